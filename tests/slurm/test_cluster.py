"""`snakemake --profile slurm all` on a real Slurm, with a job cancelled, one at its time limit, one preempted, one out of
memory and one that loses its node, while others run on two processes and on two nodes.

All experiments of tiny.yaml compute the same thing, so each must give the numbers of the undisturbed one. The study
runs once, as a user would run it; the tests read what it left.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import torch
from cluster import Cluster, job_fields, run
from safetensors.torch import load_file

from aps.results import saved_run
from aps.settings.reading import load_study
from aps.stages import STAGES

pytestmark = [pytest.mark.slurm, pytest.mark.soak, pytest.mark.slow, pytest.mark.xdist_group("slurm")]

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PATIENCE = 1200  # seconds for the whole study on a busy machine

# Snakemake as it is, but for the pauses between two looks at the queue: they grow by ten seconds each.
SNAKEMAKE = """
from snakemake_executor_plugin_slurm import Executor
Executor.next_seconds_between_status_checks = property(lambda self: 2, lambda self, seconds: None)
from snakemake.cli import main
main()
"""


@dataclass
class Study:
    """A finished `snakemake --profile slurm`, and what was seen of its jobs while they ran."""

    folder: Path
    output: str = ""
    status: int = -1
    jobs: dict[str, dict[str, dict[str, str]]] = field(
        default_factory=dict
    )  # experiment -> job id -> scontrol's fields
    submitted: set[str] = field(default_factory=set)  # rules that were seen in the queue
    environment: dict[str, str] = field(default_factory=dict)  # of the undisturbed training process

    def log(self, job: str) -> str:
        """Slurm's log of one job, all its runs."""
        (file,) = (self.folder / ".snakemake/slurm_logs").glob(f"*/*/{job}.log")
        return file.read_text()

    def encoder(self, experiment: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / f"results/tiny/{experiment}/seed0/pretrain/encoder.safetensors")

    def metrics(self, experiment: str, stage: str = "pretrain") -> dict[str, object]:
        return dict(json.loads((self.folder / f"results/tiny/{experiment}/seed0/{stage}/metrics.json").read_text()))

    def keys(self) -> dict[str, str]:
        """Experiment -> key of its pretraining, as soon as the images are there."""
        manifest = self.folder / "results/data/digits/manifest.json"
        if not manifest.exists():
            return {}
        study = load_study([HERE / "tiny.yaml"])
        return {
            name: saved_run("results", study.stage_settings(name, 0, "pretrain"), manifest, None).name
            for name in study.experiments
        }

    def memory(self, name: str) -> list[int]:
        """MB that each attempt asked for, in order."""
        fields = [self.jobs[name][job] for job in sorted(self.jobs[name], key=int)]
        return [int(re.search(r"mem=(\d+)M", f["TRES"]).group(1)) for f in fields]  # type: ignore[union-attr]


def checkout(folder: Path) -> Path:
    """The repository as a folder of links, so that results and Snakemake's own files stay out of it."""
    for name in ("Snakefile", "workflow", "profiles", "slurm", "config", "aps"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def command(study: str, *more: str) -> list[str]:
    polling = ["--slurm-init-seconds-before-status-checks", "2", "--slurm-keep-successful-logs", "--latency-wait", "10"]
    return [sys.executable, "-c", SNAKEMAKE, "--profile", "slurm", "--configfile", str(HERE / study), *polling, *more]


class Disturber:
    """Does to some of the study's jobs what their experiment is there for.

    Each is held (SIGSTOP) as soon as it has written a checkpoint, so that nothing depends on the machine's speed. Slurm
    itself lets it go on before it ends it.
    """

    def __init__(self, study: Study, cluster: Cluster) -> None:
        self.study, self.cluster = study, cluster
        self.held: dict[str, int] = {}  # experiment -> process
        self.done: set[str] = set()
        self.last = 0.0

    def look(self) -> None:
        for name in ("calm", "cancelled", "limited", "lost", "preempted"):
            folder = self.study.folder / "results/runs/pretrain" / self.study.keys().get(name, "not yet")
            if name not in self.held and list(folder.glob("state-*.pt")):
                self.held[name] = int(json.loads((folder / "attempt.json").read_text())["pid"])
                if name == "calm":
                    self._read_environment()
                else:
                    os.kill(self.held[name], signal.SIGSTOP)
        if time.monotonic() - self.last > 1:
            self._look_at_queue()
            self.last = time.monotonic()

    def _look_at_queue(self) -> None:
        for line in run("squeue", "-h", "-a", "-t", "all", "-o", "%i|%T|%k").splitlines():
            job, state, comment = line.split("|")
            self.study.submitted.add(comment.removeprefix("rule_").split("_wildcards")[0])
            if found := re.fullmatch(r"rule_(\w+?)_encoder_wildcards_(\w+)_0_\w+", comment):
                stage, experiment = found.groups()
                name = experiment if stage == "pretrain" else f"{experiment}.{stage}"
                fields = job_fields(job)
                self.study.jobs.setdefault(name, {}).setdefault(job, {}).update(fields)
                if state == "PENDING" and fields["Reason"] == "BeginTime":
                    # Slurm lets two minutes pass before a requeued job; the tests have no time for that.
                    run("scontrol", "update", f"JobId={job}", "StartTime=now", "TimeLimit=15")
                elif state == "RUNNING" and name in self.held and name not in self.done:
                    getattr(self, f"_{name}", lambda job: None)(job)

    def _read_environment(self) -> None:
        text = Path(f"/proc/{self.held['calm']}/environ").read_text()
        self.study.environment = dict(pair.split("=", 1) for pair in text.split("\0") if "=" in pair)

    def _cancelled(self, job: str) -> None:
        run("scancel", job)
        self.done.add("cancelled")

    def _lost(self, job: str) -> None:
        self.cluster.crash("n3")
        self.done.add("lost")

    def _preempted(self, job: str) -> None:
        run("sbatch", "--partition=urgent", "--nodelist=n4", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
        self.done.add("preempted")

    def _limited(self, job: str) -> None:
        """Brings the time limit near; Slurm looks every 30 s whom to warn."""
        if "limit" not in self.done:
            soon = datetime.now() + timedelta(seconds=120)
            run("scontrol", "update", f"JobId={job}", f"EndTime={soon:%Y-%m-%dT%H:%M:%S}")
            self.done.add("limit")
        elif _pending(self.held["limited"], signal.SIGUSR1):
            os.kill(self.held["limited"], signal.SIGCONT)
            self.done.add("limited")


def _pending(pid: int, number: signal.Signals) -> bool:
    masks = re.findall(r"(?:Sig|Shd)Pnd:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return any(int(mask, 16) >> (number - 1) & 1 for mask in masks)


def conduct(study: Study, arguments: list[str], watch: Callable[[], None] = lambda: None) -> Study:
    with (study.folder / "snakemake.out").open("wb") as out:
        process = subprocess.Popen(arguments, cwd=study.folder, stdout=out, stderr=out, start_new_session=True)
        until = time.monotonic() + PATIENCE
        try:
            while process.poll() is None and time.monotonic() < until:
                watch()
                time.sleep(0.1)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    study.output, study.status = (study.folder / "snakemake.out").read_text(), process.wait()
    return study


@pytest.fixture(scope="module")
def study(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Study]:
    study = Study(checkout(tmp_path_factory.mktemp("tiny")))
    conduct(study, command("tiny.yaml", "all"), Disturber(study, cluster).look)
    assert study.status == 0, study.output[-6000:]
    yield study


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def first_losses(study: Study, experiment: str) -> tuple[float, float]:
    """Of the first epoch of the experiment and of the undisturbed one.

    Sums over processes round differently, and training makes the last digit grow tenfold every few steps, with another
    number of threads just as well. Another batch, view or sampling would show at once.
    """
    histories = [study.folder / f"results/tiny/{name}/seed0/pretrain/history.jsonl" for name in (experiment, "calm")]
    first, second = (float(json.loads(file.read_text().splitlines()[0])["loss"]) for file in histories)
    return first, second


def test_a_job_sees_the_gpu_that_slurm_gave_it_and_no_other(study: Study) -> None:
    (fields,) = study.jobs["calm"].values()
    index = re.search(r"IDX:(\d)", fields["GRES"])
    assert fields["JOB_GRES"] == "gpu:pretended:1" and index is not None
    assert study.environment["CUDA_VISIBLE_DEVICES"] == index.group(1)


def test_all_stages_are_jobs_but_data_and_report(study: Study) -> None:
    single = [stage for stage in STAGES if stage != "embed"]  # a group of small stages: test_groups.py
    assert study.submitted >= {f"{stage}_encoder" for stage in single}
    assert not {name for name in study.submitted if "dataset" in name or "report" in name or "tracking" in name}
    assert (study.folder / "results/tiny/report/report.html").exists()
    assert study.metrics("calm", "detection")["settings_digest"]


def test_settings_of_the_cluster_reach_slurm(study: Study) -> None:
    (calm,), lost = study.jobs["calm"].values(), next(iter(study.jobs["lost"].values()))
    assert (calm["Partition"], calm["TimeLimit"], study.memory("calm")) == ("normal", "00:15:00", [4000])
    assert calm["CpusPerTres"] == "gres:gpu:1"
    assert (lost["Partition"], lost["Features"]) == ("spot", "cpu")


def test_two_gpus_run_two_processes_that_compute_the_same(study: Study) -> None:
    (fields,) = study.jobs["pair"].values()
    assert (fields["JOB_GRES"], fields["NumNodes"]) == ("gpu:pretended:2", "1")
    assert study.metrics("pair")["hardware"]["processes"] == 2  # type: ignore[index]
    first, second = first_losses(study, "pair")
    assert first == pytest.approx(second, rel=1e-5)


def test_two_nodes_run_one_process_each_that_compute_the_same(study: Study) -> None:
    ((job, fields),) = study.jobs["spread"].items()
    assert (fields["NumNodes"], fields["TresPerNode"]) == ("2", "gres:gpu:pretended:1")
    assert {"on n1", "on n2"} <= set(re.findall(r"node \d: Slurm job \d+ (on n\d)", study.log(job)))
    assert study.metrics("spread")["hardware"]["processes"] == 2  # type: ignore[index]
    first, second = first_losses(study, "spread")
    assert first == pytest.approx(second, rel=1e-5)


def test_a_cancelled_job_is_retried_from_its_checkpoint_with_the_same_result(study: Study) -> None:
    first, second = sorted(study.jobs["cancelled"], key=int)
    assert study.jobs["cancelled"][first]["JobState"] == "CANCELLED"
    assert f"Slurm job {first} was cancelled (scancel)" in study.log(first)
    done = int(re.search(r"stopped: .* after (\d+) of 80 batches", study.log(first)).group(1))  # type: ignore[union-attr]
    assert done > 0 and _first_batch(study.log(second)) >= done
    assert same(study.encoder("cancelled"), study.encoder("calm"))


def test_a_job_at_its_time_limit_requeues_itself_with_the_same_result(study: Study) -> None:
    ((job, fields),) = study.jobs["limited"].items()
    assert fields["Restarts"] == "1"
    assert f"Slurm job {job} goes back to the queue before its time limit" in study.log(job)
    assert f"Slurm job {job} is back from the queue" in study.log(job)
    assert same(study.encoder("limited"), study.encoder("calm"))


def test_a_preempted_job_makes_room_and_comes_back_with_the_same_result(study: Study) -> None:
    ((job, fields),) = study.jobs["preempted"].items()
    newer = "ReqTRES" in fields  # Slurm 24.11 queues it once more when it has finished
    assert fields["Restarts"] == "1" or (newer and fields["Restarts"] == "2")
    assert f"Slurm job {job} goes back to the queue to make room for another" in study.log(job)
    assert f"Slurm job {job} is back from the queue" in study.log(job)
    assert same(study.encoder("preempted"), study.encoder("calm"))


def test_a_job_that_loses_its_node_comes_back_with_the_same_result(study: Study) -> None:
    ((job, fields),) = study.jobs["lost"].items()
    assert fields["Restarts"] == "1"
    assert f"Slurm job {job} is back from the queue" in study.log(job)
    assert same(study.encoder("lost"), study.encoder("calm"))


def test_a_job_killed_for_its_memory_is_retried_with_more(study: Study) -> None:
    memory = study.memory("calm.knn")
    assert memory in ([800, 1200], [800, 1200, 1600])
    first, second, *_ = sorted(study.jobs["calm.knn"], key=int)
    assert "exceeded memory limit" in study.log(first)
    assert f"the attempt before this one, Slurm job {first} on n" in study.log(second)


def test_a_finished_study_has_nothing_to_do_here_or_on_another_machine(study: Study, tmp_path: Path) -> None:
    elsewhere = checkout(tmp_path)
    shutil.copytree(study.folder / "results", elsewhere / "results")  # keeps times; Snakemake's own records are missing
    for file in (study.folder / "results").glob("*/seed0/*/metrics.json"):
        os.utime(file, (1, 1))
    for folder in (study.folder, elsewhere):
        done = subprocess.run(command("tiny.yaml", "all", "-n"), cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0 and "Nothing to be done" in done.stdout + done.stderr, done.stdout + done.stderr


@pytest.fixture(scope="module")
def broken(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Study:
    study = Study(checkout(tmp_path_factory.mktemp("broken")))
    return conduct(study, command("broken.yaml", "--retries", "2", "pretrain", "knn"))


def test_a_failed_job_shows_its_message_log_and_job_id_and_stops_only_what_needs_it(broken: Study) -> None:
    assert broken.status == 1
    assert "the pretraining loss became nan; lower pretrain.lr" in broken.output
    assert "results/broken/logs/wrong/seed0/pretrain.log" in broken.output
    assert re.search(r"external_jobid: \d+", broken.output)
    assert (broken.folder / "results/broken/right/seed0/pretrain/metrics.json").exists()
    assert "rule knn_encoder" not in broken.output


def test_retries_do_not_run_a_mistake_again(broken: Study) -> None:
    log = (broken.folder / "results/broken/logs/wrong/seed0/pretrain.log").read_text()
    assert broken.output.count("not tried again") >= 2, broken.output
    assert "not tried again" in log and "Traceback" not in log


def test_data_is_a_job_where_the_study_says_so(broken: Study) -> None:
    (log,) = (broken.folder / ".snakemake/slurm_logs/rule_prepare_dataset").rglob("*.log")
    assert "digits: prepared" in log.read_text()


def _first_batch(log: str) -> int:
    """The first batch that a log tells of."""
    found = re.search(r"(\d+)/80 batches", log)
    return int(found.group(1)) if found else 0
