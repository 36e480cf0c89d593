"""The picture of views: what it draws against boxes, flips and coverage found in another way."""

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgba
from matplotlib.image import imread

from aps.cli import main
from aps.data.load import ArraySplit
from aps.data.prepare import prepare
from aps.settings.blocks import DatasetSettings, EncoderSettings, SamplingSettings, SourceSettings, ViewSettings
from aps.settings.study import ExperimentSettings
from aps.show_views import COLORS, COLUMNS, Example, draw, examples, shared

GRID = 4
STUDY = """
experiments:
  tiny: {dataset: digits, encoder: {arch: micro, image_size: 16, patch_size: 4}}
  every-cell: {inherits: tiny, sampling: {strategy: full}}
"""


def shown(images: int = 6, **blocks: object) -> list[Example]:
    """Of sources whose colours say where a pixel is: red 6 * row, green 6 * column."""
    y, x = torch.meshgrid(torch.arange(30), torch.arange(40), indexing="ij")
    sources = torch.stack([6 * y, 6 * x, 0 * x]).to(torch.uint8).expand(images, -1, -1, -1)
    encoder = EncoderSettings(arch="micro", image_size=64, patch_size=16)
    settings = ExperimentSettings(dataset=DatasetSettings(name="digits"), encoder=encoder, **blocks)  # type: ignore[arg-type]
    return examples(ArraySplit(sources, torch.zeros(images, dtype=torch.int64), ("a",)), settings, seed=1)


PLAIN = ViewSettings(color_jitter_prob=0.0, grayscale=0.0)


def test_kept_cells_lie_in_the_source_where_their_pixels_come_from() -> None:
    flips = set()
    for example in shown(views=PLAIN):
        for view in (example.view1, example.view2):
            flips.add(view.flip)
            for cell, (top, left, height, width) in zip(view.kept, view.cells(GRID), strict=True):
                row, column = cell // GRID, cell % GRID
                patch = view.pixels[16 * row : 16 * (row + 1), 16 * column : 16 * (column + 1)] * 255 / 6
                centre = patch[:, :, :2].mean((0, 1)) + 0.5  # of the pixels seen, in source pixels
                assert np.abs(centre - (top + height / 2, left + width / 2)).max() < 0.5
    assert flips == {True, False}


def test_cells_drawn_overlap_as_much_as_the_coverage_map_says() -> None:
    for example in shown(sampling=SamplingSettings(gamma=0)):
        ones = np.array(example.view1.cells(GRID))
        for cell, (top, left, height, width) in zip(example.view2.kept, example.view2.cells(GRID), strict=True):
            low = np.maximum(ones[:, :2], (top, left))
            high = np.minimum(ones[:, :2] + ones[:, 2:], (top + height, left + width))
            overlap = (high - low).clip(0).prod(1).sum() / (height * width)
            assert example.covered.ravel()[cell] == pytest.approx(overlap, abs=1e-5)
    assert max(e.covered.max() for e in shown(sampling=SamplingSettings(gamma=0))) > 0.5


def test_whole_crops_share_what_probability_says_and_asymmetric_sampling_avoids_it() -> None:
    """Two views of the whole image, mirrored or not: random cells of a share r meet a share r of the others."""
    encoder = EncoderSettings(arch="micro", image_size=32, patch_size=4)
    whole = ViewSettings(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
    found = {}
    for strategy in ("asymmetric", "random", "full"):
        settings = ExperimentSettings(
            dataset=DatasetSettings(name="digits"), encoder=encoder, views=whole,
            sampling=SamplingSettings(strategy=strategy, ratio=0.25, samplings=1),
        )  # type: ignore[call-arg]  # fmt: skip
        found[strategy] = shared([(32, 32)], settings, seed=0)
    assert found["full"] == pytest.approx((1, 1))
    assert found["random"].all == pytest.approx(0.25) and found["random"].kept == pytest.approx(0.25, abs=0.01)
    assert found["asymmetric"].all == pytest.approx(0.25) and found["asymmetric"].kept == 0


def test_panels_hold_the_boxes_views_cells_and_coverage() -> None:
    found = shown(2)
    figure = draw(found, GRID)
    assert len(figure.axes) == 2 * len(COLUMNS)
    assert [ax.get_title() for ax in figure.axes[: len(COLUMNS)]] == list(COLUMNS)
    for i, example in enumerate(found):
        row = figure.axes[i * len(COLUMNS) : (i + 1) * len(COLUMNS)]
        views = (example.view1, example.view2)
        for view, color in zip(views, COLORS, strict=True):
            source, both = (
                [
                    (p.get_y(), p.get_x(), p.get_height(), p.get_width())
                    for p in ax.patches
                    if p.get_edgecolor() == to_rgba(color)
                ]
                for ax in (row[0], row[6])
            )
            assert source == [view.box]
            assert both == view.cells(GRID)
        for ax, view in ((row[1], views[0]), (row[3], views[1])):
            assert np.array_equal(ax.images[0].get_array(), view.pixels)
        for ax, view in ((row[2], views[0]), (row[4], views[1]), (row[5], views[1])):
            assert [GRID * p.get_y() + p.get_x() for p in ax.patches] == view.kept
        assert np.array_equal(row[4].images[0].get_array(), example.covered)
        faded = row[5].images[0].get_array()
        seen = np.kron(np.isin(np.arange(GRID**2), views[1].kept).reshape(GRID, GRID), np.ones((16, 16))) > 0
        assert np.allclose(faded[seen], views[1].pixels[seen]) and (faded[~seen] > 0.8).all()


def test_the_verb_draws_a_studys_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare("digits", tmp_path / "data" / "digits", SourceSettings())
    study, out = tmp_path / "study.yaml", tmp_path / "pictures" / "views.png"
    study.write_text(f"results: {tmp_path}\n{STUDY}")
    command = ["show-views", "--configfile", str(study), "--images", "2", "--out"]
    assert main([*command, str(out)]) == 0 and capsys.readouterr().out.endswith(f"{out}\n")
    first = imread(out)
    height, width, _ = first.shape
    assert 300 < height < width and np.unique(first.reshape(-1, first.shape[2]), axis=0).shape[0] > 100
    assert main([*command, str(out)]) == 0 and np.array_equal(imread(out), first)  # nothing but the seed decides
    assert main([*command, str(tmp_path / "b.png"), "--seed", "1"]) == 0
    assert main([*command, str(tmp_path / "c.png"), "--experiment", "every-cell"]) == 0
    assert not any(np.array_equal(imread(tmp_path / name), first) for name in ("b.png", "c.png"))


def test_no_images_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["show-views", "--images", "0", "--out", str(tmp_path / "views.png")])
    assert ended.value.code == 2 and 'argument --images: "0" is not a whole number from 1' in capsys.readouterr().err


@pytest.mark.parametrize("name", ["views.txt", "views.jpg", "views.svg"])
def test_a_file_of_another_kind_is_refused_before_anything_is_read(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = tmp_path / "study.yaml"
    study.write_text(f"results: {tmp_path}\n{STUDY}")
    assert main(["show-views", "--configfile", str(study), "--out", str(tmp_path / name)]) == 2
    assert f"{name}: the picture is written as PNG; name a .png file" in capsys.readouterr().err


def test_a_dataset_that_is_not_prepared_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = tmp_path / "study.yaml"
    study.write_text(f"results: {tmp_path}\n{STUDY}")
    assert main(["show-views", "--configfile", str(study), "--out", str(tmp_path / "views.png")]) == 2
    assert "prepare it by `python -m aps data digits" in capsys.readouterr().err
