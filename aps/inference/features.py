"""Writes the features of any number of images into one Parquet file: path, embedding, and a point on a plane.

Design: memory does not grow with the number of images. Parts of a thousand rows are written atomically as they are
computed, so a killed run continues after the last part. At the end an incremental PCA reads the parts and gives every row
its point, and the file is written atomically. A second run computes new or changed images, and takes the other rows from
the existing file, for 16 bytes of memory a row. An unreadable image is listed, and does not end the run.

Columns: `path` (text), `embedding` (D float32), `xy` (2 float32: the first two principal components), `label` (text or
null), `bytes` and `modified` (of the image file; null where there is none). The file's metadata name the weights.

It does not know the uses of features (`neighbours`, `curate`).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
from sklearn.decomposition import IncrementalPCA

from aps import __version__
from aps.errors import Preempted, UserError
from aps.files import atomic_path, check_is_no_folder, read_json, write_json
from aps.inference.images import ImageLike, Once, walk
from aps.inference.model import BATCH, Model
from aps.progress import Progress

PART = 1024  # rows of a part
KEY = b"aps"  # key of our metadata in the file
ESCAPED = re.compile(rb"\\x([89a-f][0-9a-f])")  # a byte that is not UTF-8, in a name
SHOWN = 3  # unreadable images named on the terminal


class Item(NamedTuple):
    """An image to embed."""

    path: str  # its name in the file
    image: ImageLike
    label: str | None = None
    bytes: int | None = None
    modified: int | None = None  # nanoseconds

    @property
    def identity(self) -> tuple[str, int | None, int | None]:
        return self.path, self.bytes, self.modified


def files(paths: Iterable[str | Path], once: Once | None = None) -> Iterator[Item]:
    """Items of image files and of folders of them; see `aps.inference.images.walk`."""
    for path in walk(paths, once):
        name = name_of(path)
        try:
            status = path.stat()
        except OSError:  # a broken link; reading it will give the error
            yield Item(name, path)
            continue
        yield Item(name, path, None, status.st_size, status.st_mtime_ns)


def name_of(path: str | Path) -> str:
    """The text that stands for a path in a file of features: bytes that are not UTF-8, which Parquet's text is, are escaped."""
    return os.fsencode(path).decode("utf-8", errors="backslashreplace")


def file_named(name: str) -> str:
    """The path for which `name_of` gives `name`, if it had to escape bytes."""
    return os.fsdecode(ESCAPED.sub(lambda found: bytes([int(found[1], 16)]), name.encode()))


@dataclass(frozen=True)
class Written:
    """Numbers of images by what was done with them."""

    images: int  # rows of the file
    computed: int
    known: int  # taken from an earlier or interrupted run
    unreadable: int


def write_features(
    model: Model,
    items: Iterable[Item],
    total: int,
    out: Path,
    batch_size: int = BATCH,
    stop: Callable[[], bool] = lambda: False,
    label: str = "embed",
) -> Written:
    """Embed `items` into `out`.

    Args:
        items: the images, in an order that is the same at every call, such as that of `files`.
        total: the number of items, for the progress bar.
        stop: called after each batch; if it returns true, the run ends, and computed rows are kept.

    Raises:
        UserError: no image is readable, `out` can't be written or is a folder, or another process is writing it.
        Preempted: the run was asked to stop; the same call continues it.
    """
    check_is_no_folder(out)
    parts = out.with_name(f"{out.name}.parts")
    made_by = {"weights": model.digest, "transform": asdict(model.preprocessing)}
    with _claim(parts, out):
        if not _same(parts / "state.json", made_by):
            for file in parts.glob("*.parquet"):
                file.unlink()
            write_json(parts / "state.json", made_by)
        run = _Run(model, out, parts, total, batch_size, stop, label)
        stream = run.skip_finished(iter(items))
        with _Known(out if out.exists() and _made_by(out, made_by) else None) as known:
            run.embed(stream, known)
        written = run.assemble({**made_by, "source": model.source.address, "dim": model.dim})
        shutil.rmtree(parts)
    return written


class _Run:
    """One run that writes a file."""

    def __init__(
        self, model: Model, out: Path, parts: Path, total: int, batch_size: int, stop: Callable[[], bool], label: str
    ) -> None:  # fmt: skip
        self.model, self.out, self.parts, self.schema = model, out, parts, _schema(model.dim)
        self.total, self.batch_size, self.stop, self.label = total, batch_size, stop, label
        self.finished = self.computed = self.known = 0
        self.stopped = False
        self.rows: list[dict[str, Any]] = []  # rows of the part that is being computed

    def skip_finished(self, items: Iterator[Item]) -> Iterator[Item]:
        """Keep the finished parts that hold the first images, delete the others, and return the remaining items."""
        for number, file in enumerate(sorted(self.parts.glob("*.parquet"))):
            done = [
                (row["path"], row["bytes"], row["modified"])
                for row in pq.read_table(file, columns=["path", "bytes", "modified"]).to_pylist()
            ]
            expected = list(islice(items, len(done)))
            if [item.identity for item in expected] != done or file.name != _part_name(number):
                for stale in sorted(self.parts.glob("*.parquet"))[number:]:
                    stale.unlink()
                return chain(expected, items)
            self.finished += 1
            self.known += len(done)
        return items

    def embed(self, items: Iterator[Item], known: _Known) -> None:
        """Write parts with the features of all items; those that are `known` are not computed again."""
        with Progress(self.label, self.total, "images", self.known) as progress:
            while chunk := list(islice(items, PART)):
                found = [known.find(item) for item in chunk]
                fresh = [item for item, row in zip(chunk, found, strict=True) if row is None]
                computed = self._compute(fresh, progress)
                for item, row in zip(chunk, found, strict=True):
                    if row is not None:
                        self.known += 1
                        progress.update(1)
                    elif (row := next(computed, None)) is None:  # the run was asked to stop
                        break
                    else:
                        self.computed += 1
                    self.rows.append({**item._asdict(), **row})
                self._write_part()
                if self.stopped:
                    raise Preempted(f"{self.label}: {progress.done} images are done; run it again to go on")

    def _compute(self, items: list[Item], progress: Progress) -> Iterator[dict[str, Any]]:
        """`embedding` and `error` of each item: zeros and a message where it is unreadable, else the features and None.

        It ends early if the run is asked to stop."""
        nothing = np.zeros(self.model.dim, dtype=np.float32)  # Parquet's lists of fixed length can't be null
        for batch in self.model.prepared((item.image for item in items), self.batch_size):
            readable = [x for x in batch if not isinstance(x, UserError)]
            vectors = iter(self.model.features_of(readable).numpy() if readable else ())
            progress.update(len(batch), len(batch))
            self.stopped = self.stop()
            for x in batch:
                if isinstance(x, UserError):
                    yield {"embedding": nothing, "error": str(x).encode(errors="backslashreplace").decode()}
                else:
                    yield {"embedding": next(vectors), "error": None}
            if self.stopped:
                return

    def _write_part(self) -> None:
        if self.rows:
            columns = {name: [row[name] for row in self.rows] for name in _PART_COLUMNS}
            with atomic_path(self.parts / _part_name(self.finished)) as temporary:
                pq.write_table(pa.table(columns, schema=_part_schema(self.schema)), temporary)
            self.finished += 1
            self.rows = []

    def assemble(self, metadata: dict[str, Any]) -> Written:
        """Write the parts as one file, each row with its point on the plane."""
        pca = _Plane()
        unreadable = images = 0
        problems = self.out.with_name(f"{self.out.name}.unreadable.txt")
        with (
            atomic_path(problems) as temporary,
            temporary.open("w", encoding="utf-8", errors="surrogateescape") as list_,
        ):
            for table in self._tables():
                broken = [text for text in table["error"].to_pylist() if text is not None]
                list_.writelines(f"{text}\n" for text in broken)
                for text in broken[: max(0, SHOWN - unreadable)]:
                    print(f"left out: {text}", file=sys.stderr)
                unreadable += len(broken)
                vectors = _vectors(table.filter(pa.compute.is_null(table["error"])))
                images += len(vectors)
                pca.learn(vectors)
        if not images:
            raise UserError(f"{self.out}: none of the {unreadable} images can be read; they are listed in {problems}")
        if not unreadable:
            problems.unlink()
        metadata |= {"rows": images, "version": __version__, "folder": str(Path.cwd())}
        schema = self.schema.with_metadata({KEY: json.dumps(metadata).encode()})
        with atomic_path(self.out) as temporary, pq.ParquetWriter(temporary, schema) as writer:
            for table in self._tables():
                readable = table.filter(pa.compute.is_null(table["error"]))
                if not len(readable):
                    continue
                xy = pa.FixedSizeListArray.from_arrays(pa.array(pca.points(_vectors(readable)).ravel()), 2)
                columns = {name: readable[name] for name in readable.column_names} | {"xy": xy}
                writer.write_table(pa.table([columns[name] for name in schema.names], schema=schema))
        return Written(images, self.computed, self.known, unreadable)

    def _tables(self) -> Iterator[pa.Table]:
        for number in range(self.finished):
            yield pq.read_table(self.parts / _part_name(number))


class _Plane:
    """The first two principal components of vectors that are given in batches."""

    def __init__(self) -> None:
        self._pca: IncrementalPCA | None = None
        self._waiting = np.empty((0, 0), dtype=np.float32)

    def learn(self, vectors: np.ndarray) -> None:
        """Add vectors, (m, D). The PCA needs two at least, so a single vector is kept until the next call."""
        if len(self._waiting):
            vectors = np.concatenate([self._waiting, vectors])
        if len(vectors) < 2:
            self._waiting = vectors if len(vectors) else self._waiting
            return
        self._waiting = np.empty((0, 0), dtype=np.float32)
        self._pca = self._pca or IncrementalPCA(min(2, vectors.shape[1]))
        with np.errstate(invalid="ignore", divide="ignore"):  # equal vectors: it divides by their variance for shares
            self._pca.partial_fit(vectors)

    def points(self, vectors: np.ndarray) -> np.ndarray:
        """vectors: (m, D) -> float32 (m, 2)."""
        if self._pca is None:  # there was only one image
            return np.zeros((len(vectors), 2), dtype=np.float32)
        return self._pca.transform(vectors).astype(np.float32)


class _Known:
    """Embeddings of the existing file, by path, size and time of change, in any order.

    Memory: 16 bytes a row, and one piece of the file. Images of a folder lie in neighbouring rows, so a piece is read
    about once, whatever the order in which folders are named.
    """

    def __init__(self, file: Path | None) -> None:
        self._file = None if file is None else pq.ParquetFile(file)
        groups = range(0 if self._file is None else self._file.num_row_groups)
        pieces = [
            np.array([hash(identity) for identity in self._identities(group)], dtype=np.int64) for group in groups
        ]
        hashes = np.concatenate([np.empty(0, dtype=np.int64), *pieces])
        self._starts = np.cumsum([0, *map(len, pieces)])
        self._order = np.argsort(hashes)
        self._hashes = hashes[self._order]
        self._piece: tuple[int, list[tuple[Any, ...]], np.ndarray] = (-1, [], np.empty((0, 0)))  # number, rows, vectors

    def __enter__(self) -> _Known:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()

    def find(self, item: Item) -> dict[str, Any] | None:
        """The embedding of an unchanged image; None for a new or changed one."""
        wanted = hash(item.identity)
        at = int(np.searchsorted(self._hashes, wanted))
        if item.modified is None or at == len(self._hashes) or self._hashes[at] != wanted:
            return None
        row = int(self._order[at])
        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        if self._piece[0] != group:
            assert self._file is not None
            self._piece = (group, self._identities(group), _vectors(self._file.read_row_group(group, ["embedding"])))
        _, identities, vectors = self._piece
        inside = row - int(self._starts[group])
        return {"embedding": vectors[inside], "error": None} if identities[inside] == item.identity else None

    def _identities(self, group: int) -> list[tuple[Any, ...]]:
        assert self._file is not None
        columns = self._file.read_row_group(group, ["path", "bytes", "modified"]).to_pydict()
        return list(zip(columns["path"], columns["bytes"], columns["modified"], strict=True))


_PART_COLUMNS = ("path", "label", "bytes", "modified", "embedding", "error")


def _schema(dim: int) -> pa.Schema:
    return pa.schema(
        [
            ("path", pa.string()),
            ("label", pa.string()),
            ("embedding", pa.list_(pa.float32(), dim)),
            ("xy", pa.list_(pa.float32(), 2)),
            ("bytes", pa.int64()),
            ("modified", pa.int64()),
        ]
    )


def _part_schema(schema: pa.Schema) -> pa.Schema:
    types = {"error": pa.string()} | {field.name: field.type for field in schema}
    return pa.schema([(name, types[name]) for name in _PART_COLUMNS])


def _part_name(number: int) -> str:
    return f"{number:08d}.parquet"


def _vectors(table: pa.Table) -> np.ndarray:
    """float32 (m, D)"""
    column = table["embedding"].combine_chunks()
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), column.type.list_size)


def read_metadata(file: Path) -> dict[str, Any]:
    """Our metadata of a file of features: the weights that made it, its width, its number of rows.

    Raises:
        UserError: it is missing, broken or not a file of features.
    """
    try:
        stored = pq.read_schema(file).metadata or {}
        return dict(json.loads(stored[KEY]))
    except FileNotFoundError:
        raise UserError(f"{file} does not exist; `aps embed WEIGHTS IMAGES --out {file}` makes it") from None
    except (pa.ArrowInvalid, KeyError, ValueError, OSError):
        raise UserError(f"{file} is no file of features; make one by `aps embed WEIGHTS IMAGES --out FILE`") from None


def _made_by(file: Path, made_by: dict[str, Any]) -> bool:
    """Whether an existing file was made by the same weights and transform; False for any other file."""
    try:
        stored = read_metadata(file)
    except UserError:
        return False
    return all(stored.get(key) == json.loads(json.dumps(value)) for key, value in made_by.items())


def _same(file: Path, made_by: dict[str, Any]) -> bool:
    return file.exists() and read_json(file) == json.loads(json.dumps(made_by))


@contextlib.contextmanager
def _claim(parts: Path, out: Path) -> Iterator[None]:
    """Lock `out` against other processes that write it. Raises UserError where one does."""
    try:
        parts.mkdir(parents=True, exist_ok=True)
        lock = (parts / "lock").open("w", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{parts}: cannot be written ({error.strerror}); choose another --out") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{out} is being written by another process; wait for it, or choose another --out"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield
