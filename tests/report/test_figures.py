"""Figures: shown where their runs exist, with axes that don't exaggerate a point; sweeps found in a study."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gammas
import numpy as np
import pytest
from made_up import STUDY, finish, table
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from aps.findings import Findings
from aps.layout import stage_folder, study_folder
from aps.report import examples as report_examples
from aps.report.differences import _groups, sweeps
from aps.report.drawing import COLOURS, INK, Panel, Picture, axis_limits, make_styles
from aps.report.figures import all_figures, confusions
from aps.report.page import _chips, is_intact
from aps.report.table import Table
from aps.seals import contents, seal
from aps.settings.reading import load_study
from aps.settings.study import Study


def names(study: Study) -> list[str]:
    return [picture.name for picture in all_figures(table(study), is_intact)]


def again(folder: Path, **more: Any) -> None:
    """Seal a made-up result again, with its files as they are and more in it."""
    metrics = json.loads((folder / "metrics.json").read_text()) | more
    (folder / "metrics.json").write_text(json.dumps(seal(metrics | {"files": contents(folder)})))


def test_a_figure_is_shown_only_where_its_run_exists(study: Study) -> None:
    assert names(study) == []
    folder = finish(study, "aps", 0, "pretrain", loss=1.0)
    assert names(study) == ["curves"]
    lines = [
        {"step": s, "time": 0.0, "loss": 3.0, "knn_train_top1": 40.0 + s, "flops": 1e9 * s, "seconds": 2.0 * s}
        for s in (1, 2)
    ]
    (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    again(folder, cost={"seconds": 4.0, "flops": 2e9, "peak_memory_gb": 1.5})
    during = next(p for p in all_figures(table(study), is_intact) if p.name == "knn-cost")
    assert [panel.label for panel in during.panels] == [
        "kNN on held-out train images, % against operations",
        "kNN on held-out train images, % against seconds of training",
        "Peak memory of pretraining",
    ]
    assert list(during.legend) == ["aps"]
    finish(study, "untrained", 0, "knn", knn_top1_k20=50.0)
    assert names(study) == ["scores", "knn-cost", "curves"]


@pytest.mark.parametrize("images", [359, 10_000])
def test_whoever_sees_an_interval_reads_what_it_is(study: Study, images: int) -> None:
    """In the caption, beside the axis of a figure that stands alone, and in the text for those who do not see it."""
    for seed in (0, 1):
        finish(study, "aps", seed, "knn", knn_top1_k20=80.0, test_images=images)
    picture = next(p for p in all_figures(table(study), is_intact) if p.name == "scores")
    axes = Figure().subplots()
    picture.panels[0].draw(axes)
    said = ["95 %" in text for text in (picture.caption, axes.get_xlabel(), picture.panels[0].label)]
    assert said == [images == 359] * 3
    assert ("not the seeds' spread" in picture.caption) == (images == 359)


def drawn(panel: Panel) -> list[Line2D]:
    axes = Figure().subplots()
    panel.draw(axes)
    return axes.lines


def test_a_run_with_a_single_point_is_seen_in_its_curve(study: Study) -> None:
    """A budget can end before the second evaluation."""
    folder = finish(study, "aps", 0, "pretrain", loss=1.0)
    line = {"step": 7, "time": 0.0, "loss": 3.0, "knn_train_top1": 40.0, "flops": 1e9, "seconds": 2.0}
    (folder / "history.jsonl").write_text(json.dumps(line) + "\n")
    again(folder, cost={"seconds": 4.0, "flops": 2e9, "peak_memory_gb": 1.5})
    shown = {picture.name: picture for picture in all_figures(table(study), is_intact)}
    for name, count in (("knn-cost", 2), ("curves", len(shown["curves"].panels))):
        assert list(shown[name].legend) == ["aps"]
        for panel in shown[name].panels[:count]:
            (point,) = drawn(panel)
            assert len(np.atleast_1d(point.get_xdata())) == 1 and point.get_marker() != "None"


def pretrained(study: Study, name: str, seed: int, peak: float, last: float) -> None:
    """A finished pretraining with two kNN readings, of which `last` is the second."""
    folder = finish(study, name, seed, "pretrain", loss=1.0)
    lines = [
        {"step": step, "time": 0.0, "loss": 3.0, "knn_train_top1": accuracy, "flops": 1e9 * step, "seconds": 2.0 * step}
        for step, accuracy in ((1, 30.0), (2, last))
    ]
    (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    again(folder, cost={"seconds": 4.0, "flops": 2e9, "peak_memory_gb": peak})


def test_accuracy_against_the_cost_of_pretraining_says_which_seeds_are_missing(study: Study) -> None:
    """In the words of scores against cost: in the caption, and beside the peak of the seeds that there are."""
    for name, seed in (("aps", 0), ("aps", 1), ("longer", 0)):
        pretrained(study, name, seed, 1.5, 50.0)

    def said() -> tuple[str, list[str]]:
        picture = next(p for p in all_figures(table(study), is_intact) if p.name == "knn-cost")
        axes = Figure().subplots()
        picture.panels[-1].draw(axes)
        return picture.caption, [text.get_text() for text in axes.texts]

    caption, bars = said()
    assert caption.endswith(" Not all seeds have finished of longer.")
    assert bars == ["aps  1.50 GB", "longer  1.50 GB (1 of 2 seeds)"]
    pretrained(study, "longer", 1, 1.7, 50.0)
    caption, bars = said()
    assert "Not all seeds" not in caption and bars == ["aps  1.50 GB", "longer  1.60 GB"]


def test_the_last_reading_stands_against_the_peak_memory_with_the_range_of_the_seeds(study: Study) -> None:
    for name, seed, peak, last in (("aps", 0, 1.0, 40.0), ("aps", 1, 1.2, 44.0), ("longer", 0, 2.0, 41.0)):
        pretrained(study, name, seed, peak, last)
    picture = next(p for p in all_figures(table(study), is_intact) if p.name == "knn-cost")
    (panel,) = (p for p in picture.panels if p.label == "The last kNN on held-out train images, % against peak memory")
    points, ranges = {}, {}
    for line in drawn(panel):
        x, y = np.atleast_1d(line.get_xdata()).tolist(), np.atleast_1d(line.get_ydata()).tolist()
        if len(x) == 1:
            points[line.get_color()] = (x[0], y[0])
        else:
            ranges.setdefault(line.get_color(), []).append((x, y))
    aps, longer = (picture.legend[name].colour for name in ("aps", "longer"))
    assert points == {aps: pytest.approx((1.1, 42.0)), longer: (2.0, 41.0)}
    vertical, horizontal = ranges[aps]
    assert vertical == ([pytest.approx(1.1)] * 2, [40.0, 44.0]) and horizontal == ([1.0, 1.2], [42.0, 42.0])
    assert picture.lines and picture.marks and picture.png()


def test_a_legend_shows_what_is_drawn(study: Study) -> None:
    """Lines for lines; for marks the mark of each experiment, on paper and in the page."""
    for name, stages in (("untrained", ("finetune", "knn")), ("longer", ("pretrain", "finetune"))):
        for stage in stages:
            finish(study, name, 0, stage, test_top1=50.0, cost={"seconds": 1.0, "flops": 1e9})
    for picture in all_figures(table(study), is_intact):
        marks = {(str(line.get_color()), line.get_marker()) for panel in picture.panels for line in drawn(panel)}
        if picture.marks:
            assert {(style.colour, style.marker) for style in picture.legend.values()} <= marks
    chips = _chips(next(p for p in all_figures(table(study), is_intact) if p.name == "score-cost"))
    assert len({(colour, mark) for _, colour, _, mark in chips}) == len(chips) > 1


def test_scores_against_cost_need_two_experiments_of_which_all_has_run(study: Study) -> None:
    for name, stages in (("untrained", ("finetune", "knn")), ("longer", ("pretrain", "finetune"))):
        for stage in stages:
            finish(study, name, 0, stage, test_top1=50.0, cost={"seconds": 1.0, "flops": 1e9})
        assert ("score-cost" in names(study)) == (name == "longer")


def test_a_score_stands_against_the_cost_of_its_pretraining_and_its_own_stage(study: Study) -> None:
    """Not of the others: with equal pretraining, who also finetunes is not further to the right in kNN."""
    for name, stages in (("aps", ["pretrain", "finetune", "knn"]), ("longer", ["pretrain", "knn"])):
        study = study.model_copy(
            update={
                "experiments": study.experiments | {name: study.experiments[name].model_copy(update={"stages": stages})}
            }
        )
    for name, stages in (("aps", ("pretrain", "finetune", "knn")), ("longer", ("pretrain", "knn"))):
        for stage in stages:
            flops = {"pretrain": 1e12, "finetune": 7e12, "knn": 1.5e12}[stage]
            scores = {"pretrain": {}, "finetune": {"test_top1": 90.0}, "knn": {"knn_top1_k20": 80.0}}[stage]
            finish(study, name, 0, stage, cost={"seconds": flops / 1e10, "flops": flops}, **scores)
    (picture,) = [p for p in all_figures(table(study), is_intact) if p.name == "score-cost"]
    (panel,) = picture.panels
    places = {float(x) for line in drawn(panel) for x in np.atleast_1d(line.get_xdata())}
    assert panel.label == "kNN top-1, k = 20 against operations of one seed" and places == {1.5e12}


def test_a_damaged_journal_leaves_its_curve_out_with_a_sentence(
    study: Study, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = finish(study, "aps", 0, "pretrain", loss=1.0)
    text = (folder / "history.jsonl").read_text()
    (folder / "history.jsonl").write_text(text.replace("3.0", "9.0"))
    assert names(study) == []
    assert "pretrain aps/seed0: left out of the report" in capsys.readouterr().err


def test_a_confusion_matrix_sums_the_seeds_and_names_the_most_frequent_mistake(study: Study) -> None:
    for seed, counts in ((0, [[3, 1], [0, 4]]), (1, [[2, 2], [1, 3]])):
        again(
            finish(study, "aps", seed, "finetune", test_top1=50.0),
            confusion={"classes": ["cat", "dog"], "counts": counts},
        )
    (picture,) = [p for p in all_figures(table(study), is_intact) if p.name == "confusion"]
    assert picture.panels[0].label == "Confusion matrix of aps. Most often cat is taken for dog."
    assert picture.png().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [((50.0, 51.0), 45.5, 55.5), ((50.0,), 45.0, 55.0), ((99.5, 100.0), 90.0, 102.0), ((0.0, 0.5), 0.0, 10.0)],
)
def test_an_axis_spans_ten_points_or_more(values: tuple[float, ...], low: float, high: float) -> None:
    found = axis_limits(values, 10.0)
    assert found == pytest.approx((low, high), abs=1.5)
    assert found[1] - found[0] >= 10 and found[0] <= min(values) and found[1] >= max(values)


def test_a_wide_spread_is_shown_whole(study: Study) -> None:
    low, high = axis_limits((20.0, 90.0), 10.0)
    assert low < 20 and high > 90


def test_experiments_are_told_apart_by_colour_and_beyond_that_by_the_kind_of_line() -> None:
    found = make_styles([f"e{i}" for i in range(40)])
    assert len({(look.colour, look.dash) for look in found.values()}) == 40
    assert len({look.colour for look in list(found.values())[: len(COLOURS)]}) == len(COLOURS)


def test_an_inline_figure_has_no_ink_of_its_own_and_no_name_twice() -> None:
    def draw(axes: Any) -> None:
        axes.plot([1, 2], [3, 4], "o")
        axes.set_title("dollars $ and $ signs".replace("$", r"\$"))

    svgs = [svg for _, svg in Picture("it", "scores", "It", "", [Panel("a", draw), Panel("b", draw)]).inline()]
    for svg in svgs:
        assert INK not in svg and "currentColor" in svg and not re.search(r'<svg[^>]* (width|height)="', svg)
        assert set(re.findall(r'href="#([^"]+)"', svg)) <= set(re.findall(r'\bid="([^"]+)"', svg))
    ids = re.findall(r'\bid="([^"]+)"', "".join(svgs))
    assert len(ids) == len(set(ids))


def test_a_file_has_all_panels_on_white(tmp_path: Path) -> None:
    panels = [Panel(str(i), lambda axes: axes.plot([1, 2])) for i in range(4)]
    (tmp_path / "it.png").write_bytes(Picture("it", "scores", "It", "", panels, make_styles(["a", "_b"])).png())
    with Image.open(tmp_path / "it.png") as picture:
        assert picture.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
        assert picture.width > picture.height


# -- sweeps ---------------------------------------------------------------------------------------


def swept(tmp_path: Path, experiments: dict[str, Any], skip: tuple[str, ...] = ()) -> list[tuple[Any, ...]]:
    """(key, what changes with it, {line: {experiment: value}}) of a made-up study in which all but `skip` has run."""
    (tmp_path / "study.yaml").write_text(STUDY.format(results=tmp_path / "results").partition("experiments:")[0])
    study = load_study([tmp_path / "study.yaml"], {"experiments": experiments})
    for name, seed, stage in study.jobs():
        if name not in skip and seed == 0:
            finish(study, name, seed, stage, knn_top1_k20=50.0)
    return [(s.key, s.with_it, s.lines) for s in sweeps(Table(study, Findings(study)))]


SHORT = {"stages": ["pretrain", "knn"]}


def test_a_sweep_is_three_values_of_one_setting(tmp_path: Path) -> None:
    found = swept(tmp_path, {
        "base": SHORT, "g0": {"inherits": "base", "sampling": {"gamma": 0}}, "g9": {"inherits": "base", "sampling": {"gamma": 9}},
        "floor": {"inherits": "base", "encoder": {"weights": "random"}, "stages": ["knn"]},
    })  # fmt: skip
    assert found == [("sampling.gamma", (), {"": {"base": 3.0, "g0": 0.0, "g9": 9.0}})]


def test_two_values_are_no_sweep_nor_are_three_that_have_not_run(tmp_path: Path) -> None:
    experiments = {
        "base": SHORT, "g0": {"inherits": "base", "sampling": {"gamma": 0}}, "g9": {"inherits": "base", "sampling": {"gamma": 9}},
    }  # fmt: skip
    assert swept(tmp_path, experiments, skip=("g9",)) == []


def test_an_ablation_of_several_settings_has_a_sweep_for_each_and_says_what_changes_with_it(tmp_path: Path) -> None:
    def change(**blocks: Any) -> dict[str, Any]:
        return {"inherits": "base", **blocks}

    found = swept(tmp_path, {
        "base": SHORT,
        "g0": change(sampling={"gamma": 0}), "g9": change(sampling={"gamma": 9}),
        "t1": change(sampling={"samplings": 1}, pretrain={"epochs": 6400}), "t2": change(sampling={"samplings": 2}, pretrain={"epochs": 3200}),
        "random": change(sampling={"strategy": "random"}),
        "c1": change(views={"crop_scale": [0.1, 1.0]}), "c2": change(views={"crop_scale": [0.5, 1.0]}),
    })  # fmt: skip
    assert found == [
        ("sampling.gamma", (), {"": {"base": 3.0, "g0": 0.0, "g9": 9.0}}),
        ("sampling.samplings", ("pretrain.epochs",), {"": {"base": 4, "t1": 1, "t2": 2}}),
        ("views.crop_scale", (), {"": {"base": [0.15, 1.0], "c1": [0.1, 1.0], "c2": [0.5, 1.0]}}),
    ]


def test_a_grid_has_a_line_for_each_value_of_the_others(tmp_path: Path) -> None:
    experiments: dict[str, Any] = {
        f"g{gamma}r{ratio}": {**SHORT, "sampling": {"gamma": gamma, "ratio": ratio}}
        for gamma in (0, 1, 3) for ratio in (0.125, 0.25)
    }  # fmt: skip
    ((key, with_it, lines),) = swept(tmp_path, experiments)
    assert (key, with_it) == ("sampling.gamma", ())
    assert {label: list(own.values()) for label, own in lines.items()} == {
        "ratio 0.125": [0.0, 1.0, 3.0], "ratio 0.25": [0.0, 1.0, 3.0],
    }  # fmt: skip


def test_a_sweep_is_drawn_over_its_setting(tmp_path: Path) -> None:
    study = load_study([gammas.write_study(tmp_path)])
    gammas.finish(study)
    (picture,) = [p for p in all_figures(table(study), is_intact) if p.category == "sweeps"]
    assert picture.name == "sweep-sampling.gamma"
    assert [panel.label for panel in picture.panels] == [
        "finetuned top-1 for each sampling.gamma", "kNN top-1, k = 20 for each sampling.gamma",
    ]  # fmt: skip
    assert stage_folder(study_folder(study), "gamma0", 0, "knn").exists() and picture.png()


def test_every_two_experiments_are_compared_once() -> None:
    """Of 1,000 experiments each setting is looked up a million times, not a million times for each set of settings."""
    looked_up = 0

    class Settings(dict[str, Any]):
        def get(self, key: str, default: Any = None) -> Any:
            nonlocal looked_up
            looked_up += 1
            return super().get(key, default)

    keys = ["pretrain.a", "pretrain.b", "pretrain.c"]
    flat = {f"e{n}": Settings(zip(keys, (n % 3, n // 3 % 3, n // 9), strict=True)) for n in range(27)}
    study = SimpleNamespace(experiments={name: SimpleNamespace(stages=("knn",)) for name in flat})
    found = _groups(SimpleNamespace(study=study), flat, keys)  # type: ignore[arg-type]
    assert {together: len(members) for together, members in found.items()} == {(key,): 9 for key in keys}
    assert looked_up <= 27 * 26 / 2 * len(keys) * 2


def test_a_figure_with_a_panel_for_each_experiment_shows_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing 48 panels takes minutes, and a study may have 1,000 experiments."""
    monkeypatch.setattr("aps.report.figures.MOST_PANELS", 2)
    monkeypatch.setattr("aps.report.drawing.MOST_PANELS", 2)
    experiments = [f"e{n}" for n in range(4)]
    confusion = {"classes": ["a", "b"], "counts": [[1, 0], [0, 1]]}

    def pictures(count: int) -> list[Picture]:
        runs = [{"experiment": name, "confusion": confusion} for name in experiments[:count]]
        return confusions(SimpleNamespace(study=SimpleNamespace(experiments=experiments), runs=runs))  # type: ignore[arg-type]

    (few,), (many,) = pictures(1), pictures(4)
    assert len(few.panels) == 1 and "first" not in few.caption
    assert len(many.panels) == 2 and many.caption.endswith("No more than the first 2 experiments are shown.")


def test_images_are_drawn_of_no_more_experiments_than_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def panels(*_: object) -> Iterator[Panel]:
        for number in range(9):
            made.append(number)
            yield Panel(f"{number}", lambda axes: None)

    monkeypatch.setattr(report_examples, "MOST_PANELS", 3)
    monkeypatch.setattr(report_examples, "_panels", panels)
    assert {len(p.panels) for p in report_examples.examples(None, is_intact)} == {3}  # type: ignore[arg-type]
    assert max(made) == 2
