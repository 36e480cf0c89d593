"""The examples of docs/extending.md, run as they are printed."""

import json
import os
import re
import shutil
import subprocess
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

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text()
METHOD, STRATEGY, ARCH, _ = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
FILES = {name: text for name, text in re.findall(r"```\w+ title=\"([^\"]+)\"\n(.*?)```", PAGE, re.DOTALL)}
(COMMANDS,) = (text.splitlines() for text in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL))
STAGE = "aps/training/class_means.py"


def study(experiment: dict[str, Any]) -> Study:
    return load_study([], {"experiments": {"mine": experiment}})


def test_examples_are_at_most_ten_lines_a_method_a_hundred_and_a_stage_sixteen() -> None:
    for code in [*re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL), FILES[STAGE]]:
        most = {METHOD: 100, FILES[STAGE]: 16}.get(code, 10)
        assert len([line for line in code.splitlines() if line]) <= most


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
    pretrain = {"method": simclr, "epochs": 20, "batch_size": 32, "warmup_epochs": 2, "projector": [16, 8], "lr": 0.01}
    with pytest.raises(UserError, match=r"unknown key 'pretrain\.temprature'; did you mean 'pretrain\.temperature'"):
        study({**small_crops, "pretrain": pretrain | {"temprature": 1.0}})
    settings = study({**small_crops, "pretrain": pretrain}).stage_settings("mine", 0, "pretrain")
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


def test_the_documented_method_passes_the_tests_of_every_method(tmp_path: Path) -> None:
    """As a file of its own among the methods, under a name of two words; the other methods are left out for time."""
    shutil.copytree(ROOT / "aps", tmp_path / "aps", ignore=shutil.ignore_patterns("__pycache__"))
    for file in (tmp_path / "aps/methods").glob("[a-z]*.py"):
        if file.name != "aps.py":
            file.unlink()
    (tmp_path / "aps/methods/two_views.py").write_text(METHOD.replace("class SimCLR", "class TwoViews"))
    tests = ROOT / "tests/methods/test_every_method.py"
    given(f"python -m pytest -q -p no:cacheprovider {tests} -k 'two_views or planning'", tmp_path, tmp_path)


def test_a_part_of_a_batch_that_the_documented_method_cannot_train_on_is_refused(simclr: str) -> None:
    pretrain = {"method": simclr, "batch_size": 4, "accumulate": 4}
    with pytest.raises(UserError, match=r"pretrain\.accumulate"):
        study({"dataset": "digits", "pretrain": pretrain})


def test_the_documented_methods_loss_is_its_definition(simclr: str) -> None:
    method = registry.METHODS.load(simclr)
    pretrain = method.Settings(method=simclr, temperature=0.5)
    z = torch.randn(5, 2, 7, dtype=torch.float64)
    found, _ = method(stage_model(simclr)(stage="pretrain", experiment="x", seed=0, pretrain=pretrain)).loss(z, 0.0)
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
    kept_cover = covered.gather(2, kept.view2.transpose(0, 1))
    assert torch.equal(kept_cover.sort(2).values, covered.sort(2).values[:, :, :16])


def test_the_documented_row_adds_an_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="arch 'mini' is unknown"):
        EncoderSettings(arch="mini")
    monkeypatch.setattr(archs, "MINI", None, raising=False)  # taken out again after the test
    exec(ARCH, vars(archs))
    monkeypatch.setattr(registry.ARCHS, "_rows", registry.ARCHS._rows | {"mini": "aps.models.archs:MINI"})
    encoder = build_encoder(EncoderSettings(arch="mini", image_size=16, patch_size=4))
    assert (encoder.embed_dim, len(encoder.blocks), encoder.blocks[0].attn.num_heads) == (128, 6, 2)
    assert encoder(torch.zeros(2, 3, 16, 16), torch.arange(4).expand(2, -1)).shape == (2, 128)


# --------------------------------------------------------------------------------------------------
# A stage, and a package of one's own: in other processes, which know nothing of this one's.


def given(command: str, folder: Path, *paths: Path) -> str:
    """What a command line of ours says in `folder`, with `paths` before everything that Python knows."""
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": ":".join(map(str, paths)),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_TRACKING_URI": "none",
    }
    run = subprocess.run(["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, f"{command}\n{run.stdout}{run.stderr}"
    return run.stdout + run.stderr


@pytest.fixture(scope="module")
def with_a_stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository with what the page adds to it for a stage."""
    folder = tmp_path_factory.mktemp("stage")
    for name in ("aps", "workflow", "config", "profiles"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(ROOT / "Snakefile", folder / "Snakefile")
    for name in (STAGE, "workflow/rules/class_means.smk", "config/means.yaml"):
        (folder / name).write_text(FILES[name])
    rows, table = folder / "aps/stages.py", folder / "workflow/Snakefile"
    rows.write_text(rows.read_text().replace("ROWS = (\n", f"ROWS = (\n{FILES['aps/stages.py'].rstrip()},\n"))
    include = re.search(r"`(include: [^`]+)`", PAGE)[1]
    table.write_text(
        table.read_text().replace('include: "rules/report.smk"', f'{include}\ninclude: "rules/report.smk"')
    )
    return folder


def test_the_documented_stage_is_checked_and_planned(with_a_stage: Path) -> None:
    check, plan, _ = COMMANDS
    assert "class_means" in given(check, with_a_stage, with_a_stage)
    planned = given(f"{plan} --dry-run --quiet all", with_a_stage, with_a_stage)
    assert "rror" not in planned
    wrong = {"experiments": {"one": {"dataset": "digits", "stages": ["class_mean"]}}}
    (with_a_stage / "config/wrong.yaml").write_text(json.dumps(wrong))
    with pytest.raises(AssertionError, match="class_means"):
        given("python -m aps check --configfile config/wrong.yaml", with_a_stage, with_a_stage)


@pytest.mark.slow
def test_the_documented_stage_runs_and_its_figure_is_in_the_table(with_a_stage: Path) -> None:
    for command in COMMANDS:
        said = given(command, with_a_stage, with_a_stage)
    (found,) = (with_a_stage / "results/means").rglob("class_means/metrics.json")
    figure = json.loads(found.read_text())["metrics"]["class_means_top1"]
    assert 15 < figure < 100  # of ten classes
    assert "class means top-1" in said and f"{figure:.1f}" in said


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """The page's package, built and installed by pip into a folder of its own, with nothing from anywhere."""
    source, folder = tmp_path / "source", tmp_path / "installed"
    (source / "ours").mkdir(parents=True)
    (source / "pyproject.toml").write_text(FILES["pyproject.toml"])
    imports = {
        "__init__": "",
        "simclr": "",
        "archs": "from aps.models.archs import Arch\n\n",
        "strategies": "import torch\n\nfrom aps.sampling import Cells, Geometry, Noise, coverage, kept_cells, sparse\n"
        "from aps.settings.blocks import SamplingSettings\n\n\n",
    }
    code = {"__init__": "", "simclr": METHOD, "archs": ARCH, "strategies": STRATEGY}
    for name, text in code.items():
        (source / "ours" / f"{name}.py").write_text(imports[name] + text)
    given(
        f"python -m pip install --quiet --no-deps --no-index --no-build-isolation --target {folder} {source}", tmp_path
    )
    return folder


@pytest.mark.slow
def test_an_installed_package_adds_a_method_a_strategy_and_an_architecture(package: Path, tmp_path: Path) -> None:
    """They are known where a study is read, a misspelt one is named, and both pretrain."""
    shared = {
        "dataset": {"name": "digits", "train_limit": 64},
        "encoder": {"arch": "mini", "image_size": 16, "patch_size": 4},
        "stages": ["pretrain"],
    }
    pretrain = {"epochs": 1, "batch_size": 32, "warmup_epochs": 0}
    study = {
        "study": "foreign",
        "defaults": shared,
        "experiments": {
            "method": {"pretrain": pretrain | {"method": "ours_simclr", "projector": [16, 8]}},
            "strategy": {"pretrain": pretrain, "sampling": {"strategy": "least"}},
        },
    }
    (tmp_path / "study.yaml").write_text(json.dumps(study))
    with pytest.raises(AssertionError, match="ours_simclr"):
        given(
            "python -m aps check --configfile study.yaml --set defaults.pretrain.method=ours_simcl",
            tmp_path,
            package,
            ROOT,
        )
    with pytest.raises(AssertionError, match="arch 'mini' is unknown"):
        given("python -m aps check --configfile study.yaml", tmp_path, ROOT)
    given("python -m aps data digits --configfile study.yaml", tmp_path, package, ROOT)
    for experiment in ("method", "strategy"):
        given(f"python -m aps pretrain --configfile study.yaml --experiment {experiment}", tmp_path, package, ROOT)
        metrics = json.loads((tmp_path / f"results/foreign/{experiment}/seed0/pretrain/metrics.json").read_text())
        assert metrics["settings"]["encoder"]["arch"] == "mini"
    heads = load_file(tmp_path / "results/foreign/method/seed0/pretrain/heads.safetensors")
    assert {name.split(".")[0] for name in heads} == {"projector"}
