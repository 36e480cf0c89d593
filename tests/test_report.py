"""Report: means and spreads, the floor, published numbers beside ours, what is shown of unfinished studies."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from aps import published
from aps.cli import main
from aps.files import sha256
from aps.findings import Findings
from aps.layout import stage_folder, study_folder
from aps.report.page import write_report
from aps.report.table import Table
from aps.report.terminal import terminal
from aps.seals import contents, seal
from aps.settings.reading import load_study
from aps.settings.study import Study
from aps.stages import STAGES

STUDY = """
study: small
results: {results}
tracking_uri: none
defaults:
  dataset: digits
  seeds: [0, 1]
  stages: [pretrain, finetune, knn]
  encoder: {{arch: micro, image_size: 16, patch_size: 4}}
experiments:
  aps: {{}}
  untrained: {{inherits: aps, encoder: {{weights: random}}, stages: [finetune, knn]}}
  longer: {{inherits: aps, finetune: {{epochs: 7}}, stages: [pretrain, finetune]}}
"""


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    file = tmp_path / "study.yaml"
    file.write_text(STUDY.format(results=tmp_path / "results"))
    return load_study([file])


def finish(study: Study, experiment: str, seed: int, stage: str, **metrics: Any) -> Path:
    """What a finished stage leaves, without running it."""
    settings = study.stage_settings(experiment, seed, stage)
    folder = stage_folder(study_folder(study), experiment, seed, stage)
    folder.mkdir(parents=True)
    content = {
        "stage": stage,
        "experiment": experiment,
        "seed": seed,
        "metrics": metrics,
        "settings": settings.relevant(),
        "settings_digest": settings.digest,
        "dataset": {"name": "digits", "digest": "d" * 64},
        "finished": "2026-01-01T00:00:00+00:00",
        "wall_seconds": 12.5,
        "mlflow_run_id": f"{experiment}-{seed}-{stage}",
        "mlflow_complete": True,
        "version": "0.1.0",
        "commit": "abc",
        "hardware": {"cpu": "a <fast> CPU", "processes": 2},
    }
    lines = [{"step": step, "time": 0.0, "loss": 3.0 / step, "positive_cosine": step / 10} for step in (1, 2, 3)]
    (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name in STAGES[stage].outputs:
        (folder / name).write_text(f"{experiment} {seed}")
    pretrained = stage_folder(study_folder(study), experiment, seed, "pretrain") / "encoder.safetensors"
    content["encoder"] = {"sha256": sha256(pretrained) if pretrained.exists() and stage != "pretrain" else None}
    (folder / "metrics.json").write_text(json.dumps(seal(content | {"files": contents(folder)})))
    return folder


def table(study: Study) -> Table:
    return Table(study, Findings(study))


def test_a_cell_is_the_mean_and_the_sample_standard_deviation_over_seeds(study: Study) -> None:
    for seed, value in ((0, 80.0), (1, 84.0)):
        finish(study, "aps", seed, "knn", knn_top1_k20=value)
    finish(study, "untrained", 0, "knn", knn_top1_k20=50.0)
    knn = next(score for score in table(study).scores if score.stage == "knn")
    assert table(study).text("aps", knn) == "82.0 ± 2.8"  # sqrt(((80-82)^2 + (84-82)^2) / 1)
    assert table(study).text("untrained", knn) == "50.0"


def test_what_has_not_run_is_said_and_what_is_not_planned_is_empty(study: Study) -> None:
    scores = {score.stage: score for score in table(study).scores}
    assert table(study).text("aps", scores["finetune"]) == "not run"
    assert table(study).text("longer", scores["knn"]) == ""
    assert "detection" not in scores
    assert "0 of 14 runs finished" in terminal(study, "none")  # aps 2 x 3, untrained 2 x 2, longer 2 x 2


def test_the_floor_is_the_same_evaluation_of_random_weights(study: Study) -> None:
    for seed in (0, 1):
        finish(study, "aps", seed, "knn", knn_top1_k20=80.0 + seed)
        finish(study, "untrained", seed, "knn", knn_top1_k20=50.0 + 4 * seed)
        for name in ("aps", "untrained", "longer"):
            finish(study, name, seed, "finetune", test_top1=90.0)
    rows = table(study).above_floor()
    knn = next(row for row in rows if "kNN" in row["score"])
    assert (knn["experiment"], knn["floor"]) == ("aps", "untrained")
    assert knn["difference"] == pytest.approx(80.5 - 52.0)
    assert knn["spread"] == pytest.approx(4.0)  # the larger range of the two
    assert knn["times"] == pytest.approx(28.5 / 4)
    assert "longer" not in {row["experiment"] for row in rows}, "it finetunes longer than the floor does"


def test_a_report_has_a_row_a_run_escapes_what_it_shows_and_needs_no_other_file(study: Study, tmp_path: Path) -> None:
    for seed in (0, 1):
        finish(study, "aps", seed, "pretrain", loss=1.0)
        finish(study, "aps", seed, "knn", knn_top1_k10=79.0, knn_top1_k20=80.0, per_class={"a": 1.0})
    write_report(study, tmp_path / "report", "none")
    rows = list(csv.DictReader((tmp_path / "report/results.csv").open()))
    assert [(row["experiment"], row["seed"], row["stage"]) for row in rows] == [
        ("aps", "0", "pretrain"), ("aps", "0", "knn"), ("aps", "1", "pretrain"), ("aps", "1", "knn"),
    ]  # fmt: skip
    assert (rows[1]["headline"], rows[1]["value"], rows[1]["knn_top1_k10"]) == ("knn_top1_k20", "80.0", "79.0")
    page = (tmp_path / "report/report.html").read_text()
    assert "a &lt;fast&gt; CPU" in page and "a <fast> CPU" not in page
    assert "80.0 ± 0.0" in page
    assert page.count("<figure") == 3  # scores of kNN, and two curves
    assert 'src="' not in page and "<link" not in page and "<script" not in page
    for picture in ("scores/scores.png", "curves/curves.png"):
        assert (tmp_path / "report/figures" / picture).read_bytes().startswith(b"\x89PNG")


def test_a_report_on_nothing_says_so(study: Study, tmp_path: Path) -> None:
    write_report(study, tmp_path / "report", "none")
    assert "0 of 14 runs finished" in (tmp_path / "report/report.html").read_text()
    assert len((tmp_path / "report/results.csv").read_text().splitlines()) == 1


def test_the_terminal_table_says_where_everything_lies(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    finish(study, "aps", 0, "finetune", test_top1=91.23)
    shown = terminal(study, "none")
    assert "1 of 14 runs finished" in shown and "91.2" in shown
    assert f"{study.results}/small/report/report.html (not yet made)" in shown
    assert "MLflow   off" in shown


def test_the_verb_prints_the_command_that_opens_mlflow(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    arguments = [
        "results",
        "--configfile",
        str(tmp_path / "study.yaml"),
        "--set",
        f"tracking_uri=sqlite:///{tmp_path}/ml.db",
    ]
    assert main(arguments) == 0
    assert f"mlflow server --backend-store-uri sqlite:///{tmp_path}/ml.db --port 5000" in capsys.readouterr().out


PUBLISHED = {"knn": published.Entry(method="PatchMix", dataset="digits", arch="micro", patch_size=4, pretrain_epochs=1600,
                                    metrics={"knn.knn_top1_k20": 75.4, "finetune.test_top1": 86.0}, source="a paper")}  # fmt: skip


@pytest.mark.parametrize(("epochs", "difference"), [(1600, 4.6), (100, None)])
def test_published_numbers_stand_beside_ours_and_are_compared_only_where_the_experiment_repeats_them(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epochs: int, difference: float | None
) -> None:
    monkeypatch.setattr(published, "load", lambda: PUBLISHED)
    overrides = {"experiments": {"aps": {"published": "knn", "pretrain": {"epochs": epochs}}}}
    study = load_study([tmp_path / "study.yaml"], overrides)
    finish(study, "aps", 0, "knn", knn_top1_k20=80.0)
    knn, finetune = table(study).beside_published(Findings(study).runs())
    assert (knn["published"], str(knn["ours"]), knn["runs"]) == (75.4, "80.0", ["aps-0-knn"])
    assert knn["difference"] == (pytest.approx(difference) if difference is not None else None)
    assert ("pretrain.epochs 100 instead of 1600" in knn["remark"]) == (difference is None)
    assert finetune["ours"] is None and finetune["difference"] is None
    write_report(study, tmp_path / "report", "none")
    page = (tmp_path / "report/report.html").read_text()
    assert "not run" in page and ("+4.6" in page) == (difference is not None)


def test_a_broken_result_is_no_figure_and_the_page_says_why(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (finish(study, "aps", 0, "knn", knn_top1_k20=80.0) / "metrics.json").write_text("{")
    write_report(study, tmp_path / "report", "none")
    page = (tmp_path / "report/report.html").read_text()
    assert "0 of 14 runs finished" in page and "metrics.json: not valid JSON" in page and "80.0" not in page
    assert "knn aps/seed0: damaged: " in terminal(study, "none")
