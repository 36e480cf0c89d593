"""Two things that go wrong in training without an error: a loss that is no number, and features that are all alike.

Design: a loss that is not finite ends the run at its step, before a checkpoint could hold it. On CPUs every step's loss is
looked at. On a GPU that would wait for the device; there each step's loss goes into a small ring on the device, which is
copied to the host behind training's back, so the run ends some steps later and still says which step it was. Among several
processes the first one watches, since it is the one that speaks; the gradients that all share bring it the others' losses.

A collapsed representation is told by the features of a few images: their effective rank, and how many dimensions are dead.
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
from aps.training.loop import not_finite

RING, COPIED = 64, 16  # losses that are kept on a GPU; steps between two copies of them
DEAD = 0.01  # of the spread that a dimension has where features point everywhere, 1/sqrt(D)
LEAST_RANK, MOST_DEAD = 2.0, 0.9  # beyond which a representation is called collapsed


class Watch:
    """The losses of one training.

    Args:
        name: of the training, for messages; block: of its settings.
        manifest: of its images.
    """

    def __init__(self, name: str, block: str, distributed: Distributed, manifest: Path) -> None:
        self.name, self.block, self.manifest = name, block, manifest
        self.active = distributed.main
        self._last: tuple[int, float] | None = None  # the last finite loss and its step
        self._seen = -1  # the last step that was looked at
        self._ring: Tensor | None = None
        if distributed.device.type == "cuda":
            self._ring = torch.zeros(RING, device=distributed.device)
            self._host = torch.zeros(RING).pin_memory()
            self._steps: list[int] = [-1] * RING  # of the losses in the ring
            self._count = 0
            self._copied: tuple[torch.cuda.Event, list[int]] | None = None

    def add(self, loss: Tensor, step: int, images: Iterable[Tensor]) -> None:
        """A step's loss, a scalar on the device, and the images it was computed from.

        Raises:
            UserError: the loss of this step, or on a GPU of one before, is not finite.
        """
        if not self.active:
            return
        if self._ring is None:
            self._look(step, float(loss.detach()), images)
            return
        place = self._count % RING
        self._ring[place].copy_(loss.detach())
        self._steps[place], self._count = step, self._count + 1
        if self._count % COPIED == 0 and (self._copied is None or self._copied[0].query()):
            if self._copied is not None:
                self._scan(self._copied[1], images)
            self._host.copy_(self._ring, non_blocking=True)
            self._copied = torch.cuda.Event(), list(self._steps)
            self._copied[0].record()

    def check(self, images: Iterable[Tensor] = ()) -> None:
        """Looks at all that was added, waiting for the device. Raises UserError as `add` does."""
        if self._ring is not None:
            self._copied = None
            self._host.copy_(self._ring)
            self._scan(self._steps, images)

    def _scan(self, steps: list[int], images: Iterable[Tensor]) -> None:
        """steps: of the losses that lie on the host."""
        losses = self._host.tolist()
        for step, place in sorted((step, place) for place, step in enumerate(steps) if step > self._seen):
            self._seen = step
            self._look(step, losses[place], images)

    def _look(self, step: int, loss: float, images: Iterable[Tensor]) -> None:
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
                f"look at the mean and std in {self.manifest} and prepare the dataset again"
            )
        raise UserError(not_finite(loss, self.name, self.block, f"step {step + 1}; {last}"))


def spread(features: Tensor) -> dict[str, float]:
    """Features (M, D) of M images -> how much of their D dimensions they use.

    effective_rank: exp of the entropy of the singular values (RankMe, arXiv 2210.02885), from 1 to min(M, D).
    dead_dimensions: share of the dimensions whose standard deviation over the images, of features of unit length, is below
        a hundredth of 1/sqrt(D).
    """
    x = features.double()
    values = torch.linalg.eigvalsh(x.T @ x).clamp(min=0).sqrt()  # of D x D: images may be many
    p = values / values.sum().clamp(min=1e-300)
    entropy = -(p * p.clamp(min=1e-300).log()).sum()
    deviation = F.normalize(x, dim=1).std(0, correction=0)
    dead = (deviation < DEAD / math.sqrt(x.shape[1])).double().mean()
    return {"effective_rank": float(entropy.exp()), "dead_dimensions": float(dead)}


def collapsed(found: dict[str, float], positive_cosine: float | None = None) -> str | None:
    """One clause where `spread` found that images can't be told apart; else None."""
    rank, dead = found["effective_rank"], found["dead_dimensions"]
    if rank >= LEAST_RANK and dead <= MOST_DEAD:
        return None
    cosine = "" if positive_cosine is None else f", positive cosine {positive_cosine:.3f}"
    return f"effective rank {rank:.2f}, {100 * dead:.0f} % of the dimensions dead{cosine}"
