"""Finds near duplicates and outliers in a folder of images by their embeddings.

Near duplicates are images whose similarity exceeds a threshold; connected pairs form a group, of which the largest file is
kept. An outlier is an image far from its nearest neighbours: its score is 1 minus the mean similarity to the ten nearest.

Similarity is the cosine after whitening. Features of an encoder share one direction and vary along few, so the plain cosine
of two different photographs can be 0.99. After whitening, directions have equal weight (weak ones less), and a copy that
was saved again or resized can be told from a similar image (docs/log.md has the figures). Features that hardly differ have
no directions to weight: copies of one image, or a collapsed encoder. There it is the plain cosine, and the summary says so.
Every two images are compared, so the time grows with the square of their number; memory does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from aps.files import csv_rows
from aps.inference.neighbours import Index
from aps.progress import Progress
from aps.text import number_of

SIMILAR = 0.95  # similarity from which two images are near duplicates
# Shares of the mean variance that are added to the variance of each direction: FLOOR, because a weaker direction is noise;
# FEW per direction and image, because variances estimated from few images are uncertain.
FLOOR, FEW = 0.01, 0.05
EQUAL = 1e-6  # total variance of vectors of length 1 (1 - mean cosine) under which they are equal but for rounding
NEAREST = 10  # neighbours in the score of an outlier
SHOWN = 8  # images of a group on the terminal
AT_ONCE = 8192  # rows compared with the whole file in one pass


@dataclass(frozen=True)
class Curated:
    """One value for each of the M images of the file, in its order."""

    group: np.ndarray  # int64: near duplicates have the same number; -1: no duplicates
    keep: np.ndarray  # bool: true for images in no group, and for one file of each group, by all its names
    nearest: np.ndarray  # int64: the most similar row; -1 where there is only one image
    similarity: np.ndarray  # float32: similarity to it
    outlier: np.ndarray  # float32: outlier score
    equal: bool  # whether all features are equal, so that similarity is the plain cosine

    @property
    def groups(self) -> list[list[int]]:
        """The rows of each group; the first is to be kept."""
        members: dict[int, list[int]] = {}
        for row in np.flatnonzero(self.group >= 0).tolist():
            members.setdefault(int(self.group[row]), []).append(row)
        return [sorted(rows, key=lambda row: (not self.keep[row], row)) for _, rows in sorted(members.items())]

    def outliers(self, count: int) -> list[int]:
        """The `count` rows with the highest scores, without duplicates that are not kept."""
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
            whitened = space.whiten(vectors)
            best, best_rows = _compare(index, whitened, start, space, similar, groups, k)
            if k:
                nearest[rows], similarity[rows] = best_rows[:, 0].numpy(), best[:, 0].numpy()
                outlier[rows] = 1 - best.mean(1).numpy()
            progress.update(len(whitened), len(whitened))
    group = groups.numbers()
    return Curated(group, _kept(group, index), nearest, similarity, outlier, space.equal and count > 1)


class _Space:
    """Whitens features by the mean and covariance of all of them."""

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
        self.equal = float(variances.sum()) < EQUAL
        floor = FLOOR + FEW * D / len(index)
        scale = (variances + floor * variances.mean()).clamp(min=1e-30).rsqrt()
        self._mean, self._map = mean.float(), (directions * scale).float()

    def whiten(self, vectors: Tensor) -> Tensor:
        """vectors: (m, D), of length 1 -> (m, D), of length 1."""
        return vectors if self.equal else F.normalize((vectors - self._mean) @ self._map, dim=1)


def _compare(
    index: Index, whitened: Tensor, first: int, space: _Space, similar: float, groups: _Groups, k: int
) -> tuple[Tensor, Tensor]:
    """Compare some rows with the whole file, and join near duplicates in `groups`.

    whitened: (m, D), the rows from `first` on -> the k most similar others: similarities and rows, (m, k).
    """
    m = len(whitened)
    best, best_rows = torch.full((m, 0), -2.0), torch.zeros((m, 0), dtype=torch.int64)
    numbers = torch.arange(first, first + m)
    for start, vectors in index.batches():
        similarities = whitened @ space.whiten(vectors).T
        columns = torch.arange(start, start + len(vectors))
        similarities[numbers[:, None] == columns] = -2.0  # an image is not compared with itself
        groups.join_pairs(*((similarities >= similar).nonzero() + torch.tensor([first, start])).T.numpy())
        similarities = torch.cat([best, similarities], dim=1)
        best, order = similarities.topk(min(k, similarities.shape[1]), dim=1)
        best_rows = torch.cat([best_rows, columns.expand(m, -1)], dim=1).gather(1, order)
    return best, best_rows


class _Groups:
    """Groups of rows that are duplicates of each other (union-find)."""

    def __init__(self, count: int) -> None:
        self._parent = np.arange(count)

    def _root(self, row: int) -> int:
        while (parent := int(self._parent[row])) != row:
            self._parent[row] = self._parent[parent]
            row = parent
        return row

    def join_pairs(self, a: np.ndarray, b: np.ndarray) -> None:
        """Join rows a[i] and b[i]; a, b: (pairs,). Components are found first, so each row is joined at most once."""
        rows, inverse = np.unique(np.concatenate([a, b]), return_inverse=True)
        edges = coo_array((np.ones(len(a)), (inverse[: len(a)], inverse[len(a) :])), shape=(len(rows), len(rows)))
        _, components = connected_components(edges, directed=False)
        first = np.full(len(rows), -1)  # the first row of each component
        for row, component in zip(rows.tolist(), components.tolist(), strict=True):
            if first[component] < 0:
                first[component] = row
            low, high = sorted((self._root(row), self._root(int(first[component]))))
            self._parent[high] = low

    def numbers(self) -> np.ndarray:
        """int64 (M): the number of each row's group, in the order of their first rows; -1 for a row in no group."""
        roots = np.array([self._root(row) for row in range(len(self._parent))], dtype=np.int64)
        shared = np.bincount(roots, minlength=len(roots))[roots] > 1 if len(roots) else np.zeros(0, dtype=bool)
        number = np.full(len(roots), -1, dtype=np.int64)
        number[shared] = np.unique(roots[shared], return_inverse=True)[1]
        return number


def _kept(group: np.ndarray, index: Index) -> np.ndarray:
    """bool (M): rows in no group, and the largest file of each group, the first of equals, by all its names."""
    sizes = index.sizes()
    keep = group < 0
    largest: dict[int, int] = {}
    members = np.flatnonzero(group >= 0).tolist()
    for row in members:
        if sizes[row] > sizes[largest.setdefault(int(group[row]), row)]:
            largest[int(group[row])] = row
    keep[list(largest.values())] = True
    named = index.describe(members)
    kept = {number: index.identity(named[row][0], row) for number, row in largest.items()}
    for row in members:  # whoever deletes another name of the kept file may delete the file
        keep[row] |= (own := index.identity(named[row][0], row)) is not None and own == kept[int(group[row])]
    return keep


def write_table(path: Path, index: Index, found: Curated) -> None:
    """Write a CSV file with columns path, keep, group, nearest, similarity, outlier; one row for each image."""
    with csv_rows(path, ["path", "keep", "group", "nearest", "similarity", "outlier"]) as write:
        paths = index.paths()  # read once: neighbours lie anywhere in the file
        for row in range(len(index)):
            near = int(found.nearest[row])
            group = int(found.group[row])
            write(
                [
                    paths[row].as_py(),
                    "yes" if found.keep[row] else "no",
                    "" if group < 0 else group,
                    "" if near < 0 else paths[near].as_py(),
                    "" if near < 0 else f"{found.similarity[row]:.4f}",
                    f"{found.outlier[row]:.4f}",
                ]
            )


def summary(index: Index, found: Curated, outliers: int) -> str:
    """The result as text for the terminal."""
    groups, count = found.groups, len(index)
    spare = int((~found.keep).sum())
    lines = [
        f"{number_of(count, 'image')}: {number_of(len(groups), 'group')} of near duplicates, {number_of(spare, 'image')} could go"
    ]
    if found.equal:
        lines.append(
            "all features are equal, so similarity is the plain cosine: these are copies of one image, or the encoder has "
            "collapsed; look at the images before any goes"
        )
    named = index.describe(sorted({row for rows in groups[:outliers] for row in rows} | set(found.outliers(outliers))))
    for rows in groups[:outliers]:
        lines.append(f"  keep {named[rows[0]][0]}")
        lines += [
            f"  {'keep' if found.keep[row] else '    '} {named[row][0]}  ({found.similarity[row]:.3f})"
            for row in rows[1:SHOWN]
        ]
        lines += [f"       ... and {len(rows) - SHOWN} more"] if len(rows) > SHOWN else []
    if len(groups) > outliers:
        lines.append(f"  ... and {number_of(len(groups) - outliers, 'group')} more")
    lines.append("farthest from all others (score: 1 - mean similarity to their ten nearest)")
    lines += [f"  {found.outlier[row]:.3f}  {named[row][0]}" for row in found.outliers(outliers)]
    if count > 1:
        low, half, high = np.quantile(found.similarity, [0.1, 0.5, 0.9])
        lines.append(
            f"similarity to the nearest other: {low:.3f} (a tenth), {half:.3f} (half), {high:.3f} (nine tenths)"
        )
    return "\n".join(lines)
