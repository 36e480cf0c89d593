"""DINO's loss, head and centre against lightly's, its crops, its schedules and what it does around a step."""

from __future__ import annotations

import math

import pytest
import rivals
import torch
from lightly.loss import DINOLoss
from lightly.models.modules import DINOProjectionHead
from torch import Tensor

from aps.methods.dino import DINO, scores
from aps.models.encoder import build_encoder

SMALL = {"head": [16, 16, 8], "prototypes": 24}


def outputs(crops: int, step: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    student = torch.randn(crops, 6, 24, dtype=torch.float64, generator=generator)
    return student, torch.randn(2, 6, 24, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("crops", [2, 5])
def test_loss_gradient_and_centre_are_lightlys_over_several_steps(crops: int) -> None:
    ours = rivals.build(DINO, teacher_temperature=[0.05, 0.05], center_momentum=0.8, **SMALL)
    ours.center, networks = ours.center.double(), rivals.networks(DINO, **SMALL)
    theirs = DINOLoss(24, teacher_temp=0.05, warmup_teacher_temp_epochs=0, center_momentum=0.8).double()
    for step in range(3):
        student, teacher = outputs(crops, step)
        one, other = student.clone().requires_grad_(), student.clone().requires_grad_()
        loss, _ = ours.loss((one, teacher), 0.0)
        expected = theirs(list(teacher), list(other))
        (loss + expected).backward()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-6, atol=1e-9)
        with torch.no_grad():
            ours.after_step(networks, 0.0)
        torch.testing.assert_close(ours.center, theirs.center.view(-1), rtol=1e-6, atol=1e-9)


def test_the_head_is_lightlys() -> None:
    networks, head = rivals.networks(DINO, prototypes=512), DINOProjectionHead(rivals.DIM, 2048, 256, 512)
    rivals.copy_parameters(networks["head"], head.layers)
    with torch.no_grad():
        head.last_layer.weight_v.copy_(networks["prototypes"].weight)
    x = torch.randn(16, rivals.DIM)
    ours = scores(networks["head"](x), networks["prototypes"])
    torch.testing.assert_close(ours, head(x), rtol=1e-6, atol=1e-6)
    grad = torch.randn(16, 512)
    ours.backward(grad)
    head(x).backward(grad)
    torch.testing.assert_close(networks["prototypes"].weight.grad, head.last_layer.weight_v.grad, rtol=1e-4, atol=1e-6)


def test_the_teachers_temperature_rises_linearly_and_its_entropy_is_told() -> None:
    method = rivals.build(DINO, epochs=100, teacher_temperature=[0.04, 0.08], teacher_warmup_epochs=20, **SMALL)
    student, teacher = outputs(2)
    for progress, temperature in ((0.0, 0.04), (0.1, 0.06), (0.2, 0.08), (0.9, 0.08)):
        method.center = torch.zeros(24, dtype=torch.float64)
        loss, figures = method.loss((student, teacher), progress)
        targets = (teacher / temperature).softmax(-1)
        logs = (student / 0.1).log_softmax(-1)
        expected = -((targets[0] * logs[1]).sum(-1) + (targets[1] * logs[0]).sum(-1)).mean() / 2
        assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
        entropy = -(targets * targets.log()).sum(-1).mean().item()
        assert figures["teacher_entropy"].item() == pytest.approx(entropy, rel=1e-6) and entropy < math.log(24)


def test_two_large_crops_and_small_ones_of_three_sevenths() -> None:
    views = rivals.build(DINO, {"blur": [1.0, 0.1], "solarize": [0.0, 0.2], "local_blur": 0.5}, **SMALL).views()
    assert [view.size for view in views] == [16, 16] + 8 * [8]  # 16 * 3/7 is 6.9, the nearest multiple of P = 4 is 8
    assert [view.chances for view in views[:2]] == [1, 2]
    assert {view.augmentation.crop_scale for view in views[:2]} == {(0.4, 1.0)}
    assert {view.augmentation.crop_scale for view in views[2:]} == {(0.05, 0.4)}
    assert {(view.augmentation.blur, view.augmentation.solarize) for view in views[2:]} == {((0.5, 0.5), (0.0, 0.0))}
    assert len(rivals.build(DINO, {"local_crops": 3}, **SMALL).views()) == 5
    assert rivals.build(DINO, {"local_size": 12}, **SMALL).views()[2].size == 12
    with pytest.raises(ValueError, match=r"views.local_size 10 is not a multiple of encoder.patch_size 4"):
        DINO.check(rivals.experiment(DINO, {"local_size": 10}, **SMALL))


def test_all_crops_reach_the_student_and_the_large_ones_the_teacher() -> None:
    method, networks = rivals.build(DINO, **SMALL), rivals.networks(DINO, **SMALL)
    crops = [torch.randn(4, 3, size, size) for size in (16, 16, 8, 8, 8)]
    student, teacher = method.forward(networks.eval(), tuple(crops), ())
    assert student.shape == (5, 4, 24) and teacher.shape == (2, 4, 24) and not teacher.requires_grad
    for crop, found in zip(crops, student, strict=True):
        features = networks["encoder"](crop)
        torch.testing.assert_close(found, scores(networks["head"](features), networks["prototypes"]))
    torch.testing.assert_close(teacher, student[:2])  # copies at the start


def test_drop_path_acts_in_the_student_alone() -> None:
    method = rivals.build(DINO, drop_path=0.5, **SMALL)
    assert method.drop_path == 0.5
    torch.manual_seed(0)
    networks = method.networks(build_encoder(rivals.ENCODER, method.drop_path)).train()
    images = torch.randn(32, 3, 16, 16)
    assert torch.equal(networks["teacher"](images), networks["teacher"](images))
    assert not torch.equal(networks["encoder"](images), networks["encoder"](images))


def test_gradients_are_clipped_one_by_one_and_the_prototypes_wait() -> None:
    method, networks = rivals.build(DINO, epochs=10, frozen_epochs=1, **SMALL), rivals.networks(DINO, **SMALL)
    for progress, waits in ((0.0, True), (0.099, True), (0.1, False), (0.9, False)):
        for p in networks.parameters():
            p.grad = torch.full_like(p, 100.0) if p.requires_grad else None
        networks["encoder"].cls_token.grad.fill_(1e-3)
        method.before_step(networks, progress)
        assert (networks["prototypes"].weight.grad is None) == waits
        for name, p in networks.named_parameters():
            if p.grad is not None and name != "encoder.cls_token":
                assert p.grad.norm().item() == pytest.approx(3.0, rel=1e-4), name
        assert networks["encoder"].cls_token.grad.unique().tolist() == pytest.approx([1e-3])


def test_weight_decay_rises_along_a_cosine_and_spares_biases_and_norms() -> None:
    method, networks = rivals.build(DINO, **SMALL), rivals.networks(DINO, **SMALL)
    assert [method.weight_decay(p) for p in (0.0, 0.5, 1.0)] == pytest.approx([0.04, 0.22, 0.4])
    decayed, spared = method.parameters(networks)
    assert "weight_decay" not in decayed and spared["weight_decay"] == 0
    names = {id(p): name for name, p in networks.named_parameters()}
    assert all(
        names[id(p)].endswith((".bias", "norm1.weight", "norm2.weight", "norm.weight")) for p in spared["params"]
    )
    assert len(decayed["params"]) + len(spared["params"]) == sum(p.requires_grad for p in networks.parameters())


def test_the_teacher_follows_as_a_moving_average() -> None:
    method, networks = rivals.build(DINO, momentum=0.9, **SMALL), rivals.networks(DINO, **SMALL)
    pairs = {"teacher": "encoder", "teacher_head": "head", "teacher_prototypes": "prototypes"}
    method.loss((torch.randn(2, 4, 24), torch.randn(2, 4, 24)), 0.5)
    with torch.no_grad():
        for p in networks.parameters():
            p.add_(torch.randn(p.shape))
        before = {name: [p.clone() for p in networks[name].parameters()] for name in pairs}
        method.after_step(networks, 0.5)
        for follower, followed in pairs.items():
            new = list(networks[followed].parameters())
            for old, value, now in zip(before[follower], new, networks[follower].parameters(), strict=True):
                torch.testing.assert_close(now, 0.95 * old + 0.05 * value, rtol=1e-5, atol=1e-6)
    assert method.evaluated == "teacher"
