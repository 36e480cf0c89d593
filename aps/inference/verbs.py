"""Command-line verbs that use an encoder: embed, neighbours, curate, predict, detect, attention, export.

Any number of images needs the memory of a few batches. Heavy imports are inside the verbs, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import islice, tee
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aps.errors import UserError
from aps.ranges import up_to_one, whole_number
from aps.text import number_of

if TYPE_CHECKING:
    from torch import Tensor

    from aps.inference.images import Once
    from aps.inference.model import Detections, Loaded, Model
    from aps.inference.neighbours import Index

Run = Callable[[argparse.Namespace], None]
Verb = Callable[[str, Run, str], argparse.ArgumentParser]

WEIGHTS = "a stage's folder, a .safetensors file, timm:NAME, runs:/ID or models:/NAME/VERSION"
IMAGES = "image files, and folders of them at any depth"
ROWS, COLUMNS = 12, 40  # of a picture with many images; Matplotlib refuses 65,536 pixels
COUNT = whole_number(1, 1_000_000)


def add(add_verb: Verb) -> None:
    """Register all verbs except `embed`, which is a stage too."""

    def verb(name: str, run: Run, text: str) -> argparse.ArgumentParser:
        return add_verb(name, _on_a_free_gpu(run), text)

    p = verb("neighbours", _neighbours, "find the images of a file of features that are most similar to given ones")
    p.add_argument("weights", help=f"what made the features: {WEIGHTS}")
    p.add_argument("images", nargs="+", metavar="QUERY", help=IMAGES)
    p.add_argument("--index", type=Path, required=True, help="features, written by `aps embed`")
    p.add_argument("-k", type=COUNT, default=8, help="neighbours of each query (default: 8)")
    p.add_argument("--picture", type=Path, default=Path("neighbours.png"), help="(default: neighbours.png)")
    p.add_argument("--table", type=Path, help="write them as CSV too")
    _batch_and_device(p)

    p = verb("curate", _curate, "find near duplicates and outliers among images, by their embeddings")
    p.add_argument("weights", nargs="?", help=f"{WEIGHTS}; not needed where --index is there")
    p.add_argument("images", nargs="*", metavar="IMAGES", help=IMAGES)
    p.add_argument(
        "--index",
        type=Path,
        default=Path("features.parquet"),
        help="features, made where images are given (default: features.parquet)",
    )
    p.add_argument(
        "--similarity", type=up_to_one(zero=False), help="from which two are near duplicates (default: 0.95)"
    )
    p.add_argument("--outliers", type=COUNT, default=12, help="how many to show (default: 12)")
    p.add_argument("--out", type=Path, default=Path("curate.csv"), help="a row an image (default: curate.csv)")
    p.add_argument("--picture", type=Path, default=Path("curate.png"), help="(default: curate.png)")
    _batch_and_device(p)

    p = verb("predict", _predict, "classify images by a finetuned model or a probe")
    _weights_and_images(p)
    p.add_argument("--top", type=COUNT, default=3, help="classes of each image (default: 3)")
    p.add_argument("--out", type=Path, help="write every class's probability as CSV")
    _batch_and_device(p)

    p = verb("detect", _detect, "find objects in images by a detector: a picture each, and COCO's results")
    _weights_and_images(p)
    p.add_argument(
        "--threshold", type=up_to_one(zero=True), default=0.5, help="score from which a detection counts (default: 0.5)"
    )
    p.add_argument("--out", type=Path, default=Path("detections"), help="folder (default: detections)")
    _batch_and_device(p, batch=4)

    p = verb("attention", _attention, "draw what the class token attends to, in each head")
    _weights_and_images(p)
    p.add_argument(
        "--block",
        type=whole_number(-10_000, 10_000),
        default=-1,
        help="from 0, or from the end (default: -1, the last)",
    )
    p.add_argument(
        "--out", type=Path, default=Path("attention.png"),
        help=f"a .png file for up to {ROWS} images, or a folder for a picture each (default: attention.png)",
    )  # fmt: skip
    _batch_and_device(p)

    p = verb(
        "export", _export, "write weights for other software, with a model card, and print the Python that loads them"
    )
    p.add_argument("weights", help=WEIGHTS)
    p.add_argument("--to", default="timm", help="timm (a .safetensors file), onnx, hub-folder, vitdet (default: timm)")
    p.add_argument("--out", type=Path, required=True, help="the file, or the folder of hub-folder")
    p.add_argument("--licence", help="of the weights, as the Hub names it, such as apache-2.0 or cc-by-4.0")
    p.set_defaults(device="cpu")


def add_embed(p: argparse.ArgumentParser) -> None:
    """Let the verb of the stage `embed` take WEIGHTS and IMAGES instead of a study."""
    run_stage = p.get_default("run")

    def run(args: argparse.Namespace) -> None:
        (run_stage if args.weights is None else _on_a_free_gpu(_embed))(args)

    p.set_defaults(run=run)
    group = p.add_argument_group("any images, without a study", "(--out: the file, default features.parquet)")
    group.add_argument("weights", nargs="?", metavar="WEIGHTS", help=WEIGHTS)
    group.add_argument("images", nargs="*", metavar="IMAGES", help=IMAGES)
    _batch_and_device(group)


def _on_a_free_gpu(run: Run) -> Run:
    """The same verb, which uses a GPU that no stage of this machine uses, where there is one."""

    def on_it(args: argparse.Namespace) -> None:
        from aps.runtime.gpus import hold

        needed = args.weights is not None and args.device in (None, "cuda")
        with hold(1, "this command", "use the CPU (--device cpu)") if needed else nullcontext():
            run(args)

    return on_it


def _weights_and_images(p: argparse.ArgumentParser) -> None:
    p.add_argument("weights", help=WEIGHTS)
    p.add_argument("images", nargs="+", metavar="IMAGES", help=IMAGES)


def _batch_and_device(p: argparse._ActionsContainer, batch: int = 64) -> None:
    p.add_argument("--batch-size", type=COUNT, default=batch, help=f"images at once (default: {batch})")
    p.add_argument("--device", help="default: the GPU where there is one, else the CPU")


def _model(args: argparse.Namespace, verb: str) -> Model:
    """The model that the arguments name. Raises UserError where it does not support `verb`."""
    from aps.inference.model import Model

    loaded = _loaded(args)
    loaded.check(verb)
    assert isinstance(loaded, Model)
    return loaded


def _loaded(args: argparse.Namespace) -> Loaded:
    from aps.inference.load import load

    return load(args.weights, device=args.device)


def _check_outputs(
    reads: list[Any], *writes: Path | None, picture: Path | None = None, folder: Path | None = None
) -> None:
    """Check every name under which a verb writes, before anything is computed.

    Args:
        reads: what the verb reads: weights, images, an index.
        writes: files; those that are None are not written.
        picture: one more, a PNG.
        folder: for pictures.

    Raises:
        UserError: a file can't be written, would replace what is read, another output or a file of another kind, or lies in
            a stage's folder; a picture is named as another kind of file, or a folder as a picture.
    """
    from aps.files import check_writable
    from aps.seals import check_no_stage

    taken = {os.path.realpath(path) for path in reads}
    inside = None if folder is None else folder / "any picture"
    for path in filter(None, (*writes, picture, inside)):
        check_writable(path)
        check_no_stage(path.parent)
        if os.path.realpath(path) in taken:
            raise UserError(f"{path}: this command reads or writes it already; name another file")
        taken.add(os.path.realpath(path))
    for path in filter(None, writes):
        if path.exists() and path.suffix.lower() not in OUTPUTS:
            raise UserError(f"{path}: is there, and is no file that this command writes; name another")
    if picture is not None or folder is not None:
        from aps.inference.figures import check_folder, check_picture

        if picture is not None:
            check_picture(picture)
        if folder is not None:
            check_folder(folder)


OUTPUTS = ("", ".csv", ".tsv", ".txt", ".parquet", ".jsonl", ".safetensors", ".onnx", ".pth", ".pt")  # may be replaced
Prepare = Callable[[Any, str], "Tensor"]


def _readable(args: argparse.Namespace, prepare: Prepare) -> Iterator[tuple[list[Path], list[Tensor]]]:
    """Batches of the prepared images that the arguments name; unreadable ones are named on standard error.

    Raises:
        UserError: a path does not exist, or no image can be read.
    """
    from aps.inference.images import Once, decoded, walk

    once = Once()
    names, paths = tee(walk(args.images, once))
    any_readable = False
    for batch in decoded(paths, prepare, args.batch_size):
        named = list(zip(islice(names, len(batch)), batch, strict=True))
        for error in (x for _, x in named if isinstance(x, UserError)):
            print(f"left out: {error}", file=sys.stderr)
        if kept := [(path, x) for path, x in named if not isinstance(x, UserError)]:
            any_readable = True
            yield [path for path, _ in kept], [x for _, x in kept]
    _say_met_again(once)
    if not any_readable:
        raise UserError("none of the images can be read; give others")


def _say_met_again(once: Once) -> None:
    if once.left_out:
        print(f"left out: {number_of(once.left_out, 'name')} of folders and images met before", file=sys.stderr)


# --------------------------------------------------------------------------------------------------


def _embed(args: argparse.Namespace) -> None:
    if not args.images:
        raise UserError(f"embed {args.weights}: name images after the weights")
    args.out = args.out or Path("features.parquet")
    _check_outputs([args.weights, *args.images], args.out)
    written = _write_features(args, args.out)
    lost = f", {written.unreadable} unreadable, listed in {args.out}.unreadable.txt" if written.unreadable else ""
    known = f" ({written.known} of them known before)" if written.known else ""
    print(f"{args.out}: {number_of(written.images, 'image')}{known}{lost}")


def _write_features(args: argparse.Namespace, out: Path) -> Any:
    from aps.inference.features import files, write_features
    from aps.inference.images import Once, walk
    from aps.runtime.processes import Distributed
    from aps.runtime.signals import stop_requested

    model = _model(args, "embed")
    alone = Distributed(0, 1, model.device)
    once = Once()
    total = sum(1 for _ in walk(args.images, once))
    _say_met_again(once)
    return write_features(model, files(args.images, Once()), total, out, args.batch_size, lambda: stop_requested(alone))


def _neighbours(args: argparse.Namespace) -> None:
    import torch

    from aps.inference import figures
    from aps.inference.features import name_of
    from aps.inference.neighbours import Index, table, write_table

    _check_outputs([args.weights, *args.images, args.index], args.table, picture=args.picture)
    index, model = Index(args.index), _model(args, "embed")
    index.check(model)
    queries, vectors = list[Path](), list[Any]()
    for paths, pixels in _readable(args, model.preprocessing.pixels):
        queries += paths
        vectors.append(model.features_of(pixels))
    found = [
        [n for n in neighbours if not _is(index.image(n.path, n.row), query)][: args.k]  # a query may find itself
        for query, neighbours in zip(queries, index.neighbours(torch.cat(vectors), args.k + 1), strict=True)
    ]
    shown = {n.row for neighbours in found for n in neighbours}
    _say_changed(index, index.changed(shown), "images found")
    names = [name_of(path) for path in queries]
    print(table(names, found))
    if args.table:
        write_table(args.table, names, found)
    rows = [
        (
            "",
            [
                figures.Cell(path, f"query: {path.name}", "black"),
                *(
                    figures.Cell(index.image(n.path, n.row), f"{n.similarity:.3f} {n.label or Path(n.path).name}")
                    for n in neighbours[:COLUMNS]
                ),
            ],
        )
        for path, neighbours in zip(queries[:ROWS], found, strict=False)
    ]
    figures.grid(args.picture, rows)
    more = f" (the first {ROWS} of {len(queries)} queries)" if len(queries) > ROWS else ""
    more += f" (the first {COLUMNS} of {args.k} neighbours)" if args.k > COLUMNS else ""
    print(f"\n{args.picture}{more}")


def _say_changed(index: Index, count: int, among: str) -> None:
    if count:
        print(
            f"warning: {count:,} of the {among} have changed since {index.file} was made, and their features are old; "
            f"run `aps embed {index.metadata['source']} IMAGES --out {index.file}`",
            file=sys.stderr,
        )


def _is(file: Path | None, other: Path) -> bool:
    return file is not None and file.samefile(other)


def _curate(args: argparse.Namespace) -> None:
    from aps.inference import curate, figures
    from aps.inference.neighbours import Index

    if args.weights is not None:
        if not args.images:
            raise UserError(f"curate {args.weights}: name images after the weights, or neither and --index")
        _check_outputs([args.weights, *args.images], args.index, args.out, picture=args.picture)
        _write_features(args, args.index)
    else:
        _check_outputs([args.index], args.out, picture=args.picture)
    index = Index(args.index)
    if args.weights is None:
        _say_changed(index, index.changed(), f"{len(index):,} images")
    found = curate.curate(index, curate.SIMILAR if args.similarity is None else args.similarity)
    curate.write_table(args.out, index, found)
    print(curate.summary(index, found, args.outliers))
    groups, outliers = found.groups[:ROWS], found.outliers(min(args.outliers, 8 * ROWS))
    named = index.describe(sorted({row for rows in groups for row in rows} | set(outliers)))
    rows = [
        (
            f"group {number}",
            [
                figures.Cell(
                    index.image(named[row][0], row),
                    "keep" if found.keep[row] else f"{found.similarity[row]:.3f}",
                    "green" if found.keep[row] else "firebrick",
                )
                for row in members[:8]
            ],
        )
        for number, members in enumerate(groups)
    ]
    for start in range(0, len(outliers), 8):
        cells = [
            figures.Cell(index.image(named[row][0], row), f"{found.outlier[row]:.3f}")
            for row in outliers[start : start + 8]
        ]
        rows.append(("outliers" if not start else "", cells))
    figures.grid(args.picture, rows)
    more = f" (the first {len(outliers)} outliers)" if args.outliers > 8 * ROWS else ""
    print(f"\n{args.out}, {args.picture}{more}")


def _predict(args: argparse.Namespace) -> None:
    from aps.data.walk import printable
    from aps.files import csv_rows
    from aps.inference.features import name_of
    from aps.inference.model import Predictions

    _check_outputs([args.weights, *args.images], args.out)
    model = _model(args, "predict")
    header = ["path", "class", "probability", *model.classes]
    with nullcontext(lambda row: None) if args.out is None else csv_rows(args.out, header) as write:
        for paths, pixels in _readable(args, model.preprocessing.pixels):
            predictions = Predictions(model.probabilities_of(pixels), model.classes)
            tops = predictions.top(args.top)
            for path, top, probabilities in zip(paths, tops, predictions.probabilities.tolist(), strict=True):
                print(f"{printable(path)}  " + "  ".join(f"{name} {probability:.3f}" for name, probability in top))
                write([name_of(path), top[0][0], f"{top[0][1]:.6f}", *(f"{x:.6f}" for x in probabilities)])
    if args.out:
        print(f"\n{args.out}", file=sys.stderr)


def _detect(args: argparse.Namespace) -> None:
    from aps.files import atomic_path
    from aps.inference import figures
    from aps.inference.model import as_bytes

    results = args.out / "detections.jsonl"
    _check_outputs([args.weights, *args.images], results, folder=args.out)
    model = _loaded(args)
    model.check("detect")
    objects = images = 0
    with atomic_path(results) as temporary, temporary.open("w", encoding="utf-8") as file:
        for paths, pixels in _readable(args, as_bytes):
            for path, image, found in zip(paths, pixels, model.detect(pixels, args.threshold), strict=True):
                file.write(json.dumps({"path": str(path), "detections": coco(found)}) + "\n")
                figures.detections(picture_of(args.out, path), image, found, model.classes, path.name)
                objects, images = objects + len(found), images + 1
    print(
        f"{number_of(objects, 'object')} in {number_of(images, 'image')}: {results}, and a picture of each image in {args.out}"
    )


def coco(found: Detections) -> list[dict[str, Any]]:
    """Detections in COCO's form: label, score, bbox (left, top, width, height), and segmentation as run lengths, if any."""
    codes = [{"segmentation": code} for code in found.run_lengths()] or [{} for _ in found.labels]
    return [
        {
            "label": label,
            "score": round(score, 6),
            "bbox": [round(x, 2) for x in (left, top, right - left, bottom - top)],
        }
        | code
        for label, score, (left, top, right, bottom), code in zip(
            found.labels, found.scores.tolist(), found.boxes.tolist(), codes, strict=True
        )
    ]


def picture_of(folder: Path, path: Path) -> Path:
    """The file for the picture of an image: the image's path under `folder`, so that every image has a different one."""
    inside = Path(os.path.normpath(path.absolute()))
    try:
        inside = inside.relative_to(Path.cwd())
    except ValueError:
        inside = inside.relative_to(inside.anchor)
    return folder / inside.with_name(f"{inside.name}.png")


def _attention(args: argparse.Namespace) -> None:
    from aps.inference import figures

    single = args.out.suffix.lower() == ".png"
    _check_outputs([args.weights, *args.images], **{"picture" if single else "folder": args.out})
    model = _model(args, "attention")
    rows: list[Any] = []
    for paths, pixels in _readable(args, model.preprocessing.pixels):
        images = [x.permute(1, 2, 0).numpy() for x in pixels]
        maps = model.attention_of(pixels, args.block)
        named = [(path, (path.name, *row)) for path, *row in zip(paths, images, maps, strict=True)]
        if not single:
            for path, row in named:
                figures.attention(picture_of(args.out, path), [row])
            continue
        rows += [row for _, row in named]
        if len(rows) > ROWS:
            print(f"only the first {ROWS} images are drawn; name a folder for all: --out attention", file=sys.stderr)
            break
    if single:
        figures.attention(args.out, rows[:ROWS])
    print(args.out)


def _export(args: argparse.Namespace) -> None:
    from aps.inference.export import export

    if args.to != "hub-folder":  # a folder may be exported into itself
        _check_outputs([args.weights], args.out)
    print(export(_loaded(args), args.to, args.out, args.licence))
