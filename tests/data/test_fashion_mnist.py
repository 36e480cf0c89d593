import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from miniatures import fashion_mnist as miniature
from miniatures import idx, md5

from aps.data import fashion_mnist, fetch
from aps.data.load import load_split
from aps.data.prepare import prepare
from aps.errors import UserError
from aps.settings.blocks import SourceSettings


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion_mnist, "COUNTS", {"train": 30, "test": 20})


def from_folder(tmp_path: Path) -> SourceSettings:
    return SourceSettings(path=str(tmp_path / "raw"))


@pytest.mark.parametrize("zip_it", [True, False])
def test_idx_files_gzipped_or_not_give_their_images(tmp_path: Path, zip_it: bool) -> None:
    made = miniature(tmp_path / "raw", 30, 20, zip_it)
    manifest = prepare("fashion_mnist", tmp_path / "fashion_mnist", from_folder(tmp_path))
    for split, (images, labels) in made.items():
        loaded = load_split(tmp_path / "fashion_mnist" / "manifest.json", split)
        assert torch.equal(loaded.images, torch.from_numpy(images)[:, None].expand(-1, 3, -1, -1))
        assert torch.equal(loaded.labels, torch.from_numpy(labels).long())
    assert manifest.classes[9] == "Ankle boot" and manifest.image_size == (28, 28)
    assert abs(manifest.normalization()[0][0] - made["train"][0].mean() / 255) < 1e-12


def test_the_same_images_gzipped_or_not_have_the_same_digest(tmp_path: Path) -> None:
    digests = set()
    for zip_it in (True, False):
        miniature(tmp_path / f"{zip_it}", 30, 20, zip_it)
        manifest = prepare("fashion_mnist", tmp_path / f"out{zip_it}", SourceSettings(path=str(tmp_path / f"{zip_it}")))
        digests.add(manifest.digest)
    assert len(digests) == 1


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    miniature(tmp_path / "raw", 30, 20)
    (tmp_path / "raw" / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(UserError, match=r"raw: has neither t10k-labels-idx1-ubyte.gz nor t10k-labels-idx1-ubyte;"):
        prepare("fashion_mnist", tmp_path / "fashion_mnist", from_folder(tmp_path))


def damage(kind: str) -> bytes:
    whole = idx(np.zeros((30, 28, 28)))
    return {
        "truncated gzip": gzip.compress(whole)[:-20],
        "no gzip": whole,
        "altered gzip": gzip.compress(whole)[:-8] + bytes(8),
        "truncated": gzip.compress(whole[:-5]),
        "of labels": gzip.compress(idx(np.zeros(30))),
        "of floats": gzip.compress(bytes([0, 0, 13]) + whole[3:]),
        "of 29 images": gzip.compress(idx(np.zeros((29, 28, 28)))),
        "empty": b"",
    }[kind]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated gzip", "truncated or damaged archive"),
        ("no gzip", "truncated or damaged archive"),
        ("altered gzip", "truncated or damaged archive"),
        ("truncated", "truncated: 23,515 of 23,520 bytes"),
        ("of labels", "not an IDX file of unsigned bytes in 3 dimensions"),
        ("of floats", "not an IDX file of unsigned bytes in 3 dimensions"),
        ("of 29 images", "holds 29x28x28 bytes, not 30x28x28"),
        ("empty", "not an IDX file|truncated or damaged"),
    ],
)
def test_a_damaged_file_is_named_with_its_damage(tmp_path: Path, kind: str, message: str) -> None:
    miniature(tmp_path / "raw", 30, 20)
    (tmp_path / "raw" / "train-images-idx3-ubyte.gz").write_bytes(damage(kind))
    with pytest.raises(UserError, match=f"train-images-idx3-ubyte.gz: .*{message}"):
        prepare("fashion_mnist", tmp_path / "fashion_mnist", from_folder(tmp_path))


def test_a_label_above_nine_is_refused(tmp_path: Path) -> None:
    miniature(tmp_path / "raw", 30, 20)
    (tmp_path / "raw" / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.full(30, 10))))
    with pytest.raises(UserError, match=r"a label is 10, above 9"):
        prepare("fashion_mnist", tmp_path / "fashion_mnist", from_folder(tmp_path))


def test_without_a_folder_the_files_are_downloaded_and_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    miniature(tmp_path / "raw", 30, 20)
    files = sorted((tmp_path / "raw").iterdir())
    monkeypatch.setattr(fashion_mnist, "INSTALLED", tmp_path / "not installed")
    monkeypatch.setattr(
        fashion_mnist, "FILES", [fetch.Published(f.name, f.as_uri(), md5(f.read_bytes())) for f in files]
    )
    assert prepare("fashion_mnist", tmp_path / "fashion_mnist", SourceSettings()).splits["train"].count == 30
    assert sorted(file.name for file in (tmp_path / "fashion_mnist").iterdir()) == [
        "manifest.json",
        "prepared.json",
        "test.safetensors",
        "train.safetensors",
    ]
    assert [file.name for file in fashion_mnist.FILES] == [file.name for file in files]


def test_the_published_list_names_the_four_files_by_their_publisher() -> None:
    assert len(fashion_mnist.FILES) == 4 and all(len(file.md5) == 32 for file in fashion_mnist.FILES)


@pytest.mark.skipif(
    not fashion_mnist.INSTALLED.is_dir(), reason=f"{fashion_mnist.INSTALLED} is absent: install dataset-fashion-mnist"
)
def test_the_70000_real_images_are_prepared_as_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion_mnist, "COUNTS", {"train": 60_000, "test": 10_000})
    manifest = prepare("fashion_mnist", tmp_path / "fashion_mnist", SourceSettings())
    assert manifest.origin == str(fashion_mnist.INSTALLED)
    train = load_split(tmp_path / "fashion_mnist" / "manifest.json", "train")
    test = load_split(tmp_path / "fashion_mnist" / "manifest.json", "test")
    assert train.labels.bincount().tolist() == [6000] * 10 and test.labels.bincount().tolist() == [1000] * 10
    assert train.labels[:5].tolist() == [9, 0, 0, 3, 0]
    # the constants in common use for this data set
    assert [round(value, 4) for value in manifest.normalization()[0]] == [0.2860] * 3
    assert [round(value, 4) for value in manifest.normalization()[1]] == [0.3530] * 3
