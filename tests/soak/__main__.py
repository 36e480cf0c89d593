"""Kills stages at random and checks their results: `make soak`, or `python -m tests.soak --minutes N`.

A trial is a stage in a separate results folder. It is started, gets a random signal at a random moment, and is started
again by the same command, until it may finish. Then its weights, figures, journal and points in a real MLflow server
are compared with those of an undisturbed run: each difference is a loss. Each trial adds a JSON line to trials.jsonl in
the folder `--out`. With the same folder, another call continues. The folders of trials with a loss are kept.

Design: most attempts are forked from an interpreter that has imported everything (starter.py); some are real commands
under the shell of the workflow's rules. At times the server is paused or killed. After each trial, `sync` runs in this
process, at times without the run's tracking.json. So memory and open files of both sides are seen over time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from mlflow_stores import RealServer  # noqa: E402

from aps.settings.reading import load_study  # noqa: E402
from aps.tracking.syncing import sync  # noqa: E402
from tests.soak import attempts, study  # noqa: E402
from tests.soak.attempts import FORKED, REAL, SIGNALS, Hit, Outcome, Starter  # noqa: E402
from tests.soak.study import JOBS, Job, Result, differences, read_result  # noqa: E402

CHECKPOINT_MINUTES = "0.003"
REAL_SHARE = 0.04  # share of real commands among attempts that could be forked
MOST_HITS = 10  # signals in a trial
SERVER_SLEEPS, SERVER_DIES = 0.06, 0.015  # shares of trials
REFUSED = "already at work"


class Soak:
    """Trials in a folder.

    Args:
        folder: holds the server's files, the undisturbed runs, trials.jsonl, and the folders of trials with a loss.
        seed: seed of all random choices.
        real: whether real commands are among the attempts.
    """

    def __init__(self, folder: Path, seed: int, real: bool = True) -> None:
        self.folder, self.real = folder.resolve(), real
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = self.folder / "trials.jsonl"
        self.number = len(self.file.read_text().splitlines()) if self.file.exists() else 0
        self.chance = random.Random(f"{seed} {self.number}")
        self.server = RealServer(self.folder)
        self.server.start()
        environment = {
            "MLFLOW_TRACKING_URI": self.server.uri, "APS_DEVICE": "cpu", "OMP_NUM_THREADS": "1",
            "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true", "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        os.environ.update(environment)
        self.starter = Starter({**os.environ, **environment})
        self.durations: dict[tuple[str, str], float] = {}  # (job, kind of start) -> seconds
        self.expected: dict[str, Result] = {}  # job -> result of its undisturbed run

    def close(self) -> None:
        self.starter.close()
        self.server.kill()

    # -- undisturbed ------------------------------------------------------------------------------

    def prepare(self, jobs: tuple[Job, ...] = JOBS) -> None:
        """Prepare the datasets, and run each job undisturbed."""
        if not (self.folder / "study.yaml").exists():
            study.lay_out(self.folder)
        for name in ("digits", "digits_coco", "photos"):
            if not self.manifest(name).exists():
                self.run_undisturbed(
                    ["data", name, "--configfile", "study.yaml", "--out", str(self.manifest(name).parent)]
                )
        for job in jobs:
            # A folder for each experiment: runs of one folder with equal settings are computed once, whatever their processes.
            reference = self.folder / "reference" / job.experiment
            outcome = None
            if not (job.result(reference, "soak-reference") / "metrics.json").exists():
                outcome = self.run_undisturbed(self.arguments(job, reference, "soak-reference"), job)
            self.durations[job.name, REAL if job.real else FORKED] = outcome.seconds if outcome else 3.0
            self.sync(reference, "soak-reference", job)
            self.expected[job.name] = read_result(reference, "soak-reference", job, self.server.uri)

    def manifest(self, dataset: str) -> Path:
        return self.folder / "data" / dataset / "manifest.json"

    def arguments(self, job: Job, results: Path, name: str) -> list[str]:
        block = study.STUDY["experiments"][job.experiment].get("dataset", study.STUDY["defaults"]["dataset"])
        dataset = study.DETECTION["dataset"] if job.stage == "detection" else block["name"]
        encoder = JOBS[0].result(self.folder / "reference" / "aps", "soak-reference") / "encoder.safetensors"
        return [
            job.stage, "--configfile", "study.yaml", "--set", f"study={name}", f"results={results.relative_to(self.folder)}",
            "--experiment", job.experiment, "--manifest", str(self.manifest(dataset)), "--checkpoint-minutes", CHECKPOINT_MINUTES,
            *(() if job.stage == "pretrain" else ("--encoder", str(encoder))), *job.options,
        ]  # fmt: skip

    def run_undisturbed(self, arguments: list[str], job: Job | None = None) -> Outcome:
        start = REAL if job is not None and job.real else FORKED
        outcome = attempts.attempt(self.starter, arguments, self.folder, start, None, self.chance)
        if outcome.status:
            raise SystemExit(f"undisturbed, {' '.join(arguments)} ended with {outcome.status}:\n{outcome.log}")
        return outcome

    # -- trials -----------------------------------------------------------------------------------

    def trial(self, job: Job | None = None) -> dict[str, Any]:
        """One run that gets signals again and again, and then may finish -> its record."""
        begun, chance = time.monotonic(), self.chance
        candidates = [candidate for candidate in JOBS if candidate.name in self.expected]
        job = job or chance.choices(candidates, [candidate.weight for candidate in candidates])[0]
        name = f"soak-{self.number}"
        results = self.folder / "trials" / name
        arguments, losses, outcomes = self.arguments(job, results, name), [], list[Outcome]()
        if self.real and chance.random() < SERVER_SLEEPS + SERVER_DIES:
            self.disturb_server()
        hits = 1 if job.real else chance.randint(2, MOST_HITS)
        while True:
            hit = self.hit(job) if hits > 0 else None
            start = REAL if job.real or (self.real and chance.random() < REAL_SHARE) else FORKED
            if hit is not None:
                forked = self.durations.get((job.name, FORKED), 3.0)
                hit.seconds *= self.durations.get((job.name, start), forked + 8)
                if hit.target == "parent" and start == FORKED:
                    hit.target = "stage"
            outcome = attempts.attempt(
                self.starter, arguments, self.folder, start, hit, chance, self.moment(job, results)
            )
            outcomes.append(outcome)
            losses += self.judge(outcome, results)
            hits -= hit is not None and hit.delivered
            if outcome.status == 0 and (results / name).exists() and self.finished(job, results, name):
                if hit is None or not hit.delivered:
                    self.durations[job.name, start] = outcome.seconds
                break
            self.wait_for_orphans(results)
            if len(outcomes) > 3 * MOST_HITS + 5:
                losses.append(f"never finished; the last attempt ended with {outcome.status}: {outcome.log[-300:]}")
                break
        if self.finished(job, results, name):
            losses += self.sync(results, name, job, forget=chance.random() < 0.3)
            losses += differences(read_result(results, name, job, self.server.uri), self.expected[job.name])
        record = {
            "trial": self.number, "time": datetime.now(UTC).isoformat(timespec="seconds"), "job": job.name,
            "seconds": round(time.monotonic() - begun, 2), "attempts": [outcome.record() for outcome in outcomes],
            "kills": sum(1 for o in outcomes if o.hit is not None and o.hit.delivered), "losses": losses,
            "server": self.server_usage(), "sync": usage([psutil.Process()]),
        }  # fmt: skip
        with self.file.open("a") as file:
            print(json.dumps(record), file=file)
        if losses:
            (results / "attempts.log").write_text("\n".join(f"--- {o.record()}\n{o.log}" for o in outcomes))
        else:
            shutil.rmtree(results, ignore_errors=True)
        self.number += 1
        return record

    def hit(self, job: Job) -> Hit:
        chance = self.chance
        number = chance.choices(SIGNALS, (4, 2, 2, 2))[0]
        targets = {"stage": 6, "group": 2, "parent": 2 if not job.real else 1, "child": 3 if job.options else 0}
        target = chance.choices(list(targets), list(targets.values()))[0]
        return Hit(number.name, target, chance.random() * 1.05)  # seconds: as a share of the job's duration

    def moment(self, job: Job, results: Path) -> Any:
        """At times the signal waits until the outputs are written -> a function that says when, or None."""
        if self.chance.random() > 0.15:
            return None
        return lambda: any(results.glob(f"runs/{job.stage}/*/outputs"))

    def judge(self, outcome: Outcome, results: Path) -> list[str]:
        """What was wrong with an attempt, whatever its result."""
        losses = []
        if not outcome.expected and REFUSED not in outcome.log:
            losses.append(f"exit status {outcome.status} after {outcome.hit}: {outcome.log[-300:]}")
        # When a stage is killed, the thread of a decoding worker that shares its tensors may print one of Python's own.
        orphaned = outcome.hit is not None and outcome.hit.signal == "SIGKILL" and "resource_sharer" in outcome.log
        if outcome.log.count("Traceback") > orphaned and "KeyboardInterrupt" not in outcome.log:
            losses.append(f"a traceback: {outcome.log[-600:]}")
        return losses

    def finished(self, job: Job, results: Path, name: str) -> bool:
        return (job.result(results, name) / "metrics.json").exists()

    def wait_for_orphans(self, results: Path) -> None:
        """A stage goes on when its shell was killed. Wait until it ends, or kill it too."""
        for process in psutil.process_iter():
            try:
                if process.pid != os.getpid() and any(str(results.name) in word for word in process.cmdline()):
                    if self.chance.random() < 0.5:
                        process.kill()
                    process.wait(120)
            except psutil.Error:
                continue

    # -- MLflow -----------------------------------------------------------------------------------

    def sync(self, results: Path, name: str, job: Job, forget: bool = False) -> list[str]:
        """Do what `aps sync` does, in this process. forget: delete the run's tracking.json first."""
        if forget:
            (job.result(results, name) / "tracking.json").unlink(missing_ok=True)
        loaded = load_study([self.folder / "study.yaml"], {"study": name, "results": str(results)})
        for _ in range(60):
            synced = sync(loaded, self.server.uri)
            if not synced.missing:
                return []
            time.sleep(1)
        return [f"sync could not send it: {synced.reason}"]

    def disturb_server(self) -> None:
        """Let the server not answer for some seconds; or kill it and start it again."""
        dies = self.chance.random() < SERVER_DIES / (SERVER_SLEEPS + SERVER_DIES)

        def disturb() -> None:
            time.sleep(self.chance.random() * 3)
            if dies:
                self.server.kill()
                self.server.start()
            else:
                self.server.stop_answering()
                time.sleep(2 + self.chance.random() * 10)
                self.server.answer_again()

        threading.Thread(target=disturb).start()

    def server_usage(self) -> dict[str, Any]:
        process = self.server.process
        if process is None:
            return {}
        try:
            head = psutil.Process(process.pid)
            return usage([head, *head.children(recursive=True)]) | {"pid": process.pid}
        except psutil.Error:
            return {}


def usage(processes: list[psutil.Process]) -> dict[str, Any]:
    """Bytes of these processes' unshared memory, and the number of their open files."""
    memory, files = 0, 0
    for process in processes:
        try:
            memory, files = memory + process.memory_full_info().uss, files + process.num_fds()
        except psutil.Error:
            continue
    return {"memory": memory, "files": files}


def summary(file: Path) -> str:
    """A summary of all trials in a file, as text."""
    records = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    if not records:
        return "no trials yet"
    kills, seconds = sum(r["kills"] for r in records), sum(r["seconds"] for r in records)
    attempts_made = [a for r in records for a in r["attempts"]]
    hits = [a["hit"] for a in attempts_made if a["hit"] and a["hit"]["delivered"]]
    losses = [r for r in records if r["losses"]]
    lines = [
        f"{len(records)} trials, {len(attempts_made)} attempts, {kills} kills in {seconds / 3600:.2f} h "
        f"({3600 * kills / max(1, seconds):.0f} an hour), {len(losses)} with a loss",
        *(
            f"  {what}: " + ", ".join(f"{key} {count}" for key, count in counted(hits, what))
            for what in ("signal", "target")
        ),
        "  job: " + ", ".join(f"{key} {count}" for key, count in counted(records, "job")),
        "  start: " + ", ".join(f"{key} {count}" for key, count in counted(attempts_made, "start")),
    ]
    tenth = max(1, len(records) // 10)
    for who in ("server", "sync"):
        for what, unit, scale in (("memory", "MB", 1e6), ("files", "", 1)):
            first, last = (sorted(r[who][what] for r in part if r[who]) for part in (records[:tenth], records[-tenth:]))
            if first and last:
                lines.append(
                    f"  {who} {what}: {first[len(first) // 2] / scale:.0f} -> {last[len(last) // 2] / scale:.0f} {unit}"
                )
    peaks = sorted(a["peak"] for a in attempts_made if a["peak"])
    lines.append(
        f"  peak memory of a stage: median {peaks[len(peaks) // 2] / 1e3:.0f} MB, most {peaks[-1] / 1e3:.0f} MB"
    )
    lines += [f"  loss in trial {r['trial']} ({r['job']}): {loss[:300]}" for r in losses for loss in r["losses"][:3]]
    return "\n".join(lines)


def counted(records: list[dict[str, Any]], key: str) -> list[tuple[str, int]]:
    """The values of a key with their numbers, the most frequent first."""
    values = [record[key] for record in records]
    return sorted(((value, values.count(value)) for value in set(values)), key=lambda pair: -pair[1])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--out", type=Path, default=Path("results/soak"), help="folder to start in, or to go on with")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trials", type=int, help="at most so many")
    parser.add_argument(
        "--only", nargs="+", metavar="STAGE", help="stages, of images in memory alone, and no real commands"
    )
    parser.add_argument("--summary", action="store_true", help="only say what the folder's trials found")
    args = parser.parse_args()
    if args.summary:
        print(summary(args.out / "trials.jsonl"))
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    soak = Soak(args.out, args.seed, real=not args.only)
    last = soak.number + args.trials if args.trials else sys.maxsize
    try:
        soak.prepare(
            tuple(job for job in JOBS if not args.only or (job.experiment == "aps" and job.stage in args.only))
        )
        deadline = time.monotonic() + 60 * args.minutes
        while time.monotonic() < deadline and soak.number < last:
            record = soak.trial()
            print(
                f"trial {record['trial']}: {record['job']}, {record['kills']} kills in {record['seconds']:.0f} s"
                + "".join(f"\n  LOSS {loss}" for loss in record["losses"]),
                flush=True,
            )
    except KeyboardInterrupt:
        pass
    finally:
        soak.close()
    text = summary(soak.file)
    print(text)
    return 1 if "loss in trial" in text else 0


if __name__ == "__main__":
    sys.exit(main())
