"""Anything that is an image gives the pixels that the stages see; anything else is a sentence."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torchvision.transforms.v2 import functional

from aps.data.load import read_image
from aps.errors import UserError
from aps.inference.images import Once, Transform, as_list, decoded, read, walk
from aps.training.features import centred, resized

CENTRE = Transform.of_stage(32, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "centre")
WHOLE = Transform.of_stage(32, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "whole")
PIXELS = np.random.default_rng(0).integers(0, 256, (50, 70, 3)).astype(np.uint8)


@pytest.fixture
def png(tmp_path: Path) -> Path:
    PIL.Image.fromarray(PIXELS).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def same_image(png: Path) -> dict[str, Any]:
    tensor = torch.from_numpy(PIXELS).permute(2, 0, 1)
    return {
        "path": png, "text": str(png), "Pillow's, opened": PIL.Image.open(png), "Pillow's": PIL.Image.fromarray(PIXELS),
        "array": PIXELS, "array, channels first": tensor.numpy(), "tensor": tensor, "tensor, channels last": tensor.permute(1, 2, 0),
        "RGBA array": np.concatenate([PIXELS, PIXELS[..., :1]], 2), "RGBA": PIL.Image.fromarray(PIXELS).convert("RGBA"),
    }  # fmt: skip


def test_every_form_of_an_image_gives_the_same_pixels(png: Path) -> None:
    for form, image in same_image(png).items():
        assert torch.equal(read(image), read_image(png)), form


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_float_images_are_taken_in_zero_to_one(dtype: Any) -> None:
    found = read((PIXELS / 255).astype(dtype))
    assert found.dtype == torch.float32
    assert torch.allclose(found, torch.from_numpy(PIXELS).permute(2, 0, 1) / 255, atol=1e-3)


def test_one_channel_becomes_three() -> None:
    for gray in (
        PIXELS[..., 0],
        PIXELS[..., :1],
        torch.from_numpy(PIXELS[..., 0]),
        PIL.Image.fromarray(PIXELS[..., 0]),
    ):
        assert torch.equal(read(gray), torch.from_numpy(PIXELS[..., 0].copy()).expand(3, -1, -1))


def test_sixteen_bits_are_brought_to_eight(tmp_path: Path) -> None:
    deep = PIXELS[..., 0].astype(np.uint16) * 257
    PIL.Image.fromarray(deep).save(tmp_path / "deep.png")
    for form in (tmp_path / "deep.png", PIL.Image.open(tmp_path / "deep.png")):
        assert torch.equal(read(form)[0], torch.from_numpy(PIXELS[..., 0].copy()))


WRONG = {
    "nothing": (None, "image is a NoneType; give a path"),
    "bytes": (b"abc", "image is a bytes"),
    "a number": (3, "image is a int"),
    "whole numbers": (PIXELS.astype(np.int64), "image has dtype int64; give uint8"),
    "words": (np.array(["a"]), "image has dtype <U1"),
    "yes and no": (torch.zeros(3, 4, 4, dtype=torch.bool), "image has dtype torch.bool"),
    "a normalized tensor": (torch.linspace(-2, 2, 48).view(3, 4, 4), "float values from -2 to 2; give uint8"),
    "floats of bytes": (PIXELS.astype(np.float32), "float values from 0 to 255"),
    "not a number": (torch.full((3, 4, 4), torch.nan), "float values from nan to nan"),
    "two channels": (torch.zeros(2, 4, 5), r"image has shape \(2, 4, 5\); give \(3, H, W\)"),
    "a vector": (np.zeros(5, np.uint8), r"image has shape \(5,\); give \(H, W, 3\)"),
    "no pixels": (np.zeros((0, 5, 3), np.uint8), "holds no pixel"),
    "no file": ("nowhere.jpg", "nowhere.jpg"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_image_is_one_sentence(case: str) -> None:
    image, message = WRONG[case]
    with pytest.raises(UserError, match=message) as caught:
        read(image)
    assert "\n" not in str(caught.value)


def test_files_of_a_folder_are_shown_as_the_stages_show_them(png: Path) -> None:
    assert torch.equal(CENTRE.pixels(png), centred(read_image(png), 32).float() / 255)


def test_images_in_memory_are_shown_as_the_stages_show_them() -> None:
    images = torch.from_numpy(PIXELS).permute(2, 0, 1)[None]
    assert torch.equal(WHOLE.pixels(images[0]), resized(images, 32)[0])
    small = images[:, :, :32, :32]
    assert torch.equal(WHOLE.pixels(small[0]), small[0].float() / 255)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("resize", [None, 40])
def test_the_printed_transform_is_the_transform(png: Path, resize: int | None, interpolation: Any) -> None:
    transform = Transform(32, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), resize, interpolation)
    names: dict[str, Any] = {}
    exec("import torch\nfrom torchvision.transforms import v2\n" + transform.code(), names)
    assert torch.allclose(names["transform"](PIL.Image.open(png)), transform(png), atol=1e-6)


def test_a_transform_normalizes_each_channel_by_its_own(png: Path) -> None:
    x = CENTRE.pixels(png)
    for channel, (mean, std) in enumerate(zip(CENTRE.mean, CENTRE.std, strict=True)):
        assert torch.allclose(CENTRE(png)[channel], (x[channel] - mean) / std)


@pytest.mark.parametrize("size", [8, 32, 224, 443, 815, 1024])
def test_timm_gets_a_share_that_it_turns_into_the_same_pixels(size: int) -> None:
    transform = Transform.of_stage(size, (0.5,) * 3, (0.2,) * 3, "centre")
    assert math.floor(size / transform.timm_config()["crop_pct"]) == transform.resize == round(size * 256 / 224)


def test_one_image_a_list_a_batch_and_a_generator_are_all_lists() -> None:
    batch = torch.zeros(2, 3, 4, 4)
    assert len(as_list("a.jpg")) == len(as_list(PIXELS)) == len(as_list(batch[0])) == 1
    assert len(as_list(batch)) == len(as_list(["a.jpg", PIXELS])) == len(as_list(iter(["a", "b"]))) == 2
    for nothing in ([], torch.zeros(0, 3, 4, 4)):
        with pytest.raises(UserError, match="images is empty"):
            as_list(nothing)
    with pytest.raises(UserError, match="images is a dict; give an image or a list"):
        as_list({"a": 1})  # type: ignore[arg-type]


def test_decoding_keeps_the_order_and_puts_a_sentence_in_place_of_a_broken_image(png: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    given = [png, tmp_path / "broken.jpg", PIXELS, 7, png] * 3
    batches = list(decoded(given, CENTRE.pixels, 4, threads=3))  # type: ignore[arg-type]
    assert [len(batch) for batch in batches] == [4, 4, 4, 3]
    flat = [x for batch in batches for x in batch]
    for number, x in enumerate(flat):
        if number % 5 == 1:
            assert isinstance(x, UserError) and "broken.jpg" in str(x)
        elif number % 5 == 3:
            assert isinstance(x, UserError) and f"image {number} is a int" in str(x)
        else:
            assert torch.equal(x, CENTRE.pixels(png))  # type: ignore[arg-type]


def test_decoding_reads_no_further_ahead_than_a_few_batches() -> None:
    taken = 0

    def images() -> Iterator[np.ndarray]:
        nonlocal taken
        for _ in range(1000):
            taken += 1
            yield PIXELS

    stream = decoded(images(), CENTRE.pixels, 2)
    next(stream)
    assert taken <= 8
    stream.close()  # type: ignore[attr-defined]


def test_walking_finds_images_at_any_depth_in_a_fixed_order(tmp_path: Path) -> None:
    for name in ("b/2.png", "b/1.jpg", "b/c/d/e/3.PNG", "a.jpeg", "b/notes.txt", ".hidden/4.png", "b/.5.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    os.symlink(tmp_path / "b", tmp_path / "z")
    os.symlink(tmp_path, tmp_path / "b" / "up")  # leads back
    found = [str(path.relative_to(tmp_path)) for path in walk([tmp_path])]
    assert found == ["a.jpeg", "b/1.jpg", "b/2.png", "b/c/d/e/3.PNG", "z/1.jpg", "z/2.png", "z/c/d/e/3.PNG"]
    assert list(walk([tmp_path / "b" / "notes.txt"])) == [tmp_path / "b" / "notes.txt"]  # named, so wanted


TREE = {
    "a folder beside its link": (["cats", "zlatest -> cats"], ["."], ["cats/1.png", "cats/sub/2.png"]),
    "a link before its folder": (["cats", "alatest -> cats"], ["."], ["alatest/1.png", "alatest/sub/2.png"]),
    "a link to a folder inside": (["cats", "inner -> cats/sub"], ["."], ["cats/1.png", "cats/sub/2.png"]),
    "a link to a file": (["cats", "cats/0.png -> 1.png"], ["."], ["cats/1.png", "cats/sub/2.png"]),
    "a link to a hidden file": (["cats", ".store", "x.png -> .store/1.png"], ["."], ["cats/1.png", "cats/sub/2.png", "x.png"]),
    "links to one hidden file": ([".store", "x.png -> .store/1.png", "y.png -> .store/1.png"], ["."], ["x.png"]),
    "a folder and a file in it": (["cats"], ["cats", "cats/1.png"], ["cats/1.png", "cats/sub/2.png"]),
    "a file and its folder": (["cats"], ["cats/sub/2.png", "cats"], ["cats/sub/2.png", "cats/1.png"]),
    "a folder twice": (["cats"], ["cats", "cats/../cats"], ["cats/1.png", "cats/sub/2.png"]),
    "a hard link": (["cats", "hard.png = cats/1.png"], ["."], ["cats/1.png", "cats/sub/2.png", "hard.png"]),
}  # fmt: skip


@pytest.mark.parametrize("case", TREE)
def test_a_file_is_met_once_whatever_names_lead_to_it(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, given, expected = TREE[case]
    monkeypatch.chdir(tmp_path)
    for name in made:
        if " -> " in name:
            os.symlink(*reversed(name.split(" -> ")))
        elif " = " in name:
            os.link(*reversed(name.split(" = ")))
        else:
            Path(name, "sub").mkdir(parents=True)
            Path(name, "1.png").touch()
            Path(name, "sub/2.png").touch()
    once = Once()
    assert [str(path) for path in walk(given, once)] == expected
    assert bool(once.left_out) == (case not in ("a link to a hidden file", "a hard link"))


def test_links_that_lead_nowhere_are_images_that_can_not_be_read(tmp_path: Path) -> None:
    for name in ("a.png", "z.png"):
        PIL.Image.new("RGB", (4, 4)).save(tmp_path / name)
    for name, target in (("itself.png", "itself.png"), ("gone.png", "nowhere.png"), ("folder", "folder")):
        os.symlink(target, tmp_path / name)
    once = Once()
    found = list(walk([tmp_path], once))
    assert [path.name for path in found] == ["a.png", "gone.png", "itself.png", "z.png"] and once.left_out == 0
    assert list(walk([tmp_path])) == found
    for path in found[1:3]:
        with pytest.raises(UserError, match=rf"{path.name}: cannot be read as an image"):
            read(path)


def test_a_place_without_images_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no images in this folder"):
        list(walk([tmp_path]))
    with pytest.raises(UserError, match="does not exist; give image files"):
        list(walk([tmp_path / "nowhere"]))


def test_pillow_images_stand_upright(tmp_path: Path) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # turned a quarter
    PIL.Image.fromarray(PIXELS).save(tmp_path / "turned.png", exif=exif)
    upright = functional.pil_to_tensor(PIL.Image.fromarray(np.rot90(PIXELS, 3).copy()))
    assert torch.equal(read(PIL.Image.open(tmp_path / "turned.png")), upright)
