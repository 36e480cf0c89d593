"""Channel mean and standard deviation of images in one pass, in float64.

Every image counts equally, whatever its size: training sees crops of one size from each. With images of one size this
is the ordinary mean and (population) standard deviation over all pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aps.data.manifest import ChannelStatistics


class Accumulator:
    """Sums of per-image means of x and x^2; the per-image sums are exact integers."""

    def __init__(self) -> None:
        self.images = 0
        self._first = torch.zeros(3, dtype=torch.float64)
        self._second = torch.zeros(3, dtype=torch.float64)

    def add(self, images: Tensor) -> None:
        """images: uint8 (M, C, H, W), C 1 or 3."""
        m, _, h, w = images.shape
        x = images.to(torch.int64)
        self._first += (x.sum(dim=(2, 3)).double() / (255 * h * w)).sum(dim=0).expand(3)
        self._second += (x.square().sum(dim=(2, 3)).double() / (255**2 * h * w)).sum(dim=0).expand(3)
        self.images += m

    def result(self, over: str) -> ChannelStatistics:
        mean = self._first / self.images
        std = (self._second / self.images - mean**2).clamp(min=0).sqrt()
        return ChannelStatistics(mean=tuple(mean.tolist()), std=tuple(std.tolist()), over=over)  # type: ignore[arg-type]
