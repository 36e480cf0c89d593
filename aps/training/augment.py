"""Augmentation for finetuning, a batch at a time on its device: crops, flips, RandAugment, erasing, mixup, cutmix.

Parameters are drawn for each image. The pixels are those of timm's and torchvision's transforms with the same parameters
on Pillow images: uint8 between any two operators, rounded or truncated as in Pillow
(tests/training/test_augmentation.py, operator by operator, and in distribution).

    B  images of a batch, S side of an image in pixels, L operators one after another (`n` of RandAugment), C classes

Design: parameters are drawn on the CPU for the global batch, so that they do not depend on the number of processes. The
CPU therefore knows which image gets which operator, and never waits for the device. Images are sorted by operator, so
that each operator is a slice, and each of these families is one computation:
- eight operators are a table of 256 values for each channel of each image (`tables`);
- two blend the image with a filtered copy (`color`, `sharpness`);
- four shift each row, or each column, along itself (`sheared_or_shifted`); only a rotation gathers single pixels.

Mixup pairs neighbours of the batch, images 2k and 2k+1; timm pairs the first with the last. An epoch's order is shuffled,
so the distribution is the same, and a pair never spans two processes. One lambda is used for the whole batch, as in
timm's default mode and the recipes that we follow.

It does not know datasets, decoding, the model or the training loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor
from torchvision.transforms.v2 import functional

from aps.runtime.precision import full_products
from aps.runtime.prefetch import send
from aps.settings.blocks import FinetuneSettings, ViewSettings
from aps.views import draw_boxes

# Operators by name, sorted by family; an operator's number is its index in OPERATORS.
TABLES = ("AutoContrast", "Equalize", "Invert", "Posterize", "Solarize", "SolarizeAdd", "Brightness", "Contrast")
BLENDS = ("Color", "Sharpness")
MOVES = ("Rotate", "ShearX", "TranslateX", "ShearY", "TranslateY")
OPERATORS = (*TABLES, *BLENDS, *MOVES)
NONE = len(OPERATORS)  # leaves the image as it is

LEVELS = 10.0  # magnitudes of RandAugment run from 0 to 10
ERASED_AREA, ERASED_ASPECT = (0.02, 1 / 3), (0.3, 1 / 0.3)  # timm's RandomErasing
TRIES = 10  # boxes tried for an image (timm's RandomErasing)
LUMA = (19595, 38470, 7471)  # weights of red, green and blue in Pillow's conversion to gray, in units of 1 / 65,536


class Program(NamedTuple):
    """Operators of each image, in the order in which they are applied. All on the CPU, (L, B)."""

    operators: Tensor  # int64: indices in OPERATORS, or NONE
    values: (
        Tensor  # float64: the argument of timm's function: a factor, degrees, a threshold, bits, a share of the side
    )
    bicubic: Tensor  # bool: whether MOVES interpolate cubically, else linearly


class Mix(NamedTuple):
    """How the neighbours of a batch are mixed; the same for the whole batch."""

    share: float  # lambda: share of the image itself; the rest comes from its neighbour
    box: tuple[int, int, int, int] | None  # cutmix: top, bottom, left, right of the neighbour's part; None: mixup


class Parameters(NamedTuple):
    """Augmentation parameters of each image of a batch. All on the CPU."""

    boxes: Tensor  # (B, 4) int64: top, left, height, width of the crop; for `crop: pad`, in the padded image
    flips: Tensor  # (B,) bool
    program: Program
    erased: Tensor | None  # (B, 4) int64: top, left, height, width; height 0: nothing is erased
    mix: Mix | None

    def rows(self, rows: slice) -> Parameters:
        """The parameters of some images of the batch; `erased` stays whole, because `erase` needs all of it."""
        program = Program(*(field[:, rows] for field in self.program))
        return self._replace(boxes=self.boxes[rows], flips=self.flips[rows], program=program)


def joined(parts: list[Parameters]) -> tuple[Tensor, Tensor, Program]:
    """Boxes, flips and programs of several batches, concatenated."""
    program = Program(*(torch.cat(field, 1) for field in zip(*(part.program for part in parts), strict=True)))
    return torch.cat([part.boxes for part in parts]), torch.cat([part.flips for part in parts]), program


# --------------------------------------------------------------------------------------------------
# Drawing


class Draw:
    """Draws parameters with the distributions of timm's and torchvision's transforms.

    Args:
        settings: finetuning's; timm parses `rand_augment`, which is in its notation.
        size: S.
    """

    def __init__(self, settings: FinetuneSettings, size: int) -> None:
        self.settings, self.size = settings, size
        self._views = ViewSettings(crop_scale=(0.08, 1.0))  # torchvision's RandomResizedCrop
        self._layers: int | None = None
        if settings.rand_augment is not None:
            augment = rand_augment_transform(settings.rand_augment, {})
            first = augment.ops[0]
            self._layers, self._probability, self._magnitude = augment.num_layers, first.prob, float(first.magnitude)
            self._deviation, self._most = first.magnitude_std, float(first.magnitude_max or LEVELS)
            self._scales = torch.tensor([SCALES[op.name] for op in augment.ops], dtype=torch.float64)
            names = [op.name.removesuffix("Increasing").removesuffix("Rel") for op in augment.ops]
            self._operators = torch.tensor([OPERATORS.index(name) for name in names])

    def __call__(self, batch: int, height: int, width: int, generator: torch.Generator) -> Parameters:
        """Parameters of a (global) batch of images of one size in pixels, from a CPU generator."""
        return Parameters(
            boxes=self.boxes(torch.full((batch,), height), torch.full((batch,), width), generator),
            flips=torch.rand(batch, generator=generator) < self.settings.flip,
            program=self.program(batch, generator),
            erased=self.erased(batch, generator),
            mix=self.mix(generator),
        )

    def boxes(self, heights: Tensor, widths: Tensor, generator: torch.Generator) -> Tensor:
        """Crops of images of these sizes, (B,) int64 -> (B, 4) int64."""
        if self.settings.crop == "resized":
            return draw_boxes(heights, widths, self._views, generator)
        corners = torch.randint(0, 2 * padding(self.size) + 1, (len(heights), 2), generator=generator)
        return torch.cat([corners, torch.full_like(corners, self.size)], 1)

    def program(self, batch: int, generator: torch.Generator) -> Program:
        """RandAugment; without it colour jitter; without both no operators."""
        if self._layers is not None:
            return self._rand_augment(self._layers, batch, generator)
        if strength := self.settings.color_jitter:
            low, high = max(0.0, 1 - strength), 1 + strength
            jitter = torch.tensor([OPERATORS.index(name) for name in ("Brightness", "Contrast", "Color")])
            order = torch.rand(3, batch, generator=generator).argsort(0)
            factors = low + (high - low) * torch.rand(3, batch, generator=generator, dtype=torch.float64)
            return Program(jitter[order], factors, torch.zeros(3, batch, dtype=torch.bool))
        return Program(*(torch.zeros(0, batch, dtype=dtype) for dtype in (torch.int64, torch.float64, torch.bool)))

    def _rand_augment(self, layers: int, batch: int, generator: torch.Generator) -> Program:
        """RandAugment (arXiv 1909.13719) as in timm: operators drawn with replacement, noise on the magnitude."""
        shape = (layers, batch)
        chosen = torch.randint(0, len(self._scales), shape, generator=generator)
        skipped, up, linear, spread = torch.rand(4, *shape, generator=generator, dtype=torch.float64)
        if self._deviation == math.inf:
            magnitude = self._magnitude * spread
        else:
            noise = torch.randn(shape, generator=generator, dtype=torch.float64)
            magnitude = self._magnitude + self._deviation * noise
        magnitude = magnitude.clamp_(0, self._most).div_(LEVELS)
        most, start, direction, whole, least, greatest = self._scales[chosen].unbind(2)
        moved = most * magnitude
        moved = torch.where(whole > 0, moved.floor(), moved)
        values = start + moved * torch.where(direction == 0, torch.where(up > 0.5, -1.0, 1.0), direction)
        operators = torch.where(skipped > self._probability, NONE, self._operators[chosen])
        return Program(operators, values.clamp(least, greatest), linear >= 0.5)

    def erased(self, batch: int, generator: torch.Generator) -> Tensor | None:
        """Boxes of timm's RandomErasing, (B, 4) int64, of height 0 where an image is not erased; None: erasing is off."""
        if not self.settings.erasing:
            return None
        hit = (torch.rand(batch, generator=generator) < self.settings.erasing).nonzero()[:, 0]
        area, aspect, down, right = torch.rand(4, batch, TRIES, generator=generator, dtype=torch.float64)[:, hit]
        area = (ERASED_AREA[0] + (ERASED_AREA[1] - ERASED_AREA[0]) * area) * self.size**2
        narrow, wide = (math.log(x) for x in ERASED_ASPECT)
        aspect = torch.exp(narrow + (wide - narrow) * aspect)
        height, width = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
        fits = (height < self.size) & (width < self.size)
        top, left = (down * (self.size - height + 1)).floor(), (right * (self.size - width + 1)).floor()
        first = (fits * torch.arange(TRIES, 0, -1)).argmax(1)
        boxes = torch.stack([top, left, height, width], 2)[torch.arange(len(hit)), first].long()
        return torch.zeros(batch, 4, dtype=torch.int64).index_copy_(0, hit, boxes * fits.any(1, keepdim=True))

    def mix(self, generator: torch.Generator) -> Mix | None:
        """Mixup or cutmix of the batch; None: its images are not mixed."""
        mixup, cutmix = self.settings.mixup, self.settings.cutmix
        if not (mixup or cutmix):
            return None
        seed = int(torch.randint(0, 2**62, (), generator=generator))
        numbers = np.random.default_rng(seed)  # torch's beta distribution takes no generator
        cuts = not mixup or (cutmix > 0 and numbers.random() < self.settings.mixup_switch)
        alpha = cutmix if cuts else mixup
        share = float(numbers.beta(alpha, alpha))
        if not cuts:
            return Mix(share, None)
        middle = numbers.integers(0, self.size, 2)
        side = int(self.size * math.sqrt(1 - share))
        low = np.clip(middle - side // 2, 0, self.size)
        high = np.clip(middle + (side + 1) // 2, 0, self.size)
        (top, left), (bottom, right) = low.tolist(), high.tolist()
        return Mix(1 - (bottom - top) * (right - left) / self.size**2, (top, bottom, left, right))


class Scale(NamedTuple):
    """Maps a magnitude m in [0, 1] to the argument of timm's function: clip(start + direction * most * m)."""

    most: float
    start: float = 0.0
    direction: int = 0  # 1 or -1; 0: drawn for each image
    whole: bool = False  # whether most * m is truncated to a whole number
    least: float = -math.inf
    greatest: float = math.inf


FACTOR = Scale(1.8, 0.1, 1)
FACTOR_INCREASING = Scale(0.9, 1.0, least=0.1)
SCALES = {
    "AutoContrast": Scale(0.0),
    "Equalize": Scale(0.0),
    "Invert": Scale(0.0),
    "Posterize": Scale(4, 0, 1, whole=True, least=1),  # Pillow refuses 0 bits, of which only black would be left
    "PosterizeIncreasing": Scale(4, 4, -1, whole=True, least=1),
    "Solarize": Scale(256, 0, 1, whole=True),
    "SolarizeIncreasing": Scale(256, 256, -1, whole=True),
    "SolarizeAdd": Scale(110, 0, 1, whole=True, greatest=128),
    "Color": FACTOR,
    "Contrast": FACTOR,
    "Brightness": FACTOR,
    "Sharpness": FACTOR,
    "ColorIncreasing": FACTOR_INCREASING,
    "ContrastIncreasing": FACTOR_INCREASING,
    "BrightnessIncreasing": FACTOR_INCREASING,
    "SharpnessIncreasing": FACTOR_INCREASING,
    "Rotate": Scale(30),
    "ShearX": Scale(0.3),
    "ShearY": Scale(0.3),
    "TranslateXRel": Scale(0.45),
    "TranslateYRel": Scale(0.45),
}


# --------------------------------------------------------------------------------------------------
# Crops


def on_device(boxes: Tensor, flips: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Boxes (B, 4) int64 and flips (B,) bool on the device, by one transfer without waiting."""
    table = send(torch.cat([boxes, flips[:, None]], 1), device)
    return table[:, :4], table[:, 4] > 0


def flip(images: Tensor, flips: Tensor) -> Tensor:
    """Images, mirrored where `flips`, (B,) bool, is true."""
    return torch.where(flips[:, None, None, None], images.flip(3), images)


def padding(size: int) -> int:
    """Padding of each side before a crop, in pixels: 4 at size 32."""
    return max(1, size // 8)


def pad_crop(images: Tensor, boxes: Tensor, flips: Tensor, size: int) -> Tensor:
    """Pad each image with black, crop it, and mirror it where `flips` is true.

    images: (B, 3, H, W) uint8, first resized to SxS where they have another size; boxes: (B, 4) int64, in the padded
    picture; flips: (B,) bool -> (B, 3, S, S) uint8. Equals torchvision's Resize, RandomCrop with padding and
    RandomHorizontalFlip.
    """
    if images.shape[2:] != (size, size):
        images = functional.resize(images, [size, size], antialias=True)
    side = size + 2 * padding(size)
    padded = F.pad(images, 4 * [padding(size)]).flatten(2)
    steps = torch.arange(size, device=images.device)
    rows = (boxes[:, 0, None] + steps) * side  # (B, S)
    columns = boxes[:, 1, None] + torch.where(flips[:, None], size - 1 - steps, steps)
    indices = (rows[:, :, None] + columns[:, None, :]).view(len(images), 1, size * size)
    return padded.gather(2, indices.expand(-1, 3, -1)).view(-1, 3, size, size)


@full_products()
def resized_crop(images: Tensor, boxes: Tensor, flips: Tensor, size: int) -> Tensor:
    """Each image's box, resized to SxS by Pillow's antialiased cubic filter, mirrored where `flips` is true.

    Columns are resized first, and rounded to [0, 255] before the rows; Pillow 13 resizes rows first where that is cheaper.
    In TF32 pixels would be up to two levels off.
    images: (B, 3, H, W) uint8; boxes: (B, 4) int64; flips: (B,) bool -> (B, 3, S, S) uint8.
    """
    batch, channels, height, width = images.shape
    top, left, tall, wide = boxes.float().unbind(1)
    columns = cubic_matrix(left, wide, width, size)
    columns = torch.where(flips[:, None, None], columns.flip(1), columns)
    across = rounded(torch.bmm(images.float().reshape(batch, channels * height, width), columns.mT))
    x = cubic_matrix(top, tall, height, size)[:, None] @ across.view(batch, channels, height, size)
    return rounded(x).to(torch.uint8)


def cubic_matrix(start: Tensor, length: Tensor, source: int, size: int) -> Tensor:
    """Weights of Pillow's antialiased cubic filter (a = -0.5) along one axis, cut at the box and normalized.

    start, length: (B,) float32, source pixels -> (B, S, source).
    """
    scale = (length / size)[:, None]  # source pixels of a target pixel
    wide = scale.clamp(min=1)
    centre = (torch.arange(size, device=start.device) + 0.5) * scale  # in the box
    pixel = torch.arange(source, device=start.device) + 0.5 - start[:, None]
    inside = (pixel > 0) & (pixel < length[:, None])
    x = ((pixel[:, None, :] - centre[:, :, None]) / wide[:, :, None]).abs_()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0)) * inside[:, None, :]
    return weights / weights.sum(2, keepdim=True)


def rounded(x: Tensor) -> Tensor:
    """Round x to the nearest whole number in [0, 255], halves up; x is overwritten."""
    return x.add_(0.5).floor_().clamp_(0, 255)


# --------------------------------------------------------------------------------------------------
# Operators. Each takes images (K, 3, S, S) uint8 and values (K,), and gives (K, 3, S, S) uint8.


def run_program(images: Tensor, program: Program, fill: Tensor) -> Tensor:
    """Apply to each image its operators.

    images: (B, 3, S, S) uint8; fill: (3,) float32, the colour of pixels that a move leaves empty, on the images' device
    -> (B, 3, S, S) uint8.
    """
    layers, batch = program.operators.shape
    if not layers:
        return images
    operators = program.operators
    last = (program.bicubic & (operators >= len(TABLES + BLENDS))) | (operators == NONE)
    keys = operators + len(MOVES) * last
    order = keys.argsort(dim=1, stable=True)  # (L, B)
    ranks = order.argsort(1)  # position of each image in a layer's order
    before = torch.cat([torch.arange(batch)[None], ranks[:-1]]).gather(1, order)  # from one layer's order to the next
    table = torch.stack([before.double(), ranks.double(), program.values.gather(1, order)])
    table = send(table, images.device)
    steps, back, values = table[0].long(), table[1, -1].long(), table[2]
    for layer in range(layers):
        images = images.index_select(0, steps[layer])  # a copy, which the layer overwrites
        counts = keys[layer].bincount(minlength=NONE + len(MOVES) + 1).tolist()
        _run_layer(images, counts, values[layer], fill)
    return images.index_select(0, back)


def _run_layer(images: Tensor, counts: list[int], values: Tensor, fill: Tensor) -> None:
    """Apply one operator to each image.

    images: (B, 3, S, S) uint8, sorted by operator, the cubic moves after all others, overwritten; counts: images of each
    operator, first with linear, then with cubic moves; values: (B,) float64.
    """
    ends = np.cumsum([0, *counts]).tolist()
    rows = [slice(start, end) for start, end in pairwise(ends)]  # the images of each operator
    lookups = [tables(name, images[rows[i]], values[rows[i]]) for i, name in enumerate(TABLES) if counts[i]]
    if lookups:  # these operators come first
        lookup = torch.cat(lookups)
        images[: len(lookup)] = look_up(images[: len(lookup)], lookup)
    for i, name in enumerate(BLENDS, len(TABLES)):
        if counts[i]:
            images[rows[i]] = BLENDED[name](images[rows[i]], values[rows[i]])
    for i, taps in ((len(TABLES + BLENDS), 2), (NONE, 4)):
        rotate, shifts = rows[i], slice(ends[i + 1], ends[i + len(MOVES)])
        if counts[i]:
            images[rotate] = rotated(images[rotate], values[rotate], taps, fill)
        if shifts.start < shifts.stop:
            each = counts[i + 1 : i + len(MOVES)]
            images[shifts] = sheared_or_shifted(images[shifts], each, values[shifts], taps, fill)


def tables(name: str, images: Tensor, values: Tensor) -> Tensor:
    """Lookup tables of an operator, for each channel of each image: (K, 3, S, S), (K,) float64 -> (K, 3, 256) uint8."""
    old = torch.arange(256, device=images.device)
    if name in TABLES_OF_VALUES:
        return TABLES_OF_VALUES[name](old, values[:, None]).to(torch.uint8)[:, None].expand(-1, 3, -1)
    return {"AutoContrast": _auto_contrast, "Equalize": _equalize, "Contrast": _contrast}[name](old, images, values)


def look_up(images: Tensor, lookup: Tensor) -> Tensor:
    """images: (K, 3, S, S) uint8, lookup: (K, 3, 256) uint8 -> (K, 3, S, S) uint8."""
    return lookup.flatten(0, 1).gather(1, images.flatten(0, 1).flatten(1).long()).view_as(images)


def blend(other: Tensor, image: Tensor, factors: Tensor) -> Tensor:
    """other + factor (image - other) as Pillow's blend computes it: in float32, clamped to [0, 255].

    factors: of a shape that broadcasts -> of the shape of `other` and `image`, float32.
    """
    image, other = image.float(), other.float()
    return ((image - other) * factors.float()).add_(other).clamp_(0, 255)


def _posterize(old: Tensor, bits: Tensor) -> Tensor:
    return old & (256 - 2 ** (8 - bits.long().clamp(max=8)))


def _solarize(old: Tensor, threshold: Tensor) -> Tensor:
    return torch.where(old < threshold, old, 255 - old)


def _solarize_add(old: Tensor, added: Tensor) -> Tensor:
    return torch.where(old < 128, (old + added).clamp(max=255), old)


# (256,) int64, (K, 1) float64 -> (K, 256)
TABLES_OF_VALUES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Invert": lambda old, unused: (255 - old).expand(len(unused), -1),
    "Posterize": _posterize,
    "Solarize": _solarize,
    "SolarizeAdd": _solarize_add,
    "Brightness": lambda old, factors: blend(torch.zeros_like(old), old, factors),
}


def gray(images: Tensor) -> Tensor:
    """Pillow's conversion to L: (K, 3, S, S) uint8 -> (K, S, S) int32."""
    red, green, blue = images.int().unbind(1)
    return (red * LUMA[0] + green * LUMA[1] + blue * LUMA[2] + 0x8000) >> 16


def _contrast(old: Tensor, images: Tensor, factors: Tensor) -> Tensor:
    pixels = images[0, 0].numel()
    mean = (2 * gray(images).sum((1, 2)) + pixels) // (2 * pixels)  # rounded
    return blend(mean[:, None], old, factors[:, None]).to(torch.uint8)[:, None].expand(-1, 3, -1)


def _auto_contrast(old: Tensor, images: Tensor, unused: Tensor) -> Tensor:
    low, high = (getattr(images, name)((2, 3)).double()[:, :, None] for name in ("amin", "amax"))
    # Infinite where high equals low. torch would compute 255 / x by multiplication with a rounded 1 / x.
    scale = torch.full_like(high, 255) / (high - low)
    stretched = (old * scale + -low * scale).clamp(0, 255)
    return torch.where(high > low, stretched, old.double()).to(torch.uint8)


def _equalize(old: Tensor, images: Tensor, unused: Tensor) -> Tensor:
    pixels = images.flatten(0, 1).flatten(1).long()  # (K*3, S*S)
    counts = pixels.new_zeros(len(pixels), 256).scatter_add_(1, pixels, torch.ones_like(pixels))
    brightest = counts.gather(1, pixels.amax(1, keepdim=True))
    step = (pixels.shape[1] - brightest) // 255  # 0 too where only one value occurs
    before = counts.cumsum(1) - counts
    spread = (step // 2 + before) // step.clamp(min=1)
    # Pillow's table holds bytes, so larger values are clipped
    return torch.where(step > 0, spread.clamp(max=255), old).to(torch.uint8).view(-1, 3, 256)


def color(images: Tensor, factors: Tensor) -> Tensor:
    """Blend with the gray image."""
    return blend(gray(images)[:, None], images, factors[:, None, None, None]).to(torch.uint8)


def sharpness(images: Tensor, factors: Tensor) -> Tensor:
    """Blend with a 3x3 mean in which the middle has weight 5 of 13; pixels at the border stay as they are."""
    x = images.int()
    across = x[..., :-2] + x[..., 1:-1] + x[..., 2:]
    around = across[:, :, :-2] + across[:, :, 1:-1] + across[:, :, 2:] + 4 * x[:, :, 1:-1, 1:-1]
    inner = images[:, :, 1:-1, 1:-1]
    sharpened = images.clone()
    sharpened[:, :, 1:-1, 1:-1] = blend((2 * around + 13) // 26, inner, factors[:, None, None, None]).to(torch.uint8)
    return sharpened


BLENDED = {"Color": color, "Sharpness": sharpness}


def rotated(images: Tensor, degrees: Tensor, taps: int, fill: Tensor) -> Tensor:
    """Rotate counter-clockwise about the centre, as Pillow does.

    images: (K, 3, H, W) uint8; degrees: (K,) float64; taps: 2 for linear interpolation, 4 for cubic; fill: (3,) float32
    -> (K, 3, H, W) uint8. Positions are float64, because a rounded position could lie in a neighbouring pixel; pixel values
    are float32.
    """
    count, _, height, width = images.shape
    angle, middle_x, middle_y = -torch.deg2rad(degrees)[:, None, None], width / 2, height / 2
    cos, sin = angle.cos(), angle.sin()
    y = torch.arange(height, device=images.device, dtype=torch.float64)[:, None] + 0.5
    x = torch.arange(width, device=images.device, dtype=torch.float64) + 0.5
    across = cos * x + sin * y + (middle_x - cos * middle_x - sin * middle_y)  # source position of a pixel: (K, H, W)
    down = cos * y - sin * x + (middle_y + sin * middle_x - cos * middle_y)
    left, above = (across - 0.5).floor(), (down - 0.5).floor()
    offsets = torch.arange(taps, device=images.device)[:, None, None] - (taps // 2 - 1)
    columns = (left.long()[:, None] + offsets).clamp_(0, width - 1)  # (K, taps, H, W)
    rows = (above.long()[:, None] + offsets).clamp_(0, height - 1).mul_(width)
    indices = (rows[:, :, None] + columns[:, None]).view(count, 1, -1).expand(-1, 3, -1)
    pixels = images.flatten(2).gather(2, indices).view(count, 3, taps, taps, height, width).float()
    right, below = ((p - 0.5 - whole).float()[:, None] for p, whole in ((across, left), (down, above)))
    result = _between(_between(pixels.unbind(3), right[:, :, None]).unbind(2), below)
    outside = (across < 0) | (across >= width) | (down < 0) | (down >= height)
    return _filled(result, outside, fill)


def sheared_or_shifted(images: Tensor, counts: list[int], values: Tensor, taps: int, fill: Tensor) -> Tensor:
    """Shift every row, or every column, along itself, as Pillow's affine transform does for shears and translations.

    images: (K, 3, S, S) uint8; counts: numbers of images of ShearX, TranslateX, ShearY and TranslateY, in this order;
    values: (K,) float64, slopes or shares of the side; taps, fill: as for `rotated` -> (K, 3, S, S) uint8.
    """
    side = images.shape[3]
    lines = torch.arange(side, device=images.device) + 0.5
    whole = torch.full_like(lines, side)
    distances = [line.expand(count, -1) for line, count in zip([lines, whole] * 2, counts, strict=True)]
    shifts = values[:, None] * torch.cat(distances)  # (K, S), pixels
    upright = sum(counts[:2])
    turned = torch.cat([images[:upright], images[upright:].mT])
    result = _shifted(turned, shifts, taps, fill)
    return torch.cat([result[:upright], result[upright:].mT])


def _shifted(images: Tensor, shifts: Tensor, taps: int, fill: Tensor) -> Tensor:
    """images: (K, 3, H, W) uint8; shifts: (K, H) float64, source minus target position -> (K, 3, H, W) uint8."""
    width = images.shape[3]
    whole = shifts.floor()
    before = taps // 2 - 1
    columns = whole.long()[:, :, None] + torch.arange(-before, width + taps - 1 - before, device=images.device)
    columns = columns.clamp_(0, width - 1)[:, None].expand(-1, 3, -1, -1)
    row = images.gather(3, columns).float()  # (K, 3, H, W + taps - 1)
    past = (shifts - whole).float()[:, None, :, None]
    result = _between([row[..., i : i + width] for i in range(taps)], past)
    first, end = ((edge - 0.5 - shifts).ceil()[:, :, None] for edge in (0, width))
    x = torch.arange(width, device=images.device)
    return _filled(result, (x < first) | (x >= end), fill)


def _between(pixels: Sequence[Tensor], past: Tensor) -> Tensor:
    """Pillow's linear or cubic interpolation (a = -1) of values around a position; equal values are kept exactly."""
    if len(pixels) == 2:
        a, b = pixels
        return (b - a).mul_(past).add_(a)
    a, b, c, d = pixels
    difference = c - d
    cube = (b - a).sub_(difference)
    square = (a - b).mul_(2).add_(difference)
    return cube.mul_(past).add_(square).mul_(past).add_(c - a).mul_(past).add_(b)


def _filled(x: Tensor, outside: Tensor, fill: Tensor) -> Tensor:
    """x: (K, 3, H, W) float32; outside: (K, H, W) bool -> (K, 3, H, W) uint8, truncated."""
    return torch.where(outside[:, None], fill[:, None, None], x.clamp_(0, 255)).to(torch.uint8)


# --------------------------------------------------------------------------------------------------
# After normalization


def erase(x: Tensor, boxes: Tensor, local: slice, generator: torch.Generator) -> Tensor:
    """Fill the boxes with normal noise, drawn for every pixel and channel: timm's RandomErasing in mode `pixel`.

    x: (B, 3, S, S) float32, normalized, overwritten; local: the rows of x in the global batch; boxes: (B * world, 4) int64
    on the CPU, of the global batch; generator: on x's device.
    """
    hit = boxes[:, 2].nonzero()[:, 0]
    local_hit = hit[(hit >= local.start) & (hit < local.stop)]
    if not len(local_hit):
        return x
    values = 3 * boxes[:, 2] * boxes[:, 3]  # numbers of noise for each image
    noise = torch.randn(int(values.sum()), generator=generator, device=x.device)[int(values[: local.start].sum()) :]
    table = send(torch.cat([boxes[local_hit], local_hit[:, None] - local.start], 1), x.device)
    top, left, height, width, rows = table.unbind(1)
    inside = _within(top, height, x.shape[2])[:, None, :, None] & _within(left, width, x.shape[3])[:, None, None, :]
    x[rows] = x[rows].masked_scatter_(inside.expand(-1, 3, -1, -1), noise)
    return x


def _within(start: Tensor, length: Tensor, side: int) -> Tensor:
    """start, length: (K,) -> (K, side) bool."""
    past = torch.arange(side, device=start.device) - start[:, None]
    return (past >= 0) & (past < length[:, None])


def mix_images(x: Tensor, mix: Mix | None) -> Tensor:
    """Mix each image with its neighbour. x: (B, 3, S, S), B even, overwritten."""
    if mix is None:
        return x
    other = x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    if mix.box is None:
        return x.mul_(mix.share).add_(other.mul_(1 - mix.share))
    top, bottom, left, right = mix.box
    x[:, :, top:bottom, left:right] = other[:, :, top:bottom, left:right]
    return x


def soft_targets(labels: Tensor, classes: int, smoothing: float, mix: Mix | None) -> Tensor:
    """Smoothed labels, mixed like their images: (B,) int64 -> (B, C) float32."""
    targets = torch.full((len(labels), classes), smoothing / classes, device=labels.device)
    targets.scatter_(1, labels[:, None], 1 - smoothing + smoothing / classes)
    if mix is None:
        return targets
    other = targets.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    return targets * mix.share + other * (1 - mix.share)
