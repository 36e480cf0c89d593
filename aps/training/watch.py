"""Finds two silent failures of training: a loss that is not finite, and features that have collapsed.

Design: a loss that is not finite ends the run before a checkpoint could contain its effect. On CPUs the loss of every step
is read. On a GPU that would wait for the device, so losses are written into a small ring buffer on the device, which is
copied to the host asynchronously; the run ends some steps later, and the message names the right step. Of several
processes only the first checks its loss; a loss that is not finite on another one reaches it through the shared gradients.

A collapsed representation is found from the features of some images: their effective rank, and the share of dead
dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from aps.errors import UserError
from aps.runtime.processes import Distributed
from aps.training.features import Normalization
from aps.training.loop import not_finite

RING, COPIED = 64, 16  # losses kept on a GPU; steps between two copies to the host
DEAD = 0.01  # share of 1/sqrt(D), the standard deviation of a dimension of uniformly spread features
LEAST_RANK, MOST_DEAD = 2.0, 0.9  # below and above which a representation is called collapsed


class Watch:
    """Checks the losses of one training.

    Args:
        name: the training's, for messages.
        block: the name of its settings.
        manifest: the file manifest.json of its images.
        normalization: the mean and std of its images, where they are normalized before they come here.
        rate: as in `not_finite`.
    """

    def __init__(
        self,
        name: str,
        block: str,
        distributed: Distributed,
        manifest: Path,
        normalization: Normalization | None = None,
        rate: str = "lr",
    ) -> None:
        self.name, self.block, self.manifest, self.rate = name, block, manifest, rate
        self._normalization = normalization
        self.active = distributed.main
        self._last: tuple[int, float] | None = None  # the last finite loss and its step
        self._checked = -1  # the last step that was checked
        self._ring: Tensor | None = None
        if distributed.device.type == "cuda":
            self._ring = torch.zeros(RING, device=distributed.device)
            self._host = torch.zeros(RING).pin_memory()
            self._steps: list[int] = [-1] * RING  # the steps of the losses in the ring
            self._count = 0
            self._copied: tuple[torch.cuda.Event, list[int]] | None = None

    def add(self, loss: Tensor, step: int, images: Iterable[Tensor]) -> None:
        """Check a step's loss, a scalar on the device, computed from `images`.

        Raises:
            UserError: the loss of this step, or on a GPU of one before, is not finite.
        """
        if not self.active:
            return
        if self._ring is None:
            self._check_step(step, float(loss.detach()), images)
            return
        slot = self._count % RING
        self._ring[slot].copy_(loss.detach())
        self._steps[slot], self._count = step, self._count + 1
        if self._count % COPIED == 0 and (self._copied is None or self._copied[0].query()):
            if self._copied is not None:
                self._scan(self._copied[1], images)
            self._host.copy_(self._ring, non_blocking=True)
            self._copied = torch.cuda.Event(), list(self._steps)
            self._copied[0].record()

    def check(self, images: Iterable[Tensor] = ()) -> None:
        """Check all losses that were added, waiting for the device. Raises UserError as `add` does."""
        if self._ring is not None:
            self._copied = None
            self._host.copy_(self._ring)
            self._scan(self._steps, images)

    def _scan(self, steps: list[int], images: Iterable[Tensor]) -> None:
        """Check the losses that were copied to the host; `steps` are their steps."""
        losses = self._host.tolist()
        for step, slot in sorted((step, slot) for slot, step in enumerate(steps) if step > self._checked):
            self._checked = step
            self._check_step(step, losses[slot], images)

    def _check_step(self, step: int, loss: float, images: Iterable[Tensor]) -> None:
        if math.isfinite(loss):
            self._last = step, loss
            return
        last = (
            "no step before had a finite one"
            if self._last is None
            else f"it was {self._last[1]:.4g} at step {self._last[0] + 1}"
        )
        if not all(bool(x.isfinite().all()) for x in images):
            raise UserError(
                f"the {self.name} loss became {loss} because images of its batch are not finite numbers (step {step + 1}; {last}); "
                f"{self._where_images_break()}"
            )
        raise UserError(not_finite(loss, self.name, self.block, f"step {step + 1}; {last}", self.rate))

    def _where_images_break(self) -> str:
        """What to do about images that are not finite. Pixels are whole numbers up to 255, so it was what normalized them,
        or what augmented them."""
        if self._normalization is not None:
            mean, std = self._normalization
            if all(math.isfinite(x) for x in (*mean, *std)) and all(std):
                return f"what augments them did it; look at the settings `{'views' if self.block == 'pretrain' else self.block}`"
        return f"look at the mean and std in {self.manifest} and prepare the dataset again"


def spread(features: Tensor) -> dict[str, float]:
    """How much of their D dimensions the features (M, D) of M images use.

    effective_rank: exp of the entropy of the singular values (RankMe, arXiv 2210.02885) of the features minus their mean,
        from 1 to min(M, D). With the mean, which a ViT's features share, it is near 1 for good encoders too.
    dead_dimensions: share of the dimensions in which features of unit length have a standard deviation over the images
        below a hundredth of 1/sqrt(D).
    """
    x = features.double()
    centred = x - x.mean(0)
    # Of a D x D matrix, because there may be many images.
    values = torch.linalg.eigvalsh(centred.T @ centred).clamp(min=0).sqrt()
    p = values / values.sum().clamp(min=1e-300)
    entropy = -(p * p.clamp(min=1e-300).log()).sum()
    deviation = F.normalize(x, dim=1).std(0, correction=0)
    dead = (deviation < DEAD / math.sqrt(x.shape[1])).double().mean()
    return {"effective_rank": float(entropy.exp()), "dead_dimensions": float(dead)}


def collapsed(figures: dict[str, float], positive_cosine: float | None = None) -> str | None:
    """A clause that says that `figures` of `spread` mean a collapsed representation; None where they do not."""
    rank, dead = figures["effective_rank"], figures["dead_dimensions"]
    if rank >= LEAST_RANK and dead <= MOST_DEAD:
        return None
    cosine = "" if positive_cosine is None else f", positive cosine {positive_cosine:.3f}"
    return f"effective rank {rank:.2f}, {100 * dead:.0f} % of the dimensions dead{cosine}"
