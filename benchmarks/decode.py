"""What a worker does with an image file: decode it and cut two crops of 224 pixels, in place or from a shrunk copy.

    python -m benchmarks.decode

One process, one thread. The ordinary way is Pillow, torchvision's RandomResizedCrop and torch's default_collate. Photographs
are made up: smooth, with noise as a camera's, JPEG of quality 85, of ImageNet's usual size and of a small camera's.
Copies are those of `datasets.NAME.shrink`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import default_collate
from torchvision import transforms

from aps.data.load import load_split
from aps.data.prepare import prepare
from aps.settings.blocks import UserDataset, ViewSettings
from aps.training.order import collated
from aps.views import View, cut_crops
from benchmarks.common import arguments, compare, plot, row, run, write

SIZE, SHRINK = 224, 256
SIDES = {"500x375": (375, 500), "2000x1500": (1500, 2000)}  # height, width


def photograph(file: Path, height: int, width: int, random: np.random.Generator) -> None:
    smooth = Image.fromarray(random.integers(0, 256, (24, 32, 3), np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    noisy = np.asarray(smooth) + random.normal(0, 8, (height, width, 3))
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)


def main() -> None:
    args = arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    count, repeats = (2, 2) if args.quick else (64, 9)
    settings = ViewSettings()
    random, rows, bars = np.random.default_rng(0), [], {}
    crop = transforms.Compose(
        [transforms.RandomResizedCrop(SIZE, settings.crop_scale, settings.crop_ratio), transforms.PILToTensor()]
    )
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        for name, (height, width) in SIDES.items():
            folder = Path(temporary) / name
            for i in range(count):
                photograph(folder / f"{i}.jpg", height, width, random)
            for shrink in (None, SHRINK):
                source = UserDataset(folder=str(folder), labels=False, shrink=shrink)
                out = Path(temporary) / f"{name}-{shrink}"
                prepare("photographs", out, source)
                split = load_split(out / "manifest.json", "train")
                files = [folder / f"{i}.jpg" for i in range(len(split))]
                two = [View(SIZE, settings)] * 2

                def ours(split=split, two=two) -> object:  # type: ignore[no-untyped-def]
                    return collated([cut_crops(split.read(i), two, (0, 0, i)) for i in range(len(split))])

                def ordinary(files=files) -> object:  # type: ignore[no-untyped-def]
                    images = [Image.open(file).convert("RGB") for file in files]
                    return default_collate([[crop(image), crop(image)] for image in images])

                timings = compare(ours, ordinary, repeats, warmup=1)
                what = f"{name}, shrunk to {shrink}" if shrink else f"{name}, in place"
                results[what] = timings
                target = 2.0 if shrink else None
                rows.append(
                    row(f"decode and two crops of {SIZE}, {what}: images a second", timings["ratio"], target=target)
                )
                per_image = {
                    way: {key: 1000 * value / count for key, value in timings[way].items()}
                    for way in ("ours", "ordinary")
                }
                if not shrink:
                    bars[f"ordinary: {name}"] = per_image["ordinary"]
                bars[f"ours: {what}"] = per_image["ours"]
    chosen = {"size": SIZE, "shrink": SHRINK, "images": count, "crop_scale": settings.crop_scale, "threads": 1}
    write("decode", {"rows": rows, "results": results}, chosen, args.out)
    title = f"Decode an image file and cut two crops of {SIZE} pixels, one core"
    plot("decode", bars, "ms an image", title, {key for key in bars if key.startswith("ours")}, args.out)


if __name__ == "__main__":
    run(main)
