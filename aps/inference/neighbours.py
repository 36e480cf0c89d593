"""Finds nearest neighbours in a file of features: exactly, piece by piece, or by FAISS in a large file.

Similarity is the cosine, as in the kNN stage. With more than 100,000 rows and `faiss` installed (`pip install faiss-cpu`),
an inverted file of FAISS is built once, kept beside the features, and searched instead. A few percent of the neighbours can
be missed; similarities are exact.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from functools import cached_property
from importlib.util import find_spec
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor

from aps.errors import UserError
from aps.files import atomic_path, csv_rows
from aps.inference.features import file_named, read_metadata
from aps.inference.model import Loaded
from aps.ranges import whole

EXACT_UP_TO = 100_000  # rows
LEARNED_FROM = 64  # vectors per cell from which FAISS's partition is learned
PROBED = 32  # cells searched for each query
MISSING = -1  # row that FAISS gives where the searched cells hold fewer than k


class Neighbour(NamedTuple):
    row: int
    path: str
    label: str | None
    similarity: float


class Index:
    """A file of features that can be searched.

    Args:
        file: written by `aps.inference.features.write_features`.

    Raises:
        UserError: it is missing or not a file of features.
    """

    def __init__(self, file: Path) -> None:
        self.file = Path(file)
        self.metadata = read_metadata(self.file)
        self._opened = pq.ParquetFile(self.file)
        counts = [self._opened.metadata.row_group(i).num_rows for i in range(self._opened.num_row_groups)]
        self._starts = np.cumsum([0, *counts])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def approximate(self) -> bool:
        """Whether `search` uses FAISS."""
        return len(self) > EXACT_UP_TO and find_spec("faiss") is not None

    def check(self, model: Loaded) -> None:
        """Raises UserError where another network made the features, because they can't be compared with this one's."""
        if self.metadata["weights"] != model.digest:
            raise UserError(
                f"{self.file} was made by {self.metadata['source']}, not by the weights of {model.source.address}; name those, "
                f"or make it anew by `aps embed {model.source.address} IMAGES --out FILE`"
            )

    def batches(self, least: int = 1) -> Iterator[tuple[int, Tensor]]:
        """(first row, float32 (m, D), vectors of length 1) of every piece of the file, of `least` rows or more."""
        waiting: list[Tensor] = []
        first = 0
        for group, end in enumerate(self._starts[1:].tolist()):
            waiting.append(self._piece(group))
            if end - first >= least or end == len(self):
                yield first, torch.cat(waiting)
                waiting, first = [], end

    def _piece(self, group: int) -> Tensor:
        column = self._opened.read_row_group(group, columns=["embedding"])["embedding"].combine_chunks()
        vectors = torch.from_numpy(column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1).copy())
        return F.normalize(vectors, dim=1)

    def vectors(self, rows: list[int]) -> Tensor:
        """Vectors of rows, float32 (m, D), of length 1; each piece of the file is read once.

        Raises:
            UserError: the file has no such row.
        """
        groups = self._groups(rows)
        pieces = {group: self._piece(group) for group in sorted(set(groups))}
        return torch.stack(
            [pieces[group][row - int(self._starts[group])] for row, group in zip(rows, groups, strict=True)]
        )

    @torch.inference_mode()
    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The nearest rows of queries, (Q, D): similarities float32 (Q, k) and rows int64 (Q, k), most similar first.

        k is limited to the number of rows.

        Raises:
            UserError: k is not a whole number above 0, or the queries have another width than the features.
        """
        k, dim = min(whole(k, "k"), len(self)), int(self.metadata["dim"])
        if queries.ndim != 2 or queries.shape[1] != dim:
            raise UserError(f"queries have shape {tuple(queries.shape)}; {self.file} is searched by (Q, {dim})")
        queries = F.normalize(queries.float(), dim=1)
        if self.approximate:
            return self._search_faiss(queries, k)
        best = torch.full((len(queries), 0), -2.0)
        rows = torch.zeros((len(queries), 0), dtype=torch.int64)
        for start, vectors in self.batches():
            similar = torch.cat([best, queries @ vectors.T], dim=1)
            numbers = torch.arange(start, start + len(vectors)).expand(len(queries), -1)
            best, order = similar.topk(min(k, similar.shape[1]), dim=1)
            rows = torch.cat([rows, numbers], dim=1).gather(1, order)
        return best, rows

    def neighbours(self, queries: Tensor, k: int) -> list[list[Neighbour]]:
        """The k rows most similar to each query, (Q, D), with paths and labels. Raises UserError as `search` does."""
        similar, rows = self.search(queries, k)
        named = self.describe(sorted(set(rows.flatten().tolist()) - {MISSING}))
        return [
            [
                Neighbour(row, *named[row], value)
                for row, value in zip(query_rows, values, strict=True)
                if row != MISSING
            ]
            for query_rows, values in zip(rows.tolist(), similar.tolist(), strict=True)
        ]

    def describe(self, rows: list[int]) -> dict[int, tuple[str, str | None]]:
        """Path and label of rows given in ascending order; only the pieces that hold them are read.

        Raises:
            UserError: the file has no such row.
        """
        found: dict[int, tuple[str, str | None]] = {}
        groups = self._groups(rows)
        for group, members in groupby(zip(groups, rows, strict=True), key=itemgetter(0)):
            table = self._opened.read_row_group(group, columns=["path", "label"])
            for _, row in members:
                at = row - int(self._starts[group])
                found[row] = (table["path"][at].as_py(), table["label"][at].as_py())
        return found

    def _groups(self, rows: list[int]) -> list[int]:
        """The piece of the file that holds each row."""
        for row in rows:
            if whole(row, f"{self.file}: row", 0) >= len(self):
                raise UserError(f"{self.file}: row is {row}; it has rows 0 to {len(self) - 1}")
        return (np.searchsorted(self._starts, rows, side="right") - 1).tolist()

    def paths(self) -> pa.ChunkedArray:
        """The path of each row, (M,); a million take 60 MB."""
        return self._opened.read(columns=["path"])["path"].combine_chunks()

    def sizes(self) -> np.ndarray:
        """Bytes of each row's image file, int64 (M,); 0 where it has no file."""
        return self._opened.read(columns=["bytes"])["bytes"].fill_null(0).to_numpy()

    @cached_property
    def _sizes(self) -> np.ndarray:
        return self.sizes()

    def image(self, path: str, row: int | None = None) -> Path | None:
        """The image file of a path, relative to the working directory when the features were made, or else here; None: gone.

        row: its row; a file relative to the working directory here then has to be as large as the row's, for another folder
            may have a file of the same name.
        """
        names = dict.fromkeys((path, file_named(path)))
        if (
            made := next((f for name in names if (f := Path(self.metadata["folder"], name)).is_file()), None)
        ) is not None:
            return made
        here = next((file for name in names if (file := Path(name)).is_file()), None)
        if here is not None and row is not None and here.stat().st_size != self._sizes[row]:
            return None
        return here

    def changed(self, rows: Iterable[int] | None = None) -> int:
        """How many image files of rows (None: of all) are others now than when the features were made; those gone are none.

        Raises:
            UserError: the file has no such row.
        """
        count = 0
        of_group: dict[int, list[int]] = {}
        chosen = list(range(len(self))) if rows is None else sorted(set(rows))
        for row, group in zip(chosen, self._groups(chosen), strict=True):
            of_group.setdefault(group, []).append(row - int(self._starts[group]))
        for group, inside in of_group.items():
            table = self._opened.read_row_group(group, columns=["path", "bytes", "modified"])
            for row in table.take(inside).to_pylist():
                if row["modified"] is None or (file := self.image(row["path"])) is None:  # whatever its size
                    continue
                status = file.stat()
                count += (status.st_size, status.st_mtime_ns) != (row["bytes"], row["modified"])
        return count

    def identity(self, path: str, row: int) -> tuple[int, int] | None:
        """Device and inode of a row's image file; None: gone."""
        if (file := self.image(path, row)) is None:
            return None
        status = file.stat()
        return status.st_dev, status.st_ino

    def _search_faiss(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        index = self._faiss
        similar, rows = index.search(queries.numpy(), k)
        return torch.from_numpy(similar), torch.from_numpy(rows)

    @cached_property
    def _faiss(self) -> Any:
        import faiss

        index: Any
        kept = self.file.with_name(f"{self.file.name}.faiss")
        if kept.exists() and kept.stat().st_mtime_ns > self.file.stat().st_mtime_ns:
            index = faiss.read_index(str(kept))
            index.nprobe = PROBED
            return index
        print(f"{kept}: building FAISS's index of {len(self):,} rows, once", file=sys.stderr)
        dim, cells = int(self.metadata["dim"]), max(1, int(4 * len(self) ** 0.5))
        wanted, share = LEARNED_FROM * cells, min(1.0, LEARNED_FROM * cells / len(self))
        generator = np.random.default_rng(0)
        sample = np.concatenate(
            [vectors.numpy()[generator.random(len(vectors)) < share] for _, vectors in self.batches()]
        )[:wanted]
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, cells, faiss.METRIC_INNER_PRODUCT)
        index.train(sample)
        for _, vectors in self.batches():
            index.add(vectors.numpy())
        with atomic_path(kept) as temporary:
            faiss.write_index(index, str(temporary))
        index.nprobe = PROBED
        return index


def table(queries: list[str], found: list[list[Neighbour]]) -> str:
    """Text for the terminal: each query, and below it one line for each neighbour."""
    lines = []
    for query, neighbours in zip(queries, found, strict=True):
        lines.append(query)
        lines += [
            f"  {rank:>3}  {n.similarity:6.3f}  {n.path}{f'  ({n.label})' if n.label else ''}"
            for rank, n in enumerate(neighbours, 1)
        ]
    return "\n".join(lines)


def write_table(path: Path, queries: list[str], found: list[list[Neighbour]]) -> None:
    """Write a CSV file with columns query, rank, path, label, similarity."""
    with csv_rows(path, ["query", "rank", "path", "label", "similarity"]) as write:
        for query, neighbours in zip(queries, found, strict=True):
            for rank, n in enumerate(neighbours, 1):
                write([query, rank, n.path, n.label or "", f"{n.similarity:.6f}"])
