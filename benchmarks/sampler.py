"""2. The sampler alone: the kept cells of a batch of view pairs at once, against loops over images and samplings.

    python -m benchmarks.sampler

The loops of benchmarks/ordinary.py use one core, so ours has one torch thread. On a GPU, ours runs there.
"""

from __future__ import annotations

import numpy as np
import torch

from aps.runtime.memory import keep_memory
from aps.runtime.processes import processes
from aps.sampling import sample
from aps.settings.blocks import SamplingSettings, ViewSettings
from aps.views import draw_parameters
from benchmarks.common import arguments, compare, plot, row, run, write
from benchmarks.ordinary import sample_image


def main() -> None:
    args = arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    settings, grid, batch, side = SamplingSettings(), 4 if args.quick else 16, 4 if args.quick else 512, 32
    generator = torch.Generator().manual_seed(0)
    parameters = [draw_parameters(view, batch, side, side, ViewSettings(), generator) for view in (1, 2)]
    boxes1, boxes2 = ([tuple(box) for box in p.boxes.tolist()] for p in parameters)
    flips1, flips2 = (p.flips.tolist() for p in parameters)
    random = np.random.default_rng(0)
    with processes() as distributed:
        if distributed.device.type == "cpu":
            keep_memory()  # as the stage does
        view1, view2 = (p.geometry(distributed.device) for p in parameters)
        on_device = torch.Generator(distributed.device).manual_seed(0)

        def ours() -> None:
            sample(settings, grid, view1, view2, on_device)

        def ordinary() -> None:
            for image in zip(boxes1, flips1, boxes2, flips2, strict=True):
                sample_image(*image, grid, settings.ratio, settings.samplings, settings.gamma, random)

        timings = compare(ours, ordinary, repeats=2 if args.quick else 15)
    rows = [row(f"sampler, G={grid}, T={settings.samplings}, B={batch}", timings["ratio"], target=40)]
    chosen = {"grid": grid, "samplings": settings.samplings, "ratio": settings.ratio, "batch": batch, "threads": 1}
    write("sampler", {"rows": rows, **timings}, chosen, args.out)
    microseconds = {
        name: {key: 1e6 * value / batch for key, value in timings[which].items()}
        for which, name in (("ours", "ours: batched"), ("ordinary", "ordinary: NumPy, image by image"))
    }
    title = f"Kept cells of a pair of views, G={grid}, T={settings.samplings}, B={batch}"
    plot("sampler", microseconds, "us an image", title, {"ours: batched"}, args.out)


if __name__ == "__main__":
    run(main)
