"""The network that is pretrained: encoder, projector, predictor. One forward gives what the loss needs.

Both views pass the encoder in one batch (it has no statistics over the batch) and the heads one after the other
(their BatchNorm has).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from aps.models.encoder import Encoder
from aps.models.heads import projection_head


class APS(nn.Module):
    """Asymmetric Patch Sampling, arXiv 2306.02854."""

    def __init__(self, encoder: Encoder, projector: nn.Module, predictor: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = projector
        self.predictor = predictor

    def forward(
        self, view1: Tensor, view2: Tensor, kept1: Tensor | None = None, kept2: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """view1, view2: (B, 3, S, S); kept1, kept2: (B, n) int64 or both None for all -> p1, z1, p2, z2: (B, d)"""
        kept = None if kept1 is None or kept2 is None else torch.cat([kept1, kept2])
        features1, features2 = self.encoder(torch.cat([view1, view2]), kept).chunk(2)
        z1, z2 = self.projector(features1), self.projector(features2)
        return self.predictor(z1), z1, self.predictor(z2), z2


def build_heads(dim: int, settings: Any) -> tuple[nn.Sequential, nn.Sequential]:
    """Projector (B, dim) -> (B, d) and predictor (B, d) -> (B, d)."""
    projector = projection_head((dim, *settings.projector))
    return projector, projection_head((settings.projector[-1], *settings.predictor))
