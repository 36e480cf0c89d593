"""Images with local noise, for config/mechanism_local.yaml: `python -m benchmarks.local_noise MANIFEST DEVIATION ...`.

Each block of 4 x 4 pixels of each image gets a colour added that is random, of mean 0, and its own. It tells two cells of one
image from those of others, and nothing of what is on the image. NAME-localDEVIATION.npz has both splits, for a study's
`datasets: {NAME: {arrays: FILE}}`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from aps.data.load import ArraySplit, load_split
from aps.errors import UserError
from benchmarks.common import run
from benchmarks.options import folder

BLOCK = 4  # pixels, the side of a patch in the study


def noisy(images: np.ndarray, deviation: float, seed: list[int]) -> np.ndarray:
    """images: (M, S, S, 3) uint8, S a multiple of 4; deviation: of the colours, in 1/255 -> the same with noise."""
    M, S = images.shape[:2]
    colours = np.random.default_rng(seed).normal(0, deviation, (M, S // BLOCK, S // BLOCK, 3)).astype(np.float32)
    return np.clip(np.rint(images + colours.repeat(BLOCK, 1).repeat(BLOCK, 2)), 0, 255).astype(np.uint8)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.local_noise", description=__doc__)
    parser.add_argument("manifest", type=Path, help="of an array dataset: results/data/NAME/manifest.json")
    parser.add_argument("deviations", type=float, nargs="+", metavar="DEVIATION", help="of the colours, in 1/255")
    parser.add_argument("--out", type=folder, default=Path("."), help="folder of the files (here)")
    args = parser.parse_args(arguments)
    splits = {split: load_split(args.manifest, split, labelled=True) for split in ("train", "test")}
    for deviation in args.deviations:
        arrays = {}
        for number, (name, split) in enumerate(splits.items()):
            if not isinstance(split, ArraySplit) or split.images.shape[2] % BLOCK:
                raise UserError(f"{args.manifest}: needs images in memory whose side is a multiple of {BLOCK}")
            images = split.images.permute(0, 2, 3, 1).numpy()
            arrays |= {f"{name}_images": noisy(images, deviation, [7, number]), f"{name}_labels": split.labels.numpy()}
        args.out.mkdir(parents=True, exist_ok=True)
        file = args.out / f"{args.manifest.parent.name}-local{deviation:g}.npz"
        np.savez(file, **arrays)
        print(file)


if __name__ == "__main__":
    run(main)
