"""8. Finetuning's input: batched augmentation against an image at a time in workers.

    python -m benchmarks.augment

Both use the same cores: ours by torch's threads, the ordinary way (benchmarks/ordinary.py: torchvision's and timm's
transforms on PIL images, timm's erasing and mixup on the batch) by as many DataLoader workers, which are running before
the clock starts. On a GPU ours runs there and the ordinary way's batches are sent to it. Neither side decodes files.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from aps.data.load import ArraySplit
from aps.runtime.memory import keep_memory
from aps.runtime.processes import processes
from aps.settings.blocks import FinetuneSettings
from aps.training.examples import AugmentedExamples
from benchmarks.common import arguments, compare, plot, row, write
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
    rows, times, rates = [], {}, {}
    with processes() as distributed:
        if distributed.device.type == "cpu":
            keep_memory()  # as the stage does
        workers = 1 if args.quick else torch.get_num_threads()
        for name, (source, size, batch, changes) in RECIPES.items():
            batch = 8 if args.quick else batch
            settings = FinetuneSettings(batch_size=batch, **changes)
            pixels = np.random.default_rng(0).integers(0, 256, (images, source, source, 3), np.uint8)
            labels = torch.arange(images) % CLASSES
            split = ArraySplit(
                torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), labels, tuple(map(str, range(CLASSES)))
            )
            examples = AugmentedExamples(
                split, torch.arange(images), settings, size, CLASSES, (MEAN, STD), 0, distributed
            )
            loader = DataLoader(
                OrdinaryExamples(pixels, labels, settings, size), batch, shuffle=True, num_workers=workers,
                persistent_workers=True, pin_memory=distributed.device.type == "cuda",
            )  # fmt: skip
            finish = finished(settings, CLASSES, MEAN, STD, distributed.device)

            def ours(examples: AugmentedExamples = examples) -> None:
                for _ in examples.epoch(0):
                    pass

            def ordinary(loader: DataLoader = loader, finish: Any = finish) -> None:
                for tensors in loader:
                    finish(*tensors)

            found = compare(ours, ordinary, repeats, warmup=1)
            del loader
            times[name] = found
            rows.append(row(f"{name}: images a second", found["ratio"], target=10))
            rates |= {
                f"{which}: {name}": {key: images / value for key, value in found[side].items()}
                for side, which in (("ours", "batched"), ("ordinary", "one by one"))
            }
    chosen = {"recipes": {name: recipe[:3] for name, recipe in RECIPES.items()}, "images": images, "workers": workers}
    write("augment", {"rows": rows, "images_a_second": rates, "times": times}, chosen, args.out)
    bars = {
        name: {**rate, "low": rate["high"], "high": rate["low"]} for name, rate in rates.items()
    }  # of inverse times
    plot(
        "augment",
        bars,
        "images a second",
        "Augmented images for finetuning",
        {n for n in bars if n.startswith("batched")},
        args.out,
    )


if __name__ == "__main__":
    main()
