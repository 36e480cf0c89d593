"""3. The training step on a share r of the tokens against all of them, at equal batch: time and peak memory.

    python -m benchmarks.step --arch tiny

All ratios are timed in turn in one process. Then peak memory is measured in a separate process for each ratio, above
the memory before the model was built; where one ends without a figure (too little memory), the times are written all
the same, and the exit status is 1. Beside the ratio of times stands that of operations (aps.training.cost): they would
be equal if every operation took the same time.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from aps.files import atomic_path
from aps.ranges import whole_number
from aps.runtime.processes import processes
from aps.settings.blocks import EncoderSettings
from aps.training.cost import step_flops
from benchmarks.common import MOST, OTHER, OURS, arguments, row, run, seconds, spread, synchronize, write
from benchmarks.common import label as machine_label
from benchmarks.study import experiment, inputs, make_trainer

RATIOS = (0.125, 0.25, 0.5, 1.0)
BATCHES = {"cpu": {"tiny": 32, "small": 16, "base": 8}, "gpu": {"tiny": 512, "small": 512, "base": 256}}
REPEATS = {"tiny": 7, "small": 5, "base": 3}


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--arch", nargs="+", default=list(REPEATS), choices=list(REPEATS))
    parser.add_argument("--batch-size", type=whole_number(1, MOST), help="default: " + json.dumps(BATCHES))
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--memory-of", type=float, help=argparse.SUPPRESS)  # child: the ratio whose memory to print
    args = parser.parse_args()
    if args.quick:
        args.arch = args.arch[:1]
    measured = True
    for arch in args.arch:
        batch = args.batch_size or (
            2 if args.quick else BATCHES["gpu" if torch.cuda.is_available() else "cpu"][arch]
        )  # fmt: skip
        encoder = EncoderSettings(arch=arch, depth=1 if args.quick else None)
        if args.memory_of is not None:
            print(peak_memory(encoder, args.memory_of, batch, args.precision))
            return 0
        measured &= measure(args, arch, encoder, batch)
    return int(not measured)


def times_of(studies: dict[float, Any], repeats: int) -> tuple[dict[float, list[float]], str]:
    """Seconds of a step by ratio, and its precision."""
    times: dict[float, list[float]] = {r: [] for r in RATIOS}
    with processes() as distributed:
        trainer = make_trainer(studies[1.0], distributed)  # the ratio changes no parameter
        tensors = {r: inputs(study, distributed.device) for r, study in studies.items()}
        for repeat in range(-1, repeats):
            for r in RATIOS[:: 1 if repeat % 2 else -1]:
                taken = seconds(lambda r=r: trainer.step(*tensors[r], 1e-4))  # type: ignore[misc]
                if repeat >= 0:
                    times[r].append(taken)
        return times, trainer.precision.name


def measure(args: argparse.Namespace, arch: str, encoder: EncoderSettings, batch: int) -> bool:
    """Whether the memory of every ratio was measured."""
    studies = {r: experiment(encoder, r, batch, precision=args.precision) for r in RATIOS}
    repeats = 2 if args.quick else REPEATS[arch]
    times, precision = times_of(studies, repeats)
    if torch.cuda.is_available():  # the GPU's memory is for the children now
        gc.collect()
        torch.cuda.empty_cache()
    memory = {r: child(arch, r, batch, args) for r in RATIOS}
    flops = {r: step_flops(study) for r, study in studies.items()}
    rows, ratios = [], {}
    for r in RATIOS[:-1]:
        time = spread([full / fewer for fewer, full in zip(times[r], times[1.0], strict=True)])
        operations, few, full = flops[1.0] / flops[r], memory[r], memory[1.0]
        less = full / few if few and full else None
        ratios[r] = {
            "time": time, "operations": operations, "memory": less,
            "time_over_operations": time["median"] / operations,
        }  # fmt: skip
        noted = f", {less:.3g}x memory" if less else ""
        rows.append(
            row(f"step of ViT-{arch}, B={batch}, r={r:g} against full ({operations:.3g}x operations{noted})", time)
        )
    result = {
        "rows": rows, "ratios": ratios, "flops": flops, "memory_gib": {r: m / 2**30 for r, m in memory.items() if m},
        "time": {r: spread(values) for r, values in times.items()}, "seconds": times,
    }  # fmt: skip
    settings = {"arch": arch, "patch_size": 2, "image_size": 32, "batch": batch, "ratios": RATIOS, "repeats": repeats,
                "precision": precision}  # fmt: skip
    write(f"step-{arch}", result, settings, args.out)
    draw(f"step-{arch}", result, f"Training step of ViT-{arch}/2, 32 px, B={batch}, {precision}", args.out)
    return all(memory.values())


def peak_memory(encoder: EncoderSettings, ratio: float, batch: int, precision: str) -> int:
    """Peak bytes of two steps above the memory after the imports. The second step has the optimizer's state."""
    study = experiment(encoder, ratio, batch, precision=precision)
    with processes() as distributed:
        before = resident("VmRSS")
        trainer, tensors = make_trainer(study, distributed), inputs(study, distributed.device)
        for _ in range(2):
            trainer.step(*tensors, 1e-4)
        synchronize()
        if distributed.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return resident("VmHWM") - before


def resident(key: str) -> int:
    """Bytes of resident memory: VmRSS now, VmHWM at the peak (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key + ":"))


def child(arch: str, ratio: float, batch: int, args: argparse.Namespace) -> int | None:
    """`peak_memory` in a process of its own. None: it has ended without a figure, and why is printed."""
    command = [sys.executable, "-m", "benchmarks.step", "--arch", arch, "--memory-of", str(ratio), "--batch-size",
               str(batch), "--precision", args.precision, *(["--quick"] if args.quick else [])]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return int(done.stdout.split()[-1])
    said = done.stderr.strip().split("\n")[-1]
    print(f"  ViT-{arch}, r={ratio:g}: no memory measured (exit status {done.returncode}) {said}", file=sys.stderr)
    return None


def draw(name: str, result: dict[str, Any], title: str, folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
    full = result["time"][1.0]["median"]
    names = [f"{r:g}" for r in RATIOS]
    medians = [result["time"][r]["median"] / full for r in RATIOS]
    errors = [
        [(result["time"][r]["median"] - result["time"][r]["low"]) / full for r in RATIOS],
        [(result["time"][r]["high"] - result["time"][r]["median"]) / full for r in RATIOS],
    ]
    left.bar(names, medians, yerr=errors, color=OURS, width=0.6)
    left.plot(
        names,
        [result["flops"][r] / result["flops"][1.0] for r in RATIOS],
        "_",
        color="black",
        ms=28,
        label="operations",
    )
    left.set_ylabel(f"time of a step (full: {full:.3g} s)")
    left.legend(frameon=False, loc="upper left")
    right.bar(names, [result["memory_gib"].get(r, 0) for r in RATIOS], color=[OURS] * 3 + [OTHER], width=0.6)
    right.set_ylabel("peak memory, GiB")
    for axes in (left, right):
        axes.set_xlabel("share of tokens r")
        axes.spines[["top", "right"]].set_visible(False)
    left.patches[-1].set_color(OTHER)
    figure.suptitle(f"{title}\n{machine_label()}", fontsize=10, x=0.01, ha="left")
    with atomic_path(folder / f"{name}-{'gpu' if torch.cuda.is_available() else 'cpu'}.png") as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    plt.close(figure)


if __name__ == "__main__":
    run(main)
