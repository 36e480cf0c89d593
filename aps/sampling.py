"""Chooses the patches of each view that the encoder sees: sparse sampling of view 1, selective sampling of view 2.

This is the method of the paper (arXiv 2306.02854) as pure functions on tensors. A view is a crop of the source image,
divided into a grid of cells; a cell covers a box of source pixels. View 1 keeps random cells. View 2 prefers cells whose
source pixels view 1 did not keep, so that the two share little appearance, and only semantics can match them.

    G  cells along a side, N = G*G cells of a view, numbered row-major as seen in the (flipped) view
    r  sampling ratio, n = int(N*r) kept cells
    T  samplings drawn for one pair of views; B images; gamma the power that sharpens the preference

Design: there are no loops over images, cells or samplings. Cells are axis-aligned, so coverage separates into one small
matrix for rows and one for columns, and weighted sampling without replacement is the top n of perturbed log weights.

It does not know pixels, models, files, or where the boxes come from.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from aps.errors import BrokenContract, UserError
from aps.registry import STRATEGIES
from aps.settings.blocks import SamplingSettings

# A cell counts as covered if its uncovered share is below this, which is above float32's rounding and too small for gamma.
ROUNDING = 1e-5


class Geometry(NamedTuple):
    """Positions of a batch's views in their source images."""

    boxes: Tensor  # (B, 4) float: top, left, height, width in source pixels
    flips: Tensor  # (B,) bool: mirrored left to right after the crop


class Kept(NamedTuple):
    """Cells the encoder sees, in no particular order."""

    view1: Tensor  # (T, B, n) int64
    view2: Tensor  # (T, B, n) int64


def kept_cells(grid: int, ratio: float) -> int:
    """n = int(N*r)."""
    return int(grid * grid * ratio)


# --------------------------------------------------------------------------------------------------
# Coverage


def overlaps(start1: Tensor, size1: Tensor, cells1: Tensor, start2: Tensor, size2: Tensor, cells2: Tensor) -> Tensor:
    """Share of each interval of view 2 that each interval of view 1 covers, along one axis.

    start, size: (B,) source pixels; cells: (B, G) position of each interval along the axis -> (B, G2, G1).
    """
    grid = cells1.shape[1]
    offset = grid * (start1 - start2)[:, None]  # (B, 1)
    low = (offset + cells1 * size1[:, None]) / size2[:, None]  # (B, G1) in intervals of view 2
    high = (offset + (cells1 + 1) * size1[:, None]) / size2[:, None]
    below = torch.maximum(low[:, None, :], cells2[:, :, None])
    above = torch.minimum(high[:, None, :], cells2[:, :, None] + 1)
    return (above - below).clamp_(0, 1)


def coverage(view1: Geometry, mask1: Tensor, view2: Geometry, grid: int, flip_aware: bool = True) -> Tensor:
    """Share of each cell of view 2 covered, in the source, by the kept cells of view 1: Oy @ M @ Ox^T.

    mask1: (B, T, N) 1 where view 1 keeps the cell -> (B, T, N) in [0, 1].
    flip_aware False ignores flips, as the authors' release does: cells of a flipped view are then taken mirrored.
    """
    rows = torch.arange(grid, device=mask1.device, dtype=torch.float64).expand(len(mask1), grid)
    columns1, columns2 = rows, rows
    if flip_aware:
        columns1 = torch.where(view1.flips[:, None], grid - 1 - rows, rows)
        columns2 = torch.where(view2.flips[:, None], grid - 1 - rows, rows)
    top1, left1, height1, width1 = view1.boxes.double().unbind(1)
    top2, left2, height2, width2 = view2.boxes.double().unbind(1)
    over_y = overlaps(top1, height1, rows, top2, height2, rows)  # (B, G2, G1)
    over_x = overlaps(left1, width1, columns1, left2, width2, columns2)
    mask = mask1.unflatten(2, (grid, grid))
    precise = torch.float64 if mask1.is_cuda else torch.float32  # on CUDA, TF32 would leave three digits
    covered = torch.einsum("bri,btij,bcj->btrc", over_y.to(precise), mask.to(precise), over_x.to(precise))
    return covered.flatten(2).float().clamp_(0, 1)


# --------------------------------------------------------------------------------------------------
# Draws


class Noise(Protocol):
    """Uniform noise of (0, 1) for this process's rows of the global batch."""

    def __call__(self, *shape: int) -> Tensor: ...  # (B, *shape) float32


def sparse(grid: int, kept: int, samplings: int, noise: Noise) -> Tensor:
    """Sparse sampling: chunks of one random permutation of each image's cells -> (B, T, n), disjoint over T."""
    permutation = least(noise(grid * grid), samplings * kept)
    return permutation.unflatten(1, (samplings, kept))


def selective(covered: Tensor, kept: int, gamma: float, noise: Noise) -> Tensor:
    """Selective sampling: cells drawn without replacement with weights w = (1 - cov)^gamma -> (B, T, n).

    covered: (B, T, N). Every cell draws an exponential time of rate w, and the n cells with the shortest times are taken.
    Their order is that of successive draws in proportion to w (Efraimidis & Spirakis 2006), and -log of the time is
    log w + Gumbel noise. Cells of weight 0 come after all others, in uniformly random order, so they are taken where fewer
    than n cells have weight. 0^0 is 1: gamma 0 draws uniformly.
    """
    exponential = noise(*covered.shape[1:]).log_().neg_()
    finish = exponential.log().add_(17)  # > 0: exponential noise from float32 is at least 6e-8
    if gamma > 0:
        uncovered = 1 - covered
        finish.sub_(uncovered.clamp(min=ROUNDING).log_(), alpha=gamma)
        finish.addcmul_(uncovered.le_(ROUNDING), exponential, value=1e30)
    return least(finish, kept)


def least(values: Tensor, kept: int) -> Tensor:
    """Indices of the `kept` least values along the last axis, in ascending order of values, then of indices.

    values: (..., N) float32, positive, so that their bits as integers have the same order -> (..., kept) int64.
    On a CPU, the bits and the index are packed into one integer, which NumPy sorts several times faster than torch.
    """
    bits = values.view(torch.int32)
    if bits.device.type != "cpu":
        return bits.sort(dim=-1, stable=True).indices[..., :kept]
    keys = bits.long().bitwise_left_shift_(32).bitwise_or_(torch.arange(bits.shape[-1])).numpy()
    if 2 * kept <= keys.shape[-1]:  # then partitioning before sorting is faster
        keys.partition(kept - 1, axis=-1)
        keys = keys[..., :kept]
    keys.sort(axis=-1)
    return torch.from_numpy(keys)[..., :kept].bitwise_and(0xFFFFFFFF)


# --------------------------------------------------------------------------------------------------
# Strategies. A new one is one function here and a row of `aps.registry.STRATEGIES`.

Cells = tuple[Tensor, Tensor]  # of view 1, of view 2, both (B, T, n)
Strategy = Callable[[SamplingSettings, int, Geometry, Geometry, Noise], Cells]


def asymmetric(settings: SamplingSettings, grid: int, view1: Geometry, view2: Geometry, noise: Noise) -> Cells:
    """The paper's method: view 1 sparse, view 2 selective."""
    kept = kept_cells(grid, settings.ratio)
    cells1 = sparse(grid, kept, settings.samplings, noise)
    mask1 = torch.zeros(*cells1.shape[:2], grid * grid, device=cells1.device).scatter_(2, cells1, 1)
    covered = coverage(view1, mask1, view2, grid, settings.flip_aware)
    return cells1, selective(covered, kept, settings.gamma, noise)


def random(settings: SamplingSettings, grid: int, view1: Geometry, view2: Geometry, noise: Noise) -> Cells:
    """Ablation: both views sparse, drawn independently."""
    kept = kept_cells(grid, settings.ratio)
    return sparse(grid, kept, settings.samplings, noise), sparse(grid, kept, settings.samplings, noise)


def full(settings: SamplingSettings, grid: int, view1: Geometry, view2: Geometry, noise: Noise) -> Cells:
    """Ordinary contrastive learning: every cell of both views, whatever the ratio."""
    cells = torch.arange(grid * grid, device=view1.boxes.device)
    cells = cells.expand(len(view1.boxes), settings.samplings, grid * grid)
    return cells, cells


def draw(settings: SamplingSettings, grid: int, view1: Geometry, view2: Geometry, noise: Noise) -> Kept:
    """Cells kept of both views of a batch, T times, on the geometries' device.

    Raises UserError where T samplings of n cells don't fit the N cells, or the strategy returned something else.
    """
    cells, kept = grid * grid, kept_cells(grid, settings.ratio)
    if settings.strategy != "full" and not 1 <= kept * settings.samplings <= cells:
        raise UserError(
            f"sampling.samplings {settings.samplings} x {kept} kept cells (sampling.ratio {settings.ratio}) must be at least 1 "
            f"and at most the {cells} cells of a view; change sampling.samplings or sampling.ratio"
        )
    strategy: Strategy = STRATEGIES.load(settings.strategy)
    found = strategy(settings, grid, view1, view2, noise)
    _check(strategy, found, settings, cells, len(view1.boxes))
    cells1, cells2 = found
    return Kept(cells1.transpose(0, 1).contiguous(), cells2.transpose(0, 1).contiguous())


_checked: set[Strategy] = set()  # those whose cells were looked at


def _check(strategy: Strategy, found: object, settings: SamplingSettings, cells: int, images: int) -> None:
    """Raises BrokenContract where a strategy returned something else than cells of both views.

    Their numbers are looked at once, on the CPU, where no device is waited for: operations are counted there before a run
    starts.
    """

    def ask(kept: object, sentence: str) -> None:
        if not kept:
            file = getattr(sys.modules.get(strategy.__module__), "__file__", strategy.__module__)
            raise BrokenContract(f"sampling.strategy {settings.strategy} ({file}) returned {sentence}")

    both = isinstance(found, tuple | list) and len(found) == 2 and all(isinstance(x, Tensor) for x in found)
    ask(both, f"a {type(found).__name__}; return two tensors (B, T, n), the cells of each view")
    tensors: Any = found
    for x in tensors:
        fits = x.dim() == 3 and x.shape[:2] == (images, settings.samplings) and x.shape == tensors[0].shape
        ask(
            fits and x.dtype == torch.int64,
            f"cells of shape {tuple(x.shape)}, {str(x.dtype).removeprefix('torch.')}; return (B, T, n), here ({images}, "
            f"{settings.samplings}, n) with the same n for both views, int64",
        )
    if strategy not in _checked and tensors[0].device.type == "cpu":
        for x in tensors:
            ask(((x >= 0) & (x < cells)).all(), f"a cell that is none of 0 to {cells - 1}; a view has {cells} cells")
            ask((x.sort(dim=2).values.diff(dim=2) > 0).all(), "a cell twice; return n different cells of a view")
        _checked.add(strategy)


def sample(
    settings: SamplingSettings,
    grid: int,
    view1: Geometry,
    view2: Geometry,
    generator: torch.Generator,
    rank: int = 0,
    world: int = 1,
) -> Kept:
    """`draw` with noise from a generator; the geometries are those of this process's rows."""
    return draw(
        settings, grid, view1, view2, global_noise(len(view1.boxes), view1.boxes.device, generator, rank, world)
    )


def global_noise(batch: int, device: torch.device, generator: torch.Generator, rank: int = 0, world: int = 1) -> Noise:
    """Noise for this process's `batch` rows of the global batch of batch*world rows, on `device`.

    It is drawn for the global batch on the generator's device (the CPU or the batch's), so it doesn't depend on the number
    of processes.
    """

    def noise(*shape: int) -> Tensor:
        drawn = torch.rand(batch * world, *shape, generator=generator, device=generator.device).clamp_(min=2.0**-25)
        local = drawn[rank * batch : (rank + 1) * batch]
        if device.type == "cuda" and local.device.type == "cpu":
            local = local.pin_memory()  # a copy from pageable memory would wait for the device
        return local.to(device, non_blocking=True)

    return noise
