"""Draws docs/images/gap.png: APS minus random sampling in every pair of runs in benchmarks/results/studies.

python docs/gap.py
"""

from __future__ import annotations

import csv
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
SCORES = {"knn": ("knn_top1_k20", "kNN, k = 20", "o"), "linear_probe": ("test_top1", "linear probe", "D")}
Pairs = dict[str, list[tuple[str, str, str]]]  # label of a row -> (study, APS, random) of its pairs


def rows() -> Pairs:
    """The rows of the figure, top to bottom."""
    found: Pairs = {"50,000 images, 1.2 epochs": [("rivals-tenth", "aps", "random")]}
    found["50,000 images, 12 epochs"] = [("rivals-512", "aps", "random")]
    for epochs in (2, 6, 20):
        found[f"10,000 images, {epochs} epochs"] = [("length-fifth", f"aps-{epochs}", f"random-{epochs}")]
    for end, words in (("", "three crops, colours, flips"), ("-plain", "three crops alone")):
        for r in ("0.125", "0.25", "0.5"):
            ends = [f"crop{crop}-r{r}{end}" for crop in ("0.99", "0.5", "0.15")]
            found[f"{words}, r = {r}"] = [("mechanism-half", f"asymmetric-{one}", f"random-{one}") for one in ends]
    for noise in ("32", "64"):
        pair = ("mechanism-local", f"asymmetric-local{noise}", f"random-local{noise}")
        found[f"local noise {noise}, r = 0.25"] = [pair]
    return found


def differences(pairs: list[tuple[str, str, str]], stage: str, key: str) -> list[float]:
    """Percentage points of APS over random sampling, for each pair and each seed that both have."""
    found = []
    for study, ours, theirs in pairs:
        with (ROOT / f"benchmarks/results/studies/{study}.csv").open() as file:
            values = {
                (row["experiment"], row["seed"]): float(row[key])
                for row in csv.DictReader(file)
                if row["stage"] == stage
            }
        seeds = sorted(
            {seed for name, seed in values if name == ours} & {seed for name, seed in values if name == theirs}
        )
        found += [values[ours, seed] - values[theirs, seed] for seed in seeds]
    return found


def draw() -> Figure:
    table = rows()
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    axes = figure.add_subplot()
    for place, (stage, (key, label, marker)) in enumerate(SCORES.items()):
        points = [(x, y) for y, pairs in enumerate(table.values()) for x in differences(pairs, stage, key)]
        colour, shift = ("#1f77b4", "#d95f02")[place], 0.3 * place - 0.15
        axes.scatter(
            [x for x, _ in points],
            [y + shift for _, y in points],
            s=26,
            marker=marker,
            color=colour,
            alpha=0.8,
            label=label,
        )
    axes.axvline(0, color="black", linewidth=1)
    axes.set_yticks(range(len(table)), list(table))
    axes.invert_yaxis()
    axes.grid(axis="x", linewidth=0.4)
    axes.set_xlabel("random sampling ahead  ←  points of top-1  →  APS ahead")
    figure.suptitle("APS minus random sampling, CIFAR-10: each mark is a pair of runs", fontsize=11)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False, fontsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure


if __name__ == "__main__":
    draw().savefig(ROOT / "docs/images/gap.png", dpi=140)
