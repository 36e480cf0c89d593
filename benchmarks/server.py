"""Many stages at once that log to one MLflow server: are points lost, and does a step wait for the server?

    python -m benchmarks.server --address http://mlflow.example.org:5000 --runs 50

Each run is a process with the tracking of a real stage around a loop of `--steps` that takes `--pause` seconds a step, as
where an accelerator computes. First all of them with tracking off, then all of them with the server. Each says how long a
step was held by its line of the journal, and how long its end waited; then MLflow is asked for every point.

Without --address it starts a server of its own on SQLite.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import tempfile
import time
import uuid
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from aps.layout import manifest_path, stage_folder
from aps.results import StageJob, StageRun, saved_run
from aps.settings.blocks import DatasetSettings, KnnSettings
from aps.settings.study import StageSettings
from aps.tracking.browsing import serving
from aps.tracking.server import Server
from benchmarks.common import arguments, write

METRIC = "knn/loss"


def job_of(results: Path, study: str, seed: int, address: str) -> StageJob:
    settings = StageSettings(
        stage="knn", experiment="load", seed=seed, dataset=DatasetSettings(name="digits"), knn=KnnSettings(k=(5,))
    )  # type: ignore[call-arg]  # fmt: skip
    manifest = manifest_path(results, "digits")
    return StageJob(
        settings=settings, manifest=manifest, out=stage_folder(results / study, "load", seed, "knn"), study=study,
        checkpoints=saved_run(results, settings, manifest, None), tracking=address,
    )  # fmt: skip


def play(job: StageJob, steps: int, pause: float, barrier: Any, found: Any) -> None:
    """One stage, in a process of its own: (seconds that each step was held, seconds that the end took)."""
    with StageRun(job) as stage:
        stage.resume(0)
        barrier.wait()
        held = []
        for step in range(1, steps + 1):
            time.sleep(pause)
            start = time.perf_counter()
            stage.log(step, loss=1.0 / step, epoch=step / 10)
            held.append(time.perf_counter() - start)
        start = time.perf_counter()
        stage.finish({"knn_top1_k5": 50.0})
    found.put((held, time.perf_counter() - start))


def measure(address: str, runs: int, steps: int, pause: float) -> dict[str, float]:
    context = multiprocessing.get_context(
        "fork"
    )  # mlflow is imported already; fresh interpreters would import it `runs` times
    with tempfile.TemporaryDirectory() as folder:
        results, study = Path(folder), f"load-{uuid.uuid4().hex[:8]}"
        manifest = manifest_path(results, "digits")
        manifest.parent.mkdir(parents=True)
        manifest.write_text(json.dumps({"name": "digits", "digest": "0123"}))
        barrier, found = context.Barrier(runs), context.Queue()
        processes = [
            context.Process(target=play, args=(job_of(results, study, seed, address), steps, pause, barrier, found))
            for seed in range(runs)
        ]
        for process in processes:
            process.start()
        answers = [found.get() for _ in processes]
        for process in processes:
            process.join()
        held = sorted(seconds for answer, _ in answers for seconds in answer)
        figures = {
            "held_ms_median": 1000 * statistics.median(held),
            "held_ms_p99": 1000 * held[int(0.99 * len(held))],
            "held_ms_most": 1000 * held[-1],
            "end_s_median": statistics.median(end for _, end in answers),
            "end_s_most": max(end for _, end in answers),
        }
        return figures if address == "none" else figures | kept(address, study, runs, steps)


def kept(address: str, study: str, runs: int, steps: int) -> dict[str, float]:
    """What MLflow has of them."""
    client = Server(address).client
    experiment = client.get_experiment_by_name(study)
    there = client.search_runs([experiment.experiment_id], max_results=1000) if experiment else []
    points = [[(p.step, p.value) for p in client.get_metric_history(run.info.run_id, METRIC)] for run in there]
    whole = [(step, 1.0 / step) for step in range(1, steps + 1)]
    return {
        "runs_there": len(there),
        "runs_finished": sum(run.info.status == "FINISHED" for run in there),
        "points_lost": sum(len({*whole} - {*own}) for own in points) + steps * (runs - len(there)),
        "points_twice": sum(len(own) - len({*own}) for own in points),
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--address", help="of a running MLflow server")
    parser.add_argument("--store", default="SQLite", help="what the server keeps runs in, to be noted")
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--pause", type=float, default=0.2, help="seconds of a step")
    args = parser.parse_args()
    if args.quick:
        args.runs, args.steps = 4, 10
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        address = args.address or stack.enter_context(serving(f"sqlite:///{folder}/mlflow.db"))[0]
        Server(address)  # imports mlflow once, for all
        off = measure("none", args.runs, args.steps, args.pause)
        on = measure(address, args.runs, args.steps, args.pause)
    print(json.dumps({"off": off, "on": on}, indent=1))
    settings = {"runs": args.runs, "steps": args.steps, "pause": args.pause, "store": args.store}
    write("server", {"off": off, "on": on}, settings, args.out)


if __name__ == "__main__":
    main()
