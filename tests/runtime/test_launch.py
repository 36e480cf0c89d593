"""What a stage asks the executor for, and the commands that start its processes. Nothing is started here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aps.errors import UserError
from aps.runtime import launch
from aps.settings.reading import load_study
from aps.settings.study import Study
from aps.stages import STAGES
from aps.workflow import resources

STUDY = """
study: asked
defaults:
  dataset: digits
  stages: [pretrain, knn]
  encoder: {arch: micro, image_size: 16, patch_size: 4}
"""


def load(tmp_path: Path, text: str) -> Study:
    file = tmp_path / "asked.yaml"
    file.write_text(STUDY + text)
    return load_study([file])


def asked(study: Study, stage: str, experiment: str | None = "a", attempt: int = 1) -> dict[str, Any]:
    """The job's resources and threads, as Snakemake finds them; without those left to the executor."""
    wildcards = SimpleNamespace(experiment=experiment) if experiment else SimpleNamespace(dataset="digits")
    found: dict[str, Any] = {"threads": resources.rule_threads(study, stage)(wildcards)}
    for name, value in resources.rule_resources(study, stage).items():
        found[name] = value(wildcards, attempt) if name in resources.BY_ATTEMPT else value(wildcards)
    assert found.pop("attempt") == attempt
    return {name: value for name, value in found.items() if value is not None}


def check(study: Study) -> None:
    for stage in (*STAGES, "data", "report"):
        resources.check_resources(study, stage)


def test_a_study_that_asks_for_nothing_leaves_all_to_the_executor(tmp_path: Path) -> None:
    study = load(tmp_path, "experiments: {a: {}}")
    check(study)
    signal = "--signal=USR1@300 --open-mode=append"
    assert asked(study, "pretrain") == {"threads": 1, "processes": 1, "nodes": 1, "slurm_extra": signal}


def test_a_gpu_job_asks_for_gpus_with_their_type_and_cpus_a_gpu(tmp_path: Path) -> None:
    resources = "resources: {pretrain: {gpus: 4, gpu_model: a100, cpus_per_gpu: 6, threads: 2}}\n"
    study = load(tmp_path, resources + "experiments: {a: {}}")
    check(study)
    found = asked(study, "pretrain")
    assert (found["gpu"], found["gpu_model"], found["cpus_per_gpu"], found["processes"]) == (4, "a100", 6, 4)
    assert found["tasks_per_gpu"] == 0  # torchrun starts the processes, Slurm one task
    assert "cpus_per_task" not in found and "mpi" not in found
    assert asked(study, "knn") == {
        "threads": 1, "processes": 1, "nodes": 1, "slurm_extra": "--signal=USR1@300 --open-mode=append",
    }  # fmt: skip


def test_threads_are_the_cores_of_one_node(tmp_path: Path) -> None:
    resources = "resources: {pretrain: {gpus: 8, nodes: 2, cpus_per_gpu: 6}, knn: {threads: 3}}\n"
    study = load(tmp_path, resources + "experiments: {a: {}}")
    assert (asked(study, "pretrain")["threads"], asked(study, "knn")["threads"]) == (24, 3)
    assert asked(study, "knn")["cpus_per_task"] == 3


def test_several_nodes_are_one_task_each_under_srun(tmp_path: Path) -> None:
    resources = "resources: {pretrain: {gpus: 8, nodes: 2, gpu_model: h100, cpus_per_gpu: 6}}\n"
    found = asked(load(tmp_path, resources + "experiments: {a: {}}"), "pretrain")
    assert (found["nodes"], found["mpi"], found["tasks"], found["processes"]) == (2, "srun", 2, 8)
    assert "--ntasks-per-node=1" in found["slurm_extra"] and "--gpus-per-node=h100:4" in found["slurm_extra"]


def test_an_experiment_overrides_the_stage_and_the_stage_the_default(tmp_path: Path) -> None:
    study = load(
        tmp_path,
        """
resources:
  default: {partition: cpu, account: lab, runtime: 60, qos: normal}
  pretrain: {partition: gpu, gpus: 1, gpu_model: a100}
experiments:
  a: {}
  b: {resources: {pretrain: {gpus: 0, partition: spot, constraint: icelake, processes: 2}}}
""",
    )
    check(study)
    a, b = asked(study, "pretrain", "a"), asked(study, "pretrain", "b")
    assert (a["slurm_partition"], a["slurm_account"], a["qos"], a["runtime"], a["gpu"]) == (
        "gpu",
        "lab",
        "normal",
        60,
        1,
    )
    assert (b["slurm_partition"], b["slurm_account"], b["constraint"], b["processes"]) == ("spot", "lab", "icelake", 2)
    assert not {"gpu", "gpu_model", "tasks_per_gpu"} & b.keys()
    assert asked(study, "data", None)["slurm_partition"] == asked(study, "knn", "a")["slurm_partition"] == "cpu"


def test_each_further_attempt_has_half_as_much_memory_again(tmp_path: Path) -> None:
    study = load(tmp_path, "resources: {pretrain: {mem_mb: 1000}}\nexperiments: {a: {}}")
    assert [asked(study, "pretrain", attempt=n)["mem_mb"] for n in (1, 2, 3)] == [1000, 1500, 2000]


@pytest.mark.parametrize(("runtime", "seconds"), [(2, 30), (5, 75), (20, 300), (1440, 300)])
def test_the_warning_comes_five_minutes_before_the_limit_or_a_quarter_of_a_short_job(
    runtime: int, seconds: int, tmp_path: Path
) -> None:
    study = load(tmp_path, f"resources: {{default: {{runtime: {runtime}}}}}\nexperiments: {{a: {{}}}}")
    assert f"--signal=USR1@{seconds} " in asked(study, "knn")["slurm_extra"]
    assert "slurm_extra" not in asked(study, "data", None)  # nothing there to save


def test_data_and_report_run_where_snakemake_does_unless_told_otherwise(tmp_path: Path) -> None:
    here = load(tmp_path, "experiments: {a: {}}")
    away = load(tmp_path, "resources: {data: {local: false}}\nexperiments: {a: {}}")
    assert resources.runs_here(here, "data") and resources.runs_here(here, "report")
    assert not resources.runs_here(away, "data") and resources.runs_here(away, "report")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "resources: {pretrain: {gpus: 3, nodes: 2}}\nexperiments: {a: {}}",
            r"experiment 'a': resources.pretrain: gpus 3 don't spread evenly over nodes 2",
        ),
        (
            "experiments: {a: {resources: {knn: {processes: 3, nodes: 2}}}}",
            r"experiment 'a': resources.knn: processes 3 don't spread evenly over nodes 2",
        ),
        (
            "experiments: {a: {resources: {knn: {mem_mb: 100}}}, b: {}}",
            r"resources.knn.mem_mb is set for some experiments but not for 'b'",
        ),
        (
            "resources: {knn: {local: true}}\nexperiments: {a: {}}",
            r"resources.knn.local = True .* only data and report",
        ),
        ("experiments: {a: {resources: {data: {threads: 2}}}}", r"experiment 'a': unknown key 'resources.data'"),
        ("resources: {pretrain: {gpu: 1}}\nexperiments: {a: {}}", r"unknown key 'resources.pretrain.gpu'; .*gpus"),
    ],
)
def test_resources_that_cannot_be_had_are_refused_in_one_sentence(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as error:
        check(load(tmp_path, text))
    assert "\n" not in str(error.value)


def test_one_node_runs_one_torchrun() -> None:
    command = launch._agents(4, 1)
    torchrun = [sys.executable, "-m", "aps.runtime.launch", "--nproc-per-node=4"]
    assert command == [*torchrun, "--standalone", "--local-addr=localhost"]


def test_two_nodes_run_one_torchrun_each_that_meet_on_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "31234")
    monkeypatch.setenv("OMP_NUM_THREADS", "24")
    command = launch._agents(8, 2)
    assert command[:4] == ["srun", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1"]
    assert "--cpus-per-task=24" in command
    assert command[-3:] == ["--nproc-per-node=4", "--nnodes=2", "--master-port=21234"]  # the same port on both, by job


def test_several_nodes_without_a_slurm_job_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(UserError, match="--nodes 2: several nodes need a Slurm job"):
        launch._agents(2, 2)


def test_processes_that_do_not_spread_over_the_nodes_are_refused() -> None:
    with pytest.raises(UserError, match="--processes 3 over --nodes 2"):
        launch._agents(3, 2)


def test_the_processes_of_a_node_share_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "12")
    assert launch._environment(4)["OMP_NUM_THREADS"] == "3"
    assert launch._environment(100)["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize(("ending", "status"), [("kill -9 $$", 137), ("kill -7 $$", 135), ("exit 3", 3), ("exit 0", 0)])
def test_the_rules_shell_passes_on_how_a_stage_ended_and_names_a_kill(ending: str, status: int) -> None:
    command = launch.SHELL_PREFIX + f"sh -c '{ending}' 2>&1 | tee /dev/null"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == status
    assert ("killed by SIGKILL, most often for its memory" in done.stderr) == (status == 137)
    assert ("killed by SIGBUS: /dev/shm is full, or the image" in done.stderr) == (status == 135)


ONE_MISTAKE = """
import os, sys, time
from argparse import Namespace
from aps import cli
from aps.errors import UserError

def run(args):
    if os.environ["RANK"] in sys.argv[1]:
        raise UserError("it is wrong")
    time.sleep(60)

cli.parse = lambda arguments: Namespace(run=run, verb="pretrain")
sys.exit(cli.main())
"""


@pytest.mark.parametrize("ranks", ["0", "1", "01"])
def test_a_mistake_is_told_once_whichever_process_meets_it(ranks: str, tmp_path: Path) -> None:
    """The others are killed as soon as one has ended."""
    (tmp_path / "work.py").write_text(ONE_MISTAKE)
    command = [
        sys.executable,
        "-m",
        "aps.runtime.launch",
        "--nproc-per-node=2",
        "--standalone",
        "--local-addr=localhost",
    ]
    done = subprocess.run([*command, str(tmp_path / "work.py"), ranks], capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and done.stderr.count("error: it is wrong") == 1 and "Traceback" not in done.stderr
