"""Measures what grows with the number of images, on hard links to a few JPEG files: python -m benchmarks.large

For each number: listing the tree, preparing it (manifest, statistics of a sample, fingerprint), checking whether it has
changed (which planning does), loading the split, an epoch's order, the first batch with workers, and their memory.
Times are CPU times of this process without its workers. The files are small, so that decoding takes little time.

With `--stages`, instead: a whole study of that size by Snakemake, on a tiny encoder with random weights, for which every
image is read: preparing, an epoch of the linear probe, kNN of 10,000 test images, the report. Wall and CPU times of each
target, Snakemake's start included, and peak memory of the stages.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import yaml
from PIL import Image

from aps.data import fingerprint, trees
from aps.data.load import load_split
from aps.data.manifest import Manifest
from aps.data.walk import walk
from aps.ranges import whole_number
from aps.runtime.processes import Distributed
from aps.settings.blocks import SourceSettings, ViewSettings
from aps.training.batches import Batches
from aps.views import View
from benchmarks.common import ROOT, arguments, plot, row, run, spread, timed, write

COUNTS = (10_000, 100_000, 1_281_167)  # the last: ImageNet-1K's train images
FEWEST = 40  # a batch has a quarter of the images, and 2 workers
DISTINCT = 64  # files, because a file system allows some ten thousand links to each
CLASSES = 1_000
TEST = 10_000  # test images of `--stages`
TREE, PHOTOS = "tree", "photos"  # the latter with the splits that the study of `--stages` needs


def lay_out(root: Path, count: int, classes: int, tree: str) -> None:
    random = np.random.default_rng(0)
    (root / "files").mkdir(parents=True, exist_ok=True)
    for i in range(DISTINCT):
        pixels = random.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        content = io.BytesIO()
        Image.fromarray(pixels).resize((64, 48), Image.Resampling.BICUBIC).save(content, "JPEG")
        (root / "files" / f"{i}.jpg").write_bytes(content.getvalue())
    for label in range(classes):
        folder = root / tree / f"n{label:08d}"
        folder.mkdir(parents=True)
        for i in range(label, count, classes):
            os.link(root / "files" / f"{i % DISTINCT}.jpg", folder / f"n{label:08d}_{i:08d}.JPEG")


def measure(root: Path, count: int, classes: int) -> dict[str, float]:
    """Seconds, or MiB, of each thing that is measured."""
    measured: dict[str, float] = {}

    def timed(what: str, function: Callable[[], Any]) -> Any:
        start = time.process_time()
        result = function()
        measured[what] = time.process_time() - start
        return result

    tree, home = root / TREE, root / "prepared"
    home.mkdir()
    timed("walk", lambda: walk(tree))
    survey = timed("survey", lambda: trees.survey(tree))
    names = trees.class_folders(survey)

    def prepare() -> Manifest:
        listing = trees.listing(survey, names)
        return trees.describe(
            home,
            "large",
            names,
            {"train": listing},
            origin=str(tree),
            source=SourceSettings(),
            trees=[survey],
            sample=1_000,
        )

    manifest = timed("prepare", prepare)
    manifest.write(home / "manifest.json")
    assert timed("planning: has it changed?", lambda: fingerprint.changed(manifest, home)) is None
    split = timed("load the split", lambda: load_split(home / "manifest.json", "train"))
    view = View(32, ViewSettings())
    batch = min(64, count // 4)
    batches = Batches(
        split, (view, view), batch, ((0.5,) * 3, (0.25,) * 3), 0, Distributed(0, 1, torch.device("cpu")), 2
    )
    timed("an epoch's order", lambda: batches._order.epoch(0))
    start = time.perf_counter()
    epoch = batches.epoch(0)
    next(epoch)
    measured["first batch, 2 workers, wall time"] = time.perf_counter() - start
    processes = psutil.Process().children()
    measured["memory of a worker beyond what it shares, MiB"] = max(p.memory_full_info().uss for p in processes) / 2**20
    measured["memory of the process, MiB"] = psutil.Process().memory_info().rss / 2**20
    return measured


def study(count: int) -> dict[str, Any]:
    """A study in which every one of `count` training images is read."""
    encoder = {
        "arch": "micro",
        "dim": 64,
        "depth": 2,
        "heads": 2,
        "image_size": 32,
        "patch_size": 8,
        "weights": "random",
    }
    return {
        "study": "large",
        "datasets": {"large": {"folder": PHOTOS}},
        "experiments": {
            "floor": {
                "dataset": "large", "seeds": [0], "stages": ["linear_probe", "knn"], "encoder": encoder,
                "linear_probe": {"epochs": 1, "batch_size": min(512, count // 4)},
            }
        },
    }  # fmt: skip


def run_stages(root: Path, count: int, classes: int) -> dict[str, float]:
    """Seconds of each target of the study, and MiB of its stages."""
    lay_out(root, max(classes, min(TEST, count // 4)), classes, f"{PHOTOS}/test")
    (root / "large.yaml").write_text(yaml.safe_dump(study(count), sort_keys=False))
    snakemake = (sys.executable, "-m", "snakemake", "--cores", "all", "--snakefile", str(ROOT / "Snakefile"))
    measured: dict[str, float] = {}
    for target in ("data", "linear_probe", "knn", "report"):
        times = timed(*snakemake, "--configfile", "large.yaml", "--", target, folder=root)
        measured |= {f"{target}, wall time": times["wall"], f"{target}, CPU time": times["cpu"]}
    for stage in ("linear_probe", "knn"):
        metrics = json.loads((root / f"results/large/floor/seed0/{stage}/metrics.json").read_text())
        measured[f"{stage}, peak memory, MiB"] = 1000**3 * metrics["cost"]["peak_memory_gb"] / 2**20
    return measured


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--counts", type=whole_number(FEWEST, 100_000_000), nargs="+", default=list(COUNTS))
    parser.add_argument(
        "--stages", action="store_true", help="run a study of that size (at 1.28 million: half an hour)"
    )
    args = parser.parse_args()
    counts = [200] if args.quick else args.counts
    results, rows = {}, []
    for count in counts:
        root, classes = Path(tempfile.mkdtemp(prefix="large-")), min(CLASSES, count // 10)
        try:
            start = time.process_time()
            lay_out(root, count, classes, f"{PHOTOS}/train" if args.stages else TREE)
            results[count] = {"links made": time.process_time() - start}
            results[count] |= (run_stages if args.stages else measure)(root, count, classes)
        finally:
            shutil.rmtree(root)
        for what, figure in results[count].items():
            target = 30 if what.startswith("planning") else None
            rows.append(row(f"{count:,} images: {what}", spread([figure]), "" if "MiB" in what else "s", target))
    name = "large-stages" if args.stages else "large"
    write(name, {"rows": rows, "found": results}, {"counts": counts, "distinct": DISTINCT}, args.out)
    bars = {what: spread([figure]) for what, figure in results[counts[-1]].items() if "MiB" not in what}
    plot(name, bars, "seconds", f"{counts[-1]:,} images", set(bars), args.out)


if __name__ == "__main__":
    run(main)
