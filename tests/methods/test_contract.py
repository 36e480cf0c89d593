"""The seam: a method with everything that the contract allows, and the loop around it that knows none of it."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import small
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from aps import registry
from aps.methods import Method, _lazy, lazy
from aps.models.encoder import Encoder, build_encoder
from aps.runtime import collectives
from aps.settings.blocks import ViewSettings
from aps.training.batches import Batches
from aps.training.pretrain import Trainer
from aps.views import View


class Everything(Method):
    """A little of DINO, MAE and MoCo v3: views of two sizes, a momentum encoder that is evaluated, a centre outside of the
    networks, random masks, drop path, groups, a schedule of the weight decay, clipped gradients, two steps a batch."""

    evaluated = "teacher"
    drop_path = 0.2
    steps = 2

    def views(self) -> Sequence[View]:
        small_crops = self.experiment.views.model_copy(update={"crop_scale": (0.05, 0.4), "blur": (0.5, 0.5)})
        return *super().views(), View(8, small_crops), View(8, small_crops)

    def networks(self, encoder: Encoder) -> nn.ModuleDict:
        self.centre = torch.zeros(encoder.embed_dim)
        encoder.patch_embed.proj.requires_grad_(False)
        head = nn.Sequential(nn.Linear(encoder.embed_dim, encoder.embed_dim), nn.BatchNorm1d(encoder.embed_dim))
        return nn.ModuleDict(
            {"encoder": encoder, "head": head, "teacher": copy.deepcopy(encoder).requires_grad_(False)}
        )

    def sample(self, geometries: Sequence[Any], noise: Any) -> Sequence[tuple[Tensor, ...]]:
        assert len(geometries) == 4
        return [(noise(16).argsort(1)[:, :8],) for _ in range(self.steps)]

    def forward(self, networks: nn.ModuleDict, views: tuple[Tensor, ...], sampled: tuple[Tensor, ...]) -> Any:
        encoder, head = networks["encoder"], networks["head"]
        queries = [head(encoder(views[0], sampled[0])), *(head(encoder(view)) for view in views[2:])]
        with torch.no_grad():
            key = networks["teacher"](views[1])
        return {"queries": queries, "key": key}

    def loss(self, outputs: Any, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        key = outputs["key"] - self.centre
        self.centre = 0.9 * self.centre + 0.1 * collectives.mean(outputs["key"].mean(0))
        losses = [1 - F.cosine_similarity(query, key).mean() for query in outputs["queries"]]
        return sum(losses) / len(losses), {"norm": outputs["key"].norm(dim=1).mean()}  # type: ignore[return-value]

    def parameters(self, networks: nn.ModuleDict) -> list[dict[str, Any]]:
        trained = [p for p in networks.parameters() if p.requires_grad]
        return [
            {"params": [p for p in trained if p.ndim > 1]},
            {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0, "lr_scale": 0.5},
        ]

    def weight_decay(self, progress: float) -> float:
        return 0.04 + 0.36 * progress

    def before_step(self, networks: nn.ModuleDict, progress: float) -> None:
        nn.utils.clip_grad_norm_([p for p in networks.parameters() if p.grad is not None], 0.5)

    def after_step(self, networks: nn.ModuleDict, progress: float) -> None:
        for mine, other in zip(networks["teacher"].parameters(), networks["encoder"].parameters(), strict=True):
            mine.lerp_(other, 0.1 * (1 - progress))

    def state_dict(self) -> dict[str, Any]:
        return {"centre": self.centre}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.centre = state["centre"]


@pytest.fixture
def everything(monkeypatch: pytest.MonkeyPatch) -> type[Method]:
    monkeypatch.setattr(registry.METHODS, "_rows", registry.METHODS._rows | {"everything": f"{__name__}:Everything"})
    return Everything


def job(digits: Path, folder: Path, **changes: Any) -> Any:
    own = Everything.Settings(method="everything", epochs=2, batch_size=32, warmup_epochs=1, **changes)
    return small.job("pretrain", digits, folder, pretrain=own)


def left(job: Any) -> tuple[Any, Any, dict[str, Tensor]]:
    files = ("encoder", "heads")
    tensors = {f"{file}: {k}": v for file in files for k, v in load_file(job.out / f"{file}.safetensors").items()}
    return small.history(job), small.metrics(job), tensors


def test_a_method_with_all_of_the_contract_trains_and_resumes_bit_for_bit(
    everything: type[Method], digits: Path, tmp_path: Path
) -> None:
    whole, stopped = (job(digits, tmp_path / name, knn_every=1) for name in ("whole", "stopped"))
    small.run(whole)
    small.run(stopped, stop_after=2)
    small.run(stopped)
    one, other = left(whole), left(stopped)
    assert one[:2] == other[:2] and small.same(one[2], other[2])
    lines = [line for line in one[0] if "loss" in line]
    assert [line["step"] for line in lines] == [6, 12] and all(line["norm"] > 0 for line in lines)
    assert one[1].keys() >= {"loss", "norm", "epochs"}


def test_the_encoder_that_is_evaluated_is_saved_and_the_rest_lies_beside_it(
    everything: type[Method], digits: Path, tmp_path: Path
) -> None:
    done = job(digits, tmp_path)
    small.run(done)
    encoder, rest = (load_file(done.out / name) for name in ("encoder.safetensors", "heads.safetensors"))
    assert encoder.keys() == build_encoder(small.ENCODER).state_dict().keys()
    assert {name.split(".")[0] for name in rest} == {"encoder", "head"}
    assert not torch.equal(encoder["pos_embed"], rest["encoder.pos_embed"])


def test_a_step_minds_groups_schedules_frozen_weights_and_the_hooks(
    everything: type[Method], digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(job(digits, tmp_path), small.ONE)
    before = {name: p.clone() for name, p in trainer.networks.named_parameters()}
    norms: list[float] = []
    hook = Everything.before_step

    def seen(self: Any, networks: nn.ModuleDict, progress: float) -> None:
        hook(self, networks, progress)
        norms.append(torch.stack([p.grad.norm() for p in networks.parameters() if p.grad is not None]).norm().item())

    monkeypatch.setattr(Everything, "before_step", seen)
    views = [torch.randn(8, 3, side, side) for side in (16, 16, 8, 8)]
    trainer.step(tuple(views), (torch.rand(8, 16).argsort(1)[:, :8],), lr=0.1, progress=0.5)
    assert [(g["lr"], g["weight_decay"]) for g in trainer.optimizer.param_groups] == [(0.1, 0.22), (0.05, 0.0)]
    assert norms[0] <= 0.5 + 1e-5
    after = dict(trainer.networks.named_parameters())
    assert torch.equal(after["encoder.patch_embed.proj.weight"], before["encoder.patch_embed.proj.weight"])
    moved = after["encoder.cls_token"] - before["encoder.cls_token"]
    assert moved.abs().max() > 0
    torch.testing.assert_close(after["teacher.cls_token"] - before["teacher.cls_token"], 0.05 * moved)


def test_more_views_leave_the_draws_of_the_first_two_as_they_were(tmp_path: Path) -> None:
    """Which view is drawn first, and that further ones come after it, is part of a run's numbers."""
    from test_pretrain import coloured

    augmentation = ViewSettings(blur=(0.5, 0.1))
    two = (View(16, augmentation, 1), View(16, augmentation, 2))
    local = View(8, augmentation.model_copy(update={"crop_scale": (0.05, 0.3)}))
    for kind in ("arrays", "files"):
        split = coloured(kind, tmp_path)
        few, many = (
            list(Batches(split, views, 3, ((0.0,) * 3, (1.0,) * 3), 3, small.ONE).epoch(1))
            for views in (two, (*two, local, local))
        )
        for one, other in zip(few, many, strict=True):
            for v in (0, 1):
                assert torch.equal(one.views[v], other.views[v])
                assert torch.equal(one.geometries[v].boxes, other.geometries[v].boxes)
            assert [x.shape[-1] for x in other.views] == [16, 16, 8, 8]
            areas = [(g.boxes[:, 2] * g.boxes[:, 3]).mean() for g in other.geometries]
            assert max(areas[2:]) < min(areas[:2])


def test_smaller_images_have_positions_stretched_over_them_and_ordinary_ones_their_own() -> None:
    encoder = build_encoder(small.ENCODER)
    images = torch.randn(2, 3, 16, 16)
    plain = encoder(images)
    with pytest.raises(ValueError, match="8x8"):
        encoder(images[:, :, :8, :8])
    encoder.any_size = True
    assert torch.equal(encoder(images), plain)
    table = encoder.pos_embed.unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    for side in (8, 12, 24):
        expected = F.interpolate(table, size=(side // 4,) * 2, mode="bicubic", align_corners=False).flatten(2).mT
        torch.testing.assert_close(encoder.positions(side, side), expected, rtol=1e-5, atol=1e-6)
        assert encoder(torch.randn(2, 3, side, side)).shape == (2, 24)


def test_a_gathered_rows_gradient_is_that_of_all_losses(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(gathering, (tmp_path,), nprocs=2)
    x = rows().requires_grad_()
    (per_row(x, x)).mean().backward()
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    torch.testing.assert_close(torch.cat([grad for grad, _ in found]) / 2, x.grad)  # DDP's mean over processes
    assert [first for _, first in found] == [0, 3]


def rows() -> Tensor:
    return torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def per_row(x: Tensor, every: Tensor) -> Tensor:
    return (x @ every.T).logsumexp(1)


def gathering(rank: int, folder: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    x = rows()[3 * rank : 3 * rank + 3].requires_grad_()
    every, first = collectives.gather_with_gradient(x)
    per_row(x, every).mean().backward()
    assert torch.equal(collectives.mean(x).detach(), (rows()[:3] + rows()[3:]) / 2)
    torch.save((x.grad, first), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


# ----------------------------------------------------------------------------------------------------------------------
# Names and imports


@pytest.mark.parametrize("name", registry.METHODS.names())
def test_a_methods_settings_are_there_without_torch_and_its_file_has_the_real_modules_when_it_is_used(
    name: str,
) -> None:
    code = f"""
import json, sys
from aps.registry import METHODS
from aps.settings.study import experiment_model
method = METHODS.load("{name}")
experiment = experiment_model("{name}").model_validate({{"dataset": "digits", "pretrain": {{"method": "{name}"}}}})
method.check(experiment)
early = "torch" in sys.modules
method(experiment)
stand_ins = [key for key, value in vars(sys.modules[method.__module__]).items() if "not imported yet" in repr(value)]
print(json.dumps([early, "torch" in sys.modules, stand_ins]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [False, True, []]


def test_a_stand_in_imports_its_module_at_the_first_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    module = type(sys)("own")
    module.colorsys = lazy("colorsys")  # type: ignore[attr-defined]
    assert "colorsys" not in sys.modules and "not imported yet" in repr(module.colorsys)
    assert module.colorsys.rgb_to_hsv(1, 0, 0) == (0.0, 1.0, 1.0)
    _lazy.settle(module)
    assert module.colorsys is sys.modules["colorsys"]
