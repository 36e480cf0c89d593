"""8. Finetuning's input: batched augmentation against an image at a time in workers.

    python -m benchmarks.augment

All use the same cores: ours by torch's threads, the others (benchmarks/ordinary.py: torchvision's and timm's transforms
on PIL images, timm's erasing and mixup on the batch) by as many DataLoader workers, which run before the clock starts.
`seeded` seeds the generators for each image, so that, as with ours, an interrupted run goes on with the same images. On
a GPU, ours runs there, and the batches of the others are sent to it. Nobody decodes files.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from aps.data.load import ArraySplit
from aps.runtime.memory import keep_memory
from aps.runtime.processes import Distributed, processes
from aps.settings.blocks import FinetuneSettings
from aps.training.examples import AugmentedExamples
from benchmarks.common import arguments, plot, row, run, seconds, spread, write
from benchmarks.ordinary import OrdinaryExamples, finished

MEAN, STD, CLASSES = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), 10
# The demo's finetuning: scans of 8 pixels enlarged to 16, shifted, and nothing else.
PLAIN: dict[str, Any] = {
    "rand_augment": None, "color_jitter": 0.0, "flip": 0.0, "erasing": 0.0, "mixup": 0.0, "cutmix": 0.0, "label_smoothing": 0.0
}  # fmt: skip
RECIPES: dict[str, tuple[int, int, int, dict[str, Any]]] = {  # pixels of the source, of the model, batch, settings
    "resize, pad and crop (demo)": (8, 16, 16, PLAIN),
    "crop, flip, RandAugment, erasing, mixup (CIFAR)": (32, 32, 128, {}),
}


def main() -> None:
    args = arguments(__doc__).parse_args()
    images, repeats = (64, 2) if args.quick else (8192, 7)
    rows, rates, times = [], {}, {}
    with processes() as distributed:
        if distributed.device.type == "cpu":
            keep_memory()  # as the stage does
        workers = 1 if args.quick else torch.get_num_threads()
        for name, (source, size, batch, changes) in RECIPES.items():
            settings = FinetuneSettings(batch_size=8 if args.quick else batch, **changes)
            epochs = contenders(settings, source, size, images, workers, distributed)
            taken = in_turn(epochs, repeats)
            times[name] = taken
            for other, goal in (("seeded", 10), ("unseeded", None)):
                ratio = spread([b / a for a, b in zip(taken["ours"], taken[other], strict=True)])
                rows.append(row(f"{name}, against one by one, {other}: images a second", ratio, target=goal))
            rates |= {f"{who}: {name}": spread([images / x for x in each]) for who, each in taken.items()}
    chosen = {"recipes": {name: recipe[:3] for name, recipe in RECIPES.items()}, "images": images, "workers": workers,
              "repeats": repeats}  # fmt: skip
    write("augment", {"rows": rows, "images_a_second": rates, "seconds": times}, chosen, args.out)
    plot(
        "augment",
        rates,
        "images a second",
        "Augmented images for finetuning",
        {n for n in rates if n[:4] == "ours"},
        args.out,
    )


def contenders(
    settings: FinetuneSettings, source: int, size: int, images: int, workers: int, distributed: Distributed
) -> dict[str, Callable[[], None]]:
    """Name -> a function that runs one epoch."""
    pixels = np.random.default_rng(0).integers(0, 256, (images, source, source, 3), np.uint8)
    labels = torch.arange(images) % CLASSES
    split = ArraySplit(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), labels, tuple("0123456789"))
    examples = AugmentedExamples(split, torch.arange(images), settings, size, CLASSES, (MEAN, STD), 0, distributed)
    finish = finished(settings, CLASSES, MEAN, STD, distributed.device)

    def ours() -> None:
        for _ in examples.epoch(0):
            pass

    def one_by_one(loader: DataLoader) -> None:
        for tensors in loader:
            finish(*tensors)

    epochs: dict[str, Callable[[], None]] = {"ours": ours}
    for name, seeded in (("seeded", True), ("unseeded", False)):
        loader = DataLoader(
            OrdinaryExamples(pixels, labels, settings, size, seeded), settings.batch_size, shuffle=True,
            num_workers=workers, persistent_workers=True, pin_memory=distributed.device.type == "cuda",
        )  # fmt: skip
        epochs[name] = partial(one_by_one, loader)
    return epochs


def in_turn(epochs: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, in turn; a first call of each does not count."""
    taken: dict[str, list[float]] = {name: [] for name in epochs}
    for repeat in range(-1, repeats):
        for name in list(epochs)[:: 1 if repeat % 2 else -1]:
            time = seconds(epochs[name])
            if repeat >= 0:
                taken[name].append(time)
    return taken


if __name__ == "__main__":
    run(main)
