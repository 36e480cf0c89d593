"""`shrink`: a folder's large images are used as smaller copies."""

from pathlib import Path
from typing import Any

import pytest
import torch
from miniatures import image, png
from PIL import Image
from torchvision.io import encode_jpeg

from aps.data.images import read_image
from aps.data.load import FileSplit, load_split
from aps.data.manifest import Manifest
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


def test_copies_have_the_size_and_the_names_and_show_the_same(photos: Path, tmp_path: Path) -> None:
    manifest, folder = run(tmp_path)
    for split in ("train", "test"):
        loaded = load_split(folder / "manifest.json", split)
        assert isinstance(loaded, FileSplit) and loaded.root == folder / "shrunk" / split
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
    assert read_image(next((folder / "shrunk").rglob("0.jpg"))).shape == (3, 48, 32)


def test_another_size_is_another_dataset_with_another_digest(photos: Path, tmp_path: Path) -> None:
    found = [run(tmp_path, shrink) for shrink in (None, 32, 24)]
    assert len({folder for _, folder in found}) == 3 and len({manifest.digest for manifest, _ in found}) == 3
    assert "shrunk to 24 pixels" in found[2][0].digest_of and "shrunk" not in found[0][0].digest_of
    assert not (found[0][1] / "shrunk").exists()
    photos.rename(tmp_path / "moved")
    source = UserDataset(folder=str(tmp_path / "moved"), shrink=24)
    assert prepare("mine", tmp_path / "elsewhere", source).digest == found[2][0].digest


def test_what_changed_is_copied_anew_and_what_is_gone_is_deleted(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, folder = run(tmp_path, labels=False)
    (photos / "a/0.jpg").unlink()
    (photos / "a/3.jpg").write_bytes(encode_jpeg(image(99, 60, 90), 95).numpy().tobytes())
    old = (folder / "shrunk/train/a/3.jpg").read_bytes()
    after, _ = run(tmp_path, labels=False)
    assert "1 image gone, 1 changed; preparing it again" in capsys.readouterr().out
    assert after.splits["train"].count == before.splits["train"].count - 1
    assert not (folder / "shrunk/train/a/0.jpg").exists() and (folder / "shrunk/train/a/3.jpg").read_bytes() != old


def test_copies_that_are_gone_are_made_again(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, folder = run(tmp_path)
    next((folder / "shrunk/train").rglob("0.jpg")).unlink()
    assert run(tmp_path)[0] == before and "is missing; preparing it again" in capsys.readouterr().out


def test_an_unreadable_image_is_named_by_its_own_path(photos: Path, tmp_path: Path) -> None:
    (photos / "a/4.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"photos/a/4\.png: cannot be read as an image .* \(1 such file, listed in"):
        run(tmp_path)


def test_an_image_too_long_for_a_copy_is_named(photos: Path, tmp_path: Path) -> None:
    (photos / "a/4.png").write_bytes(png(torch.zeros(3, 40, 90_000, dtype=torch.uint8)))
    with pytest.raises(
        UserError, match=r"photos/a/4\.png: would be 72,000x32 pixels once shrunk, more than a JPEG file holds"
    ):
        run(tmp_path)


def test_a_disk_that_is_full_is_a_sentence(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_bytes

    def full(self: Path, content: bytes) -> int:
        if "shrunk" in self.parts:
            raise OSError(28, "No space left on device", str(self))
        return write(self, content)

    with (
        monkeypatch.context() as patch,
        pytest.raises(UserError, match=r"shrunk/.*: No space left on device; free the disk"),
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
