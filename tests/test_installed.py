"""`aps init` and `aps run`: a folder of one's own, and the wheel in a fresh environment, without the repository."""

from __future__ import annotations

import datetime
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

from aps import cli
from aps.errors import UserError
from aps.layout import SHARE
from aps.settings.reading import load_study
from aps.workflow.folder import STUDIES, lay_out
from aps.workflow.plan import _plain
from aps.workflow.start import command, config_pairs

ROOT = Path(__file__).parent.parent


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("study", STUDIES)
def test_a_new_folder_has_a_study_a_snakefile_profiles_and_a_readme(study: str, here: Path) -> None:
    assert cli.main(["init", "x", "--study", study]) == 0
    assert load_study(["x/config/config.yaml"]).jobs()
    assert {file.name for file in (here / "x").iterdir()} == {"Snakefile", "config", "profiles", "slurm", "README.md"}
    assert (here / "x/slurm/config.yaml").exists() and "aps run" in (here / "x/README.md").read_text()
    assert study in (here / "x/README.md").read_text()
    assert os.access(here / "x/profiles/lsf/submit.py", os.X_OK)


def test_what_is_there_already_is_not_written_over(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "x/config").mkdir(parents=True)
    (here / "x/config/config.yaml").write_text("mine")
    assert cli.main(["init", "x"]) == 2
    assert "config is there already; name a new folder" in capsys.readouterr().err
    assert (here / "x/config/config.yaml").read_text() == "mine" and not (here / "x/Snakefile").exists()


def test_a_readme_of_ones_own_stays(here: Path) -> None:
    (here / "x").mkdir()
    (here / "x/README.md").write_text("mine")
    lay_out(here / "x", "demo")
    assert (here / "x/README.md").read_text() == "mine"


def test_an_unknown_study_lists_the_known_ones(here: Path) -> None:
    with pytest.raises(UserError, match="--study cifr: choose demo, cifar, own-images"):
        lay_out(here / "x", "cifr")


def test_run_is_snakemake_with_what_is_missing_filled_in(here: Path) -> None:
    with pytest.raises(UserError, match=r"no study: config/config\.yaml is not here; name one by --configfile FILE"):
        command(["all"])
    start = [sys.executable, "-m", "snakemake"]
    packaged = ["--snakefile", str(SHARE / "Snakefile")]
    profile = ["--workflow-profile", str(SHARE / "workflow/profiles/default")]
    (here / "mine.yaml").write_text("study: mine")
    given = ["knn", "-n", "--configfile", "mine.yaml"]
    assert command(given) == [*start, *given, *packaged, *profile]
    assert command([*given, "--profile", "slurm"]) == [*start, *given, "--profile", "slurm", *packaged]
    assert command([*given, "--snakefile=other"]) == [*start, *given, "--snakefile=other"]
    lay_out(here / "x", "demo")
    os.chdir(here / "x")
    assert command(["-n"]) == [*start, "-n"]  # all of it is here
    sets = ["--set", "defaults.knn.k=[3]", "study=b", "-n", "--set=defaults.knn.precision=fp32", "knn"]
    merged = ['defaults={"knn": {"k": [3], "precision": "fp32"}}', 'study="b"']
    for given in (sets[:-1], [*sets[:-1], "--cores", "2"]):
        rest = [text for text in ["-n", *given[5:]]]
        assert command(given) == [*start, *rest, "--config", *merged]
    texts = {"question": "APS: mine #1", "study": "2024", "description": "1e-3", "plain": "a b", "smile": "\U0001f600"}
    for key, text in texts.items():  # read twice, by Snakemake and by the plan
        (pair,) = config_pairs({key: text})
        assert _plain(yaml.safe_load(pair.partition("=")[2]), "here") == text, pair
    assert config_pairs({"study": datetime.date(2024, 1, 1)}) == ['study="2024-01-01"']
    with pytest.raises(UserError, match='the study has no experiment "apz"; did you mean'):
        command(["--set", "experiments.apz.seeds=[0]"])
    with pytest.raises(UserError, match="--set has no value"):
        command(["-n", "--set"])
    with pytest.raises(UserError, match="--set knn: write KEY=VALUE"):
        command(sets)
    with pytest.raises(UserError, match="--set and --config lay settings over the study both"):
        command([*sets[:-1], "--config", "study=c"])
    for option in (["--config", "-C"], ["--configfile", "--configfiles"]):  # of which Snakemake would read the last
        with pytest.raises(UserError, match=f"{option[0]} is given more than once"):
            command([option[0], "study=a", option[1], "seed=1"])


# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that no folder of the build stays in the repository."""
    source = tmp_path_factory.mktemp("source")
    for name in ("aps", "workflow", "config"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Snakefile", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, source / name)
    build = ["wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", "dist", "."]
    subprocess.run([sys.executable, "-m", "pip", *build], cwd=source, check=True)
    (built,) = (source / "dist").glob("*.whl")
    return built


@pytest.mark.slow
def test_the_wheel_carries_the_workflow_its_profiles_and_the_studies(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    rules = {f"aps/share/workflow/rules/{file.name}" for file in (ROOT / "workflow/rules").glob("*.smk")}
    profiles = {f"aps/share/workflow/profiles/{name}/config.yaml" for name in ("default", "slurm", "lsf")}
    studies = {f"aps/share/config/{file}" for file, _ in STUDIES.values()}
    assert rules | profiles | studies | {"aps/share/Snakefile", "aps/report/page.html.j2"} <= names
    (metadata,) = (name for name in names if name.endswith("/METADATA"))
    text = zipfile.ZipFile(wheel).read(metadata).decode()
    for key in (
        "Author",
        "Project-URL: Paper",
        "License-Expression: Apache-2.0",
        "Classifier",
    ):
        assert f"\n{key}" in text, key


@pytest.mark.slow
@pytest.mark.end_to_end
def test_installed_in_a_fresh_environment_it_lays_out_plans_and_runs(wheel: Path, tmp_path: Path) -> None:
    """The environment sees the dependencies of this one, but not this repository."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv/bin/python"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path / "venv")}))
    install = [f"--python={python}", "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([sys.executable, "-m", "pip", *install], check=True, env=kept)
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    kept |= {"PATH": f"{python.parent}:{os.environ['PATH']}", "MLFLOW_TRACKING_URI": "none"}

    def given(line: str, folder: Path) -> str:
        run = subprocess.run(["bash", "-c", line], cwd=folder, env=kept, capture_output=True, text=True)
        assert run.returncode == 0, f"{line}\n{run.stdout}{run.stderr}"
        return run.stdout + run.stderr

    assert str(site) in given("python -c 'import aps; print(aps.__file__)'", tmp_path)
    given("aps init x --study demo", tmp_path)
    folder = tmp_path / "x"
    assert "pretrain_encoder" in given("aps run -n", folder)
    small = "'defaults={dataset: {name: digits, train_limit: 200}, seeds: [0]}'"
    given(f"aps run results/demo/random-weights/seed0/knn/metrics.json --cores 1 --config {small}", folder)
    shown = given("aps results --set defaults.dataset.train_limit=200 'defaults.seeds=[0]'", folder)
    assert "random-weights" in shown
    metrics = yaml.safe_load((folder / "results/demo/random-weights/seed0/knn/metrics.json").read_text())
    assert metrics["metrics"]["train_images"] == 200
