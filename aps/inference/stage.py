"""The embed stage: computes the features of a dataset's test images, for inspection and further use.

It writes features.parquet (docs/inference.md), neighbours.html (some images with their nearest neighbours) and map.png
(every image as a point in the plane of the first two principal components, in the colour of its class). The only metric is
`neighbour_top1`: how often the nearest other image has the same class, in percent. A dataset without labels has no such
metric, and its train images are used, because it has no others. A killed run continues after the last part it has written.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import torch

from aps.data.load import ArraySplit, FileSplit, load_split, spread_rows
from aps.data.manifest import Manifest
from aps.inference import figures
from aps.inference.features import Item, files, write_features
from aps.inference.images import Transform
from aps.inference.model import Model, Source
from aps.inference.neighbours import Index, Neighbour
from aps.models.weights import load_encoder
from aps.results import StageJob, StageRun
from aps.runtime.processes import processes
from aps.runtime.signals import stop_requested
from aps.training.features import pixels

SMALLEST = 96  # pixels of a thumbnail's longer side
AT_ONCE = 8192  # images whose neighbours are searched in one pass over the file


def run(job: StageJob) -> None:
    """Run the stage. It writes features.parquet, neighbours.html, map.png, history.jsonl and metrics.json.

    Raises:
        UserError: the settings do not fit the encoder.
        Preempted: the run was asked to stop; computed features are kept.
    """
    with processes() as distributed, StageRun(job) as stage:
        if not distributed.main:  # one process is enough
            return
        settings, manifest = job.settings.embed, Manifest.read(job.manifest)
        torch.manual_seed(job.settings.seed)  # for an encoder with random weights
        encoder = load_encoder(job.encoder_spec, job.settings.encoder)
        shown = pixels(job)
        transform = Transform.of_stage(job.settings.encoder.image_size, **shown)
        source = Source(str(job.encoder_spec), settings=job.settings.encoder)
        model = Model(encoder, transform, (), source, distributed.device)
        split = load_split(job.manifest, "test" if "test" in manifest.splits else "train")  # without labels: train only
        out = stage.staging("features.parquet")
        write_features(
            model, _items(split, manifest.name), len(split), out,
            stop=lambda: stop_requested(distributed), label=job.label,
        )  # fmt: skip
        index = Index(out)
        agreement = {"neighbour_top1": neighbour_top1(index)} if split.classes else {}
        stage.log(len(split), images=len(index), **agreement)
        _page(stage.staging("neighbours.html"), index, split, settings.queries, settings.neighbours, job.label)
        table = pq.read_table(out, columns=["xy", "label"])
        picture = stage.staging("map.png")
        xy = np.array(table["xy"].to_pylist(), dtype=np.float32)
        figures.feature_map(picture, xy, table["label"].to_pylist(), f"{manifest.name}: {job.label}")
        metrics = {**agreement, "images": len(index), "dim": model.dim}
        stage.finish(metrics, pixels=shown)


def _items(split: ArraySplit | FileSplit, dataset: str) -> Iterator[Item]:
    names = [split.classes[label] if split.classes else None for label in split.labels.tolist()]
    if isinstance(split, FileSplit):
        paths = (_compared(split, i) for i in range(len(split)))  # one by one: a million of them take 0.4 GB
        for item, name in zip(files(paths), names, strict=True):
            yield item._replace(label=name)
    else:
        for number, name in enumerate(names):
            yield Item(f"{dataset}/test/{number:06d}", split.images[number], name)


def _compared(split: FileSplit, i: int) -> Path:
    split.compare(i)  # what is not as it was prepared ends the stage; an image that can't be read would be left out
    return split.path(i)


def neighbour_top1(index: Index) -> float:
    """Percentage of images whose nearest other image has the same label."""
    labels = np.array(pq.read_table(index.file, columns=["label"])["label"].to_pylist(), dtype=object)
    if len(index) < 2:
        return 0.0
    right = 0
    for start, vectors in index.batches(AT_ONCE):
        _, rows = index.search(vectors, 2)
        queries = torch.arange(start, start + len(vectors))
        nearest = torch.where(rows[:, 0] == queries, rows[:, 1], rows[:, 0]).numpy()  # an image may find itself first
        right += int((labels[nearest] == labels[queries.numpy()]).sum())
    return 100 * right / len(index)


# --------------------------------------------------------------------------------------------------

STYLE = (
    "body{font:15px system-ui,sans-serif;margin:2rem;color:#222}div{display:flex;gap:.6rem;margin:.4rem 0 1.2rem}"
    "figure{margin:0;width:7.2rem}img{width:100%;image-rendering:auto}figcaption{font-size:.75rem;word-break:break-word}"
    ".query img{outline:3px solid #222}.other figcaption{color:#b00}"
)


def _page(path: Path, index: Index, split: ArraySplit | FileSplit, queries: int, k: int, title: str) -> None:
    """Write a self-contained HTML page: images spread over the split, each with its nearest neighbours."""
    chosen = spread_rows(len(index), queries)
    vectors = index.vectors(chosen)
    named = index.describe(chosen)
    rows = []
    for row, neighbours in zip(chosen, index.neighbours(vectors, k + 1), strict=True):
        name, label = named[row]
        cells = [_figure(_image(split, row), f"{label or ''} {Path(name).name}", "query")]
        for n in [n for n in neighbours if n.row != row][:k]:
            cells.append(_figure(_image(split, n.row), _caption(n), "same" if n.label == label else "other"))
        rows.append(f"<div>{''.join(cells)}</div>")
    heading = html.escape(title)
    path.write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Neighbours: {heading}</title><style>{STYLE}</style>'
        f"<h1>Nearest neighbours</h1><p>{heading}: images, framed, and the others most similar to each (cosine). "
        "Red: of another class.</p>" + "".join(rows) + "</html>\n",
        encoding="utf-8",
    )


def _image(split: ArraySplit | FileSplit, row: int) -> Any:
    return split.path(row) if isinstance(split, FileSplit) else split.images[row]


def _caption(n: Neighbour) -> str:
    return f"{n.similarity:.3f} {n.label or Path(n.path).name}"


def _figure(image: Any, caption: str, kind: str) -> str:
    out = io.BytesIO()
    picture = PIL.Image.fromarray(figures.small(image))
    if max(picture.size) < SMALLEST:  # enlarged without interpolation, so that an image of 8 x 8 pixels is visible
        factor = -(-SMALLEST // max(picture.size))
        picture = picture.resize([side * factor for side in picture.size], PIL.Image.Resampling.NEAREST)
    picture.save(out, format="PNG")
    data = base64.b64encode(out.getvalue()).decode()
    text = html.escape(caption)
    return f'<figure class="{kind}"><img src="data:image/png;base64,{data}" alt="{text}"><figcaption>{text}</figcaption></figure>'
