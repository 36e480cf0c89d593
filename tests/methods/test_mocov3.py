"""MoCo v3's loss and heads against lightly's, and its keys against its algorithm 1."""

from __future__ import annotations

import math

import pytest
import rivals
import torch
from lightly.loss import NTXentLoss
from lightly.models.modules import MoCoProjectionHead
from torch import Tensor

from aps.methods.mocov3 import MoCoV3, contrast


def vectors(rows: int = 7, dim: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(rows, dim, dtype=torch.float64, generator=generator) for _ in range(4)]


@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
def test_the_loss_is_lightlys_with_the_other_images_keys_as_its_bank(temperature: float) -> None:
    """lightly's loss of a memory bank takes one positive and any negatives: here row by row, the batch's other keys."""
    outputs = vectors()
    loss, figures = rivals.build(MoCoV3, temperature=temperature).loss(outputs, 0.0)
    q1, k1, q2, k2 = (x / x.norm(dim=1, keepdim=True) for x in outputs)
    expected = 0.0
    for queries, keys in ((q1, k2), (q2, k1)):
        for row in range(7):
            theirs = NTXentLoss(temperature, memory_bank_size=(6, 5))
            theirs.memory_bank.bank = torch.cat([keys[:row], keys[row + 1 :]])
            expected += 2 * temperature * theirs(queries[row : row + 1], keys[row : row + 1]).item() / 7
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    assert figures["positive_cosine"].item() == pytest.approx(((q1 * k2).sum() + (q2 * k1).sum()).item() / 14)


def test_the_contrast_is_its_definition() -> None:
    q, k, *_ = (x / x.norm(dim=1, keepdim=True) for x in vectors(3))
    total = 0.0
    for i in range(3):
        terms = [math.exp((q[i] @ k[j]).item() / 0.5) for j in range(3)]
        total -= math.log(terms[i] / sum(terms)) / 3
    assert contrast(q, k, 0.5).item() == pytest.approx(2 * 0.5 * total, rel=1e-9)


def test_projector_and_predictor_are_lightlys() -> None:
    networks = rivals.networks(MoCoV3)
    for name, head in (
        ("projector", MoCoProjectionHead(rivals.DIM, 4096, 256, num_layers=3, batch_norm=True)),
        ("predictor", MoCoProjectionHead(256, 4096, 256, num_layers=2, batch_norm=True)),
    ):
        rivals.copy_parameters(networks[name], head)
        x = torch.randn(16, next(head.parameters()).shape[1])
        torch.testing.assert_close(networks[name](x), head(x), rtol=1e-6, atol=1e-6)


def test_keys_come_from_copies_without_gradient_that_follow_as_a_moving_average() -> None:
    method = rivals.build(MoCoV3, momentum=0.9, projector=[16, 16, 8], predictor=[16, 8])
    networks = rivals.networks(MoCoV3, projector=[16, 16, 8], predictor=[16, 8])
    before = {name: p.clone() for name, p in networks["followers"].named_parameters()}
    assert all(torch.equal(before[name], networks.get_parameter(name)) for name in before)  # copies at the start
    views = torch.randn(2, 8, 3, 16, 16).unbind()
    q1, k1, q2, k2 = method.forward(networks, views, ())
    assert q1.requires_grad and q2.requires_grad and not k1.requires_grad and not k2.requires_grad
    with torch.no_grad():
        for name in ("encoder", "projector"):
            for p in networks[name].parameters():
                p.add_(torch.randn(p.shape))
        for progress, momentum in ((0.0, 0.9), (0.5, 0.95), (1.0, 1.0)):  # section 4: rising to 1 as a cosine
            method.after_step(networks, progress)
            for name, value in before.items():
                value.mul_(momentum).add_((1 - momentum) * networks.get_parameter(name))
                torch.testing.assert_close(networks["followers"].get_parameter(name), value, rtol=1e-5, atol=1e-6)
    assert not any(p.requires_grad for p in networks["followers"].parameters())


def test_statistics_of_the_heads_are_those_of_one_view() -> None:
    method = rivals.build(MoCoV3, projector=[16, 16, 8], predictor=[16, 8])
    networks = rivals.networks(MoCoV3, projector=[16, 16, 8], predictor=[16, 8])
    outputs = method.forward(networks, (torch.randn(16, 3, 16, 16), 3 + 2 * torch.randn(16, 3, 16, 16)), ())
    for x in outputs:
        torch.testing.assert_close(x.mean(0), torch.zeros(8), atol=1e-5, rtol=0)
