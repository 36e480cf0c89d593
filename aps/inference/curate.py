"""What a folder holds twice, and what does not belong in it, by embedding.

Near duplicates are images whose similarity exceeds a threshold; chains of them are one group, of which the largest file is
worth keeping. An outlier is an image far from its nearest others: its score is 1 minus the mean similarity to ten of them.

Similarity is the cosine after whitening: an encoder's features share a direction and vary along few, so that the plain
cosine of two different photographs may be 0.99. Whitened, directions count alike (the faint ones less), and a saved
again or resized image stands out from a similar one (docs/log.md has the figures). Every image is compared with every
other, so the time grows with the square of their number; memory does not.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from aps.files import atomic_path
from aps.inference.neighbours import Index
from aps.progress import Progress

SIMILAR = 0.95  # from which two images are near duplicates
# Added to each direction's variance, as shares of the mean one: below it a direction is noise, and the more directions there
# are for an image, the less is known of each.
FLOOR, FEW = 0.01, 0.05
NEAREST = 10  # of whom an outlier is far
SHOWN = 8  # images of a group on the terminal
AT_ONCE = 8192  # rows compared with the whole file in one pass


@dataclass(frozen=True)
class Curated:
    """A row a image of the file, in its order (M)."""

    group: np.ndarray  # int64: near duplicates share a number; -1: none
    keep: np.ndarray  # bool: all that is in no group, and one of each
    nearest: np.ndarray  # int64: the row most similar, -1 where there is but one image
    similarity: np.ndarray  # float32: to it
    outlier: np.ndarray  # float32: score

    @property
    def groups(self) -> list[list[int]]:
        """Rows of each group, the one to keep first."""
        members: dict[int, list[int]] = {}
        for row in np.flatnonzero(self.group >= 0).tolist():
            members.setdefault(int(self.group[row]), []).append(row)
        return [sorted(rows, key=lambda row: (not self.keep[row], row)) for _, rows in sorted(members.items())]

    def outliers(self, count: int) -> list[int]:
        """The rows of the highest scores, duplicates that need not be kept left out."""
        order = np.argsort(-self.outlier, kind="stable")
        return [int(row) for row in order if self.keep[row]][:count]


@torch.inference_mode()
def curate(index: Index, similar: float = SIMILAR) -> Curated:
    """Near duplicates and outlier scores of every image in a file of features."""
    count = len(index)
    space = _Space(index)
    nearest, similarity = np.full(count, -1, dtype=np.int64), np.zeros(count, dtype=np.float32)
    outlier, groups = np.zeros(count, dtype=np.float32), _Groups(count)
    k = min(NEAREST, count - 1)
    with Progress("curate", count, "images") as progress:
        for start, vectors in index.batches(AT_ONCE):
            rows = slice(start, start + len(vectors))
            own = space.place(vectors)
            best, at = _compare(index, own, start, space, similar, groups, k)
            if k:
                nearest[rows], similarity[rows] = at[:, 0].numpy(), best[:, 0].numpy()
                outlier[rows] = 1 - best.mean(1).numpy()
            progress.update(len(own), len(own))
    group = groups.numbers()
    return Curated(group, _kept(group, index), nearest, similarity, outlier)


class _Space:
    """Features whitened by the mean and covariance of them all."""

    def __init__(self, index: Index) -> None:
        D = int(index.metadata["dim"])
        total, products = torch.zeros(D, dtype=torch.float64), torch.zeros(D, D, dtype=torch.float64)
        for _, vectors in index.batches():
            x = vectors.double()
            total += x.sum(0)
            products += x.T @ x
        mean = total / len(index)
        variances, directions = torch.linalg.eigh(products / len(index) - torch.outer(mean, mean))
        variances = variances.clamp(min=0)
        floor = FLOOR + FEW * D / len(index)
        scale = (variances + floor * variances.mean()).clamp(min=1e-30).rsqrt()
        self._mean, self._map = mean.float(), (directions * scale).float()

    def place(self, vectors: Tensor) -> Tensor:
        """(m, D) -> (m, D), each of length 1."""
        return F.normalize((vectors - self._mean) @ self._map, dim=1)


def _compare(
    index: Index, own: Tensor, first: int, space: _Space, similar: float, groups: _Groups, k: int
) -> tuple[Tensor, Tensor]:
    """own: (m, D), rows from `first` on -> the k most similar others: similarities and rows, (m, k)."""
    best, at = torch.full((len(own), 0), -2.0), torch.zeros((len(own), 0), dtype=torch.int64)
    numbers = torch.arange(first, first + len(own))
    for start, vectors in index.batches():
        found = own @ space.place(vectors).T
        columns = torch.arange(start, start + len(vectors))
        found[numbers[:, None] == columns] = -2.0  # itself
        groups.join_pairs(*((found >= similar).nonzero() + torch.tensor([first, start])).T.numpy())
        found = torch.cat([best, found], dim=1)
        best, order = found.topk(min(k, found.shape[1]), dim=1)
        at = torch.cat([at, columns.expand(len(own), -1)], dim=1).gather(1, order)
    return best, at


class _Groups:
    """Union of rows that are duplicates of each other."""

    def __init__(self, count: int) -> None:
        self._above = np.arange(count)

    def _root(self, row: int) -> int:
        while (above := int(self._above[row])) != row:
            self._above[row] = self._above[above]
            row = above
        return row

    def join_pairs(self, a: np.ndarray, b: np.ndarray) -> None:
        """a, b: (pairs). However many they are, at most as many joins as there are rows among them."""
        rows, at = np.unique(np.concatenate([a, b]), return_inverse=True)
        edges = coo_array((np.ones(len(a)), (at[: len(a)], at[len(a) :])), shape=(len(rows), len(rows)))
        _, component = connected_components(edges, directed=False)
        first = np.full(len(rows), -1)
        for row, own in zip(rows.tolist(), component.tolist(), strict=True):
            if first[own] < 0:
                first[own] = row
            low, high = sorted((self._root(row), self._root(int(first[own]))))
            self._above[high] = low

    def numbers(self) -> np.ndarray:
        """int64 (M): a number of its group for each row, by first member; -1 for what is alone."""
        roots = np.array([self._root(row) for row in range(len(self._above))], dtype=np.int64)
        shared = np.bincount(roots, minlength=len(roots))[roots] > 1 if len(roots) else np.zeros(0, dtype=bool)
        number = np.full(len(roots), -1, dtype=np.int64)
        number[shared] = np.unique(roots[shared], return_inverse=True)[1]
        return number


def _kept(group: np.ndarray, index: Index) -> np.ndarray:
    """bool (M): of each group the largest file, the first of equals."""
    sizes = index.sizes()
    keep = group < 0
    best: dict[int, int] = {}
    for row in np.flatnonzero(group >= 0).tolist():
        held = best.setdefault(int(group[row]), row)
        if sizes[row] > sizes[held]:
            best[int(group[row])] = row
    keep[list(best.values())] = True
    return keep


def write_table(path: Path, index: Index, found: Curated) -> None:
    """CSV: path, keep, group, nearest, similarity, outlier; a row an image, in the file's order."""
    with atomic_path(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["path", "keep", "group", "nearest", "similarity", "outlier"])
        for start in range(0, len(index), AT_ONCE):
            rows = list(range(start, min(len(index), start + AT_ONCE)))
            others = {int(found.nearest[row]) for row in rows} - {-1}
            named = index.describe(sorted({*rows, *others}))
            for row in rows:
                near = int(found.nearest[row])
                group = int(found.group[row])
                writer.writerow(
                    [
                        named[row][0],
                        "yes" if found.keep[row] else "no",
                        "" if group < 0 else group,
                        "" if near < 0 else named[near][0],
                        "" if near < 0 else f"{found.similarity[row]:.4f}",
                        f"{found.outlier[row]:.4f}",
                    ]
                )


def summary(index: Index, found: Curated, outliers: int) -> str:
    """For the terminal."""
    groups, count = found.groups, len(index)
    spare = int((~found.keep).sum())
    lines = [f"{count} images: {len(groups)} groups of near duplicates, {spare} images could go"]
    named = index.describe(sorted({row for rows in groups[:outliers] for row in rows} | set(found.outliers(outliers))))
    for rows in groups[:outliers]:
        lines.append(f"  keep {named[rows[0]][0]}")
        lines += [f"       {named[row][0]}  ({found.similarity[row]:.3f})" for row in rows[1:SHOWN]]
        lines += [f"       ... and {len(rows) - SHOWN} more"] if len(rows) > SHOWN else []
    if len(groups) > outliers:
        lines.append(f"  ... and {len(groups) - outliers} groups more")
    lines.append("farthest from all others (score: 1 - mean similarity to their ten nearest)")
    lines += [f"  {found.outlier[row]:.3f}  {named[row][0]}" for row in found.outliers(outliers)]
    if count > 1:
        low, half, high = np.quantile(found.similarity, [0.1, 0.5, 0.9])
        lines.append(
            f"similarity to the nearest other: {low:.3f} (a tenth), {half:.3f} (half), {high:.3f} (nine tenths)"
        )
    return "\n".join(lines)
