"""`aps compare`: what runs differ in, and what it says of folders that hold none."""

from __future__ import annotations

import shutil
from pathlib import Path

import gammas
import pytest

from aps.cli import main
from aps.compare import compare
from aps.errors import UserError
from aps.layout import stage_folder, study_folder
from aps.settings.reading import load_study


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    study = load_study([gammas.write_study(tmp_path_factory.mktemp("compared"))])
    gammas.finish(study)
    return study_folder(study)


def rows(shown: str, title: str) -> dict[str, list[str]]:
    """Name -> values, of the table under a title."""
    lines = shown.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(title))
    end = next((i for i in range(start, len(lines)) if not lines[i]), len(lines))
    return {line.split()[0]: line.split()[1:] for line in lines[start + 2 : end]}


def test_runs_differ_in_what_made_their_encoder_too(results: Path) -> None:
    folders = [stage_folder(results, name, 0, "knn") for name in ("gamma0", "gamma3", "gamma9")]
    shown = compare(folders)
    assert rows(shown, "settings") == {"sampling.gamma": ["0", "3", "9"]}
    found = [f"{gammas.figures(gamma, 0)['knn']:.6g}" for gamma in gammas.GAMMAS]
    assert rows(shown, "scores")["knn_top1_k20"] == found
    assert len(set(rows(shown, "data")["encoder"])) == 3 and "dataset" not in rows(shown, "data")
    assert "made by: alike" in shown


def test_a_setting_that_only_one_run_has_is_absent_in_the_other(results: Path) -> None:
    shown = compare([stage_folder(results, "gamma3", 0, stage) for stage in ("knn", "finetune")])
    found = rows(shown, "settings")
    assert found["stage"] == ["knn", "finetune"] and found["knn.temperature"] == ["0.07", "-"]


def test_seeds_of_one_experiment_differ_in_the_seed_alone(results: Path) -> None:
    shown = compare([stage_folder(results, "gamma3", seed, "knn") for seed in (0, 1)])
    assert rows(shown, "settings") == {"seed": ["0", "1"]}


def test_a_run_may_be_named_by_its_metrics(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [str(stage_folder(results, name, 0, "knn") / "metrics.json") for name in ("gamma0", "gamma3")]
    assert main(["compare", *folders]) == 0
    assert "sampling.gamma" in capsys.readouterr().out


def test_runs_are_compared_without_the_files_that_a_copy_leaves_out(results: Path, tmp_path: Path) -> None:
    copies = [tmp_path / name for name in ("gamma0", "gamma3")]
    for copy in copies:
        shutil.copytree(results / copy.name, copy)
        for stage in ("pretrain", "knn"):
            for file in (copy / "seed0" / stage).iterdir():
                if file.name != "metrics.json":
                    file.unlink()
    given, kept = ([folder / "seed0/knn" for folder in of] for of in (copies, [results / c.name for c in copies]))
    tables = [[rows(compare(folders), title) for title in ("settings", "scores")] for folders in (given, kept)]
    assert tables[0] == tables[1] and tables[0][0] == {"sampling.gamma": ["0", "3"]}


def test_what_is_no_run_and_what_was_changed_are_one_sentence(results: Path, tmp_path: Path) -> None:
    good = stage_folder(results, "gamma0", 0, "knn")
    with pytest.raises(UserError, match="no finished run"):
        compare([good, tmp_path])
    with pytest.raises(UserError, match="name two folders"):
        compare([good])
    for file in good.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "history.jsonl").write_text("")
    with pytest.raises(UserError, match=r"history\.jsonl has 0 bytes"):
        compare([good, tmp_path])
