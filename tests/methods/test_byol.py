"""BYOL's loss and heads against lightly's, and its target against its algorithm 1."""

from __future__ import annotations

import pytest
import rivals
import torch
from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead

from aps.methods.byol import BYOL

SMALL = {"projector": [16, 8], "predictor": [16, 8]}


def test_loss_and_gradients_are_lightlys() -> None:
    """Equation 2: ||p - z||^2 of unit vectors is 2 - 2 cos, once for each direction."""
    generator = torch.Generator().manual_seed(0)
    outputs = [torch.randn(9, 6, dtype=torch.float64, generator=generator) for _ in range(4)]
    p1, z1, p2, z2 = (x.clone().requires_grad_() for x in outputs)
    q1, t1, q2, t2 = (x.clone().requires_grad_() for x in outputs)
    loss, figures = rivals.build(BYOL).loss((p1, z1, p2, z2), 0.0)
    theirs = NegativeCosineSimilarity()
    expected = 4 + 2 * theirs(q1, t2) + 2 * theirs(q2, t1)
    (loss + expected).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    for ours, other in ((p1, q1), (p2, q2)):
        torch.testing.assert_close(ours.grad, other.grad, rtol=1e-6, atol=1e-9)
    unit = [x / x.norm(dim=1, keepdim=True) for x in outputs]
    squares = (unit[0] - unit[3]).square().sum(1) + (unit[2] - unit[1]).square().sum(1)
    assert loss.item() == pytest.approx(squares.mean().item(), rel=1e-9)
    assert figures["positive_cosine"].item() == pytest.approx(1 - loss.item() / 4)


def test_projector_and_predictor_are_lightlys() -> None:
    networks = rivals.networks(BYOL)
    for name, head in (
        ("projector", BYOLProjectionHead(rivals.DIM, 4096, 256)),
        ("predictor", BYOLPredictionHead(256, 4096, 256)),
    ):
        rivals.copy_parameters(networks[name], head)
        x = torch.randn(16, next(head.parameters()).shape[1])
        torch.testing.assert_close(networks[name](x), head(x), rtol=1e-6, atol=1e-6)


def test_the_target_has_no_predictor_and_no_gradient_and_follows_as_a_moving_average() -> None:
    method, networks = rivals.build(BYOL, momentum=0.9, **SMALL), rivals.networks(BYOL, **SMALL)
    assert set(networks["target"]) == {"encoder", "projector"}
    before = {name: p.clone() for name, p in networks["target"].named_parameters()}
    assert all(torch.equal(before[name], networks.get_parameter(name)) for name in before)  # copies at the start
    p1, z1, p2, z2 = method.forward(networks, torch.randn(2, 8, 3, 16, 16).unbind(), ())
    assert p1.requires_grad and p2.requires_grad and not z1.requires_grad and not z2.requires_grad
    with torch.no_grad():
        for name in ("encoder", "projector"):
            for p in networks[name].parameters():
                p.add_(torch.randn(p.shape))
        for progress, momentum in ((0.0, 0.9), (0.5, 0.95), (1.0, 1.0)):  # section 3.2: rising to 1 as a cosine
            method.after_step(networks, progress)
            for name, value in before.items():
                value.mul_(momentum).add_((1 - momentum) * networks.get_parameter(name))
                torch.testing.assert_close(networks["target"].get_parameter(name), value, rtol=1e-5, atol=1e-6)
