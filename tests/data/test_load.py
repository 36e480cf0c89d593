from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from miniatures import image, jpeg, png
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from aps import files
from aps.data.folder import held_out
from aps.data.load import ArraySplit, FileSplit, limited, load_split, read_image
from aps.data.manifest import Manifest, with_sizes
from aps.data.prepare import prepare
from aps.errors import UserError
from aps.settings.blocks import SourceSettings


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "digits"
    prepare("digits", folder, SourceSettings())
    return folder / "manifest.json"


def test_a_dataset_that_was_not_prepared_says_how(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"prepare it by `python -m aps data digits`"):
        load_split(tmp_path / "digits" / "manifest.json", "train")


def test_an_unknown_split_lists_the_known_ones(manifest: Path) -> None:
    with pytest.raises(UserError, match=r"has no split 'val'; it has train, test"):
        load_split(manifest, "val")


def test_a_limit_is_balanced_over_classes_and_repeats(manifest: Path) -> None:
    first = load_split(manifest, "train", limit=105)
    assert isinstance(first, ArraySplit)
    assert first.images.shape == (105, 3, 8, 8)
    assert sorted(first.labels.bincount().tolist()) == [10] * 5 + [11] * 5
    again = load_split(manifest, "train", limit=105)
    other = load_split(manifest, "train", limit=105, seed=1)
    assert torch.equal(first.images, again.images) and torch.equal(first.labels, again.labels)
    assert not torch.equal(first.images, other.images)


def test_a_limit_above_the_split_is_refused(manifest: Path) -> None:
    with pytest.raises(UserError, match=r"limit 2000 exceeds the 1438 train images of dataset 'digits'"):
        load_split(manifest, "train", limit=2000)


@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=60),
    share=st.floats(0.01, 1),
    seed=st.integers(0, 5),
)
@settings(derandomize=True, deadline=None, max_examples=100)
def test_a_smaller_choice_is_part_of_a_larger_one_and_classes_stay_level(
    labels: list[int], share: float, seed: int
) -> None:
    targets = torch.tensor(labels)
    limit = max(1, int(share * len(labels)))
    chosen = limited(targets, limit, seed)
    assert len(chosen) == limit == len(set(chosen.tolist()))
    assert chosen.tolist() == sorted(chosen.tolist())
    assert set(limited(targets, max(1, limit - 1), seed).tolist()) <= set(chosen.tolist())
    whole, counts = targets.bincount(minlength=5), targets[chosen].bincount(minlength=5)
    left = counts < whole  # a class that has not run out has at most one image fewer than any other
    assert not left.any() or counts.max() - counts[left].min() <= 1
    assert limited(targets, len(labels), seed).tolist() == list(range(len(labels)))


def test_a_tensor_file_that_vanished_says_how_to_get_it_back(tmp_path: Path) -> None:
    prepare("digits", tmp_path / "digits", SourceSettings())
    (tmp_path / "digits" / "test.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"test.safetensors: cannot be read .*aps data digits"):
        load_split(tmp_path / "digits" / "manifest.json", "test")
    (tmp_path / "digits" / "test.safetensors").unlink()
    with pytest.raises(UserError, match=r"test.safetensors: cannot be read .*aps data digits"):
        load_split(tmp_path / "digits" / "manifest.json", "test")


def test_png_is_read_exactly_and_jpeg_closely(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(image(3)))
    (tmp_path / "a.JPEG").write_bytes(jpeg(3))
    assert torch.equal(read_image(tmp_path / "a.png"), image(3))
    assert (read_image(tmp_path / "a.JPEG").float() - image(3).float()).abs().mean() < 8


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "I;16", "1", "CMYK"])
def test_any_kind_of_image_becomes_uint8_rgb(tmp_path: Path, mode: str) -> None:
    from PIL import Image

    file = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.new(mode, (6, 4), color=None if mode in ("P", "1") else 0).save(file)
    read = read_image(file)
    assert read.shape == (3, 4, 6) and read.dtype == torch.uint8


def test_a_grayscale_jpeg_has_three_equal_channels(tmp_path: Path) -> None:
    from PIL import Image

    Image.linear_gradient("L").save(tmp_path / "a.jpg")
    read = read_image(tmp_path / "a.jpg")
    assert read.shape == (3, 256, 256) and torch.equal(read[0], read[2])


def test_a_16_bit_image_keeps_its_upper_byte(tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    Image.fromarray(np.full((4, 4), 0x8001, dtype=np.uint16)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").unique().tolist() == [0x80]


@pytest.mark.parametrize("content", [b"", b"no image", jpeg(0)[:200], png(image(0))[:60]])
def test_an_unreadable_image_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.jpg").write_bytes(content)
    with pytest.raises(UserError, match=r"bad.jpg: cannot be read as an image \(.+\); replace or remove it"):
        read_image(tmp_path / "bad.jpg")
    with pytest.raises(
        UserError, match=r"gone.jpg: cannot be read as an image \(No such file or directory\); put it back"
    ):
        read_image(tmp_path / "gone.jpg")


def test_files_are_read_by_row(tmp_path: Path) -> None:
    from miniatures import tree

    tree(tmp_path / "mine" / "train", ["cat", "dog"], 3)
    tree(tmp_path / "mine" / "test", ["cat", "dog"], 2, start=50)
    prepare("folder", tmp_path / "folder", SourceSettings(path=str(tmp_path / "mine")))
    split = load_split(tmp_path / "folder" / "manifest.json", "train")
    assert isinstance(split, FileSplit)
    assert split.labels.tolist() == [0, 0, 0, 1, 1, 1] and split.classes == ("cat", "dog")
    assert torch.equal(split.read(4), image(101))
    assert split.path(4) == (tmp_path / "mine" / "train" / "dog" / "1.png").resolve()
    few = load_split(tmp_path / "folder" / "manifest.json", "train", limit=2)
    assert few.labels.tolist() == [0, 1]
    assert isinstance(few, FileSplit) and {few.path(0), few.path(1)} < {split.path(i) for i in range(len(split))}


@pytest.mark.parametrize("kind", ["tensors", "index"])
def test_a_flipped_byte_is_one_sentence_that_names_the_file(tmp_path: Path, kind: str) -> None:
    from miniatures import tree

    if kind == "tensors":
        prepare("digits", tmp_path / "data", SourceSettings())
        file = tmp_path / "data" / "train.safetensors"
    else:
        tree(tmp_path / "mine", ["cat", "dog"], 5)
        prepare("folder", tmp_path / "data", SourceSettings(path=str(tmp_path / "mine")))
        file = tmp_path / "data" / "train.tsv"
    load_split(tmp_path / "data" / "manifest.json", "train")
    whole = file.read_bytes()
    for at in range(0, len(whole), max(1, len(whole) // 7)):
        content = bytearray(whole)
        content[at] ^= 4
        file.write_bytes(bytes(content))
        with pytest.raises(UserError, match=rf"{file}: cannot be read \(damaged or altered since .*; prepare it by"):
            load_split(tmp_path / "data" / "manifest.json", "train")
    file.write_bytes(whole)
    assert len(load_split(tmp_path / "data" / "manifest.json", "train"))


def test_contents_are_verified_once_a_process(tmp_path: Path) -> None:
    prepare("digits", tmp_path / "digits", SourceSettings())
    files._sha256.cache_clear()
    for _ in range(3):
        load_split(tmp_path / "digits" / "manifest.json", "train")
        load_split(tmp_path / "digits" / "manifest.json", "test")
    assert files._sha256.cache_info().misses == 2  # files read


@pytest.mark.parametrize("label", [-1, 10])
def test_labels_out_of_range_are_refused(tmp_path: Path, label: int) -> None:
    prepare("digits", tmp_path / "digits", SourceSettings())
    file = tmp_path / "digits" / "test.safetensors"
    tensors = load_file(file)
    tensors["labels"][7] = label
    save_file(tensors, file)
    path = tmp_path / "digits" / "manifest.json"
    with_sizes(Manifest.read(path), tmp_path / "digits").write(path)
    with pytest.raises(
        UserError, match=rf"test.safetensors: holds label {label}, but dataset 'digits' has classes 0 to 9"
    ):
        load_split(path, "test")


def test_choosing_images_and_splitting_them_take_no_pass_for_each_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass over 14 million images for each of 21,841 classes takes minutes."""

    def refuse(*_: object) -> None:
        raise AssertionError("a pass over all images")

    monkeypatch.setattr(np, "flatnonzero", refuse)
    labels = torch.arange(4000) % 400
    assert limited(labels, 800, 0).tolist() == sorted(limited(labels, 800, 0).tolist())
    train, test = held_out(labels.numpy(), 0, str)
    assert len(test) == 800 and np.bincount(labels.numpy()[test]).tolist() == [2] * 400
    assert sorted([*train, *test]) == list(range(4000))


def test_a_choice_of_images_and_a_split_stay_what_they_were() -> None:
    labels = torch.tensor([2, 0, 1, 0, 2, 2, 1, 0, 2, 1, 0, 0])
    assert limited(labels, 5, 3).tolist() == [2, 4, 6, 7, 10]
    assert held_out(labels.numpy(), 0, str)[1].tolist() == [4, 7, 9]


def test_an_unreadable_image_is_one_sentence_from_a_worker_too(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"not an image")
    loader = DataLoader(_Read([tmp_path / "bad.png"]), num_workers=1)  # type: ignore[arg-type]
    with pytest.raises(UserError) as found:
        next(iter(loader))
    assert str(found.value).startswith(f"{tmp_path / 'bad.png'}: cannot be read") and "\n" not in str(found.value)


class _Read(list[Path]):
    def __getitem__(self, index: int) -> torch.Tensor:  # type: ignore[override]
        return read_image(super().__getitem__(index))
