"""Real processes under the project's launcher: they compute what one process does, and stop and fail as one."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import pytest
import small
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from aps.errors import Preempted
from aps.results import StageJob
from aps.runtime.processes import Distributed
from aps.training import loop

# One batch an epoch, four steps. Rounding, which differs with the number of processes, grows tenfold every few steps
# of training; another batch, view, sampling or learning rate would show at once.
CHANGES = {"epochs": 200, "batch_size": 96, "warmup_epochs": 2}


def start(job: StageJob, processes: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "ignore", "-m", "aps", "pretrain", "--settings", job.settings.to_json()]
    command += ["--manifest", str(job.manifest), "--results", str(job.out.parent), "--out", str(job.out)]
    command += ["--processes", str(processes), "--checkpoint-minutes", "0.001"]
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "APS_DEVICE": "cpu"}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)


def journal(job: StageJob) -> list[dict[str, float]]:
    lines = (job.checkpoints / "history.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


class Story(NamedTuple):
    whole: StageJob  # one process, stopped late, never finished
    moved: StageJob  # one process for an epoch, two until SIGTERM, one again for an epoch
    status: int
    log: str
    on_two: int  # epochs done when the two had stopped


@pytest.fixture(scope="module")
def story(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Story:
    whole, moved = (small.job("pretrain", digits, tmp_path_factory.mktemp(name), **CHANGES) for name in ("one", "two"))
    small.run(whole, stop_after=4)
    small.run(moved, stop_after=1)
    process = start(moved, 2)
    try:
        while len(list(moved.checkpoints.glob("state-*.pt"))) < 2:
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        log = process.communicate(timeout=120)[1]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    on_two = len(journal(moved))
    small.run(moved, stop_after=1)
    return Story(whole, moved, process.returncode, log, on_two)


def test_two_processes_compute_what_one_does(story: Story) -> None:
    one, two = journal(story.whole), journal(story.moved)
    assert [line["lr"] for line in one] == [line["lr"] for line in two[: len(one)]]
    assert two[0]["loss"] == one[0]["loss"]
    assert two[1]["loss"] == pytest.approx(one[1]["loss"], rel=1e-4)  # the first epoch on two processes
    assert two[1]["positive_cosine"] == pytest.approx(one[1]["positive_cosine"], abs=1e-3)
    assert one[1]["loss"] != pytest.approx(one[0]["loss"], rel=1e-3)  # the tolerance can tell epochs apart


def test_processes_asked_to_stop_save_and_end_as_one_and_go_on_in_another_number(story: Story) -> None:
    assert story.status == 75, story.log
    assert len(re.findall(r"after \d+ of 200 batches", story.log)) == 1 and "Traceback" not in story.log
    assert 1 < story.on_two < 200
    assert [line["step"] for line in journal(story.moved)] == [4 * e for e in range(1, story.on_two + 2)]


def test_a_mistake_is_told_once_however_many_processes_make_it(digits: Path, tmp_path: Path) -> None:
    process = start(small.job("pretrain", digits, tmp_path, batch_size=33), 2)
    log = process.communicate(timeout=120)[1]
    assert process.returncode == 2
    assert len(re.findall("^error: ", log, re.MULTILINE)) == 1 and "33" in log and "Traceback" not in log


# Two processes in the middle of a log window. Stopped, all of them save; a timed checkpoint is saved by the first alone.

WORLD, STOP, CHECKPOINT, KILL = 2, 10, 14, 17  # batches of the run
LONG = {"batch_size": 4, "epochs": 2}  # 25 batches an epoch, and 22 where a tenth is held out
TRAINED = ("pretrain", "finetune", "linear_probe")


def attempt(job: StageJob, distributed: Distributed, ends: int | None = None) -> None:
    """The stage on this process and the others: to its end, or until a request to stop, or a kill, after `ends` batches."""
    done = max((int(file.stem.removeprefix("state-")) for file in job.checkpoints.glob("state-*.pt")), default=0)

    def asked(_: Distributed) -> bool:
        nonlocal done
        done += 1
        if done == KILL and ends == KILL:
            raise SystemExit("killed")
        return done == STOP and ends == STOP

    dist.barrier()  # all have looked for checkpoints
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "stop_requested", asked)
        patch.setattr(loop.Checkpoints, "due", lambda self: self.writes and done == CHECKPOINT)
        if not distributed.main:  # an old listing of a file server: where to go on from is the first process's choice
            patch.setattr(loop.Checkpoints, "_files", lambda self: [])
        patch.setattr(small.module(job.settings.stage), "processes", lambda: nullcontext(distributed))
        with pytest.raises((Preempted, SystemExit)) if ends else nullcontext():
            small.module(job.settings.stage).run(job)
    dist.barrier()  # the first has written its files


def both(rank: int, folder: Path, jobs: list[tuple[StageJob, StageJob]]) -> None:
    os.environ |= {"TORCHELASTIC_RUN_ID": "test", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    distributed = Distributed(rank, WORLD, torch.device("cpu"))
    for whole, disturbed in jobs:
        attempt(whole, distributed)
        for ends in (STOP, KILL, None):
            attempt(disturbed, distributed, ends)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def disturbed(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[StageJob, StageJob]]:
    """Each stage's run that was left alone, and the one that was stopped and killed."""
    jobs = {
        stage: tuple(small.job(stage, digits, tmp_path_factory.mktemp(stage), **LONG) for _ in range(2))
        for stage in TRAINED
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "none")
        mp.spawn(both, (tmp_path_factory.mktemp("gloo"), list(jobs.values())), nprocs=WORLD)
    return jobs  # type: ignore[return-value]


@pytest.mark.parametrize("stage", TRAINED)
def test_figures_of_processes_that_end_in_a_log_window_are_those_of_undisturbed_ones(
    stage: str, disturbed: dict[str, tuple[StageJob, StageJob]]
) -> None:
    whole, other = (small.history(job) for job in disturbed[stage])
    assert other == whole and [line["epoch"] for line in whole] == [1, 2]
    assert small.metrics(disturbed[stage][0]) == small.metrics(disturbed[stage][1])


def test_every_process_has_its_own_rows_of_the_global_batch() -> None:
    rows = [Distributed(rank, 4, torch.device("cpu")).rows(512) for rank in range(4)]
    assert torch.cat([torch.arange(512)[own] for own in rows]).tolist() == list(range(512))
    assert {own.stop - own.start for own in rows} == {128}


def test_one_process_needs_no_group() -> None:
    alone = small.ONE
    value = torch.tensor([1.5, 2.5])
    alone.barrier()
    assert alone.main and alone.rows(7) == slice(0, 7) and torch.equal(alone.mean(value), value)
