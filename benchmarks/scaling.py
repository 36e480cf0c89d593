"""6. One process against several: images a second of pretraining, and the efficiency, speedup divided by processes.

    python -m benchmarks.scaling

torchrun starts the processes, one GPU each (NCCL), or one core and one thread each (gloo). The batch is the same for
any number of them, as in a study. Each measurement is a separate launch; the numbers of processes take turns. Each batch
serves T steps, and what is timed lies within an epoch, since the first batch of one is never made ahead.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from typing import Any

import torch

from aps.data.load import ArraySplit
from aps.errors import UserError
from aps.ranges import whole_number
from aps.runtime.processes import processes
from aps.sampling import global_noise
from aps.settings.blocks import EncoderSettings, SamplingSettings
from aps.text import number_of
from aps.training.batches import Batches
from aps.training.order import SAMPLING, seeded
from benchmarks.common import MOST, arguments, machine, plot, row, run, spread, synchronize, write
from benchmarks.study import experiment, make_trainer

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument(
        "--processes", type=whole_number(1, MOST), nargs="+", help="beside 1 (default: 2, 4 ... GPUs, or 2 cores)"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # one of the processes: its settings as JSON
    args = parser.parse_args()
    if args.worker is not None:
        worker(json.loads(args.worker))
        return
    gpus = torch.cuda.device_count()
    settings = {"arch": "tiny", "depth": 1 if args.quick else None, "batch": 8 if args.quick else 512 if gpus else 64,
                "batches": 12 if gpus and not args.quick else 1, "samplings": SamplingSettings().samplings}  # fmt: skip
    counts = counts_of(args.processes or ([2**k for k in range(gpus.bit_length())] if gpus else [2]), settings, gpus)
    rates: dict[int, list[float]] = {count: [] for count in counts}
    repeats = 1 if args.quick else 5
    for repeat in range(repeats):
        for count in counts[:: 1 if repeat % 2 == 0 else -1]:
            rates[count].append(launch(count, settings))
    rows, efficiency = [], {}
    for count in counts[1:]:
        share = [100 * many / count / one for one, many in zip(rates[1], rates[count], strict=True)]
        efficiency[count] = spread(share)
        rows.append(row(f"{count} processes against 1: efficiency", efficiency[count], "%"))
    images = {count: spread(values) for count, values in rates.items()}
    result = {"rows": rows, "efficiency_percent": efficiency, "images_a_second": images, "all": rates}
    settings |= {"processes": counts, "repeats": repeats, "ratio": 0.25, "backend": "nccl" if gpus else "gloo",
                 "threads_a_process": 1 if not gpus else None, "cores": machine()["cores"]}  # fmt: skip
    write("scaling", result, settings, args.out)
    bars = {f"{count} process{'es' if count > 1 else ''}": images[count] for count in counts}
    title = f"Pretraining ViT-tiny/2, r=0.25, global batch {settings['batch']}"
    plot("scaling", bars, "images/s", title, set(bars), args.out)


def counts_of(asked: list[int], settings: dict[str, Any], gpus: int) -> list[int]:
    """The numbers of processes in order, 1 among them, against which the others are measured.

    Raises:
        UserError: 1 is the only one, the batch can't be divided by one of them, or there are fewer GPUs.
    """
    counts, batch = sorted({1, *asked}), settings["batch"]
    if counts == [1]:
        raise UserError(
            "one process, and no other number to compare it with; --processes 2 needs two GPUs or two cores"
        )
    if odd := [count for count in counts if batch % count]:
        divisors = ", ".join(str(count) for count in range(2, batch + 1) if batch % count == 0)
        raise UserError(f"--processes {odd[0]}: a batch of {batch} can't be divided by it; choose among {divisors}")
    if gpus and counts[-1] > gpus:
        raise UserError(f"--processes {counts[-1]}: torch sees {number_of(gpus, 'GPU')} here; choose at most {gpus}")
    return counts


def launch(count: int, settings: dict[str, Any]) -> float:
    """Images a second with `count` processes."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=localhost"]
    command = [*torchrun, f"--nproc-per-node={count}", "-m", "benchmarks.scaling", "--worker", json.dumps(settings)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    return float(done.stdout.split()[-1])


def worker(settings: dict[str, Any]) -> None:
    """The pretraining loop: views, samplings, steps. Rank 0 prints images a second."""
    batch, batches = settings["batch"], settings["batches"]
    encoder = EncoderSettings(arch=settings["arch"], depth=settings["depth"])
    study = experiment(encoder, 0.25, batch, settings["samplings"])
    with processes() as distributed:
        # One batch before the clock starts, and one after, which a GPU makes during the last steps.
        images = torch.randint(0, 256, (batch * (batches + 2), 3, 32, 32), dtype=torch.uint8)
        split = ArraySplit(images, torch.zeros(len(images)).long(), ("a",))
        trainer = make_trainer(study, distributed)
        epoch = Batches(split, trainer.method.views(), batch, (MEAN, STD), 0, distributed).epoch(0)

        def some(first: int, last: int) -> None:
            for done in range(first, last):
                drawn = next(epoch)
                generator = seeded(0, SAMPLING, 0, done, device=distributed.device)
                rows = len(drawn.views[0])
                noise = global_noise(rows, distributed.device, generator, distributed.rank, distributed.world)
                for kept in trainer.method.sample(drawn.geometries, noise):
                    trainer.step(drawn.views, kept, 1e-4)
            synchronize()
            distributed.barrier()

        some(0, 1)  # allocates and connects
        start = time.perf_counter()
        some(1, batches + 1)
        if distributed.main:
            print(batches * batch / (time.perf_counter() - start))


if __name__ == "__main__":
    run(main)
