"""Detection datasets made of real images: instances composited on canvases with exact masks, in COCO's format.

`digits_coco` puts handwritten digits (scikit-learn's) side by side and is easy; `fashion_coco` overlaps garments of
Fashion-MNIST, among fragments of other garments that are not instances; `cifar_coco` does the same with ovals cut from
the photographs of CIFAR-10, whose classes are hard to tell from so few pixels. Train canvases are made of the source's
train images and val canvases of its test images.

Design: each canvas is drawn from a fixed seed, in integer arithmetic, so every machine makes the same dataset. A mask is
what is visible: the pixels whose topmost object is the instance. An object that would hide too much of an earlier one is
not placed, so every visible instance is annotated.

It does not know how the source is obtained, nor anything about detectors.
"""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as rle

from aps.data.load import ArraySplit, FileSplit, load_split
from aps.data.manifest import Manifest, Split, Statistics, content_digest, with_sizes, write_index
from aps.data.statistics import Accumulator
from aps.files import sweep, write_bytes, write_unsynced
from aps.registry import DATASETS
from aps.settings.blocks import SourceSettings

SEED = 20230605
TRIES = 20  # placements tried for an object before it is left out
FIXED = 1 << 10  # denominator of interpolation weights


@dataclass(frozen=True)
class Recipe:
    """How canvases are made. Lengths in pixels."""

    source: str  # a name of `aps.registry.DATASETS`
    side: int
    train: int  # canvases
    val: int
    objects: tuple[int, int]  # fewest and most
    sizes: tuple[int, int]  # side of an object's square
    # An object is where its image is at least this bright, of 255; None: an oval cut from a photograph.
    opaque: int | None
    visible: float  # share of each object that must stay visible
    fragments: tuple[int, int] = (0, 0)  # pieces of other objects
    background: tuple[int, int] = (0, 0)  # pixel values of the background's corners, from and to
    noise: int = 0  # largest pixel value added to the background

    @property
    def channels(self) -> int:
        """Channels of a canvas: digits and garments are gray, photographs are not."""
        return 3 if self.opaque is None else 1


RECIPES = {
    "digits_coco": Recipe("digits", 48, 1200, 200, (2, 5), (14, 20), 80, 0.9, noise=16),
    "fashion_coco": Recipe("fashion_mnist", 128, 4000, 500, (3, 8), (28, 64), 24, 0.35, (2, 6), (0, 120), 24),
    "cifar_coco": Recipe("cifar10", 96, 4000, 500, (2, 5), (24, 40), None, 0.6, (2, 6), (0, 255), 24),
}


def prepare(folder: Path, source: SourceSettings, name: str) -> Manifest:
    """Write canvases as PNG files, and instances_{train,val}.json with run-length masks.

    Args:
        folder: the dataset's folder under results/data.
        source: where the classification dataset comes from that the objects are taken from.
        name: a row of RECIPES.

    Raises:
        UserError: the source is missing or broken.
    """
    recipe = RECIPES[name]
    with tempfile.TemporaryDirectory(dir=folder, prefix="source-") as temporary:
        temporary_folder = Path(temporary)
        origin = DATASETS.load(recipe.source)(temporary_folder, source, recipe.source)
        origin.write(temporary_folder / "manifest.json")
        objects = {
            "train": load_split(temporary_folder / "manifest.json", "train"),
            "val": load_split(temporary_folder / "manifest.json", "test"),
        }
    statistics = Accumulator()
    splits: dict[str, Split] = {}
    contents: list[Any] = []
    for number, (split, count) in enumerate((("train", recipe.train), ("val", recipe.val))):
        images, coco = folder / split, _header(name, origin.classes)
        names, sizes, checksums = list[str](), list[int](), list[str]()
        images.mkdir(exist_ok=True)
        sweep(images)
        for index in range(count):
            canvas, annotations = compose(recipe, objects[split], np.random.default_rng([SEED, number, index]))
            file = f"{index:06d}.png"
            png = io.BytesIO()
            Image.fromarray(canvas.transpose(1, 2, 0).squeeze()).save(png, "PNG")
            write_unsynced(images / file, png.getvalue(), images)  # a study may be reading what it replaces
            names.append(file)
            sizes.append(len(png.getvalue()))
            checksums.append(hashlib.sha256(png.getvalue()).hexdigest())
            coco["images"].append({"id": index + 1, "file_name": file, "height": recipe.side, "width": recipe.side})
            for annotation in annotations:
                coco["annotations"].append({"id": len(coco["annotations"]) + 1, "image_id": index + 1, **annotation})
            contents.append(canvas.tobytes())
            if split == "train":
                statistics.add(torch.from_numpy(canvas)[None])
        annotations_file = f"instances_{split}.json"
        write_bytes(folder / annotations_file, json.dumps(coco).encode())
        write_index(folder / f"{split}.tsv", names, None, sizes, checksums)
        splits[split] = Split(count=count, images=split, index=f"{split}.tsv", annotations=annotations_file)
        contents.append(coco["annotations"])
    manifest = Manifest(
        name=name,
        kind="detection",
        classes=origin.classes,
        image_size=(recipe.side, recipe.side),
        splits=splits,
        statistics=Statistics(measured=statistics.result(f"all pixels of the {recipe.train} train canvases")),
        digest=content_digest(list(origin.classes), *contents),
        digest_of="class names, pixels and annotations",
        origin=f"composited from {recipe.source}: {origin.origin}",
        source=source.path,
    )
    return with_sizes(manifest, folder)


def compose(
    recipe: Recipe, images: ArraySplit | FileSplit, generator: np.random.Generator
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Draw one canvas.

    Returns:
        uint8 (1 or 3, side, side), and the annotations of its instances in COCO's format without ids: box as left, top, width,
        height; the visible mask run-length encoded; categories numbered from 1.
    """
    side = recipe.side
    canvas = _background(recipe, generator)
    top = np.full((side, side), -1)  # number of the topmost object; fragments come after all instances
    labels: list[int] = []
    whole: list[int] = []  # pixels of each instance, the hidden ones included
    kinds = [True] * int(generator.integers(recipe.objects[0], recipe.objects[1] + 1))
    kinds += [False] * int(generator.integers(recipe.fragments[0], recipe.fragments[1] + 1))
    for is_instance in generator.permutation(kinds):
        index = int(generator.integers(len(images)))
        size = int(generator.integers(recipe.sizes[0], recipe.sizes[1] + 1))
        pixels = np.stack([resize(channel, size) for channel in images.read(index)[: recipe.channels].numpy()])
        if not is_instance:
            pixels = _fragment(pixels, generator)
        height, width = pixels.shape[1:]
        solid = _oval(height, width, generator) if recipe.opaque is None else pixels[0] >= recipe.opaque
        if not solid.any():
            continue
        gain = int(generator.integers(160, 257))
        for _ in range(TRIES):
            y, x = (int(generator.integers(0, side - extent + 1)) for extent in (height, width))
            area = (slice(y, y + height), slice(x, x + width))
            number = len(labels) if is_instance else -1
            trial = top.copy()
            trial[area][solid] = number
            visible = np.bincount(trial[trial >= 0], minlength=len(labels))
            if all(visible[k] >= recipe.visible * whole[k] for k in range(len(whole))):
                break
        else:
            continue
        top = trial
        canvas[:, *area][:, solid] = (pixels[:, solid].astype(np.int64) * gain) >> 8
        if is_instance:
            labels.append(int(images.labels[index]))
            whole.append(int(solid.sum()))
    return canvas, [_annotation(top == number, label) for number, label in enumerate(labels)]


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """Enlarge by bilinear interpolation: uint8 (h, h) -> (size, size). Integers give every machine the same result."""
    weights = _weights(len(image), size)
    return ((weights @ image.astype(np.int64) @ weights.T + FIXED**2 // 2) // FIXED**2).astype(np.uint8)


@cache
def _weights(h: int, size: int) -> np.ndarray:
    """Weights of the h old pixels in each of the `size` new ones, in units of 1 / FIXED: (size, h)."""
    weights = np.zeros((size, h), dtype=np.int64)
    for row in range(size):
        position = min(max((2 * row + 1) * h * FIXED // (2 * size) - FIXED // 2, 0), (h - 1) * FIXED)
        low, part = divmod(position, FIXED)
        weights[row, low] += FIXED - part
        if part:
            weights[row, low + 1] += part
    return weights


def _fragment(pixels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """A random crop with a third of the object's sides: (C, h, w) -> (C, h', w')."""
    h, w = pixels.shape[1:]
    height, width = max(4, h // 3), max(4, w // 3)
    y, x = int(generator.integers(0, h - height + 1)), int(generator.integers(0, w - width + 1))
    return pixels[:, y : y + height, x : x + width]


def _oval(height: int, width: int, generator: np.random.Generator) -> np.ndarray:
    """A centred, upright oval with axes of at least three quarters of the sides: an ellipse or, with probability 1/2, a
    superellipse of degree 4. bool (height, width), computed in integers."""
    a, b = (int(generator.integers(3 * extent // 4, extent + 1)) for extent in (height, width))
    degree = 2 * int(generator.integers(1, 3))
    y, x = (2 * np.arange(extent, dtype=np.int64) + 1 - extent for extent in (height, width))
    return (y[:, None] * b) ** degree + (x[None, :] * a) ** degree <= (a * b) ** degree


def _background(recipe: Recipe, generator: np.random.Generator) -> np.ndarray:
    """Each channel interpolates between four random corners, with noise: uint8 (channels, side, side)."""
    low, high = recipe.background
    corners = generator.integers(low, high + 1, size=(recipe.channels, 2, 2)).astype(np.uint8)
    shade = np.stack([resize(channel, recipe.side) for channel in corners]).astype(np.int64)
    return np.clip(shade + generator.integers(0, recipe.noise + 1, size=shade.shape), 0, 255).astype(np.uint8)


def _annotation(mask: np.ndarray, label: int) -> dict[str, Any]:
    """The annotation of a mask, bool (side, side), not empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    y, x = int(rows[0]), int(columns[0])
    encoded = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {
        "category_id": label + 1,
        "bbox": [x, y, int(columns[-1]) - x + 1, int(rows[-1]) - y + 1],
        "area": int(mask.sum()),
        "iscrowd": 0,
        "segmentation": {"size": list(encoded["size"]), "counts": encoded["counts"].decode("ascii")},
    }


def _header(name: str, classes: tuple[str, ...]) -> dict[str, Any]:
    categories = [{"id": number + 1, "name": label} for number, label in enumerate(classes)]
    return {"info": {"description": name}, "images": [], "annotations": [], "categories": categories}
