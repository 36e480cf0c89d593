"""Results that other code made: they count, and whoever shows or uses them again says so."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import small
from tiny_study import pretend_prepared

import aps.methods
from aps import registry
from aps.code import KINDS, code_of, source_now
from aps.errors import Preempted
from aps.files import read_json, sha256, write_json
from aps.findings import Findings
from aps.layout import manifest_of, stage_folder, study_folder
from aps.registry import METHODS, STRATEGIES
from aps.report.page import write_report
from aps.report.terminal import terminal
from aps.results import StageJob, StageRun, restore_finished, run_key, saved_run
from aps.seals import contents, seal
from aps.settings.reading import load_study
from aps.settings.study import Study, experiment_model, stage_model
from aps.workflow.plan import Plan

METHOD = "from aps.methods.aps import APS\n\n\nclass Own(APS):\n    pass\n"
STUDY: dict[str, Any] = {
    "study": "code",
    "tracking_uri": "none",
    "defaults": {"dataset": "digits", "encoder": {"arch": "micro", "image_size": 16, "patch_size": 4}, "seeds": [0, 1]},
    "experiments": {
        "mine": {"pretrain": {"method": "own"}, "sampling": {"strategy": "corner"}, "stages": ["pretrain", "knn"]},
        "taker": {"pretrain": {"method": "own"}, "encoder": {"weights": "experiment:mine"}, "stages": ["knn"]},
        "floor": {"encoder": {"weights": "random"}, "stages": ["knn"]},
    },
}


def forget() -> None:
    stage_model.cache_clear()
    experiment_model.cache_clear()


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Path]]:
    """The files of a method `own` and of a strategy `corner`."""
    files = {"method": tmp_path / "code" / "own.py", "strategy": tmp_path / "code" / "corners.py"}
    files["method"].parent.mkdir()
    files["method"].write_text(METHOD)
    files["strategy"].write_text("raise RuntimeError('imported')\n")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "none")
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    monkeypatch.setattr(aps.methods, "__path__", [str(tmp_path / "code"), *aps.methods.__path__])
    monkeypatch.setattr(METHODS, "_rows", METHODS._rows | {"own": "aps.methods.own:"})
    monkeypatch.setattr(STRATEGIES, "_rows", STRATEGIES._rows | {"corner": "corners:corner"})
    forget()
    yield files
    sys.modules.pop("aps.methods.own", None)
    forget()


@pytest.fixture
def study(own: dict[str, Path], tmp_path: Path) -> Study:
    study = load_study([], STUDY | {"results": str(tmp_path / "results")})
    manifest_of(study, "digits").parent.mkdir(parents=True)
    pretend_prepared(manifest_of(study, "digits"), "d" * 64)
    return study


def job(study: Study, experiment: str, seed: int, stage: str) -> StageJob:
    settings, manifest = study.stage_settings(experiment, seed, stage), manifest_of(study, "digits")
    source = study.pretrain_source(experiment) if stage != "pretrain" else None
    encoder = stage_folder(study_folder(study), source, seed, "pretrain") / "encoder.safetensors" if source else None
    out = stage_folder(study_folder(study), experiment, seed, stage)
    return StageJob(settings, manifest, out, saved_run(study.results, settings, manifest, encoder), encoder)


def play(job: StageJob, checkpoint: bool = False) -> None:
    """The stage without its work; with `checkpoint` it is stopped behind one."""
    with StageRun(job) as stage:
        stage.log(1, loss=1.0)
        if checkpoint:
            (job.checkpoints / "state-000000001.pt").write_text("")
            raise Preempted("asked")
        for name in ("encoder.safetensors", "heads.safetensors"):
            stage.staging(name).write_text(f"{job.settings.digest} {name}")
        stage.finish({"knn_top1_k20": 50.0, "loss": 1.0})


def finish(study: Study) -> None:
    for one in study.jobs():
        play(job(study, *one))


@pytest.mark.parametrize("kind", ["method", "strategy"])
def test_whoever_shows_results_of_other_code_says_so_and_they_count(
    kind: str, study: Study, own: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finish(study)
    before = Findings(study)
    assert before.other_code() == [] and len(before.runs()) == len(study.jobs())
    own[kind].write_text(own[kind].read_text() + "# a comment\n")
    after, name = Findings(study), {"method": "own", "strategy": "corner"}[kind]
    clause = f"made by other code of {kind} '{name}' ({own[kind]} has changed since)"
    command = "`python -m aps pretrain --experiment mine --seed 0 --again`, and so for seed 1"
    lines = [f"mine: {clause}: {command}", f"taker: {clause}: {command}"]
    assert after.other_code() == lines
    assert len(after.runs()) == len(study.jobs()) and after.digest() != before.digest()
    assert all(line in terminal(study, "none") for line in lines)
    assert sum(clause in line for line in Plan(study, [], {}).explain()) == 2
    assert "error" not in capsys.readouterr().err


def test_the_report_says_so(
    study: Study, own: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aps.report.page.all_figures", lambda *_: [])
    monkeypatch.setattr("aps.report.page._examples", lambda *_: [])
    finish(study)
    own["method"].write_text(METHOD + "# a comment\n")
    write_report(study, tmp_path / "page", "none", "--configfile mine.yaml")
    page = (tmp_path / "page" / "report.html").read_text()
    assert "--experiment mine --seed 0 --again --configfile mine.yaml" in page and "has changed since" in page


def test_whoever_uses_such_a_result_again_says_so(
    study: Study, own: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    finish(study)
    own["method"].write_text(METHOD + "# a comment\n")
    for stage, what in (("pretrain", "its result"), ("knn", "its encoder")):
        capsys.readouterr()
        assert restore_finished(job(study, "mine", 0, stage))
        said = capsys.readouterr().err
        assert said.startswith(f"warning: {stage} mine/seed0: {what} was made by other code of method 'own' (")
        assert "--again of pretrain makes it anew" in said


def begun(study: Study) -> StageJob:
    """A pretraining that was stopped and left a checkpoint."""
    one = job(study, "mine", 0, "pretrain")
    with pytest.raises(Preempted):
        play(one, checkpoint=True)
    return one


def test_a_run_that_goes_on_with_other_code_says_so_at_once_and_ever_after(
    study: Study, own: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    one = job(study, "mine", 0, "pretrain")
    for attempt in (1, 2, 3):
        with pytest.raises(Preempted):
            play(one, checkpoint=True)
        said = capsys.readouterr().err
        assert ("it was begun by other code of method 'own' (" in said) == (attempt == 3), said
        if attempt == 2:
            own["method"].write_text(METHOD + "# a comment\n")
    play(one)
    assert len(read_json(one.out / "metrics.json")["code"]["method"]) == 2
    (line,) = Findings(study).other_code()
    assert "has changed while it trained" in line


def test_a_run_without_a_checkpoint_is_of_the_code_that_does_its_work(
    study: Study, own: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    one = begun(study)
    (one.checkpoints / "state-000000001.pt").unlink()
    own["method"].write_text(METHOD + "# a comment\n")
    play(one)
    assert "other code" not in capsys.readouterr().err and Findings(study).other_code() == []


def test_results_without_the_record_and_runs_begun_without_it_say_nothing(
    study: Study, own: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    one = begun(study)
    state = read_json(one.checkpoints / "run.json")
    write_json(one.checkpoints / "run.json", {key: value for key, value in state.items() if key != "code"})
    own["method"].write_text(METHOD + "# a comment\n")
    play(one)
    assert "code" not in read_json(one.out / "metrics.json")
    assert "other code" not in capsys.readouterr().err and Findings(study).other_code() == []
    metrics = read_json(one.out / "metrics.json")
    for damaged in ("abc", ["abc"], {"method": "abc"}, {"method": [1]}, {"method": []}, None):
        write_json(one.out / "metrics.json", seal(metrics | {"code": damaged, "files": contents(one.out)}))
        assert Findings(study).other_code() == []


def test_the_key_of_a_run_does_not_know_its_code(study: Study, own: dict[str, Path]) -> None:
    settings = study.stage_settings("mine", 0, "pretrain")
    before = run_key(settings, "d" * 64, None)
    own["method"].write_text(METHOD + "# a comment\n")
    assert run_key(settings, "d" * 64, None) == before and set(code_of(settings.relevant())) == {"method", "strategy"}


def test_the_file_of_every_name_is_found_without_importing_it() -> None:
    for _, _, known in KINDS.values():
        for name in known.names():
            file = known.file(name)
            assert file is not None and file.suffix == ".py" and registry.shown_file(file).startswith("aps/")
    assert METHODS.file("no such name") is None


def test_a_trained_method_has_its_code_in_its_metrics(digits: Path, tmp_path: Path) -> None:
    one = small.job("pretrain", digits, tmp_path, epochs=1)
    small.run(one)
    assert read_json(one.out / "metrics.json")["code"] == code_of(one.settings.relevant())


PACKAGE = {  # of another distribution: the code of `lab.methods.mine` and what does not belong to it
    "lab/__init__.py": "",
    "lab/methods/__init__.py": "",
    "lab/methods/mine.py": "import torch, numpy.linalg\nfrom aps.methods import Method, lazy\nfrom ..losses import pull\n"
    "from lab import heads\nfrom . import views\nschedule = lazy('lab.schedule')\nclass Mine(Method):\n    def f(self):\n"
    "        import lab.late\n",
    "lab/losses.py": "from lab.deep.down import x\n",
    "lab/heads/__init__.py": "",
    "lab/methods/views.py": "from lab.methods.mine import Mine\n",
    "lab/schedule.py": "not python (\n",
    "lab/late.py": "",
    "lab/deep/__init__.py": "",
    "lab/deep/down.py": "x = 1\n",
    "lab/other.py": "",
    "labels.py": "",
}
NO_PART = {"lab/other.py", "labels.py"}


@pytest.mark.parametrize("changed", sorted(PACKAGE))
def test_code_is_the_file_and_those_of_its_package_that_it_imports_however(
    changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in PACKAGE.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    for package in ("lab", "lab.methods"):  # looking for a file imports the packages around it
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.delitem(sys.modules, package)
    monkeypatch.setattr(METHODS, "_rows", METHODS._rows | {"mine": "lab.methods.mine:Mine"})
    before = source_now("method", "mine")
    assert before.file == f"{tmp_path}/lab/methods/mine.py or a file that it imports" and "lab.late" not in sys.modules
    (tmp_path / changed).write_text(f"{PACKAGE[changed]}# a comment\n")
    assert (source_now("method", "mine").digest != before.digest) == (changed not in NO_PART)


def test_a_file_of_a_folder_has_its_neighbours_and_an_installed_one_is_alone(
    own: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = own["strategy"].with_name("distances.py")
    own["strategy"].write_text("from distances import far\n")
    alone = source_now("strategy", "corner")
    beside.write_text("far = 1\n")
    assert alone.digest == sha256(own["strategy"]) != source_now("strategy", "corner").digest
    installed = tmp_path / "site-packages"
    own["strategy"].parent.rename(installed)
    monkeypatch.syspath_prepend(str(installed))
    assert source_now("strategy", "corner").digest == alone.digest


def test_the_code_of_this_package_s_names_is_one_file_unless_it_has_helpers_beside_it(
    own: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for kind, (_, _, known) in KINDS.items():
        for name in known.names():
            file = known.file(name)
            if file is not None and file.is_relative_to(registry.PACKAGE):
                assert source_now(kind, name).digest == sha256(file)
    folder = tmp_path / "aps" / "methods"
    folder.mkdir(parents=True)
    monkeypatch.setattr("aps.code.PACKAGE", tmp_path / "aps")
    monkeypatch.setattr(aps.methods, "__path__", [str(folder)])
    for name, text in {
        "__init__": "",
        "own": "from aps.methods import Method\nfrom aps.methods._parts import x\n",
        "_parts": "",
    }.items():
        (folder / f"{name}.py").write_text(text)
    before = source_now("method", "own").digest
    (folder / "__init__.py").write_text("# the contract\n")
    assert source_now("method", "own").digest == before
    (folder / "_parts.py").write_text("# a helper\n")
    assert source_now("method", "own").digest != before
