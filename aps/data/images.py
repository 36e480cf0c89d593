"""Decodes image files to pixels; nothing else in the package does.

It reads whatever Pillow reads: 16 bit, CMYK, palettes, animations (their first frame). An EXIF orientation is applied, so
that an image is upright.

Design: plain JPEG files are decoded by torchvision, which takes two thirds of Pillow's time and gives the same pixels,
because both use libjpeg-turbo; a test compares the two. Everything else, PNG above all, goes through Pillow: a flipped
byte can crash torchvision's PNG decoder, and libpng prints warnings that name no file. The checksums in a PNG are checked
before it is decoded. Colour profiles are not applied, transparency is dropped.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import stat
import struct
import warnings
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError, features
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from aps.data.complaints import dropped
from aps.data.manifest import mending
from aps.data.walk import SUFFIXES, printable
from aps.errors import UserError
from aps.text import number_of

# Pillow's warnings name no file, and what they report is harmless or refused here: a damaged EXIF block, a large image.
warnings.filterwarnings("ignore", module=r"PIL\.")

ORIENTATION = 0x0112  # EXIF tag
BITS_PER_SAMPLE, PHOTOMETRIC = 258, 262  # tags of a TIFF
PNG_DEPTH = 24  # where a PNG says its bits a value
OF_16_BITS = ("PPM", "PNG")  # formats of which Pillow opens 16 bits in its mode of 32
DARK = 0x1000  # images of 16 bits whose values all lie below have 12 bits, of which 4 would be left
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def read_image(path: Path, at_least: int | None = None, checksum: bytes | None = None) -> Tensor:
    """Pixels of an image file, uint8 RGB (3, H, W).

    Args:
        at_least: reduce the image by a whole factor whose result has at least this many pixels on the shorter side (an
            image that is smaller is not reduced); JPEG files are reduced while they are decoded. None: full size.
        checksum: as in `read_file`.

    Raises:
        UserError: the file is missing, damaged, altered, not an image, or has no 8-bit colours.
    """
    return decode_image(read_file(path, checksum), path, at_least)


def read_file(path: Path, checksum: bytes | None = None) -> bytes:
    """The bytes of a file.

    Args:
        checksum: SHA-256 of the file as a preparation wrote it; None: the file is the user's.

    Raises:
        UserError: it can't be read, or is another.
    """
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # reading it may never end
            raise OSError(errno.EINVAL, "a pipe or device")
        content = Path(path).read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _unreadable(path, str(error.strerror), "put it back, or prepare the dataset again without it") from None
    except (OSError, ValueError) as error:
        raise _unreadable(path, str(getattr(error, "strerror", None) or error)) from None
    if checksum is not None and hashlib.sha256(content).digest() != checksum:
        raise _unreadable(path, "its content is not what was prepared")
    return content


def decode_image(content: bytes, path: Path, at_least: int | None = None, greatest: list[int] | None = None) -> Tensor:
    """As `read_image`, of a file's bytes.

    Args:
        path: for error messages.
        greatest: gets the greatest value of an image of 16 bits; for `note_on_levels`.
    """
    try:
        with dropped():
            return _decode(content, at_least, greatest)
    except Exception as error:  # a damaged file can raise anything
        raise _unreadable(path, _reason(error)) from None


def note_on_levels(greatest: list[int]) -> list[str]:
    """The note on images of 16 bits that become nearly black, because all of them are darker than DARK.

    Args:
        greatest: the greatest value of each image of 16 bits.
    """
    if not greatest or not 0 < (most := max(greatest)) < DARK:
        return []
    return [
        f"no value of {number_of(len(greatest), 'image')} of 16 bits is above {most:,} of 65,535; the upper 8 bits are kept, which "
        f"leaves {number_of(most // 256 + 1, 'level')} of 256, nearly black: rescale them to 0 to 65,535, or store 8 bits"
    ]


def orientation(path: Path) -> int:
    """The EXIF orientation of an image file, 1 (as stored) to 8; 1 where it has none."""
    with Image.open(path) as image:
        return _orientation(image)


def from_pillow(image: Image.Image) -> Tensor:
    """Pixels of an image that Pillow has opened, uint8 RGB (3, H, W), the same as `read_image` of its file.

    Raises:
        UserError: it can't be decoded, or has no 8-bit colours.
    """
    try:
        kind = image.format  # which a copy has not
        negative = _white_is_zero(image)
        image = image.copy()  # loads it too
        _turn(image)
        return _tensor(_rgb(image, kind, negative))
    except Exception as error:  # a damaged file can raise anything
        raise UserError(f"an image opened by Pillow can't be decoded ({_reason(error)}); give another") from None


@cache
def supported(suffix: str) -> bool:
    """Whether this installation of Pillow reads files with a suffix of SUFFIXES: it can lack some formats."""
    Image.init()
    optional = {"AVIF": "avif", "WEBP": "webp", "JPEG2000": "jpg_2000"}.get(SUFFIXES[suffix])
    return SUFFIXES[suffix] in Image.OPEN and (optional is None or bool(features.check(optional)))


# --------------------------------------------------------------------------------------------------


def _decode(content: bytes, at_least: int | None, greatest: list[int] | None) -> Tensor:
    if content.startswith(PNG_SIGNATURE):
        _check_png(content)
    with Image.open(io.BytesIO(content)) as image:
        turned = _orientation(image) != 1
        factor = max(1, min(image.size) // at_least) if at_least else 1
        if image.format == "JPEG" and image.mode in ("L", "RGB") and factor == 1 and not turned:
            with contextlib.suppress(RuntimeError):  # Pillow's error messages are clearer
                return decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), mode=ImageReadMode.RGB)
        if factor > 1:
            image.draft(None, (image.width // factor, image.height // factor))  # does nothing for other formats
        negative = _white_is_zero(image)
        exact = _greatest_of_ppm(image, content) if greatest is not None else None  # loading drops the header
        image.load()
        if turned:
            _turn(image)
        rgb = _rgb(image, image.format, negative, greatest)
        if greatest is not None and not image.mode.startswith("I"):
            if exact is not None:
                greatest.append(exact)
            elif _has_16_bits(image, content):  # of which Pillow kept the upper 8
                greatest.append((int(np.asarray(rgb).max()) << 8) + 0xFF)
        if at_least and (left := min(rgb.size) // at_least) > 1:
            rgb = rgb.reduce(left)
        return _tensor(rgb)


def _tensor(rgb: Image.Image) -> Tensor:
    """uint8 (3, H, W)."""
    pixels = torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8)
    return pixels.view(rgb.height, rgb.width, 3).permute(2, 0, 1)


def _orientation(image: Image.Image) -> int:
    try:
        found = image.getexif().get(ORIENTATION, 1)
    except Exception:  # a damaged EXIF block says nothing about the pixels
        return 1
    return found if found in range(1, 9) else 1


def _turn(image: Image.Image) -> None:
    """Apply the EXIF orientation in place. Pillow turns some formats (TIFF) while loading, and then drops the tag."""
    if _orientation(image) != 1:
        ImageOps.exif_transpose(image, in_place=True)


def _white_is_zero(image: Image.Image) -> bool:
    """Whether a TIFF's 0 is white. Pillow inverts its 8 bits and not its 16."""
    return getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == 0 and image.mode.startswith("I")


def _has_16_bits(image: Image.Image, content: bytes) -> bool:
    """Whether a file has 16 bits a value, whatever Pillow made of them."""
    if image.format == "PNG":
        return content[PNG_DEPTH] == 16
    return 16 in getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE, ())


def _greatest_of_ppm(image: ImageFile.ImageFile, content: bytes) -> int | None:
    """The greatest value of a binary PPM in colours, which Pillow rounds to 8 bits, as of 65,535; None: it has 8."""
    if image.format != "PPM" or image.mode != "RGB" or image.tile[0].codec_name != "ppm":
        return None
    arguments: Any = image.tile[0].args
    most = int(arguments[1])  # that the header allows
    if most <= 0xFF:
        return None
    values = np.frombuffer(content, ">u2", 3 * image.width * image.height, image.tile[0].offset)
    return int(values.max()) * 0xFFFF // most


def _rgb(
    image: Image.Image, kind: str | None, negative: bool = False, greatest: list[int] | None = None
) -> Image.Image:
    """The image in 8-bit RGB; of 16 bits, the upper 8 are kept.

    Args:
        kind: Pillow's name of its format; None: it is of no file.
        negative: whether 0 is white.
        greatest: as in `decode_image`.
    """
    if image.mode.startswith("I"):
        values = np.asarray(image)
        most = int(values.max())
        if values.min() < 0 or most > 0xFFFF:
            raise ValueError("its pixels have more than 16 bits")
        if image.mode == "I" and kind not in OF_16_BITS and 0 < most <= 0xFF:
            raise ValueError(
                f"its pixels are of 32 bits, 0 to {most}, as of 8 bits or dark ones of 16; store 8 or 16 bits"
            )
        if negative:
            values = 0xFFFF - values
            most = int(values.max())
        if greatest is not None:
            greatest.append(most)
        image = Image.fromarray((values >> 8).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("its pixels are floating-point numbers; store them in 8 or 16 bits")
    elif "transparency" in image.info and image.mode == "P":
        image = image.convert("RGBA")
    return image.convert("RGB")


def _check_png(content: bytes) -> None:
    """Compare every chunk with its checksum. Raises ValueError for a PNG that is truncated or altered."""
    at, kind = len(PNG_SIGNATURE), b""
    while kind != b"IEND":
        if at + 12 > len(content):
            raise ValueError("truncated PNG")
        (length,) = struct.unpack_from(">I", content, at)
        kind = content[at + 4 : at + 8]
        end = at + 8 + length
        if end + 4 > len(content):
            raise ValueError("truncated PNG")
        if zlib.crc32(memoryview(content)[at + 4 : end]) != struct.unpack_from(">I", content, end)[0]:
            raise ValueError("damaged PNG: a checksum is wrong")
        at = end + 4


def _unreadable(path: Path, reason: str, advice: str = "replace or remove it") -> UserError:
    return UserError(f"{printable(path)}: cannot be read as an image ({reason}); {mending(Path(path)) or advice}")


def _reason(error: Exception) -> str:
    """What an exception says, on one line."""
    if isinstance(error, UnidentifiedImageError):
        return "it is empty or of no format that Pillow knows"
    return " ".join(str(error).split("\n")[0].split()) or type(error).__name__
