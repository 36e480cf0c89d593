"""Draws docs/images/rivals.png: kNN against operations of each method in benchmarks/results/studies/rivals-512-curves.csv.

python docs/rivals.py
"""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
METHODS = {  # label, colour
    "simclr": ("SimCLR", "#4477aa"),
    "full": ("full, all tokens", "#228833"),
    "random": ("random", "#d95f02"),
    "aps": ("APS", "black"),
    "mae": ("MAE", "#aa3377"),
    "mocov3": ("MoCo v3", "#66ccee"),
    "byol": ("BYOL", "#999933"),
    "dino": ("DINO", "#bbbbbb"),
}


def curves() -> dict[str, list[tuple[float, list[float]]]]:
    """Each method's readings: operations, kNN in percent of each seed."""
    read: dict[str, dict[int, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    with (ROOT / "benchmarks/results/studies/rivals-512-curves.csv").open() as file:
        for row in csv.DictReader(file):
            read[row["experiment"]][int(row["step"])].append((float(row["flops"]), float(row["knn_train_top1"])))
    return {
        name: [(steps[step][0][0], [top1 for _, top1 in steps[step]]) for step in sorted(steps)]
        for name, steps in read.items()
    }


def draw() -> Figure:
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    axes = figure.add_subplot()
    read = curves()
    for name, (label, colour) in METHODS.items():
        readings = read[name]
        flops, means = [x for x, _ in readings], [sum(values) / len(values) for _, values in readings]
        least, most = [min(values) for _, values in readings], [max(values) for _, values in readings]
        axes.plot(flops, means, color=colour, linewidth=2.6 if name == "aps" else 1.6, marker="o", markersize=3)
        axes.fill_between(flops, least, most, color=colour, alpha=0.15, linewidth=0)
        up = {"full": 4, "random": -4}.get(name, 0)  # points, so that their labels stand apart
        axes.annotate(label, (flops[-1], means[-1]), (6, up), textcoords="offset points", va="center", color=colour)
    axes.set_xlabel("operations of pretraining")
    axes.set_ylabel("kNN of held-out training images, %")
    axes.set_xlim(0, 3.0e14)
    axes.set_xticks([0, 0.5e14, 1e14, 1.5e14, 2e14, 2.5e14])
    axes.grid(linewidth=0.4)
    figure.suptitle("CIFAR-10 at equal operations: mean of three seeds, bands from the least to the most", fontsize=11)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure


if __name__ == "__main__":
    draw().savefig(ROOT / "docs/images/rivals.png", dpi=140)
