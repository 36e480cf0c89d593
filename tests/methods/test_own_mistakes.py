"""Mistakes in a method of one's own: one sentence that names the method, its file and what is asked, before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import small
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from aps import registry
from aps.errors import UserError
from aps.methods import Method
from aps.models.encoder import Encoder, build_encoder
from aps.results import StageJob, saved_run
from aps.settings.reading import load_study


class Plain(Method):
    """What every method here does but for its mistake."""

    least_images = 2

    def networks(self, encoder: Encoder) -> nn.ModuleDict:
        return nn.ModuleDict({"encoder": encoder, "head": nn.Linear(encoder.embed_dim, 8)})

    def forward(self, networks: nn.ModuleDict, views: tuple[Tensor, ...], sampled: Any) -> Any:
        return networks["head"](networks["encoder"](torch.cat(views)))

    def loss(self, outputs: Tensor, progress: float) -> Any:
        one, other = F.normalize(outputs, dim=-1).chunk(2)
        loss = F.cross_entropy(one @ other.T / 0.2, torch.arange(len(one)))
        return loss, {"sharpness": loss.detach()}


class Reads(Plain):
    """Reads a block that it does not name."""

    def sample(self, geometries: Any, noise: Any) -> Any:
        return [(noise(16).argsort(1)[:, : int(16 * self.experiment.sampling.ratio)],)]

    def forward(self, networks: nn.ModuleDict, views: tuple[Tensor, ...], sampled: Any) -> Any:
        return networks["head"](networks["encoder"](torch.cat(views), torch.cat(sampled * 2)))


class Named(Reads):
    blocks = ("sampling",)


def use(monkeypatch: pytest.MonkeyPatch, **methods: type[Method]) -> None:
    """Make classes of this file methods that a study can name, whichever name they have here."""
    for name, method in methods.items():
        monkeypatch.setitem(globals(), f"_{name}", method)
    rows = {name: f"{__name__}:_{name}" for name in methods}
    monkeypatch.setattr(registry.METHODS, "_rows", registry.METHODS._rows | rows)


def job(digits: Path, folder: Path, method: str, blocks: dict[str, Any] | None = None, **pretrain: Any) -> StageJob:
    own = {"method": method, "epochs": 2, "batch_size": 32, "warmup_epochs": 1, **pretrain}
    experiment = {
        "dataset": {"name": "digits", "train_limit": 100},
        "encoder": small.ENCODER.model_dump(),
        "pretrain": own,
        "stages": ["pretrain"],
        **(blocks or {}),
    }
    settings = load_study([], {"experiments": {"mine": experiment}}).stage_settings("mine", 0, "pretrain")
    return StageJob(
        settings=settings,
        manifest=digits,
        out=folder / "out",
        checkpoints=saved_run(folder, settings, digits, None),
    )


def refusal(job: StageJob) -> str:
    """The sentence with which a run ends, before it has trained a batch."""
    with pytest.raises(UserError) as found:
        small.run(job)
    sentence = str(found.value)
    assert f"pretrain.method {job.settings.pretrain.method} ({__file__})" in sentence
    assert "\n" not in sentence and not (job.checkpoints / "history.jsonl").exists()
    return sentence


def test_a_block_that_a_method_reads_has_to_be_among_its_blocks(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, reads=Reads, named=Named)
    half = {"sampling": {"ratio": 0.5}}
    assert "add 'sampling' to `blocks`" in refusal(job(digits, tmp_path, "reads", half))
    assert job(digits, tmp_path, "named", half).settings.sampling.ratio == 0.5
    assert job(digits, tmp_path, "named", half).checkpoints != job(digits, tmp_path, "named").checkpoints


def test_a_stage_too_reads_only_the_blocks_that_it_names(digits: Path, tmp_path: Path) -> None:
    settings = small.job("knn", digits, tmp_path).settings
    assert settings.knn.k and settings.encoder.arch == "micro"
    with pytest.raises(UserError, match=r"stage knn reads the block 'views', .* add it to `uses`"):
        _ = settings.views


class Tied(Plain):
    """Its networks share modules, and single tensors."""

    def networks(self, encoder: Encoder) -> nn.ModuleDict:
        networks = super().networks(encoder)
        networks["online"] = nn.Sequential(encoder, networks["head"])
        networks["decoder"] = nn.Linear(encoder.embed_dim, 8, bias=False)
        networks["decoder"].weight = networks["head"].weight
        return networks


def test_networks_that_share_tensors_are_saved_whole_and_resume(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, tied=Tied, plain=Plain)
    whole, stopped, alone = (
        job(digits, tmp_path / name, name if name == "plain" else "tied") for name in ("whole", "stopped", "plain")
    )
    small.run(whole)
    small.run(stopped, stop_after=2)
    small.run(stopped)
    small.run(alone)
    found = {
        run: [load_file(run.out / f"{part}.safetensors") for part in ("encoder", "heads")] for run in (whole, alone)
    }
    assert small.same(load_file(stopped.out / "heads.safetensors"), found[whole][1])
    assert small.same(found[whole][0], found[alone][0])  # a tensor with two names is stepped once
    heads = found[whole][1]
    for name in ("online.1.weight", "decoder.weight"):
        assert torch.equal(heads[name], heads["head.weight"])
    assert small.same({f"online.0.{name}": x for name, x in found[whole][0].items()}, {
        name: x for name, x in heads.items() if name.startswith("online.0.")
    })  # fmt: skip
    Tied(whole.settings).networks(build_encoder(small.ENCODER)).load_state_dict(
        heads | {f"encoder.{name}": x for name, x in found[whole][0].items()}
    )
