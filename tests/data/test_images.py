"""Decoding image files: every kind Pillow reads, upright, and nothing that ends the process."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from miniatures import image, png
from PIL import Image, features
from sklearn.datasets import load_sample_image
from torchvision.transforms.v2 import functional

from aps.data.images import decode_image, from_pillow, note_on_levels, orientation, read_image, supported
from aps.data.walk import SUFFIXES
from aps.detection.annotations import read_image as read_for_detection
from aps.errors import UserError


def photograph(height: int = 120, width: int = 160, seed: int = 0) -> Image.Image:
    """Smooth, with detail of a few pixels."""
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def pixels(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)


@pytest.mark.parametrize(
    "suffix", ["bmp", "tif", "ppm", "tga", "qoi", "pcx", "png", "gif", "webp", "avif", "jp2", "jpg"]
)
def test_every_kind_that_pillow_reads_is_read_with_pillows_pixels(tmp_path: Path, suffix: str) -> None:
    if not supported(f".{suffix}"):
        pytest.skip(f"this Pillow does not read {suffix}")
    file = tmp_path / f"a.{suffix}"
    photograph().save(file)
    assert torch.equal(read_image(file), pixels(Image.open(file)))


@pytest.mark.parametrize("options", [{}, {"quality": 95, "subsampling": 0}, {"progressive": True}, {"quality": 30}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_has_pillows_pixels_whatever_decodes_it(tmp_path: Path, mode: str, options: dict[str, object]) -> None:
    for number, size in enumerate([(120, 160), (37, 53), (8, 9)]):
        file = tmp_path / f"{number}.jpg"
        photograph(64, 64).resize(size).convert(mode).save(file, **options)  # type: ignore[arg-type]
        assert torch.equal(read_image(file), pixels(Image.open(file)))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("number", range(1, 9))
def test_an_exif_orientation_is_applied(tmp_path: Path, number: int, suffix: str) -> None:
    seen = photograph(48, 64)
    # How a camera stores what it saw (EXIF 2.3, tag 274): the transposition that showing it undoes.
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose
    stored = seen if number == 1 else seen.transpose(Image.Transpose(undo[number]))
    exif = Image.Exif()
    exif[0x0112] = number
    options = {"jpg": {"quality": 95, "subsampling": 0}, "webp": {"lossless": True}}.get(suffix, {})
    file = tmp_path / f"a.{suffix}"
    stored.save(file, exif=exif, **options)
    assert orientation(file) == number
    read = read_image(file)
    assert read.shape == (3, 48, 64)
    assert (read.float() - pixels(seen).float()).abs().mean() < (3 if suffix == "jpg" else 0.01)
    assert torch.equal(read, read_for_detection(file))


def test_a_damaged_exif_block_leaves_the_image_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "a.jpg"
    photograph().save(file, exif=b"Exif\0\0II*\0\xff\xff\xff\xff broken")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert read_image(file).shape == (3, 120, 160)


def test_16_bit_images_keep_their_upper_byte(tmp_path: Path) -> None:
    values = np.arange(0, 0x10000, 0x111, dtype=np.uint16)[:240].reshape(12, 20)
    for name in ("a.png", "a.tif", "a.pgm"):
        Image.fromarray(values).save(tmp_path / name)
        expected = torch.from_numpy((values >> 8).astype(np.uint8))
        assert torch.equal(read_image(tmp_path / name), expected.expand(3, -1, -1)), name


def png_of_16_bits(channels: int, value: int) -> bytes:
    """A PNG of 8x8 pixels of one value; 1 channel: grey, 2: with alpha, 3: RGB, 4: RGBA."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    pixel = [value] * (channels - 1 + channels % 2) + [0xFFFF] * (1 - channels % 2)  # alpha is no colour
    rows = (b"\0" + struct.pack(f">{channels}H", *pixel) * 8) * 8
    header = struct.pack(">IIBBBBB", 8, 8, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff_of_16_bits(values: np.ndarray, photometric: int) -> bytes:
    """An uncompressed TIFF of values (H, W) or (H, W, 3)."""
    height, width, channels = (*values.shape, 1)[:3]
    start = 8 + 2 + 12 * 9 + 4
    bits = (258, 3, 1, 16) if channels == 1 else (258, 3, 3, start)
    content = b"" if channels == 1 else struct.pack("<3H", 16, 16, 16)
    data = values.astype("<u2").tobytes()
    tags = [(256, 4, 1, width), (257, 4, 1, height), bits, (259, 3, 1, 1), (262, 3, 1, photometric),
            (273, 4, 1, start + len(content)), (277, 3, 1, channels), (278, 4, 1, height), (279, 4, 1, len(data))]  # fmt: skip
    folder = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + folder + bytes(4) + content + data


@pytest.mark.parametrize("kind", ["PNG 1", "PNG 2", "PNG 3", "PNG 4", "TIFF", "PPM"])
def test_dark_images_of_16_bits_are_known_in_every_format_that_has_them(kind: str) -> None:
    for value, dark in ((900, True), (0xFFF, True), (0x1000, False), (0xFFFF, False)):
        if kind.startswith("PNG"):
            content = png_of_16_bits(int(kind[-1]), value)
        elif kind == "TIFF":
            content = tiff_of_16_bits(np.full((8, 8, 3), value), 2)
        else:
            content = b"P6\n# 8 x 8\n8 8\n65535\n" + struct.pack(">H", value) * 192 + b"\n"
        greatest: list[int] = []
        decode_image(content, Path("a"), None, greatest)
        assert len(greatest) == 1 and 0 <= greatest[0] - value < 256
        assert [note[:32] for note in note_on_levels(greatest)] == ["no value of 1 image of 16 bits i"] * dark


def test_images_of_8_bits_and_those_that_are_scaled_are_not_taken_for_dark_ones(tmp_path: Path) -> None:
    dark = Image.fromarray(np.full((8, 8, 3), 3, dtype=np.uint8))
    for name in ("a.png", "a.tif", "a.ppm", "a.jpg"):
        dark.save(tmp_path / name)
        greatest: list[int] = []
        decode_image((tmp_path / name).read_bytes(), tmp_path / name, None, greatest)
        assert greatest == []
    decode_image(b"P6\n8 8\n4095\n" + struct.pack(">H", 4095) * 192, Path("a"), None, greatest)
    assert greatest == [0xFFFF]


def test_a_tiff_whose_zero_is_white_is_no_negative(tmp_path: Path) -> None:
    values = np.linspace(0, 0xFFFF, 240).astype(np.uint16).reshape(12, 20)
    (tmp_path / "a.tif").write_bytes(tiff_of_16_bits(values, 1))
    (tmp_path / "white.tif").write_bytes(tiff_of_16_bits(0xFFFF - values, 0))
    expected = torch.from_numpy((values >> 8).astype(np.uint8)).expand(3, -1, -1)
    for name in ("a.tif", "white.tif"):
        assert torch.equal(read_image(tmp_path / name), expected), name
        assert torch.equal(from_pillow(Image.open(tmp_path / name)), expected), name


@pytest.mark.parametrize("most", [1, 200, 255])
def test_whole_numbers_of_32_bits_that_may_be_of_8_are_refused(most: int, tmp_path: Path) -> None:
    values = np.array([[0, most], [most, 0]], dtype=np.int32)
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(
        UserError, match=rf"a.tif: .*of 32 bits, 0 to {most}, as of 8 bits or dark ones of 16; store 8 or"
    ):
        read_image(tmp_path / "a.tif")
    with pytest.raises(UserError, match="of 32 bits, 0 to"):
        from_pillow(Image.fromarray(values))
    for name in ("a.png", "a.pgm"):  # which say that they have 16
        Image.fromarray(values.astype(np.uint16)).save(tmp_path / name)
        assert read_image(tmp_path / name).max() == 0
        assert from_pillow(Image.open(tmp_path / name)).max() == 0


@pytest.mark.parametrize("most", [0, 256, 0xFFFF])
def test_whole_numbers_of_32_bits_that_can_only_be_of_16_are_those(most: int, tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, most]], dtype=np.int32)).save(tmp_path / "a.tif")
    assert read_image(tmp_path / "a.tif").max() == most >> 8


def test_transparency_is_dropped_and_a_palette_resolved(tmp_path: Path) -> None:
    clear = photograph(20, 30).convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize((30, 20)))
    clear.save(tmp_path / "a.png")
    assert torch.equal(read_image(tmp_path / "a.png"), pixels(photograph(20, 30)))
    palette = photograph(20, 30).quantize(16)
    palette.save(tmp_path / "p.png", transparency=3)
    assert torch.equal(read_image(tmp_path / "p.png"), pixels(palette))


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif"])
def test_of_an_animation_the_first_frame_is_read(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (8, 6), color) for color in ("red", "lime", "blue")]
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:])
    assert (read_image(tmp_path / f"a.{suffix}").float()[:, 2, 3] - torch.tensor([255.0, 0, 0])).abs().max() < 8


def test_floating_point_pixels_are_refused_with_what_to_do(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((4, 4), dtype=np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(
        UserError, match=r"a.tif: cannot be read as an image \(its pixels are floating-point numbers; store"
    ):
        read_image(tmp_path / "a.tif")


DAMAGE = """
import sys
from aps.data.images import read_image
from aps.errors import UserError
for file in sys.argv[1:]:
    try:
        read_image(file)
        print("read", file)
    except UserError as error:
        print("refused", str(error))
"""


def test_a_png_with_any_byte_altered_is_one_sentence_with_its_name_and_nothing_else(tmp_path: Path) -> None:
    whole = png(image(0, 40, 50))
    generator = np.random.default_rng(0)
    files = []
    for number in range(100):
        content = bytearray(whole)
        content[int(generator.integers(len(whole)))] ^= 1 << int(generator.integers(8))
        files.append(tmp_path / f"damaged{number}.png")
        files[-1].write_bytes(bytes(content))
    for length in (0, 7, 20, 45, len(whole) - 1):
        files.append(tmp_path / f"cut{length}.png")
        files[-1].write_bytes(whole[:length])
    run = subprocess.run([sys.executable, "-c", DAMAGE, *map(str, files)], capture_output=True, text=True)
    assert run.returncode == 0 and run.stderr == ""
    lines = run.stdout.splitlines()
    assert len(lines) == len(files)
    for line, file in zip(lines, files, strict=True):
        assert line.startswith(f"refused {file}: cannot be read as an image ("), line


def test_no_altered_file_ends_the_process(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    files = []
    for suffix in filter(lambda suffix: supported(f".{suffix}"), ("jpg", "webp", "avif", "gif", "tif", "bmp", "jp2")):
        photograph(40, 50).save(tmp_path / f"whole.{suffix}")
        whole = (tmp_path / f"whole.{suffix}").read_bytes()
        for number in range(40):
            content = bytearray(whole)
            for _ in range(3):
                content[int(generator.integers(len(whole)))] = int(generator.integers(256))
            files.append(tmp_path / f"{number}.{suffix}")
            files[-1].write_bytes(bytes(content))
    run = subprocess.run([sys.executable, "-c", DAMAGE, *map(str, files)], capture_output=True, text=True)
    assert run.returncode == 0 and len(run.stdout.splitlines()) == len(files), run.stderr


def test_a_known_wrong_colour_profile_prints_nothing(tmp_path: Path) -> None:
    photograph(8, 8).save(tmp_path / "a.png", icc_profile=b"\0" * 200)  # libpng: "iCCP: profile too short"
    run = subprocess.run([sys.executable, "-c", DAMAGE, str(tmp_path / "a.png")], capture_output=True, text=True)
    assert run.stdout.startswith("read") and run.stderr == ""


def test_a_name_that_is_not_utf8_can_be_printed(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    (tmp_path / name).write_bytes(b"no image")
    with pytest.raises(UserError, match=r"caf\\xe9.png: cannot be read") as found:
        read_image(tmp_path / name)
    str(found.value).encode("utf-8")


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_smaller_version_is_a_whole_factor_smaller_and_shows_the_same(tmp_path: Path, suffix: str) -> None:
    photo = Image.fromarray(load_sample_image("china.jpg")).resize((512, 384), Image.Resampling.LANCZOS)
    photo.save(tmp_path / f"a.{suffix}")
    whole = read_image(tmp_path / f"a.{suffix}")
    for at_least, side in ((385, 384), (200, 384), (192, 192), (97, 128), (96, 96)):
        small = read_image(tmp_path / f"a.{suffix}", at_least)
        assert small.shape[1] == side or (suffix == "jpg" and 97 <= small.shape[1] <= 192), at_least
        both = (functional.resize(x, [20, 27], antialias=True).float() for x in (whole, small))
        assert (next(both) - next(both)).abs().mean() < 1.5, at_least


def test_a_smaller_version_of_a_turned_photograph_is_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    photograph(384, 512).save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg", 96).shape == (3, 128, 96)


def test_suffixes_name_formats_of_pillow() -> None:
    assert supported(".jpg") and supported(".tiff") and supported(".mpo")
    assert supported(".avif") == bool(features.check("avif"))
    assert all(suffix == suffix.lower() and suffix.startswith(".") for suffix in SUFFIXES)


def test_an_image_too_large_to_be_meant_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    buffer = io.BytesIO()
    Image.new("L", (30, 30)).save(buffer, "png")
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    with pytest.raises(UserError, match=r"a.png: cannot be read as an image \(Image size \(900 pixels\) exceeds limit"):
        read_image(tmp_path / "a.png")
