"""Features in a file: whole or not there, resumed where a run was killed, never computed twice, in constant memory."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.decomposition import PCA

from aps.errors import Preempted, UserError
from aps.inference import features
from aps.inference.features import Item, Written, file_named, files, name_of, read_metadata, write_features
from aps.inference.images import Once
from aps.inference.load import load
from aps.inference.model import Model


@pytest.fixture(scope="module")
def model(finished: Path) -> Model:
    found = load(finished / "results/photos/mine/seed0/pretrain")
    assert isinstance(found, Model)
    return found


@pytest.fixture
def photos(finished: Path, tmp_path: Path) -> Path:
    """A copy of the photographs, to be changed; ten a folder."""
    for kind in ("blue", "green", "red"):
        (tmp_path / "photos" / kind).mkdir(parents=True)
        for file in sorted((finished / "photos" / kind).glob("*.jpg"))[:10]:
            shutil.copy2(file, tmp_path / "photos" / kind)
    return tmp_path / "photos"


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "PART", 8)


def write(model: Model, photos: Path, out: Path, **more: Any) -> Written:
    return write_features(model, files([photos]), 30, out, batch_size=4, **more)


def table(out: Path) -> dict[str, Any]:
    read = pq.read_table(out)
    columns = {name: read[name].to_pylist() for name in read.column_names}
    return columns | {"embedding": np.array(columns["embedding"], dtype=np.float32), "xy": np.array(columns["xy"])}


def test_a_row_is_an_images_path_embedding_and_place(model: Model, photos: Path, tmp_path: Path) -> None:
    written = write(model, photos, tmp_path / "f.parquet")
    assert written == Written(images=30, computed=30, known=0, unreadable=0)
    found, paths = table(tmp_path / "f.parquet"), sorted(photos.glob("*/*.jpg"))
    assert found["path"] == [str(path) for path in paths]
    assert np.abs(found["embedding"] - model.embed(paths).numpy()).max() < 1e-5
    assert found["bytes"] == [path.stat().st_size for path in paths]
    assert read_metadata(tmp_path / "f.parquet")["weights"] == model.digest
    assert sorted(os.listdir(tmp_path)) == ["f.parquet", "photos"]


def test_places_are_principal_components(model: Model, photos: Path, tmp_path: Path) -> None:
    write(model, photos, tmp_path / "f.parquet")
    found = table(tmp_path / "f.parquet")
    exact = PCA(2).fit(found["embedding"]).transform(found["embedding"])
    for ours, theirs in zip(found["xy"].T, exact.T, strict=True):
        assert abs(np.corrcoef(ours, theirs)[0, 1]) > 0.99


def test_what_is_there_is_not_computed_again(model: Model, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "f.parquet"
    write(model, photos, out)
    before = table(out)
    assert write(model, photos, out) == Written(30, computed=0, known=30, unreadable=0)
    (photos / "green" / "004.jpg").unlink()
    shutil.copy(photos / "red" / "001.jpg", photos / "aaa.jpg")
    PIL.Image.new("RGB", (40, 40), "white").save(photos / "red" / "009.jpg")  # another image under the same name
    assert write(model, photos, out) == Written(30, computed=2, known=28, unreadable=0)
    after = table(out)
    assert str(photos / "green" / "004.jpg") not in after["path"] and after["path"][0] == str(photos / "aaa.jpg")
    changed = after["path"].index(str(photos / "red" / "009.jpg"))
    assert not np.allclose(after["embedding"][changed], before["embedding"][29])
    assert np.array_equal(after["embedding"][1:5], before["embedding"][:4])


@pytest.mark.parametrize(
    "order", [["red", "blue", "green"], ["green", "blue", "red"], ["blue", "red/003.jpg", "green", "red"]]
)
def test_what_is_there_is_not_computed_again_in_whatever_order_it_is_named(
    model: Model, photos: Path, tmp_path: Path, order: list[str]
) -> None:
    def again(*names: str) -> Written:
        given = [photos / name for name in names]
        return write_features(model, files(given, Once()), 30, tmp_path / "f.parquet", batch_size=4)

    again(*order)
    first = table(tmp_path / "f.parquet")
    assert again(*order) == Written(30, computed=0, known=30, unreadable=0)
    assert table(tmp_path / "f.parquet")["path"] == first["path"]
    (photos / "blue/005.jpg").unlink()
    shutil.copy(photos / "red/001.jpg", photos / "green/new.jpg")
    assert again("blue", "green", "red") == Written(30, computed=1, known=29, unreadable=0)
    after, paths = table(tmp_path / "f.parquet"), sorted(photos.glob("*/*.jpg"))
    assert after["path"] == [str(path) for path in paths]
    assert np.abs(after["embedding"] - model.embed(paths).numpy()).max() < 1e-5


def test_other_weights_start_afresh(model: Model, photos: Path, tmp_path: Path, finished: Path) -> None:
    out = tmp_path / "f.parquet"
    write(model, photos, out)
    other = load(finished / "results/photos/mine/seed0/finetune")
    assert isinstance(other, Model)
    assert write(other, photos, out).computed == 30
    assert read_metadata(out)["weights"] == other.digest


def test_a_run_that_is_asked_to_stop_keeps_what_it_has(model: Model, photos: Path, tmp_path: Path) -> None:
    out, asked = tmp_path / "f.parquet", 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked == 5

    with pytest.raises(Preempted, match="20 images are done; run it again to go on"):
        write(model, photos, out, stop=stop)
    assert not out.exists()
    assert write(model, photos, out) == Written(30, computed=10, known=20, unreadable=0)
    assert table(out)["path"] == [str(path) for path in sorted(photos.glob("*/*.jpg"))]


def test_interrupted_work_on_a_folder_that_changed_is_kept_up_to_the_change(
    model: Model, photos: Path, tmp_path: Path
) -> None:
    out, asked = tmp_path / "f.parquet", 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked == 6  # three parts of eight

    with pytest.raises(Preempted):
        write(model, photos, out, stop=stop)
    (photos / "green" / "003.jpg").unlink()  # the fourteenth: in the second part
    written = write(model, photos, out)
    assert written == Written(29, computed=21, known=8, unreadable=0)
    paths = sorted(photos.glob("*/*.jpg"))
    assert table(out)["path"] == [str(path) for path in paths]
    assert np.abs(table(out)["embedding"] - model.embed(paths).numpy()).max() < 1e-5


@pytest.mark.parametrize("seconds", [0.0, 0.3])
def test_a_killed_run_goes_on_and_ends_in_the_same_file(
    model: Model, finished: Path, photos: Path, tmp_path: Path, seconds: float
) -> None:
    out = tmp_path / "f.parquet"
    code = f"""
import time
from pathlib import Path
from aps.inference import features
from aps.inference.load import load
features.PART = 2
model = load({str(finished / "results/photos/mine/seed0/pretrain")!r})
features.write_features(model, features.files([{str(photos)!r}]), 30, Path({str(out)!r}), batch_size=1, stop=lambda: time.sleep(0.05))
"""
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        parts = tmp_path / "f.parquet.parts"
        until = time.monotonic() + 120
        while len(list(parts.glob("*.parquet"))) < 3 and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(seconds)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not out.exists()
    written = write(model, photos, out)
    assert written.images == 30 and written.known >= 6 and written.computed + written.known == 30
    write(model, photos, tmp_path / "whole.parquet")
    resumed, whole = table(out), table(tmp_path / "whole.parquet")
    assert resumed["path"] == whole["path"]
    assert np.abs(resumed["embedding"] - whole["embedding"]).max() < 1e-5


def test_unreadable_images_are_listed_and_left_out(
    model: Model, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "f.parquet"
    for name in ("blue/000.jpg", "green/005.jpg"):
        (photos / name).write_bytes(b"no image at all")
    for _ in range(2):  # computed, then taken from the file
        written = write(model, photos, out)
        assert (written.images, written.unreadable) == (28, 2)
        listed = (tmp_path / "f.parquet.unreadable.txt").read_text().splitlines()
        assert len(listed) == 2 and "blue/000.jpg: cannot be read" in listed[0]
        assert "left out: " in capsys.readouterr().err
    assert str(photos / "blue" / "000.jpg") not in table(out)["path"]
    good = sorted(photos.glob("*/*.jpg"))
    PIL.Image.new("RGB", (40, 40)).save(good[0])
    PIL.Image.new("RGB", (40, 40)).save(photos / "green/005.jpg")
    assert write(model, photos, out) == Written(30, computed=2, known=28, unreadable=0)
    assert not (tmp_path / "f.parquet.unreadable.txt").exists()


def test_nothing_readable_is_a_sentence(model: Model, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"no")
    with pytest.raises(UserError, match="none of the 1 images can be read; they are listed in"):
        write_features(model, files([tmp_path / "a.jpg"]), 1, tmp_path / "f.parquet")


@pytest.mark.parametrize("count", [1, 2, 9, 17])
def test_a_few_images_have_a_place_too(model: Model, photos: Path, tmp_path: Path, count: int) -> None:
    chosen = sorted(photos.glob("*/*.jpg"))[:count]
    write_features(model, files(chosen), count, tmp_path / "f.parquet", batch_size=4)
    assert table(tmp_path / "f.parquet")["xy"].shape == (count, 2)


def test_only_one_process_writes_a_file(model: Model, photos: Path, tmp_path: Path) -> None:
    def again() -> bool:
        with pytest.raises(UserError, match="is being written by another process"):
            write(model, photos, tmp_path / "f.parquet")
        return False

    write(model, photos, tmp_path / "f.parquet", stop=again)


def test_memory_does_not_grow_with_the_images(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "PART", 256)
    monkeypatch.setattr(model, "features_of", lambda pixels: torch.zeros(len(pixels), model.dim))
    monkeypatch.setattr(
        model, "prepared", lambda images, n: ([torch.zeros(1)] * len(list(part)) for part in chunks(images, n))
    )

    def chunks(images: Any, n: int) -> Iterator[list[Any]]:
        images = iter(images)
        while part := [x for _, x in zip(range(n), images, strict=False)]:
            yield part

    def peak(count: int) -> int:
        items = (Item(f"{i:08d}.jpg", "", None, 1, 1) for i in range(count))
        tracemalloc.start()
        write_features(model, items, count, tmp_path / f"{count}.parquet")
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(300)
    assert peak(6000) < 1.5 * peak(1500)


def test_a_foreign_file_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "f.parquet").write_text("no")
    with pytest.raises(UserError, match="is no file of features"):
        read_metadata(tmp_path / "f.parquet")
    with pytest.raises(UserError, match="does not exist; `aps embed WEIGHTS IMAGES"):
        read_metadata(tmp_path / "g.parquet")


def test_names_that_are_no_text_do_not_end_the_run(model: Model, photos: Path, tmp_path: Path) -> None:
    shutil.copy(photos / "red" / "000.jpg", os.fsencode(photos) + b"/red/\xff.jpg")
    written = write_features(model, files([photos / "red"]), 11, tmp_path / "f.parquet")
    assert written.images >= 10 and written.images + written.unreadable == 11
    if not written.unreadable:
        assert table(tmp_path / "f.parquet")["path"][-1].endswith("red/\\xff.jpg")


def test_metadata_is_plain_json(model: Model, photos: Path, tmp_path: Path) -> None:
    write(model, photos, tmp_path / "f.parquet")
    assert json.loads(json.dumps(read_metadata(tmp_path / "f.parquet")))["rows"] == 30


@pytest.mark.parametrize("name", [b"a/\xff\xfe.png", b"\x80", "é.png".encode(), b"a/plain.png"])
def test_a_name_leads_back_to_its_file(name: bytes) -> None:
    path = os.fsdecode(name)
    assert name_of(path).encode("utf-8") and file_named(name_of(path)) == path
