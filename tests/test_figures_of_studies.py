"""The tables of docs/results.md are those of the runs in benchmarks/results/studies: each figure is made again from them."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from statistics import mean, stdev

import pytest

ROOT = Path(__file__).parent.parent
NUMBER = r"[+-]?\d+(?:\.\d+)?"
RIVALS = {"SimCLR": "simclr", "MAE": "mae", "full, all tokens": "full", "random": "random", "APS": "aps"}
RIVALS |= {"MoCo v3": "mocov3", "BYOL": "byol", "random weights": "random-weights", "DINO": "dino"}
Runs = dict[tuple[str, str, str], dict[str, str]]


def runs(study: str) -> Runs:
    """The rows of a study's file, by experiment, seed and stage."""
    with (ROOT / f"benchmarks/results/studies/{study}.csv").open() as file:
        return {(row["experiment"], row["seed"], row["stage"]): row for row in csv.DictReader(file)}


def table(heading: str, first: str) -> list[list[str]]:
    """The cells of the table under a heading whose first column is `first`."""
    section = (ROOT / "docs/results.md").read_text().split(f"\n## {heading}", 1)[1].split("\n## ", 1)[0]
    lines = [line.strip() for line in section.splitlines()]
    start = next(number for number, line in enumerate(lines) if line.startswith(f"| {first} |"))
    found = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            return found
        found.append([cell.strip().replace("**", "") for cell in line.strip("|").split("|")])
    return found


def numbers(cell: str) -> list[float]:
    return [float(number) for number in re.findall(NUMBER, re.sub(r"\(.*", "", cell))]


def is_rounded(shown: float, value: float, digits: int = 1) -> bool:
    return abs(shown - value) <= 0.5 * 10**-digits + 1e-9


def pair(found: Runs, names: tuple[str, str], seed: str, stage: str, key: str) -> list[float]:
    return [float(found[name, seed, stage][key]) for name in names]


def check_pair(cells: list[str], found: Runs, names: tuple[str, str], seed: str) -> None:
    """cells: loss, kNN, difference, linear probe, difference; of APS and random sampling."""
    loss, knn, by_knn, probe, by_probe = (numbers(cell) for cell in cells)
    assert all(map(is_rounded, loss, pair(found, names, seed, "pretrain", "loss"), (2, 2))), (names, loss)
    for shown, difference, stage, key in (
        (knn, by_knn, "knn", "knn_top1_k20"),
        (probe, by_probe, "linear_probe", "test_top1"),
    ):
        values = pair(found, names, seed, stage, key)
        assert all(map(is_rounded, shown, values)), (names, stage, shown, values)
        assert is_rounded(difference[0], values[0] - values[1]), (names, stage, difference, values)


def test_the_mechanism_at_half_the_length() -> None:
    found, rows = runs("mechanism-half"), table("Mechanism at half", "crops from")
    assert len(rows) == 18
    for crops, r, colours, _, *cells in rows:
        end = f"crop{crops}-r{r}{'' if colours == 'yes' else '-plain'}"
        check_pair(cells, found, (f"asymmetric-{end}", f"random-{end}"), "0")


def test_the_length() -> None:
    found, rows = runs("length-fifth"), table("Length,", "epochs (steps)")
    checked = 0
    for what, *cells in rows:
        if "float32" not in what:  # of which there are no rows
            epochs, seed = re.match(r"\d+", what), re.search(r"seed (\d+)", what)
            assert epochs
            check_pair(cells, found, (f"aps-{epochs[0]}", f"random-{epochs[0]}"), seed[1] if seed else "0")
            checked += 1
    assert checked >= 4


def test_the_pairs_of_readme_and_their_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs")
    import gap

    pairs = {pair for row in gap.rows().values() for pair in row}
    # None is left out
    for study in ("rivals-tenth", "rivals-512", "length-fifth", "mechanism-half", "mechanism-local"):
        names = {name for name, _, _ in runs(study)}
        for name in names:
            other = re.sub(r"^(asymmetric|aps)(?=-|$)", "random", name)
            assert other == name or other not in names or "labels" in name or (study, name, other) in pairs, name
    text = " ".join((ROOT / "README.md").read_text().split())
    said = re.search(
        r"Of (\d+) pairs .*? ahead in (\d+) by kNN and in (\d+) by the linear probe, never by more than (\S+) points, "
        r"and behind by more than a point in (\d+) and (\d+):",
        text,
    )
    assert said
    found = [
        [x for row in gap.rows().values() for x in gap.differences(row, stage, key)]
        for stage, (key, _, _) in gap.SCORES.items()
    ]
    assert [len(each) for each in found] == [int(said[1])] * 2
    assert [sum(x > 0 for x in each) for each in found] == [int(said[2]), int(said[3])]
    assert is_rounded(float(said[4]), max(max(each) for each in found))
    assert [sum(x < -1 for x in each) for each in found] == [int(said[5]), int(said[6])]
    (axes,) = gap.draw().axes
    assert [len(dots.get_offsets()) for dots in axes.collections] == [int(said[1])] * 2


def test_gamma_and_flips() -> None:
    found, rows = runs("length-fifth"), table("Length,", "sampling")
    names = {"gamma 0": "gamma-0-6", "gamma 1": "gamma-1-6", "gamma 3, APS": "aps-6", "gamma 10": "gamma-10-6"}
    names |= {"gamma 3, `flip_aware: false`": "flip-unaware-6", "random": "random-6"}
    assert [row[0] for row in rows] == list(names)
    for what, *cells in rows:
        runs_of = (("pretrain", "loss", 2), ("knn", "knn_top1_k20", 1), ("linear_probe", "test_top1", 1))
        for cell, (stage, key, digits) in zip(cells, runs_of, strict=True):
            assert is_rounded(float(cell), float(found[names[what], "0", stage][key]), digits), (what, stage)


def test_the_demos_head_has_the_figures_of_its_table() -> None:
    """config/config.yaml says in words what the table of docs/results.md says."""
    text = (ROOT / "docs/results.md").read_text().split("```text\nexperiment ", 1)[1].split("```", 1)[0]
    rows = {line.split()[0]: [float(x) for x in re.findall(r"\d+\.\d", line)] for line in text.splitlines()[2:] if line}
    head = " ".join((ROOT / "config/config.yaml").read_text().split("\nstudy:")[0].replace("#", " ").split())
    aps, floor, full, rivals = rows["aps"], rows["random-weights"], rows["full"], rows["random"]
    finetuned, probe, knn = aps[0], aps[2], aps[4]
    for pattern, values in (
        (r"kNN \(k = 20\) (\d+) %, linear probe (\d+) %, finetuned (\d+) %", (knn, probe, finetuned)),
        (r"random weights (\d+), (\d+), (\d+) %", (floor[2], floor[1], floor[0])),
        (r"\(kNN (\d+), linear probe (\d+) %\)", (rivals[1], rivals[0])),
        (r"all patches for the same operations are at (\d+) and (\d+) %", (full[1], full[0])),
    ):
        said = re.search(pattern, head)
        assert said and all(abs(float(a) - b) <= 0.51 for a, b in zip(said.groups(), values, strict=True)), (
            pattern,
            values,
        )


@pytest.mark.parametrize("stage, key, column", [("linear_probe", "test_top1", 3), ("knn", "knn_top1_k20", 4)])
def test_the_rivals_at_a_tenth(stage: str, key: str, column: int) -> None:
    found, rows = runs("rivals-tenth"), table("Rivals at a tenth", "method")
    assert {row[0] for row in rows} == set(RIVALS)
    for row in rows:
        centre, spread, first, *others = (float(number) for number in re.findall(NUMBER, row[column]))
        values = [float(found[RIVALS[row[0]], seed, stage][key]) for seed in "12"]
        assert all(map(is_rounded, others, values)), (row, values)
        possible = [[first + step / 200, *values] for step in range(-10, 11)]  # of seed 0 one decimal is known
        assert any(is_rounded(centre, mean(each)) and is_rounded(spread, stdev(each)) for each in possible), (
            row,
            values,
        )


def test_the_rivals_with_one_percent_of_the_labels() -> None:
    found, (row,) = runs("rivals-tenth"), (row for row in table("Rivals at a tenth", "seed") if row[0] == "1")
    names = ("mae", "simclr", "full", "aps", "random", "mocov3", "byol", "dino", "random-weights")
    values = [float(found[f"{name}-labels-1", "1", "finetune"]["test_top1"]) for name in names]
    assert all(map(is_rounded, map(float, row[1:]), values)), values


def test_the_detectors_of_few_canvases() -> None:
    found, log = runs("detection-few"), (ROOT / "docs/log.md").read_text()
    for words, start in (
        ("200, trained, seeds 1, 2", "few-"),
        ("200, frozen, seed 1", "frozen-few-"),
        ("4,000, frozen, seed 1", "frozen-"),
    ):
        line = next(line for line in log.splitlines() if line.startswith(f"| {words} |"))
        cells = [re.findall(NUMBER, cell) for cell in line.strip("|").split("|")[1:]]
        for encoder, shown in zip(("random", "aps", "mae", "labels"), cells, strict=True):
            values = [float(found[f"{start}{encoder}", seed, "detection"]["mask_AP"]) for seed in "12"[: len(shown)]]
            assert all(map(is_rounded, map(float, shown), values)), (words, encoder, values)

    def above_random(encoder: str) -> list[float]:
        arms = [("few-", "1"), ("few-", "2"), ("frozen-few-", "1")]
        return [
            float(found[f"{arm}{encoder}", seed, "detection"]["mask_AP"])
            - float(found[f"{arm}random", seed, "detection"]["mask_AP"])
            for arm, seed in arms
            if (f"{arm}{encoder}", seed, "detection") in found
        ]

    text = " ".join(log.split("canvases, encoder |", 1)[1].split("\n## ", 1)[0].split())
    for encoder, pattern in (
        ("labels", r"both seeds \(([+-].*?)\)"),
        ("mae", r"MAE's is ahead too \(([+-].*?)\)"),
        ("aps", r"APS's does not\*\* \(([+-].*?)\)"),
    ):
        said = re.search(pattern, text)
        assert said and all(map(is_rounded, map(float, re.findall(NUMBER, said[1])), above_random(encoder))), encoder


def test_the_mechanism_with_local_noise() -> None:
    found, rows = runs("mechanism-local"), table("Mechanism where shared cells", "noise")
    assert len(rows) == 6
    for noise, encoder, loss, *cells in rows:
        seeds = "0" if encoder == "random weights" else "012"
        name = f"{ {'APS': 'asymmetric', 'random': 'random', 'random weights': 'floor'}[encoder] }-local{noise}"
        if loss:
            shown = [float(number) for number in re.findall(NUMBER, loss)]
            assert all(map(is_rounded, shown, (float(found[name, s, "pretrain"]["loss"]) for s in seeds), (2, 2, 2)))
        for cell, stage, key in zip(cells, ("knn", "linear_probe"), ("knn_top1_k20", "test_top1"), strict=True):
            values = [float(found[name, seed, stage][key]) for seed in seeds]
            shown = [float(number) for number in re.findall(NUMBER, cell)]
            wanted = [mean(values), stdev(values), *values] if len(seeds) > 1 else values
            assert len(shown) == len(wanted) and all(map(is_rounded, shown, wanted)), (name, cell, wanted)


@pytest.mark.parametrize(
    "column, stage, key, end",
    [
        (3, "knn", "knn_top1_k20", ""),
        (4, "linear_probe", "test_top1", ""),
        (5, "finetune", "test_top1", "-labels-1"),
        (6, "finetune", "test_top1", "-labels-10"),
    ],
)
def test_the_rivals_at_the_whole_budget(column: int, stage: str, key: str, end: str) -> None:
    found, rows = runs("rivals-512"), table("Rivals at the whole", "method")
    assert {row[0] for row in rows} == set(RIVALS)
    for row in rows:
        of = {seed: each for (name, seed, ran), each in found.items() if (name, ran) == (RIVALS[row[0]] + end, stage)}
        centre, spread, *shown = (float(number) for number in re.findall(NUMBER, row[column]))
        values = [float(of[seed][key]) for seed in sorted(of)]
        assert len(values) == (2 if end == "-labels-10" else 3)
        assert len(shown) == len(values) and all(map(is_rounded, shown, values)), (row, values)
        assert is_rounded(centre, mean(values)) and is_rounded(spread, stdev(values)), (row, values)
        if row[0] != "random weights":
            pretrained = found[RIVALS[row[0]], "0", "pretrain"]
            assert [row[1].replace(",", ""), row[2]] == [pretrained["steps"], f"{float(pretrained['epochs']):.1f}"]
            assert is_rounded(float(row[7]), float(pretrained["peak_gpu_gb"]), 2)


def test_the_learning_rates_of_the_rivals_are_the_best_tries() -> None:
    tries: dict[str, dict[str, float]] = {}
    for (name, _, _), row in runs("rivals-lr").items():
        method, lr = name.split("-lr-")
        tries.setdefault(method, {})[lr] = float(row["knn_train_top1"])
    section = (ROOT / "docs/results.md").read_text().split("\n## Rivals at the whole", 1)[1].split("```", 2)[1]
    doubled = {name: float(lr) for name, lr in re.findall(r"(\w+): {pretrain: {lr: ([\d.e-]+)}}", section)}
    doubled["random"] = doubled["aps"]  # which it inherits
    assert {method: 2 * float(max(found, key=found.__getitem__)) for method, found in tries.items()} == doubled


def test_the_gaps_of_the_rivals_curves() -> None:
    with (ROOT / "benchmarks/results/studies/rivals-512-curves.csv").open() as file:
        read = {(r["experiment"], r["seed"], int(r["step"])): float(r["knn_train_top1"]) for r in csv.DictReader(file)}
    ahead = {key[1:]: top1 - read["aps", *key[1:]] for key, top1 in read.items() if key[0] == "random"}
    steps = sorted({step for _, step in ahead})
    section = " ".join((ROOT / "docs/results.md").read_text().split("\n## Rivals at the whole", 1)[1].split())
    said = re.search(r"ten readings in the mean, by ([\d., and]+), and in (\d+) of the (\d+) single ones", section)
    assert said
    for shown, step in zip(re.findall(r"\d+\.\d", said[1]), steps, strict=True):
        assert is_rounded(float(shown), mean(gap for (_, at), gap in ahead.items() if at == step)), step
    assert [int(said[2]), int(said[3])] == [sum(gap > 0 for gap in ahead.values()), len(ahead)]


@pytest.mark.parametrize("column, key", [(1, "box_AP"), (2, "mask_AP")])
def test_the_detectors_of_few_canvases_with_three_seeds(column: int, key: str) -> None:
    text = (ROOT / "docs/log.md").read_text()
    files = {"2.5e13 operations": "detection-few-seeds", "2.5e14 operations": "rivals-512-cpu"}
    section = text.split(": few canvases again", 1)[1].split("\n## ", 1)[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")][2:]
    names = {"MAE": "mae", "APS": "aps", "random weights": "random-weights", "SimCLR": "simclr"}
    assert len(rows) == 5
    for row in rows:
        encoder, _, operations = row[0].strip().partition(", ")
        found = runs(files[operations] if operations else "detection-few-seeds")
        values = [float(found[names[encoder], seed, "detection"][key]) for seed in "012"]
        shown = [float(number) for number in re.findall(NUMBER, row[column])]
        assert len(shown) == 5 and all(map(is_rounded, shown, [mean(values), stdev(values), *values])), (row, values)


def test_the_rivals_of_readme() -> None:
    text, found = " ".join((ROOT / "README.md").read_text().split()), runs("rivals-512")
    said = (
        re.search(r"twelve epochs, kNN is (.*?) \(three seeds", text),
        re.search(r"\(three seeds\) APS (.*?)\.(?: |$)(?!\d)", text),
    )
    assert all(said)
    knn, labels = (re.findall(rf"({NUMBER}) ± ({NUMBER})", match[1]) for match in said if match)
    mae = re.search(rf"MAE has ({NUMBER}) ± ({NUMBER})", text)
    assert mae
    shown = {("knn", "knn_top1_k20", ""): [*knn, mae.groups()], ("finetune", "test_top1", "-labels-1"): labels}
    for (stage, key, end), pairs in shown.items():
        last = ["random-weights", "mae"] if stage == "knn" else ["mae", "random-weights"]
        names = ["aps", "random", "simclr", *last]
        for name, (centre, spread) in zip(names, pairs, strict=True):
            values = [float(found[name + end, seed, stage][key]) for seed in "012"]
            assert is_rounded(float(centre), mean(values)) and is_rounded(float(spread), stdev(values)), (name, stage)
