"""Makes augmented views of a batch of images on tensors, and keeps their boxes and flips.

Crop, flip, colour jitter (and the order of its four operations), grayscale, blur and solarize are drawn for each image.
The result equals that of torchvision's functional operators with the same parameters.

Design: parameters are drawn on the CPU, always for the global batch, so that crops are the same on every device and
with any number of processes. The CPU therefore knows which image takes which branch, and never waits for the device. All
operations run on whole batches:
- crop, resize and flip are one small matrix for rows and one for columns of each image;
- brightness, contrast and saturation are the same blend, clamp(a x + b gray(x) + c mean(gray(x))), with other
  coefficients, so one operation serves all images in every step;
- images are sorted by the number of blends before their hue turns. Each blend is applied to those that have it before, then
  all hues turn, then each blend to the others: slices, the same order for each image, and one pass over the hues.

Products are full float32 on a GPU too (`full_products`): TF32, which training has, would leave three digits of a pixel. The
host decides it when it queues a product, and the thread that trains queues them, so that the steps keep TF32.

How pretraining uses it, with a generator of the batch and a `View` for each view of an image:

    array datasets   parameters = draw_parameters(view.chances, B * world, H, W, view.augmentation, generator).rows(local)
                     pixels = apply_view(images, parameters, view.size, mean, std)
    file datasets    a worker, for each image: crops, boxes = cut_crops(image, views, (seed, epoch, index))
                     after collating, crops[v] (B, 3, S, S) uint8 and boxes (B, V, 4), for view v:
                     parameters = draw_parameters(view.chances, B * world, S, S, view.augmentation, generator).rows(local)
                     parameters = parameters._replace(boxes=boxes[:, v])
                     pixels = apply_crops(crops[v].to(device), parameters, mean, std)
    both             a method's `sample` gets parameters.geometry(device) of every view

There, `local` is the slice of this process's rows. It does not know datasets, decoding, sampling of patches, or the
training loop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode, functional

from aps.runtime.precision import full_products
from aps.runtime.prefetch import send
from aps.sampling import Geometry
from aps.settings.blocks import ViewSettings

TRIES = 10  # random boxes tried for an image before a centred one is used (torchvision's RandomResizedCrop)
SIGMA = (0.1, 2.0)  # range of the blur's sigma, in pixels of the view (SimCLR, MoCo v3)
SOLARIZE = 128 / 255  # threshold of PIL's ImageOps.solarize, of [0, 1]
GRAY = (0.2989, 0.587, 0.114)  # ITU-R 601-2 luma, torchvision's rounding
HUES = 2**17  # pixels of images whose hue turns at once on a CPU, so that intermediate results stay in its caches
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


class View(NamedTuple):
    """One of the views that a method makes of each image."""

    size: int  # S, side in pixels
    augmentation: ViewSettings
    chances: int = 1  # 1 or 2: which of the augmentation's two probabilities of blur and of solarize it uses


class ViewParameters(NamedTuple):
    """Augmentation parameters of one view, for each image of a batch. All on the CPU."""

    boxes: Tensor  # (B, 4) int64: top, left, height, width in source pixels
    flips: Tensor  # (B,) bool
    jitter: Tensor  # (B,) bool: whether colours change
    factors: Tensor  # (B, 4) float32: brightness, contrast, saturation, hue, as torchvision's adjust_* take them
    order: Tensor  # (B, 4) int64: the four operations in the order in which they are applied
    gray: Tensor  # (B,) bool
    sigma: Tensor  # (B,) float32: blur in pixels; 0: none
    solarize: Tensor  # (B,) bool

    def rows(self, rows: slice) -> ViewParameters:
        """Parameters of some images of the batch."""
        return ViewParameters(*(field[rows] for field in self))

    @staticmethod
    def joined(several: Sequence[ViewParameters]) -> ViewParameters:
        """Parameters of several views' images, one view after the other."""
        return ViewParameters(*map(torch.cat, zip(*several, strict=True)))

    def geometry(self, device: torch.device | str = "cpu") -> Geometry:
        """Boxes and flips for the sampler, on its device."""
        table = send(torch.cat([self.boxes, self.flips[:, None]], 1).float(), device)
        return Geometry(table[:, :4], table[:, 4] > 0)


# --------------------------------------------------------------------------------------------------
# Drawing


def draw_boxes(heights: Tensor, widths: Tensor, settings: ViewSettings, generator: torch.Generator) -> Tensor:
    """Crop boxes with the distribution of torchvision's RandomResizedCrop.get_params.

    heights, widths: (B,) int64 sizes of the sources in pixels -> (B, 4) int64: top, left, height, width.
    """
    batch, tall, broad = len(heights), heights.numpy(), widths.numpy()
    # NumPy, because a worker draws for one image at a time, and torch takes three times as long for so few numbers.
    area, aspect, down, right = torch.rand(4, batch, TRIES, generator=generator, dtype=torch.float64).numpy()
    (small, large), (narrow, wide) = settings.crop_scale, settings.crop_ratio
    area = (small + (large - small) * area) * (tall * broad)[:, None]
    aspect = np.exp(math.log(narrow) + (math.log(wide) - math.log(narrow)) * aspect)
    height, width = np.rint(np.sqrt(area / aspect)), np.rint(np.sqrt(area * aspect))
    fits = (height > 0) & (height <= tall[:, None]) & (width > 0) & (width <= broad[:, None])
    first = np.arange(batch), fits.argmax(1)
    height, width = height[first], width[first]
    top, left = np.floor(down[first] * (tall - height + 1)), np.floor(right[first] * (broad - width + 1))
    boxes = torch.from_numpy(np.stack([top, left, height, width], 1)).long()
    found = torch.from_numpy(fits.any(1))
    if bool(found.all()):
        return boxes
    return torch.where(found[:, None], boxes, _centred_boxes(heights, widths, narrow, wide))


def _centred_boxes(heights: Tensor, widths: Tensor, narrow: float, wide: float) -> Tensor:
    """The largest centred boxes within the aspect ratios: (B,), (B,) -> (B, 4) int64."""
    aspect = widths.double() / heights
    height = torch.where(aspect < narrow, (widths / narrow).round().long().clamp(min=1), heights)
    width = torch.where(aspect > wide, (heights * wide).round().long().clamp(min=1), widths)
    return torch.stack([(heights - height) // 2, (widths - width) // 2, height, width], 1)


def draw_parameters(
    view: int, batch: int, height: int, width: int, settings: ViewSettings, generator: torch.Generator
) -> ViewParameters:
    """Parameters of a view for a batch of images of one size, from a CPU generator.

    Draw for the global batch and take this process's `.rows`. `view`, 1 or 2, chooses the probabilities of blur and solarize.
    """
    boxes = draw_boxes(torch.full((batch,), height), torch.full((batch,), width), settings, generator)
    flips, jitter, gray, blurred, sigma, solarize = torch.rand(6, batch, generator=generator)
    strength = torch.tensor(settings.color_jitter)
    low, high = 1 - strength, 1 + strength
    low[HUE], high[HUE] = -strength[HUE], strength[HUE]
    low[:HUE].clamp_(min=0)
    factors = low + (high - low) * torch.rand(batch, 4, generator=generator)
    blurred = blurred < settings.blur[view - 1]
    sigma = SIGMA[0] + (SIGMA[1] - SIGMA[0]) * sigma
    return ViewParameters(
        boxes=boxes,
        flips=flips < settings.flip,
        jitter=(jitter < settings.color_jitter_prob) & bool(strength.any()),
        factors=factors,
        order=torch.rand(batch, 4, generator=generator).argsort(1),
        gray=gray < settings.grayscale,
        sigma=torch.where(blurred, sigma, 0.0),
        solarize=solarize < settings.solarize[view - 1],
    )


def cut_crops(image: Tensor, views: Sequence[View], seed: tuple[int, int, int]) -> tuple[list[Tensor], Tensor]:
    """Cut the crops of one decoded image, in a loading worker; `apply_crops` does the other operations.

    image: (3, H, W) uint8; seed: (seed, epoch, index of the image), which alone determines the crops
    -> crops, V of (3, S, S) uint8; boxes (V, 4) int64.
    """
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1))
    height, width = image.shape[1:]
    boxes = []
    for augmentation, group in groupby(view.augmentation for view in views):  # one draw for views with one augmentation
        count = len(list(group))
        boxes.append(draw_boxes(torch.full((count,), height), torch.full((count,), width), augmentation, generator))
    table = torch.cat(boxes)
    crops = [cut(image, box, view.size) for view, box in zip(views, table.tolist(), strict=True)]
    return crops, table


def cut(
    image: Tensor, box: Sequence[int], size: int, interpolation: InterpolationMode = InterpolationMode.BILINEAR
) -> Tensor:
    """A box of one image, resized with antialiasing: the pixels of torchvision's resized_crop.

    image: (3, H, W) uint8; box: top, left, height, width -> (3, S, S) uint8.
    """
    top, left, height, width = box
    crop = image[:, top : top + height, left : left + width]
    # torch resizes 1.5 times faster where the channels of a pixel lie side by side, and leaves them so.
    crop = crop.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    return functional.resize(crop, [size, size], interpolation, antialias=True)


# --------------------------------------------------------------------------------------------------
# Applying


def apply_view(
    images: Tensor, parameters: ViewParameters, size: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> Tensor:
    """One view of a batch. images: (B, 3, H, W) uint8 -> (B, 3, S, S) float32, normalized, on the images' device."""
    plan = _Branches(parameters, mean, std, images.device)
    crops = crop_resize(images.index_select(0, plan.sorting), plan.boxes, plan.flips, size)
    return _finish(crops, plan)


def apply_crops(crops: Tensor, parameters: ViewParameters, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """As `apply_view`, for crops of `cut_crops`. crops: (B, 3, S, S) uint8 -> (B, 3, S, S) float32, normalized."""
    plan = _Branches(parameters, mean, std, crops.device)
    crops = crops.index_select(0, plan.sorting)
    crops = torch.where(plan.flips[:, None, None, None], crops.flip(3), crops)
    return _finish(crops.float().div_(255), plan)


def crop_resize(images: Tensor, boxes: Tensor, flips: Tensor, size: int) -> Tensor:
    """Crop, resize with antialiasing and flip; every image has a box and a flip.

    images: (B, 3, H, W) uint8; boxes: (B, 4) float; flips: (B,) bool -> (B, 3, S, S) float32 in [0, 1].
    """
    height, width = images.shape[2:]
    top, left, tall, wide = boxes.unbind(1)
    rows = resize_matrix(top, tall, height, size)
    columns = resize_matrix(left, wide, width, size, flips)
    return _separable(images.float(), rows.mul_(1 / 255), columns)


def resize_matrix(start: Tensor, length: Tensor, source: int, size: int, flips: Tensor | None = None) -> Tensor:
    """Weights of antialiased bilinear interpolation along one axis: start, length (B,), source pixels -> (B, S, source).

    The weights are a triangle around each target pixel's centre, as wide as a target pixel but at least a source pixel, cut
    at the box and normalized, as in torchvision's resize with antialias=True. flips: (B,) bool: targets in reverse order.
    """
    target = torch.arange(size, device=start.device, dtype=torch.float32).expand(len(start), size) + 0.5
    if flips is not None:
        target = torch.where(flips[:, None], size - target, target)
    scale = (length / size)[:, None]  # source pixels of a target pixel
    pixel = torch.arange(source, device=start.device, dtype=torch.float32) + 0.5 - start[:, None]  # in the box
    inside = (torch.minimum(pixel, length[:, None] - pixel) + 0.5).clamp_(0, 1)
    narrow = 1 / scale.clamp(min=1)
    weights = (pixel[:, None, :] - (target * scale)[:, :, None]).abs_().mul_(narrow[:, :, None])
    weights = weights.neg_().add_(1).clamp_(min=0).mul_(inside[:, None, :])
    return weights.div_(weights.sum(2, keepdim=True))


def blur_matrix(sigma: Tensor, size: int) -> Tensor:
    """Weights of a Gaussian blur along one axis with reflected borders, as in torchvision's gaussian_blur.

    sigma: (B,), pixels -> (B, S, S). The kernel spans a tenth of the view (SimCLR): 23 pixels at 224.
    """
    reach = size // 20
    position = torch.arange(size, device=sigma.device)
    offset = torch.arange(-reach, reach + 1, device=sigma.device)
    kernel = torch.softmax(-0.5 * (offset / sigma[:, None].clamp(min=1e-3)).square(), 1)  # (B, 2*reach + 1)
    tap = (position[:, None] + offset).abs()
    tap = size - 1 - (size - 1 - tap).abs()  # (S, taps)
    matrix = sigma.new_zeros(len(sigma), size, size)
    return matrix.scatter_add_(2, tap.expand(len(sigma), -1, -1), kernel[:, None].expand(-1, size, -1))


@full_products()
def _separable(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """images (B, 3, H, W), rows (B, S, H), columns (B, S, W) -> (B, 3, S, S)."""
    batch, channels, height, width = images.shape
    across = torch.bmm(images.reshape(batch, channels * height, width), columns.mT)
    return rows[:, None] @ across.view(batch, channels, height, -1)


class _Branches:
    """Parameters on the device, with images sorted by branch, sent in one transfer.

    In sorted order, images with colour jitter come first, by the number of blends before their hue turns. `before` and `after`
    are blends before and after that: rows and their coefficients.
    """

    def __init__(
        self, p: ViewParameters, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
    ) -> None:
        batch = len(p.boxes)
        hue_slot = (p.order == HUE).int().argmax(1)  # the number of blends before it
        sorting = torch.where(p.jitter, hue_slot, 4).argsort(stable=True)
        counts = torch.bincount(hue_slot[p.jitter], minlength=4).tolist()
        self.colored = sum(counts)
        self.turns = bool(p.factors[p.jitter, HUE].any())
        # Images whose hue turns before blend k, the first ones. Where no hue turns, all blends come before.
        turned = [sum(counts[: k + 1]) if self.turns else 0 for k in range(3)]

        blends = p.order[p.order != HUE].view(batch, 3)
        scale = p.factors.gather(1, blends)
        to_gray = torch.where(blends == SATURATION, 1 - scale, 0)
        to_mean = torch.where(blends == CONTRAST, 1 - scale, 0)

        identity, gray = torch.eye(3), torch.tensor([GRAY]).expand(3, 3)
        mix = torch.where(p.gray[:, None, None], gray, identity)
        self.solarize = bool(p.solarize.any())
        self.blur = bool(p.sigma.any())
        columns = [p.boxes, p.flips[:, None], p.factors[:, HUE:], scale, to_gray, to_mean, mix.flatten(1),
                   p.sigma[:, None], p.solarize[:, None]]  # fmt: skip
        table = torch.cat([c.float() for c in columns], 1)[sorting]
        table = torch.cat([table, sorting[:, None].float(), sorting.argsort()[:, None].float()], 1)
        table = send(table, device)
        widths = [c.shape[1] for c in columns] + [1, 1]
        boxes, flips, hue, scale, to_gray, to_mean, mix, sigma, solarize, sorting, inverse = table.split(widths, 1)
        self.boxes, self.flips, self.hue = boxes, flips[:, 0] > 0, hue[:, 0]
        steps = [(scale[:, k], to_gray[:, k], to_mean[:, k]) for k in range(3)]
        self.before = _of_rows([slice(end, self.colored) for end in turned], steps)
        self.after = _of_rows([slice(0, end) for end in turned], steps)
        self.mix, self.sigma, self.solarized = mix.reshape(-1, 3, 3), sigma[:, 0], solarize[:, 0]
        self.sorting, self.inverse = sorting[:, 0].long(), inverse[:, 0].long()
        self.mean, self.std = mean, std


def _of_rows(rows: Sequence[slice], steps: Sequence[tuple[Tensor, ...]]) -> list[tuple[slice, list[Tensor]]]:
    """Each step's rows and their coefficients; steps without rows are left out."""
    return [(s, [c[s] for c in step]) for s, step in zip(rows, steps, strict=True) if s.start < s.stop]


def _finish(x: Tensor, plan: _Branches) -> Tensor:
    """Apply colours, blur, solarize and normalization to sorted crops, and undo the sorting.

    x: (B, 3, S, S) float32 in [0, 1], overwritten.
    """
    channels, size = x.shape[1:3]
    for rows, blend in plan.before:
        _blend(x[rows], *blend)
    if plan.turns:
        count = max(1, HUES // size**2) if x.device.type == "cpu" else plan.colored
        for start in range(0, plan.colored, count):
            rows = slice(start, min(start + count, plan.colored))
            turn_hue(x[rows], plan.hue[rows], out=x[rows])
    for rows, blend in plan.after:
        _blend(x[rows], *blend)
    with full_products():
        x = torch.bmm(plan.mix, x.flatten(2)).view_as(x)
    if plan.blur:
        matrix = blur_matrix(plan.sigma, size)
        x = _separable(x, matrix, matrix)
    if plan.solarize:
        x = torch.where((plan.solarized[:, None, None, None] > 0) & (x >= SOLARIZE), 1 - x, x)
    for c in range(channels):
        x[:, c].sub_(plan.mean[c]).div_(plan.std[c])
    return x.index_select(0, plan.inverse)


def _blend(x: Tensor, scale: Tensor, to_gray: Tensor, to_mean: Tensor) -> None:
    """x <- clamp(scale x + to_gray gray(x) + to_mean mean(gray(x))): brightness, contrast or saturation of each image.

    x: (B, 3, S, S); coefficients: (B,).
    """
    gray = (GRAY[0] * x[:, 0]).add_(x[:, 1], alpha=GRAY[1]).add_(x[:, 2], alpha=GRAY[2])  # (B, S, S)
    mean = gray.mean((1, 2))
    rest = gray.mul_(to_gray[:, None, None]).add_((to_mean * mean)[:, None, None])
    x.mul_(scale[:, None, None, None]).add_(rest[:, None]).clamp_(0, 1)


def turn_hue(x: Tensor, shift: Tensor, out: Tensor | None = None) -> Tensor:
    """Turn the hue of each image by its share of a full circle, keeping value and saturation.

    x: (B, 3, S, S) in [0, 1]; shift: (B,) in [-0.5, 0.5] -> (B, 3, S, S). Equal to torchvision's adjust_hue. With chroma
    C = max - min, a channel that vanishes at angle a is max - C * clamp(2 - 6 |h - a|, 0, 1), |.| around the circle.
    Channels are sorted by max and min, because on CPUs `where` is ten times slower than these two.
    """
    red, green, blue = x.unbind(1)
    low, middle = torch.minimum(green, blue), torch.maximum(green, blue)
    swapped = green.clone().lt_(blue)
    high, middle, rotated = torch.maximum(red, middle), torch.minimum(red, middle), red.clone().lt_(middle)
    sector = swapped.mul(2).sub_(1 / 3).mul_(rotated).sub_(swapped)  # 0, -1, -1/3 or 2/3 of the circle
    chroma = high - torch.minimum(low, middle)
    hue = middle.sub_(low).div_(chroma.mul(6).clamp_(min=1e-20)).add_(sector).abs_().add_(shift[:, None, None])
    away = torch.stack([hue + 0.5, hue + 1 / 6, hue - 1 / 6], 1)
    away = away.sub_(away.round()).abs_().mul_(-6).add_(2).clamp_(0, 1)
    return torch.addcmul(high[:, None], away, chroma[:, None], value=-1, out=out)
