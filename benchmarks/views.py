"""1. Two views and T samplings of every image: a batch at once, against one image at a time in workers.

    python -m benchmarks.views

Both use the same cores: ours by torch's threads, the baseline (benchmarks/ordinary.py) by as many DataLoader workers,
which run before the clock starts. On a GPU, ours runs there, and the batches of the baseline are sent to it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import DataLoader

from aps.data.load import ArraySplit
from aps.runtime.memory import keep_memory
from aps.runtime.processes import processes
from aps.sampling import sample
from aps.settings.blocks import SamplingSettings, ViewSettings
from aps.training.batches import Batches
from aps.training.order import SAMPLING, seeded
from aps.views import View
from benchmarks.common import arguments, compare, plot, row, run, write
from benchmarks.ordinary import OrdinaryPairs

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


def main() -> None:
    args = arguments(__doc__).parse_args()
    size, grid, batch = 32, 16, 8 if args.quick else 512
    images = 16 if args.quick else 2048
    settings = SamplingSettings()
    pixels = np.random.default_rng(0).integers(0, 256, (images, size, size, 3), np.uint8)
    with processes() as distributed:
        if distributed.device.type == "cpu":
            keep_memory()  # as the stage does
        device = distributed.device
        split = ArraySplit(
            torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.zeros(images).long(), ("a",)
        )
        two = [View(size, ViewSettings(), chances) for chances in (1, 2)]
        batches = Batches(split, two, batch, (MEAN, STD), 0, distributed)
        workers = 1 if args.quick else torch.get_num_threads()
        ordinary_pairs = OrdinaryPairs(pixels, size, MEAN, STD, grid, settings.samplings)
        loader = DataLoader(
            ordinary_pairs, batch, shuffle=True, num_workers=workers, persistent_workers=True,
            pin_memory=device.type == "cuda",
        )  # fmt: skip

        def ours() -> None:
            for number, drawn in enumerate(batches.epoch(0)):
                sample(settings, grid, *drawn.geometries, seeded(0, SAMPLING, number, device=device))

        def ordinary() -> None:
            for tensors in loader:
                [x.to(device, non_blocking=True) for x in tensors]

        timings = compare(ours, ordinary, repeats=2 if args.quick else 7, warmup=1)
    rows = [row(f"views and samplings, {size} px: images a second", timings["ratio"], target=25)]
    chosen = {"size": size, "grid": grid, "samplings": settings.samplings, "ratio": settings.ratio, "batch": batch,
              "images": images, "workers": workers}  # fmt: skip
    write("views", {"rows": rows, **timings}, chosen, args.out)
    milliseconds = {
        f"{name}: {what}": {key: 1000 * value / images for key, value in timings[name].items()}
        for name, what in (
            ("ours", "batched tensors"),
            ("ordinary", f"PIL, {workers} worker{'s' if workers > 1 else ''}"),
        )
    }
    title = f"Two views and {settings.samplings} samplings of an image, {size} px"
    plot("views", milliseconds, "ms an image", title, {next(iter(milliseconds))}, args.out)


if __name__ == "__main__":
    run(main)
