"""What a study costs before it runs: operations, GPU hours, memory and disk of every stage.

Design: nothing here knows a network. Each stage has a function that counts a step of the modules that the stage trains, on
tensors without data (`aps.cost`), so no dataset and no GPU is needed, and what is changed in a network is counted. Hours
follow from operations by one assumption, the share of the machine's peak that a stage reaches, which is printed with them.

It does not know input pipelines: decoding ImageNet on too few cores takes longer than the GPU does.
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

# Share of a GPU's memory to leave: on a CPU, a step's resident memory was 1.15 to 1.2 times what is counted.
FREE = 0.2


class Gpu(NamedTuple):
    name: str
    # Dense peak in TFLOP/s: bf16 with float32 sums, fp16 where there is no bf16 (the vendor's data sheets).
    tflops: float
    gigabytes: float


GPUS = {
    "v100": Gpu("V100 SXM2 32 GB (fp16)", 125, 32),
    "a40": Gpu("A40", 149.7, 48),
    "a100": Gpu("A100 SXM 80 GB", 312, 80),
    "l40s": Gpu("L40S", 362, 48),
    "rtx4090": Gpu("GeForce RTX 4090", 165.2, 24),
    "h100": Gpu("H100 SXM", 989, 80),
    "h200": Gpu("H200 SXM", 989, 141),
}


def utilization(dim: int) -> float:
    """Share of the peak that a Transformer of width D is assumed to reach: narrow ones are bound by memory traffic."""
    return 0.15 if dim <= 192 else 0.25 if dim <= 384 else 0.40


CPU_UTILIZATION = (
    0.55  # of a matrix product on the same threads, as measured on a step of ViT-Tiny (docs/performance.md)
)


def this_cpu() -> Gpu:
    """A core of this machine, by a float32 matrix product now, and the machine's memory."""
    import torch

    from aps.results import hardware

    threads, side, repeats = torch.get_num_threads(), 1024, 5
    torch.set_num_threads(1)
    try:
        a, b = (torch.ones(side, side) for _ in range(2))
        taken = []
        for _ in range(1 + repeats):  # the first is slower
            start = time.thread_time()  # of this thread alone: others may use the core meanwhile
            a @ b
            taken.append(time.thread_time() - start)
    finally:
        torch.set_num_threads(threads)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return Gpu(f"{hardware()['cpu']}, one core", 2 * side**3 / min(taken) / 1e12, memory)


# Sizes the publishers state (digits and composites: this project's recipes). `folder` is the user's: its manifest says.
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
    """One run of a stage; None where nothing counts it.

    Args:
        settings: of an experiment, or of the run.
        stage: a row of `aps.stages`, which names the function that counts (`aps.cost`).
        counts: of the dataset that the stage reads.
        processes: that share the run; on GPUs, one each.
        gpu: whether on GPUs.
    """
    path = STAGES[stage].cost
    if path is None:
        return None
    function: CostFunction = resolve(path)
    return function(settings, counts, processes, gpu)


def stage_flops(settings: Any, stage: str, counts: Counts) -> float | None:
    """Operations of one run of a stage, over all processes; None where nothing counts it."""
    cost = stage_cost(settings, stage, counts)
    return None if cost is None else cost.flops


# ----------------------------------------------------------------------------------------------------------------------
# Report


def dataset_counts(study: Study, name: str) -> Counts:
    """Of a dataset: what its manifest says if it is prepared, else what its publisher states.

    Raises:
        UserError: neither is there.
    """
    manifest = manifest_of(study, name)
    if manifest.exists():
        from aps.data.manifest import Manifest

        found = Manifest.read(manifest)
        test = found.splits.get("val" if found.kind == "detection" else "test")
        size = DATASETS[name].gigabytes if name in DATASETS else sum(found.sizes.values()) / 1e9
        return Counts(found.splits["train"].count, test.count if test else 0, len(found.classes), size, found.masks)
    if name not in DATASETS:
        from aps.data.manifest import preparing

        raise UserError(f"the size of dataset '{name}' is known once it is prepared; run {preparing(name)}")
    return DATASETS[name]


def estimate(study: Study, gpu: str = "a100", share: float | None = None) -> str:
    """The table of a study.

    Args:
        study: validated.
        gpu: a name of GPUS, or cpu: cores of this machine.
        share: of the peak that is reached; None: `utilization` of the encoder's width, CPU_UTILIZATION on a CPU.

    Raises:
        UserError: an unknown GPU, a share outside (0, 1], a dataset of unknown size.
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
    tight, full_precision, lacking = [], [], []
    stages = [(name, e, stage) for name, e in study.experiments.items() for stage in e.stages]
    with Progress("counting operations", len(stages), "stages") as progress:
        for name, e, stage in stages:
            asked = study.stage_resources(stage, name)
            processes = (asked.gpus if on_gpu else None) or asked.processes or 1
            progress.update()
            try:
                cost = stage_cost(e, stage, sizes[e.dataset_of(stage)], processes, on_gpu)
            except UserError as error:
                lacking.append(f"not in this table: {name} {stage}: {error}")
                continue
            if cost is None:
                lacking.append(f"not in this table: {name} {stage}: nothing counts what it does")
                continue
            reached = share or (utilization(dimensions(e.encoder).dim) if on_gpu else CPU_UTILIZATION)
            run = cost.flops / (card.tflops * 1e12 * reached) / 3600
            hours += run * len(e.seeds)
            disk += cost.disk * len(e.seeds)
            if cost.memory * (1 if on_gpu else processes) > (1 - FREE) * 1e9 * card.gigabytes:
                tight.append(f"{name} {stage}")
            if on_gpu and getattr(getattr(e, stage, None), "precision", None) == "fp32":
                full_precision.append(f"{name} {stage}")
            figures = (cost.flops / 1e15, run, processes, cost.memory / 1e9, cost.disk / 1e9)
            rows.append((name, stage, str(len(e.seeds)), *(_short(x) for x in figures)))
    lines = [
        f"study '{study.study}' on {_assumed(card, share, on_gpu)}",
        "",
        *_aligned(rows),
        "",
        f"all runs: {_short(hours)} {unit} hours, {_short(disk / 1e9)} GB of results and checkpoints; "
        f"datasets: {', '.join(f'{name} {_short(counts.gigabytes)} GB' for name, counts in sizes.items())}",
        "PFLOP: 10^15 operations, a multiply-add is two. Memory: weights, optimizer, activations, in "
        f"{'bf16' if on_gpu else 'float32'} unless precision says otherwise; leave a fifth free.",
    ]
    if tight:
        machine, more = (f"a {card.name}", "ask for more GPUs, or ") if on_gpu else ("this machine", "")
        lines.append(
            f"more than {machine} has: {', '.join(tight)}; {more}set pretrain.accumulate or "
            "pretrain.activation_checkpointing"
        )
    if full_precision:
        lines.append(
            f"longer than given, because precision is fp32 and the peak is that of 16 bits: {', '.join(full_precision)}"
        )
    return "\n".join([*lines, *lacking])


def _assumed(card: Gpu, share: float | None, on_gpu: bool) -> str:
    """The assumption that hours rest on."""
    if not on_gpu:
        return (
            f"{card.name}: {1000 * card.tflops:.3g} GFLOP/s in a float32 matrix product, measured now, of which "
            f"{share or CPU_UTILIZATION:.0%} is assumed to be reached"
        )
    reached = f"{share:.0%}" if share else "15% (width to 192), 25% (to 384), 40% (wider)"
    return f"{card.name}: {card.tflops:g} TFLOP/s dense peak, of which {reached} is assumed to be reached"


def _short(x: float) -> str:
    """Three digits."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}" if x >= 0.001 else f"{x:.1g}"


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
