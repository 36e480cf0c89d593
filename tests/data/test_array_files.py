"""The user's own .npz files."""

from __future__ import annotations

import io
import re
import struct
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aps.data.array_files import _duplicates, describe
from aps.data.fingerprint import changed
from aps.data.load import ArraySplit, load_split
from aps.data.manifest import Manifest, copies_in_train
from aps.errors import UserError


def pixels(count: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def run(tmp_path: Path, labelled: bool = True, **content: Any) -> Manifest:
    if content:
        np.savez(tmp_path / "mine.npz", **content)
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    manifest = describe(out, "mine", str(tmp_path / "mine.npz"), "datasets.mine.arrays", labelled)
    manifest.write(out / "manifest.json")
    return manifest


def split(tmp_path: Path, name: str) -> ArraySplit:
    found = load_split(tmp_path / "out" / "manifest.json", name)
    assert isinstance(found, ArraySplit)
    return found


@pytest.mark.parametrize("shape", [(8, 10), (8, 10, 1), (8, 10, 3), (1, 8, 10), (3, 8, 10)])
def test_images_of_any_layout_come_out_as_they_are(shape: tuple[int, ...], tmp_path: Path) -> None:
    images = pixels(40, *shape)
    manifest = run(tmp_path, images=images, labels=np.arange(40) % 4)
    assert manifest.image_size == (8, 10) and manifest.classes == ("0", "1", "2", "3")
    train, test = split(tmp_path, "train"), split(tmp_path, "test")
    assert (len(train), len(test)) == (32, 8) and test.labels.bincount().tolist() == [2] * 4
    as_rgb = images if images.ndim == 4 and images.shape[1] in (1, 3) else images.reshape(40, 8, 10, -1).transpose(0, 3, 1, 2)  # fmt: skip
    expected = {np.broadcast_to(x, (3, 8, 10)).tobytes(): int(i % 4) for i, x in enumerate(as_rgb)}
    for part in (train, test):
        for image, label in zip(part.images, part.labels, strict=True):
            assert expected[image.numpy().tobytes()] == label


@pytest.mark.parametrize("names", ["{split}_{what}", "{axis}_{split}"])
@pytest.mark.parametrize("test", ["test", "val"])
def test_the_usual_names_of_splits_are_known(names: str, test: str, tmp_path: Path) -> None:
    content = {}
    for number, part in enumerate(("train", test)):
        for what, axis, values in (
            ("images", "x", pixels(10 - 4 * number, 6, 6, seed=number)),
            ("labels", "y", np.arange(10 - 4 * number)[:, None] % 2),
        ):
            content[names.format(split=part, what=what, axis=axis)] = values
    manifest = run(tmp_path, **content)
    assert (manifest.splits["train"].count, manifest.splits["test"].count) == (10, 6)


def test_labels_may_be_names_or_numbers_with_gaps(tmp_path: Path) -> None:
    assert run(tmp_path, images=pixels(6, 4, 4), labels=np.array(["dog", "cat"] * 3)).classes == ("cat", "dog")
    assert split(tmp_path, "test").labels.tolist() in ([0, 1], [1, 0])
    assert run(tmp_path, images=pixels(6, 4, 4), labels=np.array([3, 7] * 3)).classes == ("3", "7")
    assert sorted(split(tmp_path, "train").labels.unique().tolist()) == [0, 1]
    named = run(tmp_path, images=pixels(6, 4, 4), labels=np.array([0, 2] * 3), classes=np.array(["a", "b", "c"]))
    assert named.classes == ("a", "c")


def test_without_labels_all_images_are_for_training(tmp_path: Path) -> None:
    manifest = run(tmp_path, labelled=False, train_images=pixels(5, 4, 4), test_images=pixels(2, 4, 4, seed=1))
    assert manifest.kind == "images" and manifest.splits["train"].count == 7 and list(manifest.splits) == ["train"]
    assert split(tmp_path, "train").labels.tolist() == [-1] * 7
    assert torch.equal(split(tmp_path, "train").images[:5, 0], torch.from_numpy(pixels(5, 4, 4)))
    assert run(tmp_path, labelled=False, images=pixels(5, 4, 4), other=1).kind == "images"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"images": pixels(4, 4, 4).astype(np.float32) / 255, "labels": np.arange(4) % 2}, r"'images' holds float32; store pixels as uint8"),
        ({"images": pixels(4, 4, 4, 4), "labels": np.arange(4) % 2}, r"'images' has shape 4x4x4x4; store images as"),
        ({"images": pixels(0, 4, 4), "labels": np.arange(0)}, r"'images' has shape 0x1x4x4"),
        ({"images": pixels(4, 4, 4), "labels": np.arange(5) % 2}, r"'labels' has shape 5 for 4 images"),
        ({"images": pixels(4, 4, 4), "labels": np.array([0.0, 1, 0, 1])}, r"'labels' holds float64; store labels as whole numbers"),
        ({"images": pixels(4, 4, 4), "labels": np.array([0, -1, 0, 1])}, r"'labels' holds label -1; labels start at 0"),
        ({"images": pixels(4, 4, 4), "labels": np.zeros(4, int)}, r"'labels' holds one class; labelled use needs two"),
        ({"images": pixels(4, 4, 4)}, r"has no array 'labels'; add it, or use the images without labels \(labels: false\)"),
        ({"pictures": pixels(4, 4, 4)}, r"holds arrays 'pictures'; name them 'images' and 'labels', or"),
        ({"images": pixels(4, 4, 4), "labels": np.array([0, 1, 2, 0])}, r"class '1': one image can't be split"),
        ({"images": pixels(4, 4, 4), "labels": np.array([0, 5, 0, 5]), "classes": np.array(["a", "b"])}, r"label 5 is beyond the 2 names in 'classes'"),
        ({"train_images": pixels(4, 4, 4), "train_labels": np.arange(4) % 2}, r"has training images and no test images"),
        ({"train_images": pixels(4, 4, 4), "train_labels": np.arange(4) % 2, "test_images": pixels(2, 4, 4), "test_labels": np.array([0, 2])}, r"label 2 of test is none of the 2 labels of train"),
        ({"train_images": pixels(4, 4, 4), "train_labels": np.arange(4) % 2, "test_images": pixels(2, 5, 4), "test_labels": np.array([0, 1])}, r"its splits have images of different shapes"),
        ({"images": np.array([None, {}]), "labels": np.arange(2)}, r"no readable .npz file of plain arrays \(Object arrays"),
    ],
)  # fmt: skip
def test_arrays_that_are_no_images_or_labels_are_one_sentence(
    content: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        run(tmp_path, **content)


NUMBERS, IMAGES = np.array([0, 1] * 3), pixels(6, 4, 4)


@pytest.mark.parametrize(
    ("labels", "classes", "message"),
    [
        (NUMBERS, np.array([["a"], ["b"]]), r"'classes' holds <U1, shape 2x1; store a list of names"),
        (NUMBERS, np.array(5), r"'classes' holds int64, shape of one value; store a list"),
        (NUMBERS, np.array([0.5, 1]), r"'classes' holds float64"),
        (NUMBERS, np.array(["a", "a"]), r"'classes': classes 0 and 1 have one name, 'a'; rename one"),
        (NUMBERS, np.array(["caf\u00e9", "cafe\u0301"]), r"classes 0 and 1 have one name"),
        (NUMBERS, np.array(["a", " "]), r"'classes': class 1 has an empty name; give it one"),
        (NUMBERS, np.array([b"a", b"caf\xe9"]), r"'classes' holds b'caf.xe9', which is not UTF-8; store names as text"),
        (np.array([b"a", b"caf\xe9"] * 3), None, r"'labels' holds b'caf.xe9', which is not UTF-8; store names as text"),
        (np.array(["", "a"] * 3), None, r"its labels: class 0 has an empty name"),
        (np.array(["a\nb", "a"] * 3), None, r"class 1 has name 'a.nb' with a line break or control character; rename"),
        (np.array(["a\x1b[2J", "a"] * 3), None, r"class 1 has name 'a.x1b\[2J' with"),
    ],
)  # fmt: skip
def test_names_of_labels_that_cannot_be_shown_or_told_apart_are_one_sentence(
    labels: np.ndarray, classes: np.ndarray | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        run(tmp_path, images=IMAGES, labels=labels, **({} if classes is None else {"classes": classes}))


def test_names_in_bytes_are_those_in_text(tmp_path: Path) -> None:
    names = ["caf\u00e9", "\u732b \U0001f431"]
    assert run(tmp_path, images=IMAGES, labels=NUMBERS, classes=np.array([x.encode() for x in names])).classes == tuple(names)  # fmt: skip
    as_text = run(tmp_path, images=IMAGES, labels=np.array(names * 3))
    assert run(tmp_path, images=IMAGES, labels=np.array([x.encode() for x in names * 3])).digest == as_text.digest
    assert run(tmp_path, images=IMAGES, labels=NUMBERS, classes=np.array([3, 7])).classes == ("3", "7")


def test_numbers_in_one_split_and_names_in_the_other_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="its splits have numbers and names for labels; store one or the other"):
        run(tmp_path, train_images=IMAGES, train_labels=NUMBERS, test_images=IMAGES, test_labels=NUMBERS.astype("S"))


def test_a_damaged_or_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"datasets.mine.arrays: .*mine.npz is no file; set it to a .npz file"):
        run(tmp_path)
    np.savez_compressed(tmp_path / "mine.npz", images=pixels(9, 8, 8), labels=np.arange(9) % 2)
    whole = (tmp_path / "mine.npz").read_bytes()
    for content in (whole[:-40], whole[:100], b"no archive", b"", whole[:200] + b"\xff" + whole[201:]):
        (tmp_path / "mine.npz").write_bytes(content)
        with pytest.raises(UserError, match=r"mine.npz: no readable .npz file of plain arrays"):
            run(tmp_path)
    np.save(tmp_path / "one.npy", pixels(4, 4, 4))
    (tmp_path / "one.npy").rename(tmp_path / "mine.npz")
    with pytest.raises(UserError, match=r"holds one array without a name"):
        run(tmp_path)


def altered(file: Path, local: int, central: int, value: int) -> None:
    """Write `value` into a field of every member of a zip, at its offsets in the two headers that a member has."""
    content = bytearray(file.read_bytes())
    for signature, offset in ((b"PK\3\4", local), (b"PK\1\2", central)):
        for found in re.finditer(re.escape(signature), bytes(content)):
            struct.pack_into("<H", content, found.start() + offset, value)
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("local", "central", "value", "says"), [(6, 8, 1, "is encrypted"), (8, 10, 98, "compression method")]
)
def test_an_archive_that_zipfile_cannot_open_is_one_sentence(
    local: int, central: int, value: int, says: str, tmp_path: Path
) -> None:
    np.savez(tmp_path / "mine.npz", images=pixels(6, 4, 4), labels=np.arange(6) % 2)
    altered(tmp_path / "mine.npz", local, central, value)
    with pytest.raises(
        UserError, match=rf"mine.npz: no readable .npz file of plain arrays \(.*{says}.*; save it again"
    ):
        run(tmp_path)


@pytest.mark.parametrize(
    ("shape", "says"), [("(10**15, 4, 4)", "Unable to allocate"), ("(10**25, 4)", "no readable"), ("(-5, 4)", "no readable")]
)  # fmt: skip
def test_an_array_of_an_absurd_shape_is_one_sentence(shape: str, says: str, tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": eval(shape)})
    with zipfile.ZipFile(tmp_path / "mine.npz", "w") as archive:
        archive.writestr("images.npy", header.getvalue() + bytes(99))
    with pytest.raises(UserError, match=rf"mine.npz: .*{says}.*save it again by np.savez"):
        run(tmp_path)


def test_a_text_beside_the_arrays_is_no_array(tmp_path: Path) -> None:
    np.savez(tmp_path / "mine.npz", images=pixels(6, 4, 4), labels=np.arange(6) % 2)
    with zipfile.ZipFile(tmp_path / "mine.npz", "a") as archive:
        archive.writestr("classes", "a text")
    assert run(tmp_path).classes == ("0", "1")


def test_another_file_in_its_place_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    manifest = run(tmp_path, images=pixels(6, 4, 4), labels=np.arange(6) % 2)
    assert changed(manifest, tmp_path / "out") is None
    np.savez(tmp_path / "mine.npz", images=pixels(8, 4, 4), labels=np.arange(8) % 2)
    assert changed(manifest, tmp_path / "out") == "file mine.npz: changed"


def test_images_that_stand_in_train_and_test_alike_are_reported(tmp_path: Path) -> None:
    train, test = pixels(6, 4, 4), pixels(4, 4, 4, seed=1)
    test[2] = train[5]
    manifest = run(tmp_path, train_images=train, train_labels=np.arange(6) % 2, test_images=test, test_labels=np.arange(4) % 2)  # fmt: skip
    assert manifest.notes == (
        "1 image of test stands in train too, with the same content, which flatters test figures",
    )


@pytest.mark.parametrize("labelled", [True, False])
def test_arrays_of_12_bits_in_16_are_reported_and_those_of_16_are_not(labelled: bool, tmp_path: Path) -> None:
    images = pixels(6, 4, 4).astype(np.uint16) * 16
    images[0, 0, 0] = 4000
    for factor, dark in ((1, True), (2, False)):
        notes = run(tmp_path, labelled, images=np.minimum(images, 4000) * factor, labels=np.arange(6) % 2).notes
        assert [note[:60] for note in notes] == ["no value of 6 images of 16 bits is above 4,000 of 65,535; th"] * dark


def test_looking_for_duplicates_holds_no_second_copy_of_the_images() -> None:
    train = pixels(64, 3, 64, 64)
    tracemalloc.start()
    notes = _duplicates(train, train[:2])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert notes and "2 images of test stand in train too" in notes[0]
    assert copies_in_train(notes) == {"test": 2}
    assert peak < train.nbytes / 10
