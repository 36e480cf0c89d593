"""SimCLR's loss and head against lightly's, and its loss against its definition."""

from __future__ import annotations

import math

import pytest
import rivals
import torch
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from torch import Tensor

from aps.methods.simclr import SimCLR, nt_xent


def pair(rows: int = 12, dim: int = 8) -> tuple[Tensor, Tensor]:
    z1, z2 = torch.randn(2, rows, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()
    return z1, (0.7 * z1 + z2)


@pytest.mark.parametrize("temperature", [0.05, 0.1, 0.5, 1.0])
def test_loss_and_gradients_are_lightlys(temperature: float) -> None:
    ours, theirs = ([x.clone().requires_grad_() for x in pair()] for _ in range(2))
    expected = NTXentLoss(temperature)(*theirs)
    loss = nt_xent(*ours, temperature)
    (torch.stack([loss, expected]).sum()).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-6, atol=1e-9)


def test_the_loss_is_its_definition() -> None:
    """Section 2.1, equation 1: among the 2B - 1 others, the own image's other view."""
    z = [x / x.norm() for pair_ in zip(*pair(4), strict=True) for x in pair_]  # neighbours are positives
    total = 0.0
    for i in range(8):
        terms = [math.exp((z[i] @ z[k]).item() / 0.3) for k in range(8) if k != i]
        total -= math.log(math.exp((z[i] @ z[i ^ 1]).item() / 0.3) / sum(terms)) / 8
    assert nt_xent(*pair(4), 0.3).item() == pytest.approx(total, rel=1e-9)


def test_the_projector_is_lightlys() -> None:
    networks = rivals.networks(SimCLR)
    head = SimCLRProjectionHead(rivals.DIM, 2048, 128)
    rivals.copy_parameters(networks["projector"], head)
    x = torch.randn(16, rivals.DIM)
    torch.testing.assert_close(networks["projector"](x), head(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("frozen", [True, False])
def test_the_patch_projection_stays_as_it_was_drawn_if_asked(frozen: bool) -> None:
    encoder = rivals.networks(SimCLR, frozen_projection=frozen)["encoder"]
    still = {name for name, p in encoder.named_parameters() if not p.requires_grad}
    assert still == ({"patch_embed.proj.weight", "patch_embed.proj.bias"} if frozen else set())
