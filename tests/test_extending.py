"""The examples of docs/extending.md, run as they are printed."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from safetensors.torch import load_file

import aps.methods
from aps import registry, sampling
from aps.errors import UserError
from aps.models import archs
from aps.models.encoder import build_encoder
from aps.results import StageJob, saved_run
from aps.sampling import coverage, sample
from aps.settings.blocks import EncoderSettings, SamplingSettings, ViewSettings
from aps.settings.reading import load_study
from aps.settings.study import Study, experiment_model, stage_model
from aps.views import draw_parameters

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text()
METHOD, STRATEGY, ARCH, _ = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def study(experiment: dict[str, Any]) -> Study:
    return load_study([], {"experiments": {"mine": experiment}})


def test_examples_are_at_most_ten_lines_and_a_method_a_hundred() -> None:
    for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        assert len([line for line in code.splitlines() if line]) <= (100 if code == METHOD else 10)


def forget() -> None:
    """Drop the models that were made of a method's settings."""
    stage_model.cache_clear()
    experiment_model.cache_clear()


@pytest.fixture
def simclr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The documented file among the methods, before one of ours of that name."""
    (tmp_path / "simclr.py").write_text(METHOD)
    monkeypatch.setattr(aps.methods, "__path__", [str(tmp_path), *aps.methods.__path__])
    monkeypatch.setattr(registry.METHODS, "_rows", registry.METHODS._rows | {"simclr": "aps.methods.simclr:"})
    monkeypatch.delitem(sys.modules, "aps.methods.simclr", raising=False)
    forget()
    yield "simclr"
    sys.modules.pop("aps.methods.simclr", None)
    forget()


def test_the_documented_file_adds_a_method(
    simclr: str, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a study's settings to the files: it trains, learns, is stopped, and ends as if undisturbed."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "none")
    small_crops = {
        "stages": ["pretrain"],
        "dataset": {"name": "digits", "train_limit": 100},
        "encoder": small.ENCODER.model_dump(),
    }
    own = {"method": simclr, "epochs": 20, "batch_size": 32, "warmup_epochs": 2, "projector": [16, 8], "lr": 0.01}
    with pytest.raises(UserError, match=r"unknown key 'pretrain\.temprature'; did you mean 'pretrain\.temperature'"):
        study({**small_crops, "pretrain": own | {"temprature": 1.0}})
    settings = study({**small_crops, "pretrain": own}).stage_settings("mine", 0, "pretrain")
    assert settings.views.crop_scale == (0.08, 1.0) and settings.pretrain.projector == (16, 8)
    results = []
    for name, stop in (("whole", None), ("stopped", 20)):
        folder = tmp_path / name
        checkpoints = saved_run(folder, settings, digits, None)
        job = StageJob(settings=settings, manifest=digits, out=folder / "out", checkpoints=checkpoints)
        if stop is not None:
            small.run(job, stop_after=stop)
        small.run(job)
        results.append(
            (small.history(job), [load_file(job.out / f"{part}.safetensors") for part in ("encoder", "heads")])
        )
    (history, weights), (again, others) = results
    assert history == again and all(small.same(*pair) for pair in zip(weights, others, strict=True))
    assert {name.split(".")[0] for name in weights[1]} == {"projector"}
    lines = [line for line in history if "loss" in line]
    assert lines[-1]["step"] == 60 and lines[-1]["loss"] < lines[0]["loss"] - 0.15
    assert all(-1 <= line["positive_cosine"] <= 1 for line in lines)


def test_the_documented_methods_loss_is_its_definition(simclr: str) -> None:
    method = registry.METHODS.load(simclr)
    own = method.Settings(method=simclr, temperature=0.5)
    z = torch.randn(5, 2, 7, dtype=torch.float64)
    found, _ = method(stage_model(simclr)(stage="pretrain", experiment="x", seed=0, pretrain=own)).loss(z, 0.0)
    flat = torch.nn.functional.normalize(z, dim=-1).transpose(0, 1).flatten(0, 1)
    e = (flat @ flat.T / 0.5).exp()
    expected = -sum((e[i, (i + 5) % 10] / (e[i].sum() - e[i, i])).log() for i in range(10)) / 10
    torch.testing.assert_close(found, expected)


def test_the_documented_function_adds_a_strategy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="strategy 'least' is unknown"):
        SamplingSettings(strategy="least")
    monkeypatch.setattr(sampling, "least_covered", None, raising=False)  # taken out again after the test
    exec(STRATEGY, vars(sampling))
    row = {"least": "aps.sampling:least_covered"}
    monkeypatch.setattr(registry.STRATEGIES, "_rows", registry.STRATEGIES._rows | row)
    settings, grid = SamplingSettings(strategy="least"), 8
    generator = torch.Generator().manual_seed(0)
    one, two = (draw_parameters(v, 16, 40, 30, ViewSettings(), generator).geometry() for v in (1, 2))
    kept = sample(settings, grid, one, two, generator)
    assert kept.view1.shape == kept.view2.shape == (4, 16, 16)
    mask = torch.zeros(16, 4, 64).scatter_(2, kept.view1.transpose(0, 1), 1)
    covered = coverage(one, mask, two, grid)
    own = covered.gather(2, kept.view2.transpose(0, 1))
    assert torch.equal(own.sort(2).values, covered.sort(2).values[:, :, :16])


def test_the_documented_row_adds_an_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="arch 'mini' is unknown"):
        EncoderSettings(arch="mini")
    monkeypatch.setattr(archs, "MINI", None, raising=False)  # taken out again after the test
    exec(ARCH, vars(archs))
    monkeypatch.setattr(registry.ARCHS, "_rows", registry.ARCHS._rows | {"mini": "aps.models.archs:MINI"})
    encoder = build_encoder(EncoderSettings(arch="mini", image_size=16, patch_size=4))
    assert (encoder.embed_dim, len(encoder.blocks), encoder.blocks[0].attn.num_heads) == (128, 6, 2)
    assert encoder(torch.zeros(2, 3, 16, 16), torch.arange(4).expand(2, -1)).shape == (2, 128)
