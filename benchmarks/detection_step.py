"""Measures time and memory of one training step of Mask R-CNN at full size, before a job is submitted.

    python -m benchmarks.detection_step --engine detectron2 --arch small

It compares nothing: it measures a step on this machine, for docs/detection.md and for choosing `resources`. Images are
digits on canvases of 1024x1024 pixels, with as many instances as COCO's (7 on average); their content changes neither
time nor memory.
"""

from __future__ import annotations

import itertools
import json
import resource
import tempfile
import time
from pathlib import Path

import torch

from aps.data.composites import RECIPES, Recipe
from aps.data.prepare import prepare
from aps.detection import load_engine
from aps.detection.annotations import CocoSplit
from aps.detection.engine import Task
from aps.ranges import whole_number
from aps.runtime.processes import processes
from aps.settings.blocks import DetectionSettings, EncoderSettings, SourceSettings
from benchmarks.common import MOST, arguments, run, write


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--engine", default="torchvision")
    parser.add_argument("--arch", default="small")
    parser.add_argument("--image-size", type=whole_number(1, MOST), default=1024)
    parser.add_argument("--batch-size", type=whole_number(1, MOST), default=1)
    parser.add_argument("--precision", default="auto")
    parser.add_argument(
        "--iterations", type=whole_number(2, MOST), default=4, help="the first one is left out of the time"
    )
    args = parser.parse_args()
    if args.quick:
        args.image_size, args.iterations = 256, 2
    settings = DetectionSettings(
        engine=args.engine, image_size=args.image_size, batch_size=args.batch_size, iterations=args.iterations,
        precision=args.precision, jitter_scale=(1.0, 1.0), warmup_iterations=1,
    )  # fmt: skip
    encoder = EncoderSettings(arch=args.arch, image_size=224, patch_size=16, weights="random")
    with tempfile.TemporaryDirectory() as home, processes() as distributed:
        side = args.image_size
        RECIPES["digits_coco"] = Recipe(
            "digits", side, 2 * args.batch_size, 1, (4, 10), (side // 8, side // 3), 80, 0.3
        )
        prepare("digits_coco", Path(home), SourceSettings())
        manifest = Path(home) / "manifest.json"
        train, val = (CocoSplit(manifest, split, split == "train") for split in ("train", "val"))
        task = Task(settings, encoder, 0, train, val, (0.1, 0.1, 0.1), (0.2, 0.2, 0.2), 0, distributed)
        engine = load_engine(args.engine)(task)
        times: list[float] = []

        def after(done: int, losses: object) -> None:
            if distributed.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter())

        engine.train(0, after)
        measured = {
            "seconds_a_step": [round(later - earlier, 2) for earlier, later in itertools.pairwise(times)],
            "peak_resident_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
            "parameters": sum(p.numel() for p in engine.model.parameters()),
        }
        if distributed.device.type == "cuda":
            measured["peak_gpu_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    print("  " + json.dumps(measured))
    write(f"detection_step-{args.engine}-{args.arch}-{args.image_size}", measured, vars(args) | {"out": None}, args.out)


if __name__ == "__main__":
    run(main)
