"""Tests whether many stages that log to one MLflow server lose points or wait for the server.

    python -m benchmarks.server --address http://mlflow.example.org:5000 --runs 50

Each run is a process with the tracking of a real stage and a loop of `--steps` steps, each a pause of `--pause`
seconds, as if an accelerator computed. All runs are made with tracking off, then with the server. Each measures how
long logging delayed a step, and how long the end waited. Then every point is read from MLflow.

Without --address it starts a server on SQLite.
"""

from __future__ import annotations

import json
import multiprocessing
import queue
import statistics
import sys
import tempfile
import time
import uuid
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from aps.errors import UserError
from aps.layout import manifest_path, stage_folder
from aps.ranges import number, whole_number
from aps.results import StageJob, StageRun, saved_run
from aps.settings.blocks import DatasetSettings, KnnSettings
from aps.settings.study import StageSettings
from aps.tracking.addresses import OFF
from aps.tracking.browsing import serving
from aps.tracking.reasons import why
from aps.tracking.server import Server
from benchmarks.common import MOST, arguments, run, write

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


def play(job: StageJob, steps: int, pause: float, barrier: Any, answers: Any) -> None:
    """One stage. Its answer: (seconds that logging delayed each step, seconds that the end took)."""
    with StageRun(job) as stage:
        stage.resume(0)
        barrier.wait()
        delays = []
        for step in range(1, steps + 1):
            time.sleep(pause)
            start = time.perf_counter()
            stage.log(step, loss=1.0 / step, epoch=step / 10)
            delays.append(time.perf_counter() - start)
        start = time.perf_counter()
        stage.finish({"knn_top1_k5": 50.0})
    answers.put((delays, time.perf_counter() - start))


def measure(address: str, runs: int, steps: int, pause: float) -> dict[str, float]:
    context = multiprocessing.get_context(
        "fork"
    )  # mlflow is imported already; fresh interpreters would import it `runs` times
    with tempfile.TemporaryDirectory() as folder:
        results, study = Path(folder), f"load-{uuid.uuid4().hex[:8]}"
        manifest = manifest_path(results, "digits")
        manifest.parent.mkdir(parents=True)
        manifest.write_text(json.dumps({"name": "digits", "digest": "0123"}))
        barrier, queued = context.Barrier(runs), context.Queue()
        processes = [
            context.Process(target=play, args=(job_of(results, study, seed, address), steps, pause, barrier, queued))
            for seed in range(runs)
        ]
        try:
            for process in processes:
                process.start()
            answers = [answer(queued, processes, given) for given in range(runs)]
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()  # those that have answered are done, the others wait for one that has died
                    process.join()
        delays = sorted(seconds for of_run, _ in answers for seconds in of_run)
        figures = {
            "held_ms_median": 1000 * statistics.median(delays),
            "held_ms_p99": 1000 * delays[int(0.99 * len(delays))],
            "held_ms_most": 1000 * delays[-1],
            "end_s_median": statistics.median(end for _, end in answers),
            "end_s_most": max(end for _, end in answers),
        }
        return figures if address == OFF else figures | stored(address, study, runs, steps)


def answer(queued: Any, processes: list[Any], given: int) -> Any:
    """The next answer of the stages, after `given` others. Ends the program where one has died instead."""
    while True:
        ended = [process for process in processes if process.exitcode is not None]
        try:
            return queued.get(timeout=1)
        except queue.Empty:
            if len(ended) > given:  # a process ends after its answer has been sent
                status = max((process.exitcode for process in ended), key=abs)
                sys.exit(f"a stage has died (status {status}), so that nothing was measured; what it said is above")


def stored(address: str, study: str, runs: int, steps: int) -> dict[str, float]:
    """What MLflow has of the runs."""
    client = Server(address).client
    experiment = client.get_experiment_by_name(study)
    mlflow_runs = client.search_runs([experiment.experiment_id], max_results=1000) if experiment else []
    points = [[(p.step, p.value) for p in client.get_metric_history(run.info.run_id, METRIC)] for run in mlflow_runs]
    expected = [(step, 1.0 / step) for step in range(1, steps + 1)]
    return {
        "runs_there": len(mlflow_runs),
        "runs_finished": sum(run.info.status == "FINISHED" for run in mlflow_runs),
        "points_lost": sum(len({*expected} - {*of_run}) for of_run in points) + steps * (runs - len(mlflow_runs)),
        "points_twice": sum(len(of_run) - len({*of_run}) for of_run in points),
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--address", help="of a running MLflow server")
    parser.add_argument("--store", default="SQLite", help="what the server keeps runs in, to be noted")
    parser.add_argument("--runs", type=whole_number(1, MOST), default=50)
    parser.add_argument("--steps", type=whole_number(1, MOST), default=300)
    parser.add_argument("--pause", type=number(0, MOST), default=0.2, help="seconds of a step")
    args = parser.parse_args()
    if args.quick:
        args.runs, args.steps = 4, 10
    if args.address == OFF:
        raise UserError(f"--address {OFF}: there is nothing to compare; name a server, or leave it out to start one")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        address = args.address or stack.enter_context(serving(f"sqlite:///{folder}/mlflow.db"))[0]
        try:
            Server(address).client.search_experiments(max_results=1)  # it also imports mlflow once, for all
        except Exception as error:
            raise UserError(f"MLflow at {address} can't be used ({why(error)}); mend that, or name another") from None
        off = measure(OFF, args.runs, args.steps, args.pause)
        on = measure(address, args.runs, args.steps, args.pause)
    print(json.dumps({"off": off, "on": on}, indent=1))
    settings = {"runs": args.runs, "steps": args.steps, "pause": args.pause, "store": args.store}
    write("server", {"off": off, "on": on}, settings, args.out)


if __name__ == "__main__":
    run(main)
