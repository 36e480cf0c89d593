"""Turns images of any kind into the pixels that a model reads.

Design: a file, the same image opened by Pillow, and the same pixels as an array give the same tensor. An image passes the
same operations as in the evaluation of the model's accuracy (`aps.training.features`). Threads decode a few batches ahead,
so any number of images needs the memory of a few batches.

Letters: H, W rows and columns of an image, S side of the model's view.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from aps.data.images import from_pillow, read_image
from aps.data.walk import HOUSEKEEPING, SUFFIXES, is_folder, printable
from aps.errors import UserError
from aps.runtime.cores import granted
from aps.training.features import CENTRE

ImageLike: TypeAlias = str | os.PathLike | PIL.Image.Image | np.ndarray | Tensor
Images: TypeAlias = ImageLike | Iterable[ImageLike]

THREADS = min(8, granted())
AHEAD = 2  # batches that are decoded while one is computed
SLACK = 1e-3  # how far values may lie outside [0, 1], because of resampling


def read(image: Any, name: str = "image") -> Tensor:
    """The pixels of an image, (3, H, W), uint8, or float32 in [0, 1] where the image has floats.

    Args:
        image: a path; a Pillow image; an array or tensor, uint8 or float in [0, 1], (H, W), (H, W, C) or (C, H, W) with
            1, 3 or 4 channels, of which a fourth (alpha) is dropped.
        name: what to call it in error messages.

    Raises:
        UserError: it is something else, or a file that can't be read.
    """
    if isinstance(image, str | os.PathLike):
        return read_image(Path(image))
    if isinstance(image, PIL.Image.Image):
        return from_pillow(image)
    if isinstance(image, np.ndarray):
        layout, x = "(H, W, 3)", torch.from_numpy(np.ascontiguousarray(image)) if _numeric(image) else None
    elif isinstance(image, Tensor):
        layout, x = "(3, H, W)", image.detach().cpu()
    else:
        raise UserError(
            f"{name} is a {type(image).__name__}; give a path, a Pillow image, or a uint8 or float array or tensor"
        )
    if x is None or not (x.dtype == torch.uint8 or x.is_floating_point()):
        raise UserError(f"{name} has dtype {image.dtype}; give uint8, or float in [0, 1]")
    return _three_channels(_in_range(x, name), isinstance(image, np.ndarray), name, layout)


def _numeric(array: np.ndarray) -> bool:
    return array.dtype == np.uint8 or array.dtype in (np.float16, np.float32, np.float64)


def _in_range(x: Tensor, name: str) -> Tensor:
    if x.dtype == torch.uint8 or x.numel() == 0:
        return x
    x = x.float()
    low, high = float(x.min()), float(x.max())
    if not (low >= -SLACK and high <= 1 + SLACK):  # true for NaN too
        raise UserError(
            f"{name} has float values from {low:.4g} to {high:.4g}; give uint8, or float in [0, 1] (the model "
            "normalizes by itself)"
        )
    return x


def _three_channels(x: Tensor, channels_last: bool, name: str, layout: str) -> Tensor:
    shape = tuple(x.shape)
    if x.ndim == 2:
        x = x[None]
    first, last = (x.ndim == 3 and x.shape[axis] in (1, 3, 4) for axis in (0, -1))
    if last and (channels_last or not first):
        x = x.permute(2, 0, 1)
    elif not first:
        raise UserError(f"{name} has shape {shape}; give {layout}")
    if x.numel() == 0:
        raise UserError(f"{name} has shape {shape}, which holds no pixel; give {layout}")
    x = x[:3] if len(x) == 4 else x
    return x.expand(3, -1, -1).contiguous()


@dataclass(frozen=True)
class Transform:
    """Turns an image into the network's input.

    Attributes:
        size: S.
        mean, std: of each channel, in [0, 1] units.
        resize: None: the whole image is resized to S x S, as for datasets in memory. Else its shorter side is resized to
            this many pixels, and the centre is cropped, as for datasets of files.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: int | None
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"

    @classmethod
    def of_stage(cls, size: int, mean: Iterable[float], std: Iterable[float], crop: str) -> Transform:
        """The transform of a stage's evaluation; crop: `whole` or `centre`."""
        return cls(size, tuple(mean), tuple(std), None if crop == "whole" else round(size * CENTRE))

    def __call__(self, image: ImageLike) -> Tensor:
        """An image -> (3, S, S) float32, normalized. Raises UserError where it is not an image."""
        return self.normalize(self.pixels(image))

    def pixels(self, image: ImageLike, name: str = "image") -> Tensor:
        """An image -> (3, S, S) float32 in [0, 1]."""
        x, size = read(image, name), [self.size, self.size]
        mode = InterpolationMode(self.interpolation)
        if self.resize is None:
            x = _unit(x)
            return x if list(x.shape[1:]) == size else functional.resize(x, size, mode, antialias=True)
        x = functional.resize(x, [self.resize], mode, antialias=True)
        return _unit(functional.center_crop(x, size))

    def normalize(self, x: Tensor) -> Tensor:
        """(..., 3, S, S) in [0, 1] -> normalized."""
        mean, std = (torch.tensor(values, device=x.device).view(3, 1, 1) for values in (self.mean, self.std))
        return (x - mean) / std

    def timm_config(self) -> dict[str, Any]:
        """The transform in the form of timm's `pretrained_cfg`."""
        share = 1.0 if self.resize is None else self.size / self.resize
        if self.resize is not None and int(self.size / share) != self.resize:  # timm divides and truncates
            share = math.nextafter(share, 0)
        return {
            "input_size": (3, self.size, self.size),
            "mean": self.mean,
            "std": self.std,
            "interpolation": self.interpolation,
            "crop_pct": share,
            "crop_mode": "squash" if self.resize is None else "center",
        }

    def code(self) -> str:
        """Python that makes the same tensor from a file with torchvision and Pillow alone, as `transform(image)`."""
        mode = "" if self.interpolation == "bilinear" else ", interpolation=v2.InterpolationMode.BICUBIC"
        scale = "    v2.ToDtype(torch.float32, scale=True),"
        steps = (
            [scale, f"    v2.Resize([{self.size}, {self.size}], antialias=True{mode}),"]
            if self.resize is None
            else [f"    v2.Resize([{self.resize}], antialias=True{mode}),", f"    v2.CenterCrop({self.size}),", scale]
        )
        return "\n".join(
            [
                "transform = v2.Compose([",
                "    v2.ToImage(),",
                *steps,
                f"    v2.Normalize({list(self.mean)}, {list(self.std)}),",
                "    v2.ToPureTensor(),",
                "])",
            ]
        )


def _unit(x: Tensor) -> Tensor:
    return x.float() / 255 if x.dtype == torch.uint8 else x


# --------------------------------------------------------------------------------------------------
# Many images


def as_list(images: Images) -> list[ImageLike]:
    """A list of images, from one image, several images, or a batch as an array or tensor with four dimensions, (B, ...).

    Raises:
        UserError: there are no images, or `images` is neither an image nor a list of images.
    """
    if isinstance(images, np.ndarray | Tensor) and images.ndim == 4:
        found: list[ImageLike] = list(images)
    elif isinstance(images, str | os.PathLike | PIL.Image.Image | np.ndarray | Tensor):
        found = [images]
    elif isinstance(images, Iterable) and not isinstance(images, bytes | bytearray | dict):
        found = list(images)
    else:
        raise UserError(f"images is a {type(images).__name__}; give an image or a list of images")
    if not found:
        raise UserError("images is empty; give at least one image")
    return found


def decoded(
    images: Iterable[ImageLike],
    prepare: Callable[[ImageLike, str], Tensor],
    batch: int,
    threads: int = THREADS,
) -> Iterator[list[Tensor | UserError]]:
    """Batches of `prepare(image, name)`, in order; in place of an image that it refuses, its UserError."""

    def attempt(image: ImageLike, number: int) -> Tensor | UserError:
        try:
            return prepare(image, f"image {number}" if not isinstance(image, str | os.PathLike) else str(image))
        except UserError as error:
            return error

    source = enumerate(iter(images))
    waiting: deque[list[Future[Tensor | UserError]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            while True:
                while len(waiting) <= AHEAD and (chunk := list(islice(source, batch))):
                    waiting.append([pool.submit(attempt, image, number) for number, image in chunk])
                if not waiting:
                    return
                yield [future.result() for future in waiting.popleft()]
        finally:  # the caller may have stopped early
            for future in chain.from_iterable(waiting):
                future.cancel()


class Once:
    """What a walk has met, so that a file to which two names lead is one image. Hard links are files of their own.

    Memory: a path for each folder, and for each file that is named by itself or by a link.

    Attributes:
        left_out: how many folders and files were met again, by another name.
    """

    def __init__(self) -> None:
        self.left_out = 0
        self._folders, self._files = set[str](), set[str]()

    def enters(self, folder: str) -> bool:
        """Whether a folder, a real path, is met for the first time."""
        if new := folder not in self._folders:
            self._folders.add(folder)
        self.left_out += not new
        return new

    def takes(self, path: Path, folder: str | None = None) -> bool:
        """Whether a file is met for the first time; `folder`: the real path of its folder, where the file is no link."""
        if folder is not None:
            new = not self._files or os.path.join(folder, path.name) not in self._files
        else:
            real = os.path.realpath(path)
            inside, name = os.path.split(real)
            walked = inside in self._folders and not _hidden(name) and _has_suffix(name) and os.path.exists(real)
            new = real not in self._files and not walked
            if new:
                self._files.add(real)
        self.left_out += not new
        return new


def walk(paths: Iterable[str | os.PathLike], once: Once | None = None) -> Iterator[Path]:
    """Image files: those given, and all images in given folders, at any depth, always in the same order.

    It is lazy: memory is that of one directory listing per level. Hidden files and folders, and those that operating systems
    and tools create, are left out. Links to folders are followed, unless they lead to a folder above.

    Args:
        once: a new one, to meet every file once; None: a file is met by each of its names.

    Raises:
        UserError: a path does not exist, or a given folder holds no image.
    """
    for start in map(Path, paths):
        if start.is_file():
            if once is None or once.takes(start):
                yield start
        elif start.is_dir():
            count, before = 0, once.left_out if once else 0
            for count, path in enumerate(_inside(start, frozenset(), once), 1):  # noqa: B007
                yield path
            if not count and (once is None or once.left_out == before):
                raise UserError(f"{start}: no images in this folder ({', '.join(sorted(SUFFIXES))}); give another")
        else:
            raise UserError(f"{start} does not exist; give image files or folders of images")


def _inside(folder: Path, above: frozenset[str], once: Once | None) -> Iterator[Path]:
    real = os.path.realpath(folder)
    if real in above or not (once is None or once.enters(real)):
        return
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: os.fsencode(entry.name))
    except OSError as error:
        raise UserError(f"{printable(folder)}: cannot be listed ({error.strerror}); change its permissions") from None
    for entry in entries:
        path = folder / entry.name
        if _hidden(entry.name):
            continue
        if is_folder(entry):
            yield from _inside(path, above | {real}, once)
        elif _has_suffix(entry.name) and (once is None or once.takes(path, None if entry.is_symlink() else real)):
            yield path


def _hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in HOUSEKEEPING


def _has_suffix(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES
