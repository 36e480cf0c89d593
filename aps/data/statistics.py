"""Channel mean and standard deviation of images in one pass, in float64.

Every image counts equally, whatever its size, because training takes crops of one size from each. With images of one
size this is the ordinary mean and (population) standard deviation over all pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aps.data.manifest import ChannelStatistics

LEVELS = torch.arange(256)


class Accumulator:
    """Sums, over images, of each image's mean of x and mean of x^2; each mean comes from exact integer sums.

    Levels are counted, not added up, which takes less time than decoding.
    """

    def __init__(self) -> None:
        self.images = 0
        self.first = torch.zeros(3, dtype=torch.float64)
        self.second = torch.zeros(3, dtype=torch.float64)

    def add(self, images: Tensor) -> None:
        """images: uint8 (M, C, H, W), C 1 or 3."""
        m, _, h, w = images.shape
        counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(dim=1)])
        self.first += ((counts @ LEVELS).double() / (255 * h * w)).expand(3)
        self.second += ((counts @ LEVELS.square()).double() / (255**2 * h * w)).expand(3)
        self.images += m

    def merge(self, other: Accumulator) -> None:
        """Add the sums of `other`."""
        self.first += other.first
        self.second += other.second
        self.images += other.images

    def result(self, over: str) -> ChannelStatistics:
        """Mean and standard deviation in [0, 1] units; `over` says in words what was averaged."""
        mean = self.first / self.images
        std = (self.second / self.images - mean**2).clamp(min=0).sqrt()
        return ChannelStatistics(mean=tuple(mean.tolist()), std=tuple(std.tolist()), over=over)  # type: ignore[arg-type]
