"""The page, the CSV file and the terminal's table: what they show, link to, and say of unfinished studies."""

from __future__ import annotations

import csv
import html
import re
from pathlib import Path

import gammas
import pytest
from made_up import STUDY, finish, table

from aps import published
from aps.cli import main
from aps.findings import Findings
from aps.layout import report_folder, study_folder
from aps.report.page import operations, write_report
from aps.report.terminal import terminal
from aps.settings.reading import load_study
from aps.settings.study import Study
from aps.tracking.describing import About
from aps.tracking.state import State


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


@pytest.mark.parametrize("gone", ["encoder.safetensors", "heads.safetensors", "history.jsonl"])
def test_figures_are_shown_without_the_files_that_a_copy_leaves_out(
    gone: str, study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Results brought home without the weights, which are large. The runs are made again where a run needs them."""
    for seed in (0, 1):
        folder = finish(study, "aps", seed, "pretrain", loss=1.0)
        finish(study, "aps", seed, "knn", knn_top1_k20=80.0)
        (folder / gone).unlink()
    shown = terminal(study, "none")
    files = f"pretrain aps/seed0 ({gone}), pretrain aps/seed1 ({gone})"
    said = f"hown without files that are gone: {files}; copy them here, else Snakemake makes these runs again, and what"
    assert "4 of 14 runs finished" in shown and "80.0 ± 0.0" in shown and f"  s{said} starts" in shown
    write_report(study, tmp_path / "report", "none")
    page = (tmp_path / "report/report.html").read_text()
    assert "80.0 ± 0.0" in page and f"<p>S{said} starts from them.</p>" in page
    # Not a line for each picture that lacks them
    assert capsys.readouterr().err == f"warning: s{said} starts from them\n"
    planned = {finding.label: finding.problem for finding in Findings(study) if finding.stale}
    problem = f"damaged: {gone} is missing"
    assert planned == {
        f"{stage} aps/seed{seed}": f"{before}{problem}"
        for seed in (0, 1)
        for stage, before in (("pretrain", ""), ("knn", "its encoder: "))
    }
    file = study_folder(study) / "aps/seed0/knn/history.jsonl"
    file.write_text(file.read_text()[:-1])  # a file that is there has to be the one that was written
    assert "4 of 14 runs" not in terminal(study, "none")


def test_the_notes_under_the_table_are_sentences_with_spaces_between(study: Study, tmp_path: Path) -> None:
    for encoder in (None, {"source": "file.safetensors", "sha256": "e" * 64}):  # of each seed its own, or one of all
        tree = tmp_path / ("one" if encoder else "own")
        of = study.model_copy(update={"results": str(tree)})
        for seed in (0, 1):
            finish(of, "aps", seed, "knn", knn_top1_k20=80.0, encoder=encoder)
        write_report(of, tree / "report", "none")
        (note,) = re.findall(r'<p class="note">(Percent.*?)</p>', (tree / "report/report.html").read_text(), re.DOTALL)
        assert "Floor: the same" in note and not re.search(r"[a-z][.:;][A-Z]", note)


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


def test_a_finished_run_that_lacks_the_published_k_is_not_called_not_run(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(published, "load", lambda: PUBLISHED)
    settings = {"published": "knn", "knn": {"k": [5]}, "stages": ["pretrain", "knn"]}
    study = load_study([tmp_path / "study.yaml"], {"experiments": {"aps": settings}})
    finish(study, "aps", 0, "knn", knn_top1_k5=80.0)
    (row,) = table(study).beside_published(Findings(study).runs())
    assert (row["ours"], row["absent"]) == (None, "not measured")


def test_a_published_number_is_not_compared_with_that_of_an_encoder_whose_pretraining_is_another(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(published, "load", lambda: PUBLISHED)
    borrowed = {"published": "knn", "dataset": "digits", "pretrain": {"epochs": 1600}, "stages": ["knn"]}
    borrowed["encoder"] = {"weights": "experiment:aps"}
    settings = {"experiments": {"borrowed": borrowed, "aps": {"pretrain": {"epochs": 2}}}}
    (row,) = table(load_study([tmp_path / "study.yaml"], settings)).beside_published([])
    assert row["remark"] == "not compared: experiments.aps.pretrain.epochs 2 instead of 1600"
    assert not row["compared"]


def test_a_broken_result_is_no_figure_and_the_page_says_why(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (finish(study, "aps", 0, "knn", knn_top1_k20=80.0) / "metrics.json").write_text("{")
    write_report(study, tmp_path / "report", "none")
    page = (tmp_path / "report/report.html").read_text()
    assert "0 of 14 runs finished" in page and "metrics.json: not valid JSON" in page and "80.0" not in page
    assert "knn aps/seed0: damaged: " in terminal(study, "none")


def write(study: Study, folder: Path, address: str = "none", options: str = "") -> str:
    write_report(study, folder, address, options)
    return (folder / "report.html").read_text()


def test_the_page_opens_with_the_question_date_commit_and_machine(study: Study, tmp_path: Path) -> None:
    finish(study, "aps", 0, "knn", knn_top1_k20=80.0)
    asked = study.model_copy(update={"question": "Is 3 < 4?"})
    page = write(asked, tmp_path / "report")
    top = page[: page.index("<table")]
    for said in (
        "Is 3 &lt; 4?",
        "2026-01-01 00:00 UTC",
        "commit abc",
        "a &lt;fast&gt; CPU, 2 processes",
        "1 of 14 runs",
    ):
        assert said in top, said


def test_results_that_are_not_shown_for_one_reason_are_one_line(study: Study, tmp_path: Path) -> None:
    for name, stages in (
        ("aps", ("pretrain", "finetune")),
        ("longer", ("pretrain", "finetune")),
        ("untrained", ("finetune",)),
    ):
        for seed in (0, 1):
            for stage in stages:
                finish(study, name, seed, stage, test_top1=80.0)
    changed = {"defaults": {"finetune": {"lr": 0.5}}, "experiments": {"longer": {"finetune": {"lr": 0.5}}}}
    page = write(load_study([tmp_path / "study.yaml"], changed), tmp_path / "report")
    lines = re.findall(r"<li>(finetune .*?)</li>", page)
    assert len(lines) == 1 and lines[0].startswith("finetune aps/seed0, finetune aps/seed1, ")
    assert "finetune.lr" in lines[0] and "now 0.5" in lines[0]


def test_another_question_makes_the_report_anew(study: Study, tmp_path: Path) -> None:
    folder = report_folder(study)
    write(study, folder)
    Findings(study).stamp_report(folder)
    assert Findings(study).report_is_current(folder)
    assert not Findings(study.model_copy(update={"question": "Why?"})).report_is_current(folder)


def test_a_study_under_another_does_not_lend_it_its_question(tmp_path: Path) -> None:
    (tmp_path / "below.yaml").write_text(STUDY.format(results="results") + "question: Theirs?\n")
    (tmp_path / "above.yaml").write_text("study: above\ninclude: [below.yaml]\nexperiments: {}\n")
    assert load_study([tmp_path / "below.yaml"]).question == "Theirs?"
    assert load_study([tmp_path / "above.yaml"]).question == ""


def test_cost_floor_interval_and_published_stand_by_a_score(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(published, "load", lambda: PUBLISHED)
    repeating = load_study([tmp_path / "study.yaml"], {"experiments": {"aps": {"published": "knn"}}})
    for stage, seconds, flops, metrics in (
        ("pretrain", 100.0, 1.5e12, {}),
        ("finetune", 150.0, 1.6e12, {"test_top1": 91.0}),
        ("knn", 102.0, 1.52e12, {"knn_top1_k20": 80.0, "test_images": 359}),
    ):
        finish(repeating, "aps", 0, stage, cost={"seconds": seconds, "flops": flops}, **metrics)
    finish(repeating, "untrained", 0, "knn", knn_top1_k20=50.0)
    page = write(repeating, tmp_path / "report")
    row = page[page.index("<td><b>aps</b>") : page.index("<td><b>untrained</b>")]
    for said in (
        "95 %: 75.6 to 83.8",
        "floor 50.0 (+30.0)",
        "published 75.4<",
        "1.62 TFLOP",
        ">152</td>",
    ):
        assert said in row, said


@pytest.mark.parametrize(
    ("ours", "base", "spread"),
    [
        ((80.0,), (50.0,), "one seed"),
        ((80.0, 80.0), (50.0, 50.0), "0.0"),
        ((80.0, 80.0), (50.0,), "0.0 one seed of untrained"),
        ((80.0,), (50.0, 51.5), "1.5 one seed of aps"),
        ((80.0, 82.0), (50.0, 51.5), "2.0"),
    ],
)
def test_equal_scores_of_several_seeds_are_a_spread_of_zero_and_not_one_seed(
    study: Study, tmp_path: Path, ours: tuple[float, ...], base: tuple[float, ...], spread: str
) -> None:
    for name, scores in (("aps", ours), ("untrained", base)):
        for seed, score in enumerate(scores):
            finish(study, name, seed, "knn", knn_top1_k20=score)
    page = write(study, tmp_path / "report")
    (cell,) = re.findall(r'data-label="spread">(.*?)</td>', page)
    assert " ".join(re.sub(r"<[^>]+>", " ", cell).split()) == spread


@pytest.mark.parametrize(("flops", "text"), [(1.23e9, "1.23 GFLOP"), (4.5e20, "450 EFLOP"), (12.0, "12 FLOP")])
def test_operations_have_a_unit(flops: float, text: str) -> None:
    assert operations(flops) == text


def test_every_score_leads_to_its_runs_and_those_to_file_settings_and_command(study: Study, tmp_path: Path) -> None:
    for name in ("aps", "untrained"):
        for seed in (0, 1):
            finish(study, name, seed, "knn", knn_top1_k20=80.0)
    page = write(study, tmp_path / "report", options="--configfile my.yaml")
    targets = set(re.findall(r'href="#([^"]+)"', re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL)))
    assert targets == {"run-aps-knn", "run-untrained-knn"}
    assert all(f'id="{target}"' in page for target in targets)
    assert "python -m aps knn --experiment aps --seed 1 --again --configfile my.yaml" in page
    for link in re.findall(r'href="([^"#]+metrics.json)"', page):
        assert (tmp_path / "report" / link).exists(), link
    assert "<code>knn.temperature</code> 0.07" in page


def test_a_run_links_to_its_page_where_a_server_has_it(study: Study, tmp_path: Path) -> None:
    folder = finish(study, "aps", 0, "knn", knn_top1_k20=80.0)
    about = About(study="small", name="x", stage="knn", key="k", started=0)
    State(address="http://host:5000", about=about, run_id="r1", experiment_id="7").write(folder / "tracking.json")
    link = html.escape("http://host:5000/#/experiments/7/runs/r1?workflowType=machine_learning")
    assert f'href="{link}"' in write(study, tmp_path / "report", "http://host:5000")
    assert "#/experiments/7/runs/r1" not in write(study, tmp_path / "report", "http://other:5000")


def test_settings_that_differ_are_those_that_stages_which_ran_have_read(study: Study, tmp_path: Path) -> None:
    finish(study, "aps", 0, "knn", knn_top1_k20=80.0)
    finish(study, "untrained", 0, "knn", knn_top1_k20=50.0)
    page = write(study, tmp_path / "report")
    shown = page[page.index("What the experiments differ in") : page.index("Runs, and what made them")]
    assert "encoder.weights" in shown and "finetune.epochs" not in shown
    finish(study, "aps", 0, "finetune", test_top1=80.0)
    finish(study, "longer", 0, "finetune", test_top1=80.0)
    assert "finetune.epochs" in write(study, tmp_path / "report")


def test_the_csv_file_has_the_settings_and_an_evaluation_those_of_its_pretraining(tmp_path: Path) -> None:
    study = load_study([gammas.write_study(tmp_path)])
    gammas.finish(study)
    write_report(study, tmp_path / "report", "none")
    rows = list(csv.DictReader((tmp_path / "report/results.csv").open()))
    knn = {(row["experiment"], row["seed"]): row for row in rows if row["stage"] == "knn"}
    assert {name: knn[name, "0"]["sampling.gamma"] for name, _ in knn} == {"gamma0": "0", "gamma3": "3", "gamma9": "9"}
    row = knn["gamma3", "1"]
    assert (row["pretrain.epochs"], row["knn.k"], row["dataset.name"]) == ("16", "[10, 20, 100, 200]", "digits")
    assert float(row["cost.seconds"]) > 300 and row["finetune.epochs"] == ""


def test_no_figure_of_an_earlier_report_stays_and_other_files_do(study: Study, tmp_path: Path) -> None:
    folder = finish(study, "aps", 0, "knn", knn_top1_k20=80.0)
    (tmp_path / "report/figures/scores").mkdir(parents=True)
    mine = tmp_path / "report/figures/scores/mine.png"
    write(study, tmp_path / "report")
    Findings(study).stamp_report(tmp_path / "report")
    mine.write_text("mine")
    (folder / "metrics.json").unlink()
    write(study, tmp_path / "report")
    assert list((tmp_path / "report/figures").rglob("*.png")) == [mine]


def test_a_changed_picture_makes_the_report_anew(study: Study) -> None:
    finish(study, "aps", 0, "knn", knn_top1_k20=80.0)
    folder = report_folder(study)
    write(study, folder)
    Findings(study).stamp_report(folder)
    assert Findings(study).report_is_current(folder)
    (folder / "figures/scores/scores.png").write_bytes(b"another")
    assert not Findings(study).report_is_current(folder)
