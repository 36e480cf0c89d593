"""Near duplicates are grouped, one of each is kept, and what does not belong is far from all others."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageDraw
import pyarrow.parquet as pq
import pytest
import torch

from aps.inference import curate as module
from aps.inference import features
from aps.inference.curate import Curated, curate, summary, write_table
from aps.inference.features import files, write_features
from aps.inference.load import load
from aps.inference.model import Model
from aps.inference.neighbours import Index


@pytest.fixture(scope="module")
def folder(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten photographs, two of them again (one smaller in bytes, one re-encoded twice), and a chessboard."""
    folder = tmp_path_factory.mktemp("curate")
    for number, file in enumerate(sorted((finished / "photos").glob("*/*.jpg"))[::6]):
        image = PIL.Image.open(file)
        image.save(folder / f"{number:02d}.jpg", quality=95)
        if number == 3:
            image.save(folder / f"{number:02d}-small.jpg", quality=85)
        if number == 5:
            image.save(folder / f"{number:02d}-again.jpg", quality=94)
            image.save(folder / f"{number:02d}-best.png")
    board = PIL.Image.fromarray(((np.indices((64, 64)) // 8).sum(0) % 2 * 255).astype(np.uint8))
    board.save(folder / "board.png")
    return folder


@pytest.fixture(scope="module")
def index(finished: Path, folder: Path) -> Index:
    model = load(finished / "results/photos/mine/seed0/pretrain")
    assert isinstance(model, Model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "PART", 4)  # several pieces
        write_features(model, files([folder]), 14, folder / "f.parquet")
    return Index(folder / "f.parquet")


@pytest.fixture(scope="module")
def found(index: Index) -> Curated:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "AT_ONCE", 5)  # several passes
        return curate(index)


def names(index: Index, rows: list[int]) -> list[str]:
    described = index.describe(sorted(rows))
    return [Path(described[row][0]).name for row in rows]


def test_copies_form_groups_and_the_largest_file_is_kept(index: Index, found: Curated) -> None:
    groups = [names(index, rows) for rows in found.groups]
    assert {frozenset(group) for group in groups} == {
        frozenset({"03.jpg", "03-small.jpg"}),
        frozenset({"05.jpg", "05-again.jpg", "05-best.png"}),
    }
    assert {group[0] for group in groups} == {"03.jpg", "05-best.png"}
    assert int(found.keep.sum()) == len(index) - 3


def test_pieces_and_passes_change_nothing(index: Index, found: Curated) -> None:
    whole = curate(index)
    assert np.array_equal(whole.group, found.group) and np.array_equal(whole.nearest, found.nearest)
    assert np.allclose(whole.outlier, found.outlier, atol=1e-6)


def test_similarity_is_that_of_whitened_features(index: Index, found: Curated) -> None:
    vectors = np.concatenate([x.numpy() for _, x in index.batches()]).astype(np.float64)
    centred = vectors - vectors.mean(0)
    variances, directions = np.linalg.eigh(centred.T @ centred / len(centred))
    white = centred @ directions / np.sqrt(variances.clip(0) + (0.01 + 0.05 * 48 / 14) * variances.clip(0).mean())
    white /= np.linalg.norm(white, axis=1, keepdims=True)
    all_pairs = white @ white.T
    np.fill_diagonal(all_pairs, -2)
    assert np.array_equal(all_pairs.argmax(1), found.nearest)
    assert np.allclose(all_pairs.max(1), found.similarity, atol=1e-3)
    ten = np.sort(all_pairs, axis=1)[:, ::-1][:, :10]
    assert np.allclose(1 - ten.mean(1), found.outlier, atol=1e-3)


def test_what_does_not_belong_is_the_first_outlier(finished: Path, folder: Path, tmp_path: Path) -> None:
    model = load(finished / "results/photos/mine/seed0/finetune")
    assert isinstance(model, Model)
    places = [*sorted((finished / "photos/red").glob("*.jpg")), folder / "board.png"]
    write_features(model, files(places), len(places), tmp_path / "f.parquet")
    index = Index(tmp_path / "f.parquet")
    assert names(index, curate(index).outliers(1)) == ["board.png"]


def test_copies_that_could_go_are_no_outliers(index: Index, found: Curated) -> None:
    assert not {"03-small.jpg", "05.jpg"} & set(names(index, found.outliers(99)))


def test_the_table_has_a_row_an_image(index: Index, found: Curated, tmp_path: Path) -> None:
    write_table(tmp_path / "c.csv", index, found)
    rows = {Path(row["path"]).name: row for row in csv.DictReader((tmp_path / "c.csv").open())}
    assert len(rows) == 14 and rows["03-small.jpg"]["keep"] == "no" and rows["00.jpg"]["group"] == ""
    assert (
        Path(rows["03-small.jpg"]["nearest"]).name == "03.jpg"
        and rows["05.jpg"]["group"] == rows["05-best.png"]["group"]
    )
    assert "14 images: 2 groups of near duplicates, 3 images could go" in summary(index, found, 5)


def test_a_single_image_and_all_alike_are_no_trouble(finished: Path, folder: Path, tmp_path: Path) -> None:
    model = load(finished / "results/photos/mine/seed0/pretrain")
    assert isinstance(model, Model)
    write_features(model, files([folder / "00.jpg"]), 1, tmp_path / "one.parquet")
    alone = curate(Index(tmp_path / "one.parquet"))
    assert alone.groups == [] and alone.keep.tolist() == [True] and alone.nearest.tolist() == [-1]
    summary(Index(tmp_path / "one.parquet"), alone, 3)
    write_table(tmp_path / "one.csv", Index(tmp_path / "one.parquet"), alone)


def test_the_table_reads_the_file_once(
    index: Index, found: Curated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading the pieces again for every few thousand rows takes minutes for a million."""
    monkeypatch.setattr(module, "AT_ONCE", 2)
    opened, reads = index._opened, list[str]()

    class Counting:
        def __getattr__(self, name: str) -> Any:
            reads.append(name)
            return getattr(opened, name)

    monkeypatch.setattr(index, "_opened", Counting())
    write_table(tmp_path / "curate.csv", index, found)
    assert reads == ["read"]


def test_no_name_of_the_kept_file_could_go(finished: Path, folder: Path, tmp_path: Path) -> None:
    """Names of one file are copies of each other; who deletes a link's target deletes the image."""
    model = load(finished / "results/photos/mine/seed0/pretrain")
    assert isinstance(model, Model)
    for number in range(4):
        shutil.copy(folder / f"0{number}.jpg", tmp_path)
    (tmp_path / "hard.jpg").hardlink_to(tmp_path / "01.jpg")
    (tmp_path / "soft.jpg").symlink_to("01.jpg")
    shutil.copy(folder / "01.jpg", tmp_path / "copy.jpg")
    paths = sorted(tmp_path.glob("*.jpg"))
    write_features(model, files(paths), len(paths), tmp_path / "f.parquet")
    index = Index(tmp_path / "f.parquet")
    found = curate(index)
    assert names(index, np.flatnonzero(~found.keep).tolist()) == ["copy.jpg"]
    said = summary(index, found, 5)
    assert "1 image could go" in said and said.count("  keep ") == 3


@pytest.mark.parametrize("spread", [0.0, 1e-5], ids=["copies", "a collapsed encoder"])
def test_features_that_hardly_differ_are_all_alike_and_this_is_said(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder, spread: float
) -> None:
    model = load(finished / "results/photos/mine/seed0/pretrain")
    assert isinstance(model, Model)
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    for number in range(5):
        PIL.Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    compute, noise = model.features_of, torch.Generator().manual_seed(0)
    monkeypatch.setattr(
        model,
        "features_of",
        lambda images: (x := compute(images)) * (1 + spread * torch.randn(x.shape, generator=noise)),
    )
    write_features(model, files([tmp_path]), 5, tmp_path / "f.parquet", batch_size=2)
    index = Index(tmp_path / "f.parquet")
    assert not [str(warning.message) for warning in recwarn if issubclass(warning.category, RuntimeWarning)]
    assert np.isfinite(np.array(pq.read_table(index.file)["xy"].to_pylist())).all()
    found = curate(index)
    assert found.similarity == pytest.approx(1, abs=1e-5) and found.outlier == pytest.approx(0, abs=1e-5)
    assert [len(rows) for rows in found.groups] == [5] and found.keep.sum() == 1
    assert "all features are equal, so similarity is the plain cosine" in summary(index, found, 3)


def test_features_that_differ_are_whitened(index: Index, found: Curated) -> None:
    assert not found.equal and "plain cosine" not in summary(index, found, 3)
