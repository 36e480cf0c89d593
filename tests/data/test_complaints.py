"""Damaged images that can still be decoded: named once when they are prepared, and silent afterwards."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from aps.data.complaints import Complaints
from aps.data.images import read_image
from aps.data.load import FileSplit, load_split
from aps.data.prepare import prepare
from aps.settings.blocks import UserDataset


def jpeg(file: Path, damaged: bool) -> None:
    """A photograph of noise; damaged: a byte in the middle of it is another, so that libjpeg complains and goes on."""
    content = io.BytesIO()
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    Image.fromarray(noise).save(content, "JPEG")
    changed = bytearray(content.getvalue())
    if damaged:
        changed[1500] ^= 0x55
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(bytes(changed))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for number in range(6):
        jpeg(tmp_path / f"images/{number % 2}/{number}.jpg", damaged=number == 3)
    return tmp_path / "images"


def test_libjpeg_complains_about_the_damaged_one(tree: Path, capfd: pytest.CaptureFixture[str]) -> None:
    read_image(tree / "1/3.jpg")
    assert "JPEG data" in capfd.readouterr().err


def test_a_damaged_image_is_named_once_when_it_is_prepared(tree: Path, capfd: pytest.CaptureFixture[str]) -> None:
    manifest = prepare("mine", tree.parent / "out", UserDataset(folder=str(tree), labels=False))
    shown = capfd.readouterr()
    assert "JPEG data" not in shown.err
    (note,) = [note for note in manifest.notes if "damaged" in note]
    assert note.startswith(
        f"1 image is damaged and used as far as it can be decoded ({tree}/1/3.jpg: Corrupt JPEG data"
    )
    assert note in shown.out and (tree.parent / "out/damaged.txt").read_text().count("\n") == 1


class Pixels(Dataset):
    def __init__(self, split: FileSplit) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, i: int) -> int:
        print(f"read {i}", file=sys.stderr, flush=True)  # what Python says there stays
        return int(self.split.read(i).shape[0])


def test_decoding_workers_are_silent_about_it(tree: Path, capfd: pytest.CaptureFixture[str]) -> None:
    prepare("mine", tree.parent / "out", UserDataset(folder=str(tree), labels=False))
    split = load_split(tree.parent / "out/manifest.json", "train")
    assert isinstance(split, FileSplit)
    capfd.readouterr()
    assert [int(batch) for batch in DataLoader(Pixels(split), batch_size=None, num_workers=1)] == [3] * 6
    shown = capfd.readouterr().err
    assert "JPEG data" not in shown and all(f"read {i}" in shown for i in range(6))


def test_while_they_are_kept_back_python_writes_where_it_did(capfd: pytest.CaptureFixture[str]) -> None:
    with Complaints() as complaints:
        os.write(2, b"from below\n")
        print("from Python", file=sys.stderr)
        assert complaints.size == 11 and complaints.since(0) == "from below" and complaints.since(11) == ""
    os.write(2, b"afterwards\n")
    assert capfd.readouterr().err == "from Python\nafterwards\n"
