"""The loss of APS against a loop written from its definition, its step on two real gloo processes against one, its heads.

The mutations of `test_a_broken_step_is_told_apart` are the ways the two-process step goes wrong in practice; if one of
them passed, the equality above it would prove nothing.
"""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import small
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from aps.methods.aps import APS, contrastive_loss
from aps.models.encoder import build_encoder
from aps.models.heads import synchronize_batch_norm
from aps.runtime import collectives
from aps.settings.blocks import EncoderSettings
from aps.training.pretrain import Forward, Trainer

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


def test_it_is_computed_in_float32_under_autocast(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the stage's precision, `loss` gets float32 and computes in it."""
    given: list[tuple[Tensor, ...]] = []
    loss = APS.loss

    def seen(self: APS, outputs: tuple[Tensor, ...], progress: float) -> Any:
        given.append(tuple(x.detach() for x in outputs))
        found = loss(self, outputs, progress)
        assert not torch.is_autocast_enabled("cpu") and found[0].dtype == torch.float32
        return found

    monkeypatch.setattr(APS, "loss", seen)
    trainer = Trainer(small.job("pretrain", digits, tmp_path, precision="bf16"), small.ONE)
    views, kept = torch.randn(2, 32, 3, 16, 16), torch.rand(2, 32, 16).argsort(2)[:, :, :4]
    found = trainer.step(tuple(views), tuple(kept), lr=0.0)
    assert all(x.dtype == torch.float32 for x in given[0])
    assert torch.equal(found["loss"], contrastive_loss(*given[0], TAU)[0])
    assert not torch.equal(given[0][1].bfloat16().float(), given[0][1].double().mul(1.001).float())


# ----------------------------------------------------------------------------------------------------------------------
# Networks


@pytest.fixture
def model() -> Forward:
    torch.manual_seed(0)
    return small.pretraining(build_encoder(EncoderSettings(arch="micro", image_size=16, patch_size=4, depth=1)))


def test_heads_are_the_three_layers_of_the_method() -> None:
    model = small.pretraining(build_encoder(EncoderSettings(arch="tiny", depth=1)))
    projector, predictor = model.networks.projector, model.networks.predictor
    for head, dims in ((projector, (192, 512, 512, 128)), (predictor, (128, 512, 512, 128))):
        kinds = [type(layer) for layer in head]
        assert kinds == [nn.Linear, nn.BatchNorm1d, nn.ReLU] * 2 + [nn.Linear, nn.BatchNorm1d]
        linears = [layer for layer in head if isinstance(layer, nn.Linear)]
        assert [tuple(layer.weight.shape) for layer in linears] == [
            (dims[1], dims[0]), (dims[2], dims[1]), (dims[3], dims[2])
        ]  # fmt: skip
        assert all(layer.bias is None for layer in linears)
        assert [layer.affine for layer in head if isinstance(layer, nn.BatchNorm1d)] == [True, True, False]
        parameters = sum(a * b for a, b in pairwise(dims)) + 2 * (dims[1] + dims[2])
        assert sum(p.numel() for p in head.parameters()) == parameters


def test_statistics_are_those_of_one_view(model: Forward) -> None:
    """Both views in one pass through the heads would mix the statistics of unlike views."""
    view1, view2 = torch.randn(16, 3, 16, 16), 3 + 2 * torch.randn(16, 3, 16, 16)
    every = torch.arange(16).expand(16, -1)
    p1, z1, p2, z2 = model((view1, view2), (every, every))
    for x in (p1, z1, p2, z2):
        torch.testing.assert_close(x.mean(0), torch.zeros(128), atol=1e-5, rtol=0)
    features = model.networks.encoder(torch.cat([view1, view2]))
    mixed1, mixed2 = model.networks.projector(features).chunk(2)
    assert (mixed1 - z1).abs().max() > 0.1 and (mixed2 - z2).abs().max() > 0.1


def test_one_forward_of_both_views_is_two_forwards(model: Forward) -> None:
    view1, view2 = torch.randn(8, 3, 16, 16), torch.randn(8, 3, 16, 16)
    kept1, kept2 = (torch.stack([torch.randperm(16)[:4] for _ in range(8)]) for _ in range(2))
    p1, z1, p2, z2 = model((view1, view2), (kept1, kept2))
    for view, kept, p, z in ((view1, kept1, p1, z1), (view2, kept2, p2, z2)):
        expected = model.networks.projector(model.networks.encoder(view, kept))
        torch.testing.assert_close(z, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(p, model.networks.predictor(expected), rtol=1e-4, atol=1e-4)


def test_every_parameter_gets_a_gradient(model: Forward) -> None:
    """DistributedDataParallel waits for ever for a parameter that gets none."""
    kept = torch.arange(4).expand(8, -1)
    p1, _, p2, _ = model((torch.randn(8, 3, 16, 16), torch.randn(8, 3, 16, 16)), (kept, kept))
    (p1.square() * torch.randn(128) + p2 * torch.randn(128)).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_it_compiles_without_a_graph_break(model: Forward) -> None:
    kept = torch.stack([torch.randperm(16)[:4] for _ in range(8)])
    batch = (torch.randn(8, 3, 16, 16), torch.randn(8, 3, 16, 16)), (kept, kept.flip(0))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)  # fullgraph: a break is an error
    for ours, expected in zip(compiled(*batch), model(*batch), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


# ----------------------------------------------------------------------------------------------------------------------
# Two processes against one

WORLD, ROWS = 2, 5  # rows of each process
MUTATIONS = ("keys not gathered", "targets not shifted", "norms not synchronized")


def build() -> Forward:
    torch.manual_seed(0)
    encoder = build_encoder(EncoderSettings(arch="micro", image_size=8, patch_size=2, depth=2))
    return small.pretraining(encoder, projector=(32, 32, 16), predictor=(32, 32, 16)).double()


def global_batch(own: slice = slice(None)) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Views and kept cells of some rows."""
    generator = torch.Generator().manual_seed(3)
    rows = WORLD * ROWS
    views = torch.randn(2, rows, 3, 8, 8, dtype=torch.float64, generator=generator)
    kept = torch.stack([torch.randperm(16, generator=generator)[:4] for _ in range(2 * rows)]).view(2, rows, 4)
    return (views[0][own], views[1][own]), (kept[0][own], kept[1][own])


def outcome(model: Forward, loss: Tensor) -> dict[str, Any]:
    return {
        "loss": loss.detach(),
        "grads": {name: p.grad for name, p in model.named_parameters()},
        "buffers": dict(model.named_buffers()),
    }


def worker(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    own = slice(rank * ROWS, (rank + 1) * ROWS)
    gather = collectives.gather
    broken = {
        "keys not gathered": lambda z1, z2: ((z1, z2), 0),
        "targets not shifted": lambda z1, z2: (gather(z1, z2)[0], 0),
    }
    for case in ("right", *MUTATIONS):
        model = build()
        if case != "norms not synchronized":
            synchronize_batch_norm(model)
        collectives.gather = broken.get(case, gather)
        parallel = nn.parallel.DistributedDataParallel(model)
        loss, _ = contrastive_loss(*parallel(*global_batch(own)), TAU)
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
