"""All checks and measurements that need a GPU, in nine minutes, the most important first: python benchmarks/gpu.py

It needs Python 3.11 or newer with torch, torchvision and timm, and no network: other packages come from a folder of
wheels that `make gpu-wheels` fills beforehand (`--wheels`). Without torch or the device it ends before the first step. Each step is a separate process with a time limit, and
saves its results in a JSON file, so that a stop loses nothing that was measured; a step that measures nothing leaves
the file of an earlier run. A table ends the run, also one that Ctrl-C or SIGTERM stops.

The exit status is 0 if every step ran to its end and reached its targets, 3 if one misses a target, 1 if one did not
run to its end, 2 for a mistake in the command, 128 and its number after a signal.

    python benchmarks/gpu.py --wheels wheels --out gpu-results
    python benchmarks/gpu.py --device cpu --tiny         runs every line once on a CPU; the figures mean nothing

A step's operations (aps.training.cost) are compared with a square product in bf16, measured in the same process;
CUDA's results with the CPU's from the same seeds.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parents[1]
MINUTES = 9.0
STARTED = time.monotonic()
Result = dict[str, Any]
NOT_RUN: Result = {"error": "not run"}
UNREADABLE: Result = {"error": "unreadable"}
Row = tuple[str, float, str, str]  # what, figure, target such as `<= 0.02` or an empty text, unit
# Exit statuses. MISTAKE: before any step, without torch or the device for instance.
FAILED, MISTAKE, MISSED = 1, 2, 3
# Asked in a process of its own, since a driver may hang, and since this one needs only the standard library.
PROBE = """
import sys
try:
    import torch
    torch.ones(2, device=sys.argv[1]).sum().item()
except Exception as error:
    print(" ".join(str(error).split())[:200])
    sys.exit(1)
"""
# A step leads a process group. Its guard waits at a pipe whose other end only the process that started the step has: when
# that process ends, in whatever way, so does all of the group.
GUARDED = 'exec 3<&0 </dev/null; { read -r _; kill -s KILL 0; } <&3 & exec 3<&-; exec "$@"'


class Unwritten(OSError):
    """What a step has found, where its file could not be written."""

    def __init__(self, result: Result, error: OSError) -> None:
        super().__init__(error.errno, error.strerror)
        self.result = result


# --------------------------------------------------------------------------------------------------
# The steps. Each gets the arguments and returns rows for the table, and perhaps more. Heavy imports are inside them, so
# that the process that starts them needs only the standard library.


def tests(args: argparse.Namespace) -> Result:
    """The tests that are marked `gpu`."""
    files = [str(file) for file in sorted(ROOT.glob("tests/**/test_*.py")) if "pytest.mark.gpu" in file.read_text()]
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-m", "gpu", *files]
    environment, log = _environment(args) | {"APS_TEST_DEVICE": args.device}, Path(args.out) / "tests.txt"
    with log.open("w") as file:  # which tells which test hangs
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=file)
    output = log.read_text()
    passed = re.search(r"(\d+) passed", output)
    rows: list[Row] = [
        ("tests marked gpu: exit status", done.returncode, "== 0", ""),
        ("tests marked gpu: passed", int(passed[1]) if passed else 0, ">= 1", ""),
    ]
    return {"rows": rows, "output": output[-4000:]}


STUDY = """
study: gpu
tracking_uri: none
defaults:
  dataset: {{name: digits, train_limit: 256}}
  stages: [pretrain, finetune, linear_probe, knn, embed, detection]
  encoder: {{arch: tiny, image_size: 16, patch_size: 4, dim: 24, depth: 1, heads: 3}}
  pretrain: {{epochs: 2, batch_size: 64, warmup_epochs: 1, knn_every: 2, projector: [16, 16, 8], predictor: [16, 16, 8]}}
  finetune: {{epochs: 1, batch_size: 64, warmup_epochs: 0}}
  linear_probe: {{epochs: 1, batch_size: 64, lrs: [0.1]}}
  knn: {{k: [5]}}
  detection:
    {{engine: torchvision, image_size: 32, iterations: 4, batch_size: 2, warmup_iterations: 1, window: 4, global_blocks: [0],
    pyramid_scales: [2.0, 1.0], pyramid_dim: 16, head_convs: 1, head_dim: 32, proposals: 20, rois: 16}}
experiments:
  plain: {{}}
  bf16:
    pretrain: {{precision: bf16, compile: {compile}}}
    finetune: {{precision: bf16, compile: {compile}}}
    detection: {{precision: {bf16}}}
"""


def stages(args: argparse.Namespace) -> Result:
    """Every stage of a tiny study as a user runs it: as set, then in bf16 and compiled."""
    from concurrent.futures import ThreadPoolExecutor
    from threading import Lock

    rows: list[Row] = []
    one_writer = Lock()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:
        study = Path(folder, "study.yaml")
        rows += (reason := _not_compiled(args))
        study.write_text(STUDY.format(compile="false" if reason else "true", bf16="auto"))

        def aps(what: str, *arguments: str) -> None:
            start = time.perf_counter()
            command = [sys.executable, "-m", "aps", *arguments]
            done = subprocess.run(command, cwd=folder, env=_environment(args), capture_output=True, text=True)
            with one_writer:
                rows.append((f"{what}: exit status", done.returncode, "== 0", ""))
                rows.append((f"{what}: time", round(time.perf_counter() - start, 1), "", "s"))
                if done.returncode:
                    print(what, done.stdout[-500:], done.stderr[-2000:], sep="\n", flush=True)
                _save(args, {"rows": rows})

        def experiment(name: str) -> None:
            for stage in ("pretrain", "knn", "finetune", "linear_probe", "embed", "detection"):
                aps(f"{stage}, {name}", stage, "--configfile", str(study), "--experiment", name)

        list(pool.map(lambda name: aps(f"data {name}", "data", name), ("digits", "digits_coco")))
        list(pool.map(experiment, ("bf16", "plain")))  # side by side: nothing is timed to be compared
    return {"rows": rows}


def agreement(args: argparse.Namespace) -> Result:
    """The same batch on the device and on the CPU: views, kept cells, loss, and the weights after a step."""
    import torch

    from aps.sampling import Geometry, draw
    from aps.settings.blocks import EncoderSettings, SamplingSettings, ViewSettings
    from aps.views import apply_view, draw_parameters
    from benchmarks.study import experiment, inputs

    _as_stages(args)
    device, cpu = torch.device(args.device), torch.device("cpu")
    batch, side, grid = (8, 32, 16) if args.tiny else (128, 32, 16)
    images = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8)
    augmentation = ViewSettings(blur=(0.5, 0.5), solarize=(0.2, 0.2))
    drawn = [draw_parameters(v, batch, side, side, augmentation, torch.Generator().manual_seed(v)) for v in (1, 2)]
    pixels = [[apply_view(images.to(d), p, side, (0.5,) * 3, (0.25,) * 3) for p in drawn] for d in (cpu, device)]
    # Not all: rounding may move a value over the threshold of solarize.
    apart = (torch.stack(pixels[0]) - torch.stack(pixels[1]).cpu()).abs()
    rows: list[Row] = [
        ("views: values that are the same", 100 * float((apart < 0.001).double().mean()), ">= 99.99", "%")
    ]

    rows += _augmentation_agrees(batch, side, cpu, device)

    def cells(on: torch.device) -> Any:
        generator = torch.Generator().manual_seed(3)
        geometries: list[Geometry] = [p.geometry(on) for p in drawn]
        kept = draw(
            SamplingSettings(),
            grid,
            *geometries,
            lambda *shape: torch.rand(batch, *shape, generator=generator).to(on),
        )
        return torch.cat([x.sort(-1).values.cpu() for x in kept])

    share = (cells(cpu) == cells(device)).float().mean().item()
    rows.append(("sampler: kept cells that are the same", 100 * share, ">= 99.9", "%"))
    chosen = experiment(EncoderSettings(arch="tiny", depth=2), 0.25, batch, precision="fp32")
    losses, weights = [], []
    torch.manual_seed(0)
    views, kept = inputs(chosen, cpu)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    for on in (cpu, device):
        trainer = _trainer(chosen, on)
        moved = [tuple(x.to(on) for x in pair) for pair in (views, kept)]
        losses.append(trainer.step(*moved, 1e-4)["loss"].item())
        weights.append(torch.cat([p.detach().flatten().cpu() for p in trainer.networks.parameters()]))
    torch.set_float32_matmul_precision(before)  # type: ignore[arg-type]
    rows.append(("loss: relative difference", abs(losses[1] / losses[0] - 1), "<= 0.0001", ""))
    # AdamW's first step has size lr whatever the gradient. If the gradient is only rounding, its sign may differ.
    moved_alike = ((weights[0] - weights[1]).abs() < 2e-5).float().mean().item()
    rows.append(("weights after a step that moved alike", 100 * moved_alike, ">= 99", "%"))
    return {"rows": rows}


def _augmentation_agrees(batch: int, side: int, cpu: Any, device: Any) -> list[Row]:
    """Finetuning's random resized crops, and RandAugment's operators, of the same images with the same parameters."""
    import torch

    from aps.settings.blocks import FinetuneSettings
    from aps.training import augment

    generator = torch.Generator().manual_seed(5)
    images = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8, generator=generator)
    drawn = augment.Draw(FinetuneSettings(crop="resized"), side)(batch, side, side, generator)
    pixels: dict[str, list[Any]] = {"resized_crop": [], "run_program": []}
    for on in (cpu, device):
        boxes, flips = augment.on_device(drawn.boxes, drawn.flips, on)
        here, fill = images.to(on), torch.tensor([125.0, 123.0, 114.0], device=on)
        pixels["resized_crop"].append(augment.resized_crop(here, boxes, flips, side).cpu().int())
        pixels["run_program"].append(augment.run_program(here, drawn.program, fill).cpu().int())
    # Rounding moves a few by a level, and an operator such as posterize makes more of a level.
    return [
        (f"finetuning's {name}: values that are the same", 100 * float((a == b).double().mean()), ">= 99", "%")
        for name, (a, b) in pixels.items()
    ]


def waiting(args: argparse.Namespace) -> Result:
    """The training loops in CUDA's sync debug mode, which raises an error when the host waits for the device."""
    rows: list[Row] = []
    found = {}
    for stage in ("pretrain", "finetune", "linear_probe"):
        found[stage] = _waits(args, stage)
        where = "" if stage == "pretrain" else f", {stage}"
        rows.append((f"waits for the device between two log lines{where}", len(found[stage]), "== 0", ""))
        _save(args, {"rows": rows, "found": found})
    return {"rows": rows, "found": found}


def _waits(args: argparse.Namespace, stage: str) -> list[str]:
    """Waits in the batches after the first ones, which may: kernels are chosen, memory is allocated.

    The last 24 of 32 hold all that a stage does now and then: finetuning augments 16 batches of this size at once
    (PIXELS_AT_ONCE of aps.training.examples), and the watch sends losses to the host every 16 steps and looks at those
    that it sent before.
    """
    import torch

    first, last = (1, 3) if args.tiny else (8, 32)
    # The linear probe holds a tenth of them out.
    learner = _learner(args, *(("micro", 16, 128) if args.tiny else ("tiny", 64, 4096)), stage=stage)
    waits, epoch = [], learner.batches(0, 0)

    def some(batches: range) -> None:
        for done in batches:
            learner.step(next(epoch), done)

    some(range(first))
    if args.device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        some(range(first, last))
    except RuntimeError as error:
        import traceback

        waits.append(f"{error}: {traceback.format_exc()[-1500:]}")
        print(waits[-1])
    finally:
        if args.device.startswith("cuda"):
            torch.cuda.set_sync_debug_mode("default")
    if stage == "pretrain":
        learner.meter.read()
    return waits


def share(args: argparse.Namespace) -> Result:
    """The share of a step's time in which it waits for its input: 32 pixels, ViT-Tiny/2, B=512, T=4, compiled.

    From one log line to the next, as in training. The first has the compilation.
    """
    return _input_share(args, "input_share")


def minutes(args: argparse.Namespace) -> Result:
    """The same with a budget of minutes, whose clock waits for the device after each batch."""
    from aps.settings.blocks import BudgetSettings

    return _input_share(args, "input_share with a budget of minutes", budget=BudgetSettings(minutes=60.0))


def _input_share(args: argparse.Namespace, what: str, **pretrain: Any) -> Result:
    plain = _not_compiled(args)
    learner = _learner(
        args, *(("micro", 16, 128) if args.tiny else ("tiny", 512, 50_000)), compile=not plain, **pretrain
    )
    done, epoch, lines = 0, learner.batches(0, 0), []
    for count in (1, 1) if args.tiny else (5, 50, 40):
        for _ in range(count):
            batch = next(epoch, None)  # `epoch` measures how long it takes
            if batch is None:
                break
            learner.step(batch, done)
            done += 1
        lines.append(last := learner.meter.read())
        print(last, flush=True)  # compiling may take the time that the step has
        rows = [(what, last["input_share"], "<= 0.02", ""), ("a step", last["step_ms"], "", "ms"), *plain]
        if len(lines) > 1:
            _save(args, {"rows": rows, "lines": lines})
    return {"rows": rows, "lines": lines}


def steps(args: argparse.Namespace) -> Result:
    """Images a second, MFU and peak memory of a step of ViT-T/2 and S/2 at B=512, on a quarter of the tokens and on all."""
    rows: list[Row] = []
    taken: dict[tuple[str, float, bool], tuple[float, float, float]] = {}
    for compiled in (False, True):  # compiling takes half a minute each, so it comes last
        if compiled and (reason := _not_compiled(args)):
            return {"rows": rows + reason}
        for arch in ("tiny", "small"):
            for ratio in (0.25, 1.0):
                batch = 4 if args.tiny else 512
                name = f"ViT-{arch}/2, r={ratio:g}{', compiled' * compiled}"
                measured = _step(args, arch, ratio, batch, compiled)
                if measured is None:
                    rows.append((f"{name}: out of memory", 1, "== 0", ""))
                    continue
                taken[arch, ratio, compiled] = measured
                seconds, speed, memory = measured
                rows += [
                    (f"{name}: images a second", batch / seconds, "", ""),
                    (f"{name}: MFU, recomputed scores included", 100 * speed, "", "% of the measured product"),
                    (f"{name}: peak memory", memory, "", "GiB"),
                ]
                _save(args, {"rows": rows})
            few, full = taken.get((arch, 0.25, compiled)), taken.get((arch, 1.0, compiled))
            if few and full and full[2]:
                rows.append(
                    (
                        f"ViT-{arch}/2{', compiled' * compiled}: memory at r=0.25 of full",
                        few[2] / full[2],
                        "<= 0.333",
                        "",
                    )
                )
                # each time divided by its operations: 1 if the time falls like the operations
                rows.append(
                    (f"ViT-{arch}/2{', compiled' * compiled}: time over operations", full[1] / few[1], "<= 1.1", "")
                )
                _save(args, {"rows": rows})
    return {"rows": rows}


def base(args: argparse.Namespace) -> Result:
    """MFU of ViT-B/2's step, compiled or not, against the measured product in bf16."""
    rows: list[Row] = [("product in bf16", _product(args) / 1e12, "", "TFLOP/s")]
    for compiled in (False, True):
        if compiled and (reason := _not_compiled(args)):
            return {"rows": rows + reason}
        measured = _step(args, "base", 0.25, 4 if args.tiny else 512, compiled)
        name = f"ViT-B/2, r=0.25{', compiled' * compiled}"
        rows.append(
            (f"{name}: out of memory", 1, "== 0", "")
            if measured is None
            else (f"{name}: MFU, recomputed scores included", 100 * measured[1], ">= 45" if compiled else "", "%")
        )
        _save(args, {"rows": rows})
    return {"rows": rows}


def imagenet(args: argparse.Namespace) -> Result:
    """The step of ViT-S/16 at 224 pixels."""
    batch = 4 if args.tiny else 512
    measured = _step(args, "small", 0.25, batch, False, image_size=224, patch_size=16)
    if measured is None:
        return {"rows": [("ViT-S/16 at 224: out of memory", 1, "== 0", "")]}
    seconds, speed, memory = measured
    return {
        "rows": [
            ("ViT-S/16 at 224, r=0.25: images a second", batch / seconds, "", ""),
            ("ViT-S/16 at 224, r=0.25: MFU, recomputed scores included", 100 * speed, "", "%"),
            ("ViT-S/16 at 224, r=0.25: peak memory", memory, "", "GiB"),
        ]
    }


def finetuning(args: argparse.Namespace) -> Result:
    """Images a second of finetuning, its input included: random resized crops, RandAugment, erasing, mixup."""
    from benchmarks.common import seconds

    batch = 16 if args.tiny else 512
    learner = _learner(
        args, "micro" if args.tiny else "tiny", batch, 4 * batch if args.tiny else 50_000, stage="finetune"
    )
    epoch = learner.batches(0, 0)

    def some(first: int, last: int) -> None:
        for done in range(first, last):
            learner.step(next(epoch), done)

    warm, end = (1, 3) if args.tiny else (8, 48)
    some(0, warm)
    rate = batch * (end - warm) / seconds(lambda: some(warm, end))
    return {"rows": [("finetuning ViT-T/2, with its augmentation: images a second", rate, "", "")]}


def detection(args: argparse.Namespace) -> Result:
    """A step of Mask R-CNN on ViT-S/16 at 1024 pixels."""
    size = ["--quick"] if args.tiny else ["--batch-size", "2", "--iterations", "6"]
    command = [
        sys.executable,
        "-m",
        "benchmarks.detection_step",
        "--engine",
        "torchvision",
        "--out",
        str(args.out),
        *size,
    ]
    done = subprocess.run(command, cwd=ROOT, env=_environment(args), capture_output=True, text=True)
    printed = [line for line in done.stdout.splitlines() if line.lstrip().startswith("{")]
    if not printed:  # else it has measured, and at most a full disk kept it from its file
        raise RuntimeError(done.stderr[-2000:])
    measured = json.loads(printed[0])
    rows: list[Row] = [("detection at 1024: a step", measured["seconds_a_step"][-1], "", "s")]
    if "peak_gpu_gib" in measured:
        rows.append(("detection at 1024: peak memory", measured["peak_gpu_gib"], "", "GiB"))
    return {"rows": rows, "all": measured}


def knn(args: argparse.Namespace) -> Result:
    """kNN after training ViT-Tiny/2 for the time that is left, on CIFAR-10 (`--cifar`) or on colour images of digits.

    The target is that of ten minutes of training on CIFAR-10: `--only knn --minutes 11.5`.
    """
    from aps.training.knn import monitor

    sizes = ("micro", 32, 256) if args.tiny else ("tiny", 512, 50_000)
    cuda = args.device.startswith("cuda")
    plain = _not_compiled(args) if cuda else []
    learner = _learner(args, *sizes, cifar=args.cifar, compile=cuda and not plain)
    start, done, epoch, lines = time.perf_counter(), 0, 0, []
    seconds = 2 if args.tiny else min(600, args.seconds - (time.monotonic() - STARTED) - 15)

    def evaluate() -> Result:
        scores = monitor(learner.trainer.encoder, learner.split, learner.normalization, learner.distributed)
        lines.append({"seconds": time.perf_counter() - start, "batches": done, **scores})
        top1 = scores["knn_train_top1"]
        target = ">= 80" if args.cifar and lines[-1]["seconds"] >= 600 else ""
        rows: list[Row] = [(f"kNN of held-out train images after {lines[-1]['seconds']:.0f} s", top1, target, "%")]
        found = {"rows": rows + plain, "lines": lines}
        _save(args, found)
        return found

    evaluate()
    while time.perf_counter() - start < seconds:
        for batch in learner.batches(epoch, 0):
            learner.step(batch, done)
            done += 1
            if time.perf_counter() - start > seconds:
                break
        epoch += 1
        if epoch % 5 == 0:
            evaluate()
    return evaluate()


STEPS: dict[str, tuple[Callable[[argparse.Namespace], Result], int]] = {  # seconds at most, in order of importance
    "tests": (tests, 90),
    "agreement": (agreement, 30),
    "waiting": (waiting, 45),
    "stages": (stages, 150),
    "share": (share, 130),
    "steps": (steps, 110),
    "base": (base, 70),
    "imagenet": (imagenet, 20),
    "finetuning": (finetuning, 30),
    "detection": (detection, 45),
    "minutes": (minutes, 60),
    "knn": (knn, 690),  # in practice what the others leave
}


# --------------------------------------------------------------------------------------------------
# What the steps share


def _not_compiled(args: argparse.Namespace) -> list[Row]:
    """A row that says why nothing can be compiled here; none where it can."""
    import torch

    from aps.runtime.compiling import missing_compiler

    device = torch.device(args.device)
    reason = missing_compiler(device)
    if reason is None and not args.tiny:  # a compiler alone is not enough: Triton's launchers need Python's headers
        try:
            torch.compile(lambda x: x + 1)(torch.ones(2, device=device))
        except Exception as error:
            print(error)
            reason = f"{type(error).__name__}, see the log"
    return [(f"not compiled: {reason}", 1, "== 0", "")] if reason else []


def _trainer(chosen: Any, device: Any) -> Any:
    from aps.runtime.processes import Distributed
    from benchmarks.study import make_trainer

    return make_trainer(chosen, Distributed(0, 1, device))


def _step(
    args: argparse.Namespace, arch: str, ratio: float, batch: int, compiled: bool, **encoder: Any
) -> tuple[float, float, float] | None:
    """Seconds of a step, its speed as a share of the product's, peak GiB (0 on a CPU). None: out of memory.

    Operations are those that are carried out: fused attention computes its scores again in the backward pass.
    Steps follow each other without waiting for the device, as in training. The median of five rows of them.
    """
    import gc
    import statistics

    import torch

    from aps.settings.blocks import EncoderSettings
    from aps.training.cost import step_flops
    from benchmarks.common import seconds
    from benchmarks.study import experiment, inputs

    device, cuda = torch.device(args.device), args.device.startswith("cuda")
    depth = {"depth": 1} if args.tiny else {}
    chosen = experiment(
        EncoderSettings(arch=arch, **depth, **encoder),
        ratio,
        batch,
        precision="bf16" if cuda else "auto",
        compile=compiled,
    )
    gc.collect()  # what the step before held
    if compiled:
        torch.compiler.reset()  # else the second is compiled for any number of tokens
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        trainer, tensors = _trainer(chosen, device), inputs(chosen, device)
        for _ in range(1 if args.tiny else 3):
            trainer.step(*tensors, 1e-4)
        row = range(1 if args.tiny else 8)
        taken = statistics.median(
            seconds(lambda: [trainer.step(*tensors, 1e-4) for _ in row]) / len(row)
            for _ in range(2 if args.tiny else 5)
        )
    except torch.OutOfMemoryError:
        return None
    memory = torch.cuda.max_memory_allocated() if cuda else 0
    return taken, step_flops(chosen) / taken / _product(args), memory / 2**30


def _product(args: argparse.Namespace, measured: list[float] = []) -> float:  # noqa: B006, measured once in a process
    """Operations a second of a square product in bf16 (in float32 on a CPU)."""
    if not measured:
        import torch

        from benchmarks.common import seconds

        cuda = args.device.startswith("cuda")
        side = 8192 if cuda else 256
        a, b = (torch.randn(side, side, device=args.device, dtype=torch.bfloat16 if cuda else None) for _ in range(2))
        for _ in range(3):
            a @ b
        measured.append(max(10 * 2 * side**3 / seconds(lambda: [a @ b for _ in range(10)]) for _ in range(5)))
    return measured[0]


def _as_stages(args: argparse.Namespace) -> None:
    """Products of float32 as the stages have them (aps.runtime.processes)."""
    import torch

    if args.device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")


def _learner(
    args: argparse.Namespace, arch: str, batch: int, images: int, cifar: Path | None = None, compile: bool = False,
    stage: str = "pretrain", **changed: Any,
) -> Any:  # fmt: skip
    """A learner as its stage builds it, on images of 32 pixels in memory; evaluations start from random weights."""
    import numpy as np
    import torch

    from aps.data import arrays
    from aps.data.prepare import prepare
    from aps.results import StageJob
    from aps.runtime.processes import Distributed
    from aps.settings.blocks import DatasetSettings, EncoderSettings, SourceSettings
    from aps.settings.study import stage_model
    from aps.training.finetune import Finetuning
    from aps.training.linear_probe import Probing
    from aps.training.pretrain import Pretraining

    _as_stages(args)
    model = stage_model("aps")
    changes = {"batch_size": batch, "epochs": 1000}
    if stage != "linear_probe":
        changes |= {"warmup_epochs": 5, "compile": compile}
    if stage == "finetune":
        changes |= {"crop": "resized"}  # with RandAugment, erasing and mixup, as set
    block = model.model_fields[stage].default.model_copy(update=changes | changed)
    settings = model(
        stage=stage, experiment="gpu", seed=0, dataset=DatasetSettings(name="cifar10"),
        encoder=EncoderSettings(arch=arch, **({} if stage == "pretrain" else {"weights": "random"})), **{stage: block},
    )  # type: ignore[call-arg]  # fmt: skip
    np.random.seed(0)
    on_gpu = args.device.startswith("cuda")
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    learner = {"pretrain": Pretraining, "finetune": Finetuning, "linear_probe": Probing}[stage]
    with tempfile.TemporaryDirectory() as home:  # a learner has its images in memory
        folder = Path(home)
        if cifar is not None:
            prepare("cifar10", folder, SourceSettings(path=str(cifar), download=False))
        else:
            pixels, labels = drawn_digits(images)
            splits: Any = {"train": (pixels, labels), "test": (pixels[:100], labels[:100])}
            manifest = arrays.store(folder, "cifar10", splits, tuple("0123456789"), "drawn", SourceSettings())
            manifest.write(folder / "manifest.json")
        job = StageJob(settings, folder / "manifest.json", folder / "out", folder / "saved")
        return learner(job, Distributed(0, 1, device))


def drawn_digits(images: int) -> tuple[Any, Any]:
    """scikit-learn's digits, each in a random colour and position on a coloured canvas -> (M, 3, 32, 32), (M,)."""
    import numpy as np
    from sklearn.datasets import load_digits

    random, bunch = np.random.default_rng(0), load_digits()
    rows = random.integers(0, len(bunch.target), images)
    scans = (bunch.images[rows] / 16).repeat(2, 1).repeat(2, 2)  # (M, 16, 16)
    back, ink = random.uniform(0, 255, (2, images, 3, 1, 1))
    pixels = random.standard_normal((images, 3, 32, 32), dtype="float32")
    pixels *= 12
    pixels += back
    for row, (top, left) in enumerate(random.integers(0, 17, (images, 2))):
        window = pixels[row, :, top : top + 16, left : left + 16]
        window += scans[row] * (ink[row] - window)
    return pixels.clip(0, 255).astype("uint8"), bunch.target[rows].astype("int64")


def _environment(args: argparse.Namespace) -> dict[str, str]:
    """The environment of a child process: this package and the unpacked wheels come first; the device."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": path, "APS_DEVICE": args.device, "MLFLOW_TRACKING_URI": "none"}


def _file(args: argparse.Namespace, step: str) -> Path:
    return Path(args.out) / f"{list(STEPS).index(step):02d}-{step}.json"


def _save(args: argparse.Namespace, result: Result) -> None:
    """Write a step's result; also before its end, so that a step that is stopped keeps what it has.

    Nothing is written where the step is not one of a run.
    """
    if getattr(args, "step", None) is None:
        return
    file = _file(args, args.step)
    try:
        _write(file, result)
    except OSError:  # a full disk, which is no reason to stop measuring
        _write(args.spare / file.name, result)


def _write(file: Path, result: Result) -> None:
    _write_text(file, json.dumps(result, indent=1, default=str) + "\n")


def _write_text(file: Path, text: str) -> None:
    """Write it whole or not at all."""
    temporary = file.with_suffix(".part")
    try:
        temporary.write_text(text)
        temporary.replace(file)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _state(file: Path) -> tuple[int, int]:
    """What is another after each `_write`; greater the later, (0, 0) without a file."""
    try:
        found = file.stat()
    except FileNotFoundError:
        return 0, 0
    return found.st_mtime_ns, found.st_ino


def _read(file: Path) -> Result:
    """A step's result; `unreadable` where a full disk or a copy left only a part of its file."""
    try:
        result = json.loads(file.read_text())
        return result if isinstance(result, dict) else UNREADABLE
    except FileNotFoundError:
        return NOT_RUN
    except (OSError, ValueError):
        return UNREADABLE


# --------------------------------------------------------------------------------------------------


def verdict(figure: float, target: str) -> str:
    """`ok` or `MISSED`: whether a figure reaches a target such as `<= 0.02`; empty without a target."""
    if not target:
        return ""
    relation, number = target.split()
    reached = {"<=": figure <= float(number), ">=": figure >= float(number), "==": figure == float(number)}[relation]
    return "ok" if reached else "MISSED"


def table(found: dict[str, Result], asked: list[str]) -> str:
    """All rows of all results as text. asked: the steps of this run."""
    lines = []
    for name, result in found.items():
        notes = [f"{result['wall']} s"] if "wall" in result else []
        notes += [result["error"]] if "error" in result else []
        notes += [f"of an earlier run{_dated(result)}"] if name not in asked and result != NOT_RUN else []
        lines.append(f"{name}: {', '.join(notes)}")
        lines += [f"  {result['earlier']}"] if "earlier" in result else []
        for what, figure, target, unit in result.get("rows", ()):
            lines.append(f"  {what:<62} {figure:>12.5g} {unit:<6} {target:>10} {verdict(figure, target)}".rstrip())
    return "\n".join(lines)


def _dated(result: Result) -> str:
    return f", {result['date']}" if "date" in result else ""


def unpack(wheels: Path, into: Path, received: list[signal.Signals]) -> None:
    """Unpack wheels, which are zip files, so that no pip is needed. Packages that Python has already are left out.

    Nothing is done where the same wheels are unpacked already. `into` changes only when all of them are; a signal in
    `received` ends it before.

    Raises SystemExit where there are no wheels, or one is broken; OSError where the disk is full.
    """
    files = sorted(wheels.glob("*.whl"))
    if not files:
        sys.exit(f"{wheels}: no wheels; fill it by `make gpu-wheels` on a machine with a network")
    missing = []
    for file in files:
        try:
            distribution(file.name.split("-")[0])
        except PackageNotFoundError:
            missing.append(file)
    unpacked, part = "unpacked.json", into.with_name(f"{into.name}.part")
    names = json.dumps({file.name: file.stat().st_size for file in missing}, indent=1) + "\n"
    if (into / unpacked).exists() and (into / unpacked).read_text() == names:
        return
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        for file in missing:
            if received:
                return
            with zipfile.ZipFile(file) as wheel:
                wheel.extractall(part)
        (part / unpacked).write_text(names)
        shutil.rmtree(into, ignore_errors=True)
        part.rename(into)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        sys.exit(
            f"{file}: a broken wheel ({error}); delete it, and copy it again or fill the folder by `make gpu-wheels`"
        )
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def asked_to_stop() -> Iterator[list[signal.Signals]]:
    """A list that gets the signals that ask to stop: Ctrl-C, SIGTERM, a closed terminal (unless under `nohup`).

    They are noted and not raised: an exception could come after a step's start and before anything can kill it.
    """
    received: list[signal.Signals] = []
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    before = {
        number: signal.signal(number, lambda number, _: received.append(signal.Signals(number)))
        for number in numbers
        if signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def say(text: str, stream: TextIO) -> None:
    """Print at once, or nowhere if the reader has gone: `tee` and the terminal get a signal too."""
    try:
        print(text, file=stream, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def run(args: argparse.Namespace, name: str, limit: float, received: list[signal.Signals]) -> Result:
    """Run a step in a process of its own, for `limit` seconds at most or until a signal, and add what it says to its file.

    Raises Unwritten where the file can't be written.
    """
    file, error = _file(args, name), None
    before, start = _state(file), time.monotonic()
    with tempfile.TemporaryDirectory() as spare, file.with_suffix(".log").open("w") as log:
        command = [sys.executable, str(Path(__file__).resolve()), "--step", name, "--device", args.device, "--out", str(args.out),
                   "--spare", spare, "--seconds", str(limit), *(["--tiny"] if args.tiny else []),
                   *(["--cifar", str(args.cifar)] if args.cifar else [])]  # fmt: skip
        process = _start(args, command, log, log, args.out)
        status = _status(process, limit, received)
        written = max(file, Path(spare, file.name), key=_state)
        result = _read(written) if _state(written) not in (before, (0, 0)) else {}
    if status is None:
        error = f"stopped by {received[0].name}" if received else f"stopped after {limit:.0f} s"
    elif status:
        error = f"ended with status {status}, see {log.name}"
    taken = {"wall": round(time.monotonic() - start, 1), "date": datetime.now(UTC).isoformat(timespec="seconds")}
    return _keep(file, result | taken | ({"error": error} if error else {}))


def _keep(file: Path, result: Result) -> Result:
    """Write a step's result, unless it has no rows and an earlier run's has: then that one stays, and the result says so.

    Raises Unwritten where the file can't be written.
    """
    if not result.get("rows") and (earlier := _read(file)).get("rows"):
        return result | {"earlier": f"{file.name} is of an earlier run{_dated(earlier)}"}
    try:
        if result != NOT_RUN:
            _write(file, result)
    except OSError as error:
        raise Unwritten(result, error) from None
    return result


def _start(
    args: argparse.Namespace, command: list[str], output: Any, errors: Any, folder: Path | None = None
) -> subprocess.Popen[Any]:
    """Start a process that leads a group, all of which ends with this process (`GUARDED`)."""
    return subprocess.Popen(
        ["sh", "-c", GUARDED, "sh", *command], env=_environment(args), cwd=folder, start_new_session=True,
        stdin=subprocess.PIPE, stdout=output, stderr=errors,
    )  # fmt: skip


def _status(process: subprocess.Popen[Any], limit: float, received: list[signal.Signals]) -> int | None:
    """The exit status of a process that leads a group. None: it had not ended after `limit` seconds or at a signal.

    In the end nothing of its group runs.
    """
    start = time.monotonic()
    try:
        while (status := process.poll()) is None and not received and time.monotonic() - start < limit:
            time.sleep(0.1)
    finally:  # also what a process that has ended left behind
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)  # the GPU's driver may hold a killed process
        if process.stdin is not None:
            process.stdin.close()
    return status


def missing(args: argparse.Namespace, received: list[signal.Signals], limit: float = 120) -> str | None:
    """What speaks against starting the steps: this Python has no torch, or torch no such device. None: nothing."""
    command = [sys.executable, "-c", PROBE, args.device]
    with tempfile.TemporaryFile("w+") as said:
        status = _status(_start(args, command, said, subprocess.DEVNULL), limit, received)
        said.seek(0)
        reason = said.read().strip()
    if status == 0 or received:
        return None
    if status is None:
        reason = f"no answer in {limit:.0f} s"
    return f"--device {args.device}: {sys.executable} makes no tensor there ({reason or f'status {status}'}); name another device, or mend that"


def alone(folder: Path) -> bool:
    """Whether no other run writes in the folder; none can until this process ends."""
    lock = os.open(folder, os.O_RDONLY)  # stays open
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


def conduct(args: argparse.Namespace, received: list[signal.Signals]) -> int:
    """Run every step within its limit and the time that is left, until a signal is in `received` -> the exit status."""
    slower = 1 if args.device.startswith("cuda") else 10  # on a CPU, time does not matter
    deadline = time.monotonic() + 60 * args.minutes * slower
    asked = [name for name in STEPS if not args.only or name in args.only]
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        if not alone(args.out):
            say(
                f"error: another run writes in {args.out}; wait for its end, or name another folder (--out)", sys.stderr
            )
            return MISTAKE
        if args.wheels is not None:
            folder = args.out / "packages"
            unpack(args.wheels, folder, received)
            os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    except OSError as error:
        say(
            f"error: {error.filename or args.out}: {error.strerror}; make room, or name another folder (--out)",
            sys.stderr,
        )
        return MISTAKE
    if (reason := missing(args, received)) is not None:
        say(f"error: {reason}", sys.stderr)
        return MISTAKE
    found = {name: _read(_file(args, name)) for name in STEPS if name not in asked}
    unwritten: OSError | None = None
    for name in asked:
        limit = min(STEPS[name][1] * slower, deadline - time.monotonic())
        try:
            if received:
                found[name] = _keep(_file(args, name), NOT_RUN)
            elif limit < 5:
                say(f"{name}: no time left", sys.stdout)
                found[name] = _keep(_file(args, name), {"error": "no time left"})
            else:
                say(f"{name}: at most {limit:.0f} s", sys.stdout)
                found[name] = run(args, name, limit, received)
        except OSError as error:  # a full disk: the table is printed all the same
            unwritten = error
            found[name] = error.result if isinstance(error, Unwritten) else {"error": f"not run: {error.strerror}"}
    text, file = table({name: found[name] for name in STEPS}, asked), args.out / "table.txt"
    say(text, sys.stdout)
    try:
        _write_text(file, text + "\n")
    except OSError as error:
        unwritten = error
    if unwritten is not None:
        say(
            f"error: {args.out} lacks some of that table ({unwritten.strerror}); make room, or name another folder (--out)",
            sys.stderr,
        )
    if received:
        say(
            f"stopped by {received[0].name}" + (f"; what was done is in {file}" if unwritten is None else ""),
            sys.stderr,
        )
        return 128 + received[0]
    if unwritten is not None or any("error" in found[name] for name in asked):
        return FAILED
    rows = [row for name in asked for row in found[name].get("rows", ())]
    return MISSED if any(verdict(figure, target) == "MISSED" for _, figure, target, _ in rows) else 0


def main() -> int:
    sys.path.insert(0, str(ROOT))
    from benchmarks.options import folder

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu to see that every line runs")
    parser.add_argument("--tiny", action="store_true", help="toy sizes; the figures mean nothing")
    parser.add_argument("--wheels", type=Path, help="folder that `make gpu-wheels` filled")
    parser.add_argument("--out", type=folder, default=Path("gpu-results"))
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all steps together")
    parser.add_argument("--cifar", type=Path, help="folder with CIFAR-10's archive, for kNN")
    parser.add_argument("--only", nargs="+", action="extend", choices=list(STEPS), help="some of the steps")
    parser.add_argument("--step", choices=list(STEPS), help=argparse.SUPPRESS)
    parser.add_argument("--spare", type=Path, help=argparse.SUPPRESS)  # for results where --out is full
    parser.add_argument("--seconds", type=float, default=60.0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out = args.out.resolve()
    args.cifar = args.cifar.resolve() if args.cifar else None
    if args.step is None:
        with asked_to_stop() as received:
            return conduct(args, received)
    os.chdir(ROOT)
    import torch

    from benchmarks.common import machine

    if args.device.startswith("cuda"):  # what names no device, such as a peak of memory, is the current one's
        torch.cuda.set_device(torch.device(args.device).index or 0)
    _save(args, STEPS[args.step][0](args) | {"machine": machine(), "torch": torch.__version__})
    return 0


if __name__ == "__main__":
    sys.exit(main())
