"""What a rule is given of resources, and which stages of an encoder share a job."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from pretended_gpus import pretend_gpus
from tiny_study import checkout

from aps.layout import SHARE
from aps.settings.reading import load_study
from aps.settings.study import Study
from aps.stages import STAGES
from aps.workflow.plan import Plan, one_of
from aps.workflow.resources import TOGETHER, TURN, Machine, groups, rule_resources
from benchmarks.planning import STAGES_RUN, finish, lay_out

ALL = ["pretrain", "finetune", "linear_probe", "knn", "embed"]
SMALL = {"linear_probe", "knn", "embed"}


def study(folder: Path, resources: dict[str, Any], experiments: dict[str, Any] | None = None, **own: Any) -> Study:
    content = {
        "resources": resources,
        "defaults": {"dataset": "digits", "stages": ALL},
        "experiments": experiments or {"a": {}, "b": {"resources": own}},
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(content))
    return load_study([folder / "study.yaml"])


def plan(folder: Path, resources: dict[str, Any], turns: bool = True, **own: Any) -> Plan:
    made = Plan(study(folder, resources, **own), [], {})
    made.turns = turns
    return made


def sweep(folder: Path, weights: dict[str, str], resources: dict[str, Any] | None = None, **own: Any) -> Plan:
    """Of experiments with such weights, and resources of their `own`, beside `p`, which pretrains."""
    others = {
        name: {"stages": ["knn"], "encoder": {"weights": value}, "resources": own.get(name, {})}
        for name, value in weights.items()
    }
    return plan(folder, resources or {}, experiments={"p": {}} | others)


def asks(made: Plan, experiment: str, stage: str, resource: str) -> Any:
    value = made.resources(stage)[resource]
    return value(SimpleNamespace(experiment=experiment)) if callable(value) else value


def group_of(made: Plan, experiment: str, stage: str, seed: int = 0) -> Any:
    """The group of a job, as Snakemake finds it."""
    value = made.group(stage)
    wildcards = SimpleNamespace(experiment=experiment, seed=str(seed))
    return value(wildcards) if callable(value) else value and value.format(**vars(wildcards))


def test_a_rule_gets_a_value_where_all_experiments_ask_alike_and_a_function_where_not(tmp_path: Path) -> None:
    made = plan(tmp_path, {"default": {"runtime": 20}, "knn": {"threads": 3}}, finetune={"runtime": 90})
    assert (made.threads("knn"), made.resources("knn")["runtime"]) == (3, 20)
    runtime = made.resources("finetune")["runtime"]
    assert [runtime(SimpleNamespace(experiment=name)) for name in "ab"] == [20, 90]


@pytest.mark.parametrize(
    ("asked", "machine", "threads"),
    [
        ({}, Machine(16), 1),
        ({"threads": 3}, Machine(16), 3),
        ({"gpus": 1}, Machine(), 1),  # on a cluster
        ({"gpus": 1}, Machine(16), 5),  # of the three pretrainings
        ({"gpus": 1}, Machine(16, gpus=1), 16),
        ({"gpus": 1}, Machine(16, gpus=2), 8),
        ({"gpus": 2}, Machine(16, gpus=2), 16),
        ({"gpus": 4}, Machine(2, gpus=2), 4),
        ({"gpus": 1, "cpus_per_gpu": 6}, Machine(16), 6),
        ({"gpus": 1, "threads": 2}, Machine(16), 2),
    ],
)
def test_a_job_on_a_gpu_of_this_machine_has_its_share_of_the_cores(
    tmp_path: Path, asked: dict[str, Any], machine: Machine, threads: int
) -> None:
    content = {
        "resources": {"pretrain": asked},
        "defaults": {"dataset": "digits", "stages": ["pretrain", "knn"]},
        "experiments": {"a": {"seeds": [0, 1]}, "b": {}, "c": {"encoder": {"weights": "random"}, "stages": ["knn"]}},
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content))
    made = Plan(load_study([tmp_path / "study.yaml"]), [], {})
    made.machine = machine
    assert (made.threads("pretrain"), made.threads("knn")) == (threads, 1)


def test_snakemakes_cores_and_gpus_are_what_jobs_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = {
        "resources": {"pretrain": {"gpus": 1}},
        "defaults": {"dataset": "digits", "stages": ["pretrain"]},
        "experiments": {"a": {"seeds": [0, 1]}},
    }
    checkout(tmp_path, content)
    limit = ("--resources", "gpu=1")
    for here, options, threads in (
        ([], (), "6"),
        ([], limit, "12"),
        (["GPU-a"], (), "12"),
        (["GPU-a", "GPU-b"], limit, "12"),
    ):
        pretend_gpus(tmp_path / "bin", here, monkeypatch)
        command = [sys.executable, "-m", "snakemake", "-n", "--configfile", "study.yaml", "--cores", "12", *options]
        planned = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert re.findall(r"^    threads: (\d+)$", planned.stdout, re.MULTILINE) == [threads] * 2, planned.stdout


@pytest.mark.parametrize(
    ("given", "machine", "limits"),
    [
        ({}, {}, {"gpu": 2}),
        ({"gpu": 1}, {}, {"gpu": 1}),
        ({}, {"nodes": 100}, {}),  # jobs are submitted
        ({}, {"remote": True}, {}),  # one that was
    ],
)
def test_gpu_jobs_of_this_machine_are_limited_to_its_gpus(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: dict[str, int],
    machine: dict[str, Any],
    limits: dict[str, int],
) -> None:
    pretend_gpus(tmp_path / "bin", ["GPU-a", "GPU-b"], monkeypatch)
    made = plan(tmp_path, {})
    settings = SimpleNamespace(cores=8, nodes=machine.get("nodes"))
    remote = machine.get("remote", False)
    workflow = SimpleNamespace(
        resource_settings=settings, global_resources=given, remote_exec=remote, is_main_process=not remote
    )
    made.share(workflow)
    assert workflow.global_resources == limits and made.machine.gpus == limits.get("gpu")


def test_what_no_experiment_asks_for_is_left_to_the_executor(tmp_path: Path) -> None:
    assert set(plan(tmp_path, {}, turns=False).resources("knn")) == {"attempt", "processes", "nodes", "slurm_extra"}


def test_memory_grows_with_the_attempt(tmp_path: Path) -> None:
    mem_mb = plan(tmp_path, {"default": {"mem_mb": 1000}}).resources("knn")["mem_mb"]
    assert [mem_mb(SimpleNamespace(experiment="a"), attempt) for attempt in (1, 2, 3)] == [1000, 1500, 2000]


def test_the_small_stages_of_an_encoder_are_a_group_and_take_turns(tmp_path: Path) -> None:
    made = plan(tmp_path, {"default": {"runtime": 20, "mem_mb": 1000}})
    assert {stage for stage in ALL if made.group(stage)} == SMALL == {name for name in STAGES if STAGES[name].small}
    assert {stage for stage in ALL if made.resources(stage).get(TURN) == 1} == SMALL


def test_without_a_profile_that_gives_turns_each_stage_is_a_job_of_its_own(tmp_path: Path) -> None:
    made = plan(tmp_path, {"default": {"runtime": 20}}, turns=False)
    assert not any(made.group(stage) or TURN in made.resources(stage) for stage in ALL)


@pytest.mark.parametrize(
    "one",
    [
        {"partition": "long"}, {"account": "other"}, {"qos": "high"}, {"constraint": "cpu"}, {"runtime": 5}, {"mem_mb": 900},
        {"nodes": 2, "processes": 2}, {"gpus": 1, "gpu_model": "a100"}, {"checkpoint_minutes": 3.0},
    ],
    ids=str,
)  # fmt: skip
def test_what_can_not_be_put_together_is_not(one: dict[str, Any], tmp_path: Path) -> None:
    """The others of the encoder stay together."""
    made = plan(tmp_path, {"knn": one})
    assert {stage: made.group(stage) for stage in ALL if made.group(stage)} == {
        "linear_probe": TOGETHER,
        "embed": TOGETHER,
    }
    assert TURN not in made.resources("knn") and made.resources("embed")[TURN] == 1


def test_an_experiment_with_another_partition_leaves_the_others_as_they_are(tmp_path: Path) -> None:
    made = plan(tmp_path, {}, knn={"partition": "long"})
    assert [group_of(made, name, "knn") for name in "ab"] == ["a_seed0_evaluation", None]
    assert {group_of(made, "b", stage) for stage in ("linear_probe", "embed")} == {"b_seed0_evaluation"}
    turn = made.resources("knn")[TURN]
    assert [turn(SimpleNamespace(experiment=name)) for name in "ab"] == [1, None]
    assert made.group("embed") == TOGETHER and made.resources("embed")[TURN] == 1


@pytest.mark.parametrize("one", [{"threads": 4}, {"workers": 2}, {"gpus": 1}, {"processes": 2}], ids=str)
def test_numbers_of_which_the_most_is_asked_for_may_differ(one: dict[str, Any], tmp_path: Path) -> None:
    assert all(plan(tmp_path, {"knn": one}).group(stage) == TOGETHER for stage in SMALL)


def test_experiments_that_start_from_one_encoder_are_a_group_for_each_seed(tmp_path: Path) -> None:
    made = sweep(tmp_path, {"x": "experiment:p", "y": "experiment:p", "other": "mine.safetensors"})
    assert {group_of(made, name, "knn", seed=3) for name in "pxy"} == {"p_seed3_evaluation"}
    assert group_of(made, "y", "knn", seed=4) == "p_seed4_evaluation"
    assert group_of(made, "other", "knn") == "other_seed0_evaluation"
    assert made.resources("knn")[TURN] == 1


def test_experiments_that_start_from_one_file_are_a_group(tmp_path: Path) -> None:
    made = sweep(tmp_path, {"x": "a/mine.safetensors", "y": "a/mine.safetensors", "z": "b/mine.safetensors"})
    assert [group_of(made, name, "knn")[0] for name in "pxyz"] == ["p", "x", "x", "z"]


def test_random_weights_are_an_experiments_own(tmp_path: Path) -> None:
    made = sweep(tmp_path, {"x": "random", "y": "random"})
    assert made.group("knn") == TOGETHER and group_of(made, "y", "knn") == "y_seed0_evaluation"


def test_what_can_not_be_combined_in_a_sweep_is_together_with_its_like(tmp_path: Path) -> None:
    long, slow = {"knn": {"partition": "long"}}, {"knn": {"partition": "slow"}}
    weights = dict.fromkeys(("x", "y", "z"), "experiment:p")
    made = sweep(tmp_path, weights, x=long, y=slow, z=long)
    assert [group_of(made, name, "knn") for name in "pxyz"] == [
        "p_seed0_evaluation",
        "p_seed0_evaluation_2",
        None,
        "p_seed0_evaluation_2",
    ]
    assert group_of(made, "p", "embed") == "p_seed0_evaluation"


def test_stages_of_one_job_are_warned_alike(tmp_path: Path) -> None:
    """By the shortest of them: Slurm takes one warning for a job."""
    made = study(tmp_path, {"default": {"runtime": 60}, "knn": {"runtime": 4}})
    one = SimpleNamespace(experiment="a")
    asked = [rule_resources(made, stage, groups(made))["slurm_extra"](one) for stage in sorted(SMALL)]
    assert set(asked) == {"--signal=USR1@60 --open-mode=append"}
    assert rule_resources(made, "embed")["slurm_extra"](one) == "--signal=USR1@300 --open-mode=append"


def test_a_sweep_is_warned_by_the_shortest_of_all_its_experiments(tmp_path: Path) -> None:
    resources = {"x": {"knn": {"runtime": 4}}, "y": {"knn": {"runtime": 2, "partition": "long"}}}
    made = sweep(tmp_path, {"x": "experiment:p", "y": "experiment:p"}, {"default": {"runtime": 60}}, **resources)
    asked = {
        (e, s): asks(made, e, s, "slurm_extra").split()[0] for e, s in (("p", "embed"), ("x", "knn"), ("y", "knn"))
    }
    assert asked == {
        ("p", "embed"): "--signal=USR1@60",
        ("x", "knn"): "--signal=USR1@60",
        ("y", "knn"): "--signal=USR1@30",
    }


def test_no_two_groups_wait_for_each_other(tmp_path: Path) -> None:
    """Of equal runs one is computed and the others wait for it; here they are in two partitions, crosswise."""
    knn = {"a": 5, "b": 5, "c": 7, "d": 7}
    experiments: dict[str, Any] = {
        name: {"encoder": {"weights": "experiment:p"}, "knn": {"k": [k]}, "stages": ["knn"]} for name, k in knn.items()
    }
    for name in "bc":
        experiments[name]["resources"] = {"knn": {"partition": "long"}}
    made = plan(tmp_path, {}, experiments={"p": {"stages": ["pretrain"]}} | experiments)
    jobs = [SimpleNamespace(experiment=name, seed="0", stage="knn") for name in knn]
    after = {job.experiment: Path(made.inputs(job)["after"]).parts[2] for job in jobs if "after" in made.inputs(job)}
    waits = {(group_of(made, one, "knn"), group_of(made, other, "knn")) for one, other in after.items()}
    assert len(after) == 2 and len(waits) == 1, after


def test_the_slurm_profile_names_the_group_and_the_turn() -> None:
    profile = yaml.safe_load((SHARE / "workflow/profiles/slurm/config.yaml").read_text())
    ((name, count),) = [entry.split("=") for entry in profile["group-components"]]
    assert name == TOGETHER and int(count) >= len(SMALL)
    assert profile["keep-incomplete"], "a stage that fails takes the results of its job's others away"
    assert profile["resources"] == [f"{TURN}=1"] and profile["set-resource-scopes"] == [f"{TURN}=local"]


@pytest.mark.parametrize(("stage", "file"), [(stage, file) for stage in STAGES_RUN for file in STAGES[stage].files])
def test_a_target_notices_any_missing_file_of_its_runs(
    stage: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although it names metrics.json alone: where that is missing Snakemake makes it, else the mark makes it run."""
    monkeypatch.chdir(tmp_path)
    finish(lay_out(tmp_path, 2))
    made = Plan.load(["many.yaml"], {})
    assert not [ran for ran in STAGES_RUN if made.outdated in made.outputs(ran)]
    Path("results/many/e0001/seed2", stage, file).unlink()
    made = Plan.load(["many.yaml"], {})
    marked = {ran for ran in STAGES_RUN if made.outdated in made.outputs(ran)}
    if file == "metrics.json":
        assert stage not in marked and f"results/many/e0001/seed2/{stage}/metrics.json" in made.outputs(stage)
    else:
        assert stage in marked


@pytest.mark.parametrize(
    "names", [["a"], ["a", "ab"], ["a.b", "a-b", "ab", "x"], [f"e{i:03d}" for i in range(200)], ["e", "e1", "e10"]]
)
def test_one_of_matches_the_names_and_nothing_else(names: list[str]) -> None:
    pattern = re.compile(one_of(names))
    near = {name[:-1] for name in names} | {f"{name}{more}" for name in names for more in "0b."} | {"", "a+b", "b"}
    assert all(pattern.fullmatch(name) for name in names)
    assert not [name for name in near - set(names) if pattern.fullmatch(name)]
