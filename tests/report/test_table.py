"""Scores over seeds: means and spreads, chance among test images, cost, the floor, what is best."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from pathlib import Path

import pytest
from made_up import finish, table
from scipy.stats import binomtest

from aps.data.manifest import copies_in_train, note_on_copies
from aps.files import sha256
from aps.layout import manifest_path, stage_folder, study_folder
from aps.report import csv_file
from aps.report.differences import settings_of
from aps.report.figures import all_figures
from aps.report.page import is_intact, write_report
from aps.report.table import wilson
from aps.report.terminal import terminal
from aps.settings.reading import load_study
from aps.settings.study import Study
from aps.tracking.views import study_parameters


def test_a_cell_is_the_mean_and_the_sample_standard_deviation_over_seeds(study: Study) -> None:
    for seed, value in ((0, 80.0), (1, 84.0)):
        finish(study, "aps", seed, "knn", knn_top1_k20=value)
    finish(study, "untrained", 0, "knn", knn_top1_k20=50.0)
    knn = next(score for score in table(study).scores if score.stage == "knn")
    assert table(study).text("aps", knn) == "82.0 ± 2.8"  # sqrt(((80-82)^2 + (84-82)^2) / 1)
    assert table(study).text("untrained", knn) == "50.0 (1 of 2 seeds)"


def test_what_has_not_run_is_said_and_what_is_not_planned_is_empty(study: Study) -> None:
    scores = {score.stage: score for score in table(study).scores}
    assert table(study).text("aps", scores["finetune"]) == "not run"
    assert table(study).text("longer", scores["knn"]) == ""
    assert "detection" not in scores
    assert "0 of 14 runs finished" in terminal(study, "none")  # aps 2 x 3, untrained 2 x 2, longer 2 x 2


@pytest.mark.parametrize(
    ("of_aps", "of_untrained", "shown"),
    [
        ([10, 20], [20, 100], [20]),
        ([20, 5], [5], [5]),
        ([7], [5], [7, 5]),
        ([5], [20], [20, 5]),
        ([1, 5], [20, 100], [20, 1]),
    ],
)
def test_a_score_of_every_k_that_experiments_do_not_share_is_shown_and_none_is_compared_with_another_k(
    tmp_path: Path, study: Study, of_aps: list[int], of_untrained: list[int], shown: list[int]
) -> None:
    settings = {"aps": {"knn": {"k": of_aps}}, "untrained": {"knn": {"k": of_untrained}}}
    study = load_study([tmp_path / "study.yaml"], {"experiments": settings})
    for name, ks in (("aps", of_aps), ("untrained", of_untrained)):
        for seed in (0, 1):
            finish(study, name, seed, "knn", **{f"knn_top1_k{k}": 50.0 + k / 10 for k in ks})
    found = table(study)
    columns = [score for score in found.scores if score.stage == "knn"]
    assert [score.metric for score in columns] == [f"knn_top1_k{k}" for k in shown]
    for name, ks in (("aps", of_aps), ("untrained", of_untrained)):
        texts = [found.text(name, score) for score in columns]
        assert texts == [f"{50 + k / 10:.1f} ± 0.0" if k in ks else "" for k in shown] and any(texts)
    assert len(found.verdicts()) == (len(shown) == 1)
    rows = list(csv.DictReader(io.StringIO(csv_file.content(found))))
    assert {row["experiment"]: row["value"] for row in rows} == {
        name: str(50 + next(k for k in shown if k in ks) / 10)
        for name, ks in (("aps", of_aps), ("untrained", of_untrained))
    }


def test_a_finished_run_without_a_score_is_not_called_not_run(tmp_path: Path, study: Study) -> None:
    """A dataset with boxes alone has no mask AP."""
    detector = {"image_size": 32, "window": 4, "global_blocks": [0], "pyramid_scales": [2.0, 1.0]}
    settings = {"untrained": {"stages": ["detection"], "detection": detector}}
    study = load_study([tmp_path / "study.yaml"], {"experiments": settings})
    box, mask = (score for score in table(study).scores if score.stage == "detection")
    assert (table(study).text("untrained", box), table(study).text("untrained", mask)) == ("not run", "not run")
    for seed in (0, 1):
        finish(study, "untrained", seed, "detection", box_AP=10.0)
    assert (table(study).text("untrained", box), table(study).text("untrained", mask)) == ("10.0 ± 0.0", "")


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


def verdict(study: Study, stage: str) -> tuple[str | None, str]:
    found = next(v for v in table(study).verdicts() if v.score.stage == stage)
    return found.best, found.reason


def test_best_is_who_is_ahead_of_every_other_by_more_than_seeds_differ(study: Study) -> None:
    for seed in (0, 1):
        finish(study, "aps", seed, "knn", knn_top1_k20=80.0 + seed)
        finish(study, "untrained", seed, "knn", knn_top1_k20=70.0 + seed)
        finish(study, "aps", seed, "finetune", test_top1=90.0 + seed)
        finish(study, "untrained", seed, "finetune", test_top1=60.0)
        finish(study, "longer", seed, "finetune", test_top1=89.0 + 2 * seed)
    assert verdict(study, "knn") == (
        "aps", "aps is best: 80.5 ± 0.7, 10.0 above untrained (70.5 ± 0.7), while seeds differ by 1.0 at most",
    )  # fmt: skip
    best, reason = verdict(study, "finetune")
    assert best is None, "longer is behind by 0.5, its seeds differ by 2"
    assert reason == (
        "none is best beyond the spread: aps 90.5 ± 0.7 and longer 90.0 ± 1.4 differ by 0.5, seeds of one of them by 2.0"
    )


def test_a_rival_whose_seeds_scatter_keeps_the_first_from_being_best_though_another_is_second(study: Study) -> None:
    for seed, wild in ((0, 40.0), (1, 86.0)):
        finish(study, "aps", seed, "finetune", test_top1=90.0)
        finish(study, "longer", seed, "finetune", test_top1=80.0)
        finish(study, "untrained", seed, "finetune", test_top1=wild)
    best, reason = verdict(study, "finetune")
    assert best is None and "untrained" in reason


def test_one_seed_has_no_spread_and_no_best(study: Study) -> None:
    finish(study, "aps", 0, "knn", knn_top1_k20=80.0)
    finish(study, "untrained", 0, "knn", knn_top1_k20=50.0)
    assert verdict(study, "knn") == (None, "one seed, so there is no spread and no best")
    finish(study, "untrained", 1, "knn", knn_top1_k20=50.0)
    assert verdict(study, "knn") == (None, "one seed of all but untrained, so there is no spread and no best")
    assert "±" not in table(study).text("aps", table(study).scores[1])


@pytest.mark.parametrize(("one_seed", "best"), [(50.0, "aps"), (95.0, None), (89.5, None)])
def test_an_experiment_of_one_seed_is_named_and_keeps_another_from_being_best_unless_it_is_clearly_behind(
    study: Study, one_seed: float, best: str | None
) -> None:
    for seed in (0, 1):
        finish(study, "aps", seed, "finetune", test_top1=90.0 + seed)
        finish(study, "longer", seed, "finetune", test_top1=60.0)
    finish(study, "untrained", 0, "finetune", test_top1=one_seed)
    found, reason = verdict(study, "finetune")
    assert found == best
    if best is None:
        assert reason.startswith(f"none is best for certain: untrained has {one_seed} with one seed, aps 90.5")
    else:
        assert reason.endswith("(not compared, one seed: untrained)")


@pytest.mark.parametrize("file", [True, False])
def test_seeds_that_share_an_encoder_count_as_one_seed_and_every_place_says_so(
    study: Study, tmp_path: Path, file: bool
) -> None:
    weights = tmp_path / "encoder.safetensors" if file else "timm:vit_tiny"
    if file:
        weights.write_text("trained elsewhere")  # type: ignore[union-attr]
    given = {"inherits": "aps", "stages": ["finetune", "knn"], "encoder": {"weights": str(weights)}}
    study = load_study([tmp_path / "study.yaml"], {"experiments": {"given": given}})
    for seed in (0, 1):
        encoder = {"sha256": sha256(weights) if file else None}  # type: ignore[arg-type]
        finish(study, "given", seed, "knn", knn_top1_k20=90.0, encoder=encoder)
        finish(study, "given", seed, "finetune", test_top1=80.0 + 9 * seed, encoder=encoder)
        for name in ("aps", "untrained"):  # of random weights there is no file, and each seed has its own
            finish(study, name, seed, "knn", knn_top1_k20=60.0 + seed + 9 * (name == "aps"))
            finish(study, name, seed, "finetune", test_top1=60.0 + seed)
    assert verdict(study, "knn") == (
        None,
        "none is best for certain: given has 90.0 ± 0.0 with one encoder, aps 69.5 ± 0.7; give each seed of given its own encoder",
    )
    assert "given" in verdict(study, "finetune")[1] and verdict(study, "finetune")[0] is None
    rows = {(row["experiment"], row["column"].stage): row for row in table(study).above_floor()}
    assert rows["given", "finetune"]["single"] == {"given": "one encoder"} and rows["aps", "knn"]["single"] == {}
    assert rows["given", "finetune"]["spread"] == 1.0, "the floor's, and not that of two finetunings"
    text = "90.0 ± 0.0 (one encoder)"
    assert text in terminal(study, "none") and "0.7 (one encoder)" not in terminal(study, "none")
    write_report(study, tmp_path / "report", "none")
    page = re.sub(r"<[^>]+>", "", (tmp_path / "report/report.html").read_text())
    assert page.count(text) == 2, "in the table of scores and in that of the floor"
    assert "1.0one encoder of given" in page and "One encoder: all seeds start from the same weights" in page
    pictures = {picture.name: picture for picture in all_figures(table(study), is_intact)}
    assert f"given {text}" in pictures["scores"].panels[0].label + pictures["scores"].panels[1].label
    assert "One encoder for all seeds of given:" in table(study).remarks(["aps", "given"], table(study).scores)


def test_where_everybody_has_one_encoder_or_one_seed_there_is_no_best(study: Study, tmp_path: Path) -> None:
    given = {"inherits": "aps", "stages": ["knn"], "encoder": {"weights": "timm:vit_tiny"}}
    study = load_study([tmp_path / "study.yaml"], {"experiments": {"given": given, "more": given}})
    for name in ("given", "more"):
        for seed in (0, 1):
            finish(study, name, seed, "knn", knn_top1_k20=90.0 - len(name))
    assert verdict(study, "knn") == (None, "one encoder, so there is no spread and no best")
    finish(study, "untrained", 0, "knn", knn_top1_k20=50.0)
    assert verdict(study, "knn") == (None, "one seed or one encoder, so there is no spread and no best")


def of_three_seeds(tmp_path: Path, **scores: dict[int, float]) -> Study:
    """A study of three seeds, with finetuned scores of an experiment by seed."""
    study = load_study([tmp_path / "study.yaml"], {"defaults": {"seeds": [0, 1, 2]}})
    for name, of_seeds in scores.items():
        for seed, score in of_seeds.items():
            if "pretrain" in study.experiments[name].stages:
                finish(study, name, seed, "pretrain", loss=1.0)
            finish(study, name, seed, "finetune", test_top1=score)
    return study


def test_a_mean_of_fewer_seeds_than_are_planned_says_so_wherever_it_stands(tmp_path: Path, study: Study) -> None:
    study = of_three_seeds(tmp_path, aps={0: 80.0, 2: 82.0}, untrained={0: 50.0, 1: 51.0, 2: 52.0})
    text = "81.0 ± 1.4 (2 of 3 seeds)"
    assert text in terminal(study, "none") and "51.0 ± 1.0 (" not in terminal(study, "none")
    write_report(study, tmp_path / "report", "none")
    page = re.sub(r"<[^>]+>", "", (tmp_path / "report/report.html").read_text())
    assert page.count(text) == 2, "in the table of scores and in that of the floor"
    pictures = {picture.name: picture for picture in all_figures(table(study), is_intact)}
    assert f"aps {text}" in pictures["scores"].panels[0].label
    assert "Not all seeds have finished of aps." in pictures["score-cost"].caption


def test_a_floor_of_fewer_seeds_says_so_beside_the_score(tmp_path: Path, study: Study) -> None:
    study = of_three_seeds(tmp_path, aps={0: 80.0, 1: 80.0, 2: 80.0}, untrained={0: 50.0, 1: 50.0})
    write_report(study, tmp_path / "report", "none")
    assert "<small>floor 50.0 (+30.0), 2 of 3 seeds</small>" in (tmp_path / "report/report.html").read_text()


def test_nobody_is_best_while_seeds_are_missing_of_those_who_are_compared(tmp_path: Path, study: Study) -> None:
    study = of_three_seeds(tmp_path, aps={0: 90.0, 1: 90.0}, untrained={0: 50.0, 2: 50.0})
    assert verdict(study, "finetune") == (
        None, "seeds are missing (aps 2 of 3, untrained 2 of 3), so none is best yet",
    )  # fmt: skip


@pytest.mark.parametrize(("of_longer", "best"), [((50.0, 51.0), "aps"), ((50.0, 90.5), None), ((95.0, 96.0), None)])
def test_only_experiments_with_all_their_seeds_are_compared_and_one_that_may_yet_win_keeps_them_from_being_best(
    tmp_path: Path, study: Study, of_longer: tuple[float, float], best: str | None
) -> None:
    whole = {"aps": {0: 90.0, 1: 90.0, 2: 91.0}, "untrained": {0: 70.0, 1: 70.0, 2: 70.0}}
    study = of_three_seeds(tmp_path, **whole, longer=dict(enumerate(of_longer)))
    found, reason = verdict(study, "finetune")
    assert found == best
    if best is None:
        assert reason.startswith("none is best for certain: longer has ") and "with 2 of 3 seeds, aps 90.3" in reason
        assert reason.endswith("; run the other seeds of longer")
    else:
        assert reason.endswith("(not compared, seeds missing: longer 2 of 3)")


def test_nobody_is_best_of_one(study: Study) -> None:
    finish(study, "aps", 0, "knn", knn_top1_k20=80.0)
    assert table(study).verdicts() == []


def test_scores_on_different_datasets_are_not_compared(tmp_path: Path, study: Study) -> None:
    study = load_study([tmp_path / "study.yaml"], {"experiments": {"longer": {"dataset": "fashion_mnist"}}})
    for seed in (0, 1):
        finish(study, "aps", seed, "finetune", test_top1=90.0)
        finish(study, "longer", seed, "finetune", test_top1=60.0)
    assert table(study).verdicts() == []


@pytest.mark.parametrize(("right", "n"), [(0, 10), (10, 10), (3, 7), (331, 359), (4500, 5000)])
def test_the_interval_is_wilsons(right: int, n: int) -> None:
    theirs = binomtest(right, n).proportion_ci(method="wilson")
    assert wilson(right / n, n) == pytest.approx((100 * theirs.low, 100 * theirs.high), abs=1e-4)


@pytest.mark.parametrize(("images", "shown"), [(359, True), (4999, True), (5000, False), (10_000, False)])
def test_the_interval_is_shown_where_the_test_set_is_small(study: Study, images: int, shown: bool) -> None:
    finish(study, "aps", 0, "knn", knn_top1_k20=80.0, test_images=images)
    found = table(study)
    knn = next(score for score in found.scores if score.stage == "knn")
    assert (found.interval("aps", knn) is not None) == shown


def test_test_images_are_those_of_the_manifest_unless_it_is_of_others_by_now(study: Study) -> None:
    finish(study, "aps", 0, "finetune", test_top1=80.0)
    manifest = manifest_path(study.results, "digits")
    manifest.parent.mkdir(parents=True)
    for digest, images in (("d" * 64, 100), ("e" * 64, None)):
        manifest.write_text(json.dumps({"digest": digest, "splits": {"test": {"count": 100}}}))
        assert table(study).test_images("aps", "finetune") == images


def test_scores_on_images_that_are_in_train_too_say_so_in_a_line(study: Study, tmp_path: Path) -> None:
    finish(study, "aps", 0, "finetune", test_top1=80.0)
    path = manifest_path(study.results, "digits")
    path.parent.mkdir(parents=True)
    line = "digits: 12 of 1,040 test images are in train too, which flatters scores"
    note = note_on_copies(12, "test")
    for digest, notes, said in (
        ("d" * 64, [note], True),
        ("d" * 64, [f"{note}; duplicates.txt lists them", "red: the same in every pixel"], True),
        ("d" * 64, ["red: the same in every pixel"], False),
        ("e" * 64, [note], False),  # of others by now
    ):
        path.write_text(json.dumps({"digest": digest, "splits": {"test": {"count": 1040}}, "notes": notes}))
        assert terminal(study, "none").count(line) == said
        write_report(study, tmp_path / "report", "none")
        assert (tmp_path / "report/report.html").read_text().count(f"<p>{line}.</p>") == said


@pytest.mark.parametrize(("count", "split"), [(1, "test"), (12, "val"), (1234, "test")])
def test_a_note_on_copies_is_read_as_it_was_written(count: int, split: str) -> None:
    assert copies_in_train(["another note", note_on_copies(count, split)]) == {split: count}


def test_where_few_test_images_make_intervals_overlap_nobody_is_best(study: Study) -> None:
    for seed in (0, 1):
        finish(study, "aps", seed, "knn", knn_top1_k20=80.0, test_images=100)
        finish(study, "untrained", seed, "knn", knn_top1_k20=75.0, test_images=100)
    best, reason = verdict(study, "knn")
    assert best is None and reason.endswith("but on 100 test images their 95 % intervals overlap")


def test_the_cost_of_a_seed_counts_its_pretraining_once(study: Study) -> None:
    for stage, seconds, flops in (("pretrain", 100.0, 1e12), ("finetune", 150.0, 3e12), ("knn", 105.0, 1.5e12)):
        finish(study, "aps", 0, stage, cost={"seconds": seconds, "flops": flops})
        assert (table(study).spent("aps") is not None) == (stage == "knn"), "a part of a sum is no sum"
    spent = table(study).spent("aps")
    assert spent is not None and spent.flops is not None
    assert (spent.seconds.mean, spent.flops.mean) == (155.0, 3.5e12)


def test_a_pretraining_that_ran_again_leaves_the_seconds_of_evaluations_as_they_are(study: Study) -> None:
    """The same weights in another time: their evaluations count, with the earlier time in their cost."""
    finish(study, "aps", 0, "pretrain", cost={"seconds": 300.0, "flops": 1e12})
    for stage in ("finetune", "knn"):
        finish(study, "aps", 0, stage, cost={"seconds": 110.0, "flops": 1.1e12}, wall_seconds=10.0)
    spent = table(study).spent("aps")
    assert spent is not None and spent.flops is not None
    assert (spent.seconds.mean, spent.flops.mean) == (320.0, pytest.approx(1.2e12))


@pytest.mark.parametrize("kept", [True, False])
def test_the_pretraining_of_an_encoder_from_elsewhere_is_counted_once_or_its_operations_are_unknown(
    study: Study, tmp_path: Path, kept: bool
) -> None:
    made = finish(study, "aps", 0, "pretrain", cost={"seconds": 100.0, "flops": 1e12})
    encoder = tmp_path / "elsewhere/encoder.safetensors"
    shutil.copytree(made, encoder.parent)
    if not kept:
        (encoder.parent / "metrics.json").unlink()
    borrowed = {"dataset": "digits", "encoder": {"weights": str(encoder)}, "stages": ["finetune", "knn"]}
    study = load_study([tmp_path / "study.yaml"], {"experiments": {"borrowed": borrowed}})
    origin = {"sha256": sha256(encoder), "settings_digest": "of the pretraining"}
    for stage, own, flops in (("finetune", 50.0, 3e12), ("knn", 5.0, 1.5e12)):
        finish(
            study, "borrowed", 0, stage, cost={"seconds": 100 + own, "flops": flops}, wall_seconds=own, encoder=origin
        )
    spent = table(study).spent("borrowed")
    assert spent is not None
    assert (spent.seconds.mean, spent.flops and spent.flops.mean) == ((155.0, 3.5e12) if kept else (55.0, None))


def test_an_encoder_of_two_runs_has_the_cost_and_the_settings_of_both(study: Study, tmp_path: Path) -> None:
    model = stage_folder(study_folder(study), "labels", 0, "finetune") / "model.safetensors"
    labels = {"inherits": "aps", "seeds": [0], "stages": ["finetune"], "encoder": {"weights": "experiment:aps"}}
    after = {"inherits": "aps", "seeds": [0], "stages": ["knn"], "encoder": {"weights": str(model)}}
    study = load_study(
        [tmp_path / "study.yaml"],
        {"experiments": {"aps": {"seeds": [0]}, "labels": labels | {"finetune": {"epochs": 9}}, "after": after}},
    )
    made = finish(study, "aps", 0, "pretrain", cost={"seconds": 100.0, "flops": 1e12})
    origin = {"sha256": sha256(made / "encoder.safetensors"), "settings_digest": "of the pretraining"}
    cost = {"seconds": 120.0, "flops": 3e12}
    folder = finish(study, "labels", 0, "finetune", cost=cost, wall_seconds=20.0, encoder=origin)
    assert folder == model.parent
    origin = {"sha256": sha256(model), "settings_digest": "of the finetuning"}
    finish(
        study,
        "after",
        0,
        "knn",
        cost={"seconds": 125.0, "flops": 3.5e12},
        wall_seconds=5.0,
        encoder=origin,
        top1_k20=1.0,
    )
    found = table(study)
    spent = found.spent("after")
    assert spent is not None and spent.flops is not None
    assert (spent.seconds.mean, spent.flops.mean) == (125.0, 3.5e12)
    row = next(r for r in csv.DictReader(io.StringIO(csv_file.content(found))) if r["experiment"] == "after")
    shown, sent = settings_of(found, "after"), study_parameters(study, "knn")["after"]
    assert (row["finetune.epochs"], shown["finetune.epochs"], sent["finetune.epochs"]) == ("9", 9, "9")
    assert row["pretrain.epochs"] == sent["pretrain.epochs"] == str(shown["pretrain.epochs"])
    own = {name: settings_of(found, name) for name in ("aps", "labels", "after")}
    assert {name: own[name]["encoder.weights"] for name in own} == {
        "aps": "pretrain", "labels": "experiment:aps", "after": str(model),
    }  # fmt: skip
    assert not any(key.endswith(".encoder.weights") for settings in own.values() for key in settings)


def test_where_operations_are_unknown_there_are_none_and_the_seconds_stay(study: Study) -> None:
    for stage, cost in (("finetune", {"seconds": 50.0, "flops": 1e12}), ("knn", {"seconds": 3.0})):
        finish(study, "untrained", 0, stage, cost=cost)
    spent = table(study).spent("untrained")
    assert spent is not None and spent.flops is None and spent.seconds.mean == 53.0


def test_the_terminal_says_what_is_best(study: Study) -> None:
    for seed in (0, 1):
        finish(study, "aps", seed, "knn", knn_top1_k20=80.0)
        finish(study, "untrained", seed, "knn", knn_top1_k20=50.0 + seed)
    assert "kNN top-1, k = 20: aps is best: 80.0 ± 0.0, 29.5 above untrained (50.5 ± 0.7)" in terminal(study, "none")
