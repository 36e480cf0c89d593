"""Estimates what a study will cost: operations, GPU hours, memory and disk of every stage.

Design: each stage has a function that counts a step of the modules it trains, on tensors without data (`aps.cost`). So
no dataset and no GPU is needed, and a change of a network changes the estimate. Hours are operations divided by the
speed of the machine; the share of its peak speed that is assumed is printed with them.

It does not count the input pipeline: with too few cores, decoding ImageNet takes longer than the GPU's work.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from aps.cost import Cost, CostFunction, Counts
from aps.errors import UserError
from aps.layout import manifest_of
from aps.models.archs import dimensions
from aps.progress import Progress
from aps.registry import resolve
from aps.settings.study import Study
from aps.stages import STAGES

# Share of the memory to leave free: on a CPU, a step took 1.15 to 1.2 times the memory that is counted.
FREE = 0.2


class Gpu(NamedTuple):
    name: str
    # Dense peak in TFLOP/s, from the vendor's data sheets: bf16 with float32 sums, or fp16 where there is no bf16.
    tflops: float
    gigabytes: float
    # Share of the peak that Transformers of width to 192, to 384 and wider reach. Memory traffic limits narrow ones.
    reached: tuple[float, float, float] = (0.15, 0.25, 0.40)  # assumed


# Measured on an H100 (docs/performance.md). Its memory has half as many bytes for an operation as that of an A100.
H100_REACHED = (0.07, 0.16, 0.28)
COMPILED = (1.6, 1.4, 1.3)  # times faster with `compile: true`, measured there


GPUS = {
    "v100": Gpu("V100 SXM2 32 GB (fp16)", 125, 32),
    "a40": Gpu("A40", 149.7, 48),
    "a100": Gpu("A100 SXM 80 GB", 312, 80),
    "l40s": Gpu("L40S", 362, 48),
    "rtx4090": Gpu("GeForce RTX 4090", 165.2, 24),
    "h100": Gpu("H100 SXM", 989, 80, H100_REACHED),
    "h200": Gpu("H200 SXM", 989, 141, H100_REACHED),
}


def utilization(gpu: Gpu, dim: int, compiled: bool = False) -> float:
    """The share of the peak speed that a Transformer of width D reaches on a GPU."""
    width = 0 if dim <= 192 else 1 if dim <= 384 else 2
    return gpu.reached[width] * (COMPILED[width] if compiled else 1)


CPU_UTILIZATION = (
    0.55  # share of a matrix product's speed on the same threads, measured on a step of ViT-Tiny (docs/performance.md)
)


def this_cpu() -> Gpu:
    """One core of this machine, measured now by a float32 matrix product, with the machine's memory."""
    import torch

    from aps.results import hardware

    threads, side, repeats = torch.get_num_threads(), 1024, 5
    torch.set_num_threads(1)
    try:
        a, b = (torch.ones(side, side) for _ in range(2))
        taken = []
        for _ in range(1 + repeats):  # the first is slower
            start = time.thread_time()  # counts this thread alone: other processes may use the core
            a @ b
            taken.append(time.thread_time() - start)
    finally:
        torch.set_num_threads(threads)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return Gpu(f"{hardware()['cpu']}, one core", 2 * side**3 / min(taken) / 1e12, memory)


# Sizes as the publishers state them; of digits and the composites, as this project makes them. A user's dataset has its
# size in its manifest.
DATASETS = {
    "digits": Counts(1438, 359, 10, 0.0002),
    "fashion_mnist": Counts(60_000, 10_000, 10, 0.09),
    "cifar10": Counts(50_000, 10_000, 10, 0.36),
    "cifar100": Counts(50_000, 10_000, 100, 0.36),
    "imagenet1k": Counts(1_281_167, 50_000, 1000, 155),
    "digits_coco": Counts(1200, 200, 10, 0.01),
    "fashion_coco": Counts(4000, 500, 10, 0.1),
    "cifar_coco": Counts(4000, 500, 10, 0.27),
    "coco2017": Counts(118_287, 5_000, 80, 41),
}


def stage_cost(settings: Any, stage: str, counts: Counts, processes: int = 1, gpu: bool = True) -> Cost | None:
    """The cost of one run of a stage; None if it has no cost function.

    Args:
        settings: of the experiment, or of the run.
        stage: its name in `aps.stages`, which has its cost function (`aps.cost`).
        counts: size of the stage's dataset.
        processes: how many share the run; each has a GPU if `gpu`.
        gpu: whether the run is on GPUs.
    """
    path = STAGES[stage].cost
    if path is None:
        return None
    function: CostFunction = resolve(path)
    return function(settings, counts, processes, gpu)


def stage_flops(settings: Any, stage: str, counts: Counts) -> float | None:
    """Operations of one run of a stage, over all processes; None if it has no cost function."""
    cost = stage_cost(settings, stage, counts)
    return None if cost is None else cost.flops


# ----------------------------------------------------------------------------------------------------------------------
# Report


def dataset_counts(study: Study, name: str) -> Counts:
    """The size of a dataset: from its manifest if it is prepared, else as its publisher states it.

    Raises:
        UserError: the size is not known yet.
    """
    path = manifest_of(study, name)
    if path.exists():
        from aps.data.manifest import Manifest

        prepared = Manifest.read(path)
        test = prepared.splits.get("val" if prepared.kind == "detection" else "test")
        size = DATASETS[name].gigabytes if name in DATASETS else sum(prepared.sizes.values()) / 1e9
        train = prepared.splits["train"].count
        return Counts(train, test.count if test else 0, len(prepared.classes), size, prepared.masks)
    if name not in DATASETS:
        from aps.data.manifest import preparing

        raise UserError(f"the size of dataset '{name}' is known once it is prepared; run {preparing(name)}")
    return DATASETS[name]


def estimate(study: Study, gpu: str = "a100", share: float | None = None) -> str:
    """The estimate of a study, as a table for the terminal.

    Args:
        gpu: a name of GPUS; or `cpu`, the cores of this machine.
        share: share of the peak speed that is reached; by default `utilization`, or CPU_UTILIZATION on a CPU.

    Raises:
        UserError: the GPU is unknown, the share is outside (0, 1], or a dataset's size is not known yet.
    """
    if gpu not in (*GPUS, "cpu"):
        raise UserError(f"--gpu {gpu} is unknown; known: {', '.join([*GPUS, 'cpu'])}")
    if share is not None and not 0 < share <= 1:
        raise UserError(f"--utilization {share} is not in (0, 1]; give a share of the peak")
    sizes = {name: dataset_counts(study, name) for name in study.dataset_names()}
    on_gpu = gpu != "cpu"
    card = GPUS[gpu] if on_gpu else this_cpu()
    unit = "GPU" if on_gpu else "core"
    header = ("experiment", "stage", "runs", "PFLOP a run", f"{unit} h a run")
    rows: list[tuple[str, ...]] = [
        (*header, *(("GPUs", "GB a GPU") if on_gpu else ("processes", "GB each")), "disk GB a run")
    ]
    hours = disk = 0.0
    too_large, full_precision, not_estimated = [], [], []
    stages = [(name, e, stage) for name, e in study.experiments.items() for stage in e.stages]
    with Progress("counting operations", len(stages), "stages") as progress:
        for name, e, stage in stages:
            resources = study.stage_resources(stage, name)
            processes = (resources.gpus if on_gpu else None) or resources.processes or 1
            progress.update()
            try:
                cost = stage_cost(e, stage, sizes[e.dataset_of(stage)], processes, on_gpu)
            except UserError as error:
                not_estimated.append(f"not in this table: {name} {stage}: {error}")
                continue
            if cost is None:
                not_estimated.append(f"not in this table: {name} {stage}: nothing counts what it does")
                continue
            compiled = bool(getattr(getattr(e, stage, None), "compile", False))
            reached = share or (utilization(card, dimensions(e.encoder).dim, compiled) if on_gpu else CPU_UTILIZATION)
            run_hours = (cost.flops + cost.readings) / (card.tflops * 1e12 * reached) / 3600
            hours += run_hours * len(e.seeds)
            disk += cost.disk * len(e.seeds)
            if cost.memory * (1 if on_gpu else processes) > (1 - FREE) * 1e9 * card.gigabytes:
                too_large.append(f"{name} {stage}")
            if on_gpu and getattr(getattr(e, stage, None), "precision", None) == "fp32":
                full_precision.append(f"{name} {stage}")
            figures = (cost.flops / 1e15, run_hours, processes, cost.memory / 1e9, cost.disk / 1e9)
            rows.append((name, stage, str(len(e.seeds)), *(_digits(x) for x in figures)))
    lines = [
        f"study '{study.study}' on {_assumed(card, share, on_gpu)}",
        "",
        *_aligned(rows),
        "",
        f"all runs: {_digits(hours)} {unit} hours, {_digits(disk / 1e9)} GB of results and checkpoints; "
        f"datasets: {', '.join(f'{name} {_digits(counts.gigabytes)} GB' for name, counts in sizes.items())}",
        "PFLOP: 10^15 operations, a multiply-add is two. Memory: weights, optimizer, activations, in "
        f"{'bf16' if on_gpu else 'float32'} unless precision says otherwise; leave a fifth free.",
    ]
    if too_large:
        machine, more = (f"a {card.name}", "ask for more GPUs, or ") if on_gpu else ("this machine", "")
        lines.append(
            f"more than {machine} has: {', '.join(too_large)}; {more}set pretrain.accumulate or "
            "pretrain.activation_checkpointing"
        )
    if full_precision:
        lines.append(
            f"longer than given, because precision is fp32 and the peak is that of 16 bits: {', '.join(full_precision)}"
        )
    return "\n".join([*lines, *not_estimated])


def _assumed(card: Gpu, share: float | None, on_gpu: bool) -> str:
    """The speed from which hours are computed, in words."""
    if not on_gpu:
        return (
            f"{card.name}: {1000 * card.tflops:.3g} GFLOP/s in a float32 matrix product, measured now, of which "
            f"{share or CPU_UTILIZATION:.0%} is assumed to be reached"
        )
    reached = (
        f"{share:.0%}" if share else "{:.0%} (width to 192), {:.0%} (to 384), {:.0%} (wider)".format(*card.reached)
    )
    measured = not share and card.reached is H100_REACHED
    source = "was reached on an H100" if measured else "is assumed to be reached"
    more = "" if share else ", more with compile: true"
    return f"{card.name}: {card.tflops:g} TFLOP/s dense peak, of which {reached} {source}{more}"


def _digits(x: float) -> str:
    """A number with three significant digits."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}" if x >= 0.001 else f"{x:.1g}"


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
