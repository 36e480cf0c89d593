"""The loss against a loop written from its definition, and two real gloo processes against one.

The mutations of `test_a_broken_step_is_told_apart` are the ways the two-process step goes wrong in practice; if one of
them passed, the equality above it would prove nothing.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from aps.methods.aps import APS as METHOD
from aps.models.encoder import build_encoder
from aps.models.heads import synchronize_batch_norm
from aps.models.model import APS, build_heads
from aps.settings.blocks import EncoderSettings
from aps.training import loss as loss_module
from aps.training.loss import contrastive_loss

TAU = 0.1


def tensors(rows: int = 6, dim: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(rows, dim, dtype=torch.float64, generator=generator) for _ in range(4)]


def cosine(a: Tensor, b: Tensor) -> float:
    return (a @ b / (a.norm() * b.norm())).item()


def test_it_is_the_sum_of_both_directions_by_definition() -> None:
    p1, z1, p2, z2 = tensors()
    expected, positives = 0.0, 0.0
    for p, z in ((p1, z2), (p2, z1)):
        for i in range(6):
            terms = [math.exp(cosine(p[i], z[j]) / TAU) for j in range(6)]
            expected += -math.log(terms[i] / sum(terms)) / 6
            positives += cosine(p[i], z[i]) / 12
    loss, positive_cosine = contrastive_loss(p1, z1, p2, z2, TAU)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert positive_cosine.item() == pytest.approx(positives, rel=1e-12)


def test_keys_get_no_gradient_and_queries_do() -> None:
    p1, z1, p2, z2 = (x.requires_grad_() for x in tensors())
    loss, positive_cosine = contrastive_loss(p1, z1, p2, z2, TAU)
    loss.backward()
    assert z1.grad is None and z2.grad is None
    assert p1.grad.abs().max() > 0 and p2.grad.abs().max() > 0
    assert not positive_cosine.requires_grad


def test_the_projector_learns_through_the_predictor_only() -> None:
    """With z's gradient let through, the projector's gradient would be another one."""
    torch.manual_seed(0)
    features, projector, predictor = torch.randn(2, 6, 5).double(), nn.Linear(5, 4).double(), nn.Linear(4, 4).double()
    z1, z2 = projector(features[0]), projector(features[1])
    contrastive_loss(predictor(z1), z1, predictor(z2), z2, TAU)[0].backward()
    ours = projector.weight.grad.clone()
    projector.zero_grad()
    z1, z2 = projector(features[0]), projector(features[1])
    contrastive_loss(predictor(z1), z1.detach(), predictor(z2), z2.detach(), TAU)[0].backward()
    assert torch.equal(projector.weight.grad, ours)


def test_scale_of_the_vectors_does_not_matter_and_the_temperature_does() -> None:
    p1, z1, p2, z2 = tensors()
    loss, _ = contrastive_loss(p1, z1, p2, z2, TAU)
    torch.testing.assert_close(contrastive_loss(3 * p1, 5 * z1, 7 * p2, 0.1 * z2, TAU)[0], loss)
    assert contrastive_loss(p1, z1, p2, z2, 2 * TAU)[0] != pytest.approx(loss)


def test_it_is_computed_in_float32_under_autocast() -> None:
    p1, z1, p2, z2 = (x.float() for x in tensors(64, 128))
    expected, _ = contrastive_loss(p1, z1, p2, z2, TAU)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = contrastive_loss(p1, z1, p2, z2, TAU)
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)


# ----------------------------------------------------------------------------------------------------------------------
# Two processes against one

WORLD, ROWS = 2, 5  # rows of each process
MUTATIONS = ("keys not gathered", "targets not shifted", "norms not synchronized")


def build() -> APS:
    torch.manual_seed(0)
    encoder = build_encoder(EncoderSettings(arch="micro", image_size=8, patch_size=2, depth=2))
    heads = build_heads(96, METHOD.Settings(projector=(32, 32, 16), predictor=(32, 32, 16)))
    return APS(encoder, *heads).double()


def global_batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    rows = WORLD * ROWS
    views = torch.randn(2, rows, 3, 8, 8, dtype=torch.float64, generator=generator)
    kept = torch.stack([torch.randperm(16, generator=generator)[:4] for _ in range(2 * rows)]).view(2, rows, 4)
    return views[0], views[1], kept[0], kept[1]


def outcome(model: APS, loss: Tensor) -> dict[str, Any]:
    return {
        "loss": loss.detach(),
        "grads": {name: p.grad for name, p in model.named_parameters()},
        "buffers": dict(model.named_buffers()),
    }


def worker(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    own = slice(rank * ROWS, (rank + 1) * ROWS)
    gather = loss_module.gather_keys
    broken = {
        "keys not gathered": lambda z1, z2: (z1, z2, 0),
        "targets not shifted": lambda z1, z2: (*gather(z1, z2)[:2], 0),
    }
    for case in ("right", *MUTATIONS):
        model = build()
        if case != "norms not synchronized":
            synchronize_batch_norm(model)
        loss_module.gather_keys = broken.get(case, gather)
        parallel = nn.parallel.DistributedDataParallel(model)
        loss, _ = contrastive_loss(*parallel(*(x[own] for x in global_batch())), TAU)
        loss.backward()
        dist.all_reduce(loss.detach_())
        torch.save(outcome(model, loss / WORLD), folder / f"{case}.{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("gloo")
    mp.spawn(worker, (folder,), nprocs=WORLD)
    results = {f.stem: torch.load(f, weights_only=True) for f in folder.glob("*.pt")}
    model = build()
    loss, _ = contrastive_loss(*model(*global_batch()), TAU)
    loss.backward()
    return {**results, "one process": outcome(model, loss)}


def relative_error(run: dict[str, Any], reference: dict[str, Any]) -> tuple[float, float]:
    """Of the loss, and of the gradient as one vector."""
    difference = sum((run["grads"][k] - g).square().sum() for k, g in reference["grads"].items()).sqrt()
    size = sum(g.square().sum() for g in reference["grads"].values()).sqrt()
    return ((run["loss"] - reference["loss"]).abs() / reference["loss"].abs()).item(), (difference / size).item()


@pytest.mark.parametrize("rank", range(WORLD))
def test_two_processes_give_the_loss_and_gradients_of_one(runs: dict[str, Any], rank: int) -> None:
    loss, grads = relative_error(runs[f"right.{rank}"], runs["one process"])
    assert loss < 1e-9 and grads < 1e-9
    size = sum(g.square().sum() for g in runs["one process"]["grads"].values()).sqrt()
    for name, expected in runs["one process"]["grads"].items():  # no parameter hides behind the others' size
        if expected.norm() > 1e-6 * size:
            error = (runs[f"right.{rank}"]["grads"][name] - expected).norm() / expected.norm()
            assert error < 1e-9, (name, error)


def test_running_statistics_are_those_of_one_process_on_every_rank(runs: dict[str, Any]) -> None:
    for name, expected in runs["one process"]["buffers"].items():
        for rank in range(WORLD):
            torch.testing.assert_close(
                runs[f"right.{rank}"]["buffers"][name], expected, rtol=1e-12, atol=1e-12, msg=name
            )
        assert torch.equal(runs["right.0"]["buffers"][name], runs["right.1"]["buffers"][name])


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_broken_step_is_told_apart(runs: dict[str, Any], mutation: str) -> None:
    loss, grads = relative_error(runs[f"{mutation}.1"], runs["one process"])
    assert loss > 1e-3 and grads > 1e-2
