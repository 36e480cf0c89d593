"""`shrink`: a folder's large images are used as smaller copies."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from miniatures import image, png
from PIL import Image
from torchvision.io import encode_jpeg

from aps.data import fetch, trees
from aps.data.images import decode_image, read_image
from aps.data.load import FileSplit, load_split
from aps.data.manifest import Manifest, read_index, with_sizes, write_index
from aps.data.prepare import prepare
from aps.errors import UserError
from aps.layout import data_folder
from aps.settings.blocks import UserDataset


@pytest.fixture()
def photos(tmp_path: Path) -> Path:
    """Three sizes: 60x90 as JPEG, 40x120 as PNG, and 20x30, which is small already."""
    for kind in (0, 1):
        for number in range(6):
            height, width = [(60, 90), (120, 40), (20, 30)][number % 3]
            pixels = image(10 * kind + number, height, width)
            file = tmp_path / "photos" / "ab"[kind] / f"{number}.{'png' if number % 3 == 1 else 'jpg'}"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(png(pixels) if file.suffix == ".png" else encode_jpeg(pixels, 95).numpy().tobytes())
    return tmp_path / "photos"


def run(tmp_path: Path, shrink: int | None = 32, **entry: Any) -> tuple[Manifest, Path]:
    source = UserDataset(folder=str(tmp_path / "photos"), shrink=shrink, **entry)
    folder = tmp_path / data_folder("mine", source)
    return prepare("mine", folder, source), folder


def copies(folder: Path) -> Path:
    """The only folder of copies."""
    (found,) = folder.glob("shrunk*")
    return found


def test_copies_have_the_size_and_the_names_and_show_the_same(photos: Path, tmp_path: Path) -> None:
    manifest, folder = run(tmp_path)
    for split in ("train", "test"):
        loaded = load_split(folder / "manifest.json", split)
        assert isinstance(loaded, FileSplit) and loaded.root == copies(folder) / split
        for i in range(len(loaded)):
            original, copy = photos / loaded.path(i).relative_to(loaded.root), loaded.read(i)
            assert min(copy.shape[1:]) == min(32, min(read_image(original).shape[1:]))
            with Image.open(original) as picture:
                expected = picture.convert("RGB").resize((copy.shape[2], copy.shape[1]), Image.Resampling.BICUBIC)
            difference = copy.int() - read_image_of(expected, tmp_path).int()
            assert difference.abs().float().mean() < 2
            if min(read_image(original).shape[1:]) <= 32:
                assert loaded.path(i).read_bytes() == original.read_bytes()
    assert manifest.splits["train"].count == 10 and manifest.splits["test"].count == 2 and manifest.image_size is None


def read_image_of(picture: Image.Image, tmp_path: Path) -> torch.Tensor:
    picture.save(tmp_path / "expected.png")
    return read_image(tmp_path / "expected.png")


def test_its_statistics_are_those_of_the_copies(photos: Path, tmp_path: Path) -> None:
    manifest, folder = run(tmp_path)
    split = load_split(folder / "manifest.json", "train")
    means = torch.stack([split.read(i).double().mean((1, 2)) / 255 for i in range(len(split))])
    assert manifest.normalization()[0] == pytest.approx(means.mean(0).tolist(), abs=2e-3)


def test_an_image_is_turned_upright_before_it_is_shrunk(photos: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for file in photos.glob("*/[03].jpg"):  # 90 wide and 60 high, shown 60 wide
        Image.open(file).save(file, exif=exif, quality=95)
    _, folder = run(tmp_path)
    assert read_image(next(copies(folder).rglob("0.jpg"))).shape == (3, 48, 32)


def test_another_size_is_another_dataset_with_another_digest(photos: Path, tmp_path: Path) -> None:
    found = [run(tmp_path, shrink) for shrink in (None, 32, 24)]
    assert len({folder for _, folder in found}) == 3 and len({manifest.digest for manifest, _ in found}) == 3
    assert "shrunk to 24 pixels" in found[2][0].digest_of and "shrunk" not in found[0][0].digest_of
    assert not list(found[0][1].glob("shrunk*"))
    photos.rename(tmp_path / "moved")
    source = UserDataset(folder=str(tmp_path / "moved"), shrink=24)
    assert prepare("mine", tmp_path / "elsewhere", source).digest == found[2][0].digest


def change(photos: Path) -> None:
    (photos / "a/0.jpg").unlink()
    (photos / "a/3.jpg").write_bytes(encode_jpeg(image(99, 60, 90), 95).numpy().tobytes())


def test_what_changed_is_copied_anew_and_what_is_gone_is_not(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, folder = run(tmp_path, labels=False)
    old = folder / str(before.splits["train"].images)
    change(photos)
    after, _ = run(tmp_path, labels=False)
    said = capsys.readouterr().out
    assert "1 image gone, 1 changed; preparing it again" in said
    assert f"{old.parent} stays, because a study may be reading" in said and "aps gc" in said
    assert after.splits["train"].count == before.splits["train"].count - 1
    new = folder / str(after.splits["train"].images)
    assert not (new / "a/0.jpg").exists() and (new / "a/3.jpg").read_bytes() != (old / "a/3.jpg").read_bytes()


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("changed", [False, True])
def test_a_study_at_work_reads_on_while_the_dataset_is_prepared_again(
    photos: Path, tmp_path: Path, changed: bool, again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = run(tmp_path)
    split = load_split(folder / "manifest.json", "train")
    before = [split.read(i) for i in range(len(split))]
    same = []

    def decode(*arguments: Any) -> torch.Tensor:  # each time that the preparation decodes an image
        same.append(all(torch.equal(split.read(i), pixels) for i, pixels in enumerate(before)))
        return decode_image(*arguments)

    monkeypatch.setattr(trees, "decode_image", decode)
    for number in range(3):
        if changed:
            (photos / f"a/{number}.{'png' if number == 1 else 'jpg'}").rename(photos / f"a/new{number}.jpg")
        prepare("mine", folder, UserDataset(folder=str(photos), shrink=32), force=again)
    assert all(same) and len(same) == (36 if changed or again else 0)
    assert all(torch.equal(split.read(i), pixels) for i, pixels in enumerate(before))


@pytest.mark.parametrize("damage", ["truncated", "gone"])
def test_any_damaged_copy_is_noticed_and_made_again(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of more copies than a sample would hold."""
    (tmp_path / "photos").mkdir()
    for number in range(520):
        (tmp_path / f"photos/{number:03d}.png").write_bytes(png(image(number % 7, 20, 30)))
    before, folder = run(tmp_path, shrink=16, labels=False)
    for number in (1, 258):
        copy = copies(folder) / f"train/{number:03d}.png"
        whole = copy.read_bytes()
        copy.unlink() if damage == "gone" else copy.write_bytes(whole[:-10])
        capsys.readouterr()
        assert run(tmp_path, shrink=16, labels=False)[0] == before and copy.read_bytes() == whole
        told = "is missing" if damage == "gone" else f"has {len(whole) - 10} bytes instead of {len(whole)}"
        assert f"{number:03d}.png {told}; preparing it again" in capsys.readouterr().out


@pytest.mark.parametrize("manifest", ["manifest.json", "prepared.json"])
@pytest.mark.parametrize("damage", ["truncated", "gone"])
def test_a_damaged_copy_is_mended_by_the_command_that_training_names(
    photos: Path, tmp_path: Path, manifest: str, damage: str
) -> None:
    _, folder = run(tmp_path)
    split = load_split(folder / "manifest.json", "train")
    assert isinstance(split, FileSplit)
    if manifest != "manifest.json":
        (folder / "manifest.json").unlink()  # as while Snakemake runs the rule again
    split.path(0).unlink() if damage == "gone" else split.path(0).write_bytes(split.path(0).read_bytes()[:99])
    told = r"prepare dataset 'mine' again: `python -m aps data mine --again --configfile STUDY\.yaml`$"
    with pytest.raises(UserError, match=r"0\.jpg: cannot be read as an image \(.*\); " + told):
        split.read(0)
    prepare("mine", folder, UserDataset(folder=str(photos), shrink=32), force=True)
    assert split.read(0).shape[0] == 3
    (photos / "a/0.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"photos/a/0\.jpg: .*; replace or remove it$"):
        read_image(photos / "a/0.jpg")


def test_another_image_in_the_place_of_a_copy_is_refused_when_it_is_read(photos: Path, tmp_path: Path) -> None:
    """Also one of the same size, and where a part of the images is used."""
    _, folder = run(tmp_path, labels=False)
    split = load_split(folder / "manifest.json", "train")
    small, large = sorted((copies(folder) / "train/a").glob("*.jpg"), key=lambda file: file.stat().st_size)[::3]
    large.write_bytes(small.read_bytes().ljust(large.stat().st_size, b"\0"))  # what follows a JPEG's end is passed over
    assert read_image(large).equal(read_image(small))
    assert isinstance(split, FileSplit)
    told = rf"{large.name}: .*\(its content is not what was prepared\); prepare dataset 'mine' again: .* --again"
    for part in (split, split.select(torch.arange(5)), load_split(folder / "manifest.json", "train", limit=11)):
        assert isinstance(part, FileSplit)
        row = next((i for i in range(len(part)) if part.path(i) == large), None)
        for read in (part.read, part.compare) if row is not None else ():
            with pytest.raises(UserError, match=told):
                read(row)
        assert all(part.read(i).shape[0] == 3 for i in range(len(part)) if i != row)
    run(tmp_path, labels=False)
    source = UserDataset(folder=str(photos), shrink=32, labels=False)
    prepare("mine", folder, source, force=True)
    assert all(split.read(i).shape[0] == 3 for i in range(len(split)))


def test_a_copy_is_whole_or_as_it_was(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder = run(tmp_path)
    before = {file: file.read_bytes() for file in copies(folder).rglob("*.*")}
    write = Path.write_bytes

    def half(self: Path, content: bytes) -> int:
        write(self, content[: len(content) // 2])
        raise OSError(28, "No space left on device", str(self))

    with monkeypatch.context() as patch, pytest.raises(UserError, match="No space left on device"):
        patch.setattr(Path, "write_bytes", half)
        prepare("mine", folder, UserDataset(folder=str(photos), shrink=32), force=True)
    assert {file: file.read_bytes() for file in copies(folder).rglob("*.*")} == before
    left = next(iter(before)).parent.parent / f".new.{2**22}-0123abcd"  # of a killed process
    left.write_bytes(b"half")
    run(tmp_path)
    assert not left.exists()


def test_copies_of_an_earlier_version_are_used_on(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest, folder = run(tmp_path)
    copies(folder).rename(folder / "shrunk")
    splits = {}
    for name, split in manifest.splits.items():
        write_index(folder / f"{name}.tsv", *read_index(folder / f"{name}.tsv"))
        splits[name] = split.model_copy(update={"images": f"shrunk/{name}"})
    old = with_sizes(manifest.model_copy(update={"splits": splits}), folder)
    for file in ("manifest.json", "prepared.json"):
        old.write(folder / file)
    assert run(tmp_path)[0] == old
    next((folder / "shrunk/train").rglob("3.jpg")).unlink()
    assert run(tmp_path)[0] == manifest and "is missing; preparing it again" in capsys.readouterr().out


def test_an_unreadable_image_is_named_by_its_own_path(photos: Path, tmp_path: Path) -> None:
    (photos / "a/4.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"photos/a/4\.png: cannot be read as an image .* \(1 such file, listed in"):
        run(tmp_path)


def test_copies_of_a_preparation_that_never_ended_go_with_the_next_and_those_of_one_that_did_stay(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (photos / "a/4.png").read_bytes()

    def fail() -> Path:
        known = {path.parent for path in tmp_path.glob("mine-*/shrunk-*/train")}
        (photos / "a/4.png").write_bytes(b"no image")
        with pytest.raises(UserError, match=r"4\.png: cannot be read"):
            run(tmp_path)
        (photos / "a/4.png").unlink()
        (new,) = {path.parent for path in tmp_path.glob("mine-*/shrunk-*/train")} - known
        return new

    failed = fail()
    manifest, folder = run(tmp_path)
    first = folder / Path(str(manifest.splits["train"].images)).parent
    assert not failed.exists() and copies(folder) == first and "stays" not in capsys.readouterr().out
    failed = fail()
    assert first.exists()
    (photos / "a/4.png").write_bytes(whole)
    run(tmp_path)
    assert not failed.exists() and first.exists()
    said = capsys.readouterr().out
    assert f"{first} stays, because a study may be reading" in said and said.count("stays") == 1


def test_an_image_too_long_for_a_copy_is_named(photos: Path, tmp_path: Path) -> None:
    (photos / "a/4.png").write_bytes(png(torch.zeros(3, 40, 90_000, dtype=torch.uint8)))
    with pytest.raises(
        UserError, match=r"photos/a/4\.png: would be 72,000x32 pixels once shrunk, more than a JPEG file holds"
    ):
        run(tmp_path)


def test_a_disk_that_is_full_is_a_sentence(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_bytes

    def full(self: Path, content: bytes) -> int:
        if any(part.startswith("shrunk-") for part in self.parts):
            raise OSError(28, "No space left on device", str(self))
        return write(self, content)

    with (
        monkeypatch.context() as patch,
        pytest.raises(UserError, match=r"shrunk-[0-9a-f]{8}/.*: No space left on device; free the disk"),
    ):
        patch.setattr(Path, "write_bytes", full)
        run(tmp_path)
    assert run(tmp_path)[0].splits["train"].count == 10


def test_images_that_take_long_to_decode_are_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in "ab":
        (tmp_path / "photos" / kind).mkdir(parents=True)
        for number in range(3):
            content = encode_jpeg(image(number + 10 * (kind == "a"), 820, 900), 80).numpy().tobytes()
            (tmp_path / "photos" / kind / f"{number}.jpg").write_bytes(content)
    told = "half of the train images have 820 pixels or more on the shorter side"
    assert any(note.startswith(told) and "`shrink: 512`" in note for note in run(tmp_path, None)[0].notes)
    assert run(tmp_path, 512)[0].notes == ()


def many(photos: Path, count: int = 150) -> None:
    """More images than a chunk has, one of them damaged and one of 16 bits."""
    for number in range(count):
        (photos / f"a/{number:03d}.png").write_bytes(png(image(number, 40 + number % 3, 44)))
    whole = encode_jpeg(image(3, 60, 90), 95).numpy().tobytes()
    (photos / "a/005.jpg").write_bytes(whole[: len(whole) // 2] + b"\xff\xd9")
    Image.fromarray(np.arange(40 * 40, dtype=np.uint16).reshape(40, 40)).save(photos / "a/006.png")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the record of the walk, by its name."""
    return {
        str(file.relative_to(folder)): file.read_bytes().replace(bytes(folder), b"")
        for file in folder.rglob("*")
        if file.is_file() and file.name != "files.tsv"
    }


def stopped_at(count: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of images that are decoded from now on. Ctrl-C comes at the `count`th, each time there are so many."""
    decoded = list[str]()

    def decode(content: bytes, path: Path, *more: Any) -> torch.Tensor:
        decoded.append(path.name)
        if len(decoded) == count:
            raise KeyboardInterrupt
        return decode_image(content, path, *more)

    monkeypatch.setattr(trees, "decode_image", decode)
    return decoded


@pytest.mark.parametrize("shrink", [None, 32])
@pytest.mark.parametrize("harm", ["", "cut line", "cut copy"])
def test_a_preparation_that_is_stopped_goes_on_with_the_same_result(
    photos: Path, tmp_path: Path, shrink: int | None, harm: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    many(photos)
    monkeypatch.setattr(fetch, "granted", lambda: 1)  # one thread, so that it is known what was done
    uninterrupted, folder = run(tmp_path, shrink, labels=False)
    expected = contents(folder)
    shutil.rmtree(folder)
    decoded = stopped_at(140, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, shrink, labels=False)
    journal = folder / "decoded.jsonl"
    if harm == "cut line":
        journal.write_bytes(journal.read_bytes()[:-20])
    if harm == "cut copy" and shrink:
        next(copies(folder).rglob(decoded[100])).write_bytes(b"")
    decoded.clear()
    capsys.readouterr()
    assert run(tmp_path, shrink, labels=False)[0] == uninterrupted
    chunks = 1 if harm == "cut line" or (harm and shrink) else 2
    assert len(decoded) == 163 - 64 * chunks and contents(folder) == expected and not journal.exists()
    assert (
        f"decode train: goes on from {64 * (1 if harm == 'cut line' else 2)} of 163 images" in capsys.readouterr().out
    )


@pytest.mark.parametrize("changed", ["the tree", "the size", "nothing, but all is asked for again"])
def test_what_was_decoded_of_other_images_is_not_used(
    photos: Path, tmp_path: Path, changed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    many(photos)
    decoded = stopped_at(163, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, labels=False)
    decoded.clear()
    if changed == "the tree":
        os.utime(photos / "a/000.png", (1, 1))
    source = UserDataset(folder=str(photos), shrink=24 if changed == "the size" else 32, labels=False)
    folder = next(tmp_path.glob("mine-*"))
    with pytest.raises(KeyboardInterrupt):
        prepare("mine", folder, source, force=changed.startswith("nothing"))
    assert len(decoded) == 163


def test_a_folder_that_is_moved_away_ends_it_at_once(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many(photos)
    decoded = list[str]()

    def decode(content: bytes, path: Path, *more: Any) -> torch.Tensor:
        decoded.append(path.name)
        if len(decoded) == 10:
            (photos / "a").rename(tmp_path / "away")
        return decode_image(content, path, *more)

    monkeypatch.setattr(trees, "decode_image", decode)
    monkeypatch.setattr(fetch, "granted", lambda: 1)
    told = r"photos/a/\S+ is gone: the folder has changed since it was listed; run the same command again$"
    with pytest.raises(UserError, match=told):
        run(tmp_path, labels=False)
    assert len(decoded) == 10
    monkeypatch.undo()
    assert run(tmp_path, labels=False)[0].splits["train"].count == 6
