"""Whether a tree changed since it was prepared, by names, sizes and times."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from aps.data.fingerprint import RECORD, changed, take
from aps.data.manifest import Fingerprint, Manifest, Statistics
from aps.data.walk import walk


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """photos/{cat,dog}/{0..3}.jpg below the working directory."""
    for kind in ("cat", "dog"):
        (tmp_path / "photos" / kind).mkdir(parents=True)
        for number in range(4):
            (tmp_path / "photos" / kind / f"{number}.jpg").write_bytes(b"x" * 10)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "photos"


def prepared(fingerprint: Fingerprint) -> Manifest:
    return Manifest(
        name="mine", kind="images", classes=(), image_size=None, splits={}, statistics=Statistics(measured=None),
        digest="0", digest_of="nothing", origin="here", fingerprint=fingerprint,
    )  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def test_an_untouched_tree_has_not_changed(photos: Path, data: Path) -> None:
    manifest = prepared(take(data, [walk(photos)]))
    assert manifest.fingerprint is not None and manifest.fingerprint.count == 8
    assert changed(manifest, data) is None
    (photos / "notes.txt").write_text("no image")
    (photos / ".DS_Store").write_text("")
    assert changed(manifest, data) is None


def test_new_gone_and_changed_images_are_counted(photos: Path, data: Path) -> None:
    manifest = prepared(take(data, [walk(photos)]))
    (photos / "cat" / "0.jpg").unlink()
    assert changed(manifest, data) == "folder photos: 1 image gone"
    for name in ("new", "new2", "new3"):
        (photos / "dog" / f"{name}.jpg").write_bytes(b"y")
    assert changed(manifest, data) == "folder photos: 3 images new, 1 gone"
    (photos / "dog" / "1.jpg").write_bytes(b"z" * 20)
    os.utime(photos / "dog" / "2.jpg", ns=(1, 1))
    assert changed(manifest, data) == "folder photos: 3 images new, 1 gone, 2 changed"


def test_a_renamed_image_is_one_new_and_one_gone(photos: Path, data: Path) -> None:
    manifest = prepared(take(data, [walk(photos)]))
    (photos / "cat" / "0.jpg").rename(photos / "dog" / "9.jpg")
    assert changed(manifest, data) == "folder photos: 1 image new, 1 gone"


def test_a_tree_that_is_gone_or_that_is_trusted(photos: Path, data: Path) -> None:
    manifest = prepared(take(data, [walk(photos)]))
    shutil.rmtree(photos)
    assert changed(manifest, data) == "photos is gone"
    assert changed(manifest, data, trust=True) is None


def test_without_its_record_a_change_is_still_seen(photos: Path, data: Path) -> None:
    manifest = prepared(take(data, [walk(photos)]))
    (data / RECORD).unlink()
    assert changed(manifest, data) is None
    (photos / "cat" / "0.jpg").unlink()
    assert changed(manifest, data) == "folder photos: changed"


def test_single_files_are_looked_at_too(photos: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "instances.json").write_text("{}")
    manifest = prepared(take(data, [walk(photos)], [tmp_path / "instances.json"]))
    assert changed(manifest, data) is None
    (tmp_path / "instances.json").write_text("{ }")
    (photos / "cat" / "0.jpg").unlink()
    assert changed(manifest, data) == "folder photos: 1 image gone; file instances.json: changed"
    (tmp_path / "instances.json").unlink()
    assert "instances.json is gone" in str(changed(manifest, data))


def test_trees_inside_the_datasets_folder_move_with_it(photos: Path, data: Path, tmp_path: Path) -> None:
    photos.rename(data / "train")
    manifest = prepared(take(data, [walk(data / "train")]))
    assert manifest.fingerprint is not None and manifest.fingerprint.roots == ("train",)
    data.rename(tmp_path / "moved")
    assert changed(manifest, tmp_path / "moved") is None


def test_names_of_any_script_and_odd_characters_are_kept_apart(photos: Path, data: Path) -> None:
    for name in ("猫", "犬", "a b", "e\u0301", "\x85x", "a\u2028b"):
        (photos / f"{name}.jpg").write_bytes(b"x")
    manifest = prepared(take(data, [walk(photos)]))
    assert changed(manifest, data) is None
    (photos / "猫.jpg").unlink()
    assert changed(manifest, data) == "folder photos: 1 image gone"
