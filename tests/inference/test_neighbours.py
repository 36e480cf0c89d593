"""The nearest are the nearest, read a piece at a time; FAISS finds nearly all of them."""

from __future__ import annotations

import csv
import re
import shutil
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
import torch.nn.functional as F

from aps.errors import UserError
from aps.inference import features, neighbours
from aps.inference.features import Item, files, write_features
from aps.inference.load import load
from aps.inference.model import Model
from aps.inference.neighbours import Index, table, write_table


@pytest.fixture(scope="module")
def model(finished: Path) -> Model:
    found = load(finished / "results/photos/mine/seed0/finetune")
    assert isinstance(found, Model)
    return found


@pytest.fixture(scope="module")
def index(model: Model, finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Index:
    """Of the photographs, in pieces of 7."""
    out = tmp_path_factory.mktemp("index") / "f.parquet"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "PART", 7)
        patch.chdir(finished)
        write_features(model, files(["photos"]), 60, out)
    return Index(out)


def test_search_is_exact_over_all_pieces(index: Index) -> None:
    every = torch.cat([vectors for _, vectors in index.batches()])
    assert every.shape == (60, 48) and torch.allclose(every.norm(dim=1), torch.ones(60), atol=1e-5)
    queries = torch.randn(5, 48, generator=torch.Generator().manual_seed(0))
    similar, rows = index.search(queries, 9)
    expected = (F.normalize(queries, dim=1) @ every.T).topk(9, dim=1)
    assert torch.equal(rows, expected.indices) and torch.allclose(similar, expected.values, atol=1e-6)


def test_more_neighbours_than_images_are_all_of_them(index: Index) -> None:
    _, rows = index.search(torch.randn(2, 48), 1000)
    assert rows.shape == (2, 60) and all(sorted(row) == list(range(60)) for row in rows.tolist())


def test_an_image_is_its_own_nearest_and_its_kind_follows(model: Model, index: Index, finished: Path) -> None:
    files_ = [finished / "photos/red/003.jpg", finished / "photos/blue/010.jpg"]
    for file, found in zip(files_, index.neighbours(model.embed(files_), 5), strict=True):
        assert found[0].path == str(file.relative_to(finished)) and found[0].similarity == pytest.approx(1, abs=1e-4)
        assert [n.similarity for n in found] == sorted((n.similarity for n in found), reverse=True)


def test_a_file_is_found_from_wherever_one_asks(
    index: Index, finished: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert index.image("photos/red/003.jpg") == finished / "photos/red/003.jpg"
    assert index.image("photos/red/nowhere.jpg") is None


def test_features_of_other_weights_are_refused(index: Index, finished: Path, model: Model) -> None:
    index.check(model)
    with pytest.raises(UserError, match=r"was made by .*finetune, not by the weights of .*pretrain"):
        index.check(load(finished / "results/photos/mine/seed0/pretrain"))


def test_the_table_is_for_people_and_for_programs(index: Index, model: Model, finished: Path, tmp_path: Path) -> None:
    query = str(finished / "photos/green/000.jpg")
    found = index.neighbours(model.embed(query), 3)
    text = table([query], found)
    assert text.splitlines()[0] == query and "  1   1.000  photos/green/000.jpg" in text
    write_table(tmp_path / "t.csv", [query], found)
    rows = list(csv.DictReader((tmp_path / "t.csv").open()))
    assert [row["rank"] for row in rows] == ["1", "2", "3"] and rows[0]["path"] == "photos/green/000.jpg"


def clustered(model: Model, out: Path, count: int) -> Index:
    """`count` vectors in clusters, as features are, written by the writer itself."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(50, model.dim, generator=generator)
    vectors = centres[torch.arange(count) % 50] + 0.3 * torch.randn(count, model.dim, generator=generator)
    stream = iter(vectors)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "prepared", lambda images, n: ([image] for image in images))
        patch.setattr(model, "features_of", lambda pixels: torch.stack([next(stream) for _ in pixels]))
        write_features(model, (Item(f"{i}", "") for i in range(count)), count, out)
    return Index(out)


def test_faiss_takes_over_above_its_size_and_finds_nearly_all(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("faiss")
    index = clustered(model, tmp_path / "f.parquet", 3000)
    queries = torch.randn(20, model.dim, generator=torch.Generator().manual_seed(1))
    assert not index.approximate
    exact, exact_rows = index.search(queries, 10)
    monkeypatch.setattr(neighbours, "EXACT_UP_TO", 1000)
    assert index.approximate
    found, rows = index.search(queries, 10)
    shared = sum(len(set(a) & set(b)) for a, b in zip(rows.tolist(), exact_rows.tolist(), strict=True))
    assert shared > 0.9 * 200
    same = rows == exact_rows
    assert torch.allclose(found[same], exact[same], atol=1e-5)
    assert "building FAISS's index of 3,000 rows" in capsys.readouterr().err
    index.search(queries, 10)
    assert "building" not in capsys.readouterr().err  # kept beside the features


def test_rows_that_faiss_does_not_find_are_left_out(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    found = torch.tensor([[0.5, -3e38]]), torch.tensor([[7, -1]])
    monkeypatch.setattr(index, "search", lambda queries, k: found)
    assert [n.row for n in index.neighbours(torch.randn(1, 48), 2)[0]] == [7]


@pytest.mark.parametrize("wrong", [0, -1, 1.5, "3", True, None])
def test_a_number_of_neighbours_that_is_none_is_a_sentence(index: Index, wrong: Any) -> None:
    for search in (index.search, index.neighbours):
        with pytest.raises(UserError, match=rf"^k is {wrong!r}; give a whole number from 1$"):
            search(torch.randn(1, 48), wrong)


@pytest.mark.parametrize("shape", [(48,), (2, 47), (1, 2, 48)])
def test_queries_of_another_width_are_a_sentence(index: Index, shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=rf"^queries have shape {re.escape(str(shape))}; .* is searched by \(Q, 48\)$"):
        index.search(torch.randn(shape), 1)


@pytest.mark.parametrize("wrong", [-1, 60, 0.5, "0"])
def test_a_row_that_is_not_there_is_a_sentence(index: Index, wrong: Any) -> None:
    for look in (index.vectors, index.describe):
        with pytest.raises(UserError, match=rf"f.parquet: row is {wrong!r}; "):
            look([0, wrong])


def test_without_faiss_search_stays_exact(model: Model, index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "EXACT_UP_TO", 10)
    monkeypatch.setattr(neighbours, "find_spec", lambda name: None)
    assert not index.approximate
    assert index.search(torch.randn(1, 48), 3)[1].shape == (1, 3)


def test_a_file_of_the_same_name_in_another_folder_is_not_taken_for_a_row_s(
    model: Model, finished: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Neither while the row's own file is there nor when it is gone; a copy of it that was moved here is."""
    made, elsewhere = tmp_path / "made", tmp_path / "elsewhere"
    for folder in (made, elsewhere):
        (folder / "photos").mkdir(parents=True)
    shutil.copy(finished / "photos/red/003.jpg", made / "photos/a.jpg")
    PIL.Image.new("RGB", (40, 40), "magenta").save(elsewhere / "photos/a.jpg")
    monkeypatch.chdir(made)
    write_features(model, files(["photos"]), 1, Path("f.parquet"))
    monkeypatch.chdir(elsewhere)
    index = Index(made / "f.parquet")
    assert index.image("photos/a.jpg", 0) == made / "photos/a.jpg"
    (made / "photos/a.jpg").rename(elsewhere / "moved.jpg")
    assert index.image("photos/a.jpg", 0) is None and index.identity("photos/a.jpg", 0) is None
    Path("moved.jpg").rename("photos/a.jpg")
    assert index.image("photos/a.jpg", 0) == Path("photos/a.jpg")
