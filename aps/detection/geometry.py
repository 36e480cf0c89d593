"""Checks that a detector fits its encoder: pyramid levels, windows, position embeddings. Planning imports this file.

It does not know how detectors are built (`aps.detection.vitdet`, the engines).
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from aps.models.archs import dimensions
from aps.registry import ENGINES
from aps.settings.base import check_range
from aps.settings.blocks import DetectionSettings, EncoderSettings

if TYPE_CHECKING:
    from aps.settings.study import ExperimentSettings


def strides(s: DetectionSettings, patch_size: int) -> tuple[int, ...]:
    """Pixels per cell of each pyramid level, finest first. Raises ValueError where a scale does not fit the patch."""
    if not set(s.pyramid_scales) <= {4.0, 2.0, 1.0, 0.5}:
        raise ValueError(f"detection.pyramid_scales {list(s.pyramid_scales)} may hold 4.0, 2.0, 1.0 and 0.5")
    sides = [patch_size / scale for scale in s.pyramid_scales]
    if any(fine * 2 != coarse for fine, coarse in itertools.pairwise(sides)):
        raise ValueError(f"detection.pyramid_scales {list(s.pyramid_scales)} must halve from one level to the next")
    if not all(stride.is_integer() and stride >= 2 and int(stride).bit_count() == 1 for stride in sides):
        raise ValueError(
            f"detection.pyramid_scales {list(s.pyramid_scales)} on patch_size {patch_size} gives levels of "
            f"{', '.join(f'{side:g}' for side in sides)} pixels a cell; these must be powers of two from 2 on"
        )
    return tuple(int(stride) for stride in sides)


def positions_grid(s: DetectionSettings, encoder: EncoderSettings) -> int:
    """Side, in cells, of the grid for which the backbone has position embeddings."""
    return encoder.grid if s.positions == "interpolate" else s.image_size // encoder.patch_size


def check(experiment: ExperimentSettings) -> None:
    """Raises ValueError where the experiment's detector can't be built."""
    s: DetectionSettings = experiment.detection
    encoder = experiment.encoder
    if s.engine not in ENGINES:
        raise ValueError(f"detection.engine '{s.engine}' is unknown; {ENGINES.unknown(s.engine)}")
    coarsest = strides(s, encoder.patch_size)[-1]
    step = max(coarsest, encoder.patch_size)
    if s.image_size % step:
        raise ValueError(
            f"detection.image_size {s.image_size} is not a multiple of {step} pixels, a cell of the coarsest pyramid level"
        )
    depth = dimensions(encoder).depth
    if s.window and (beyond := [block for block in s.global_blocks if block >= depth]):
        raise ValueError(
            f"detection.global_blocks names block {beyond[0]} of an encoder of {depth} blocks (from 0); list existing ones"
        )
    if s.positions == "repeat" and s.window != encoder.grid:
        raise ValueError(
            f"detection.positions: repeat repeats the pretraining grid of {encoder.grid} x {encoder.grid} cells in every "
            f"window, and detection.window is {s.window}; set detection.window to {encoder.grid}"
        )
    check_range("detection.jitter_scale", s.jitter_scale)
    if s.warmup_iterations > s.iterations:
        raise ValueError(
            f"detection.warmup_iterations {s.warmup_iterations} exceeds detection.iterations {s.iterations}"
        )
    if list(s.lr_drops) != sorted(s.lr_drops):
        raise ValueError(f"detection.lr_drops {list(s.lr_drops)} must ascend")
