"""The resources that each stage asks the executor for, by the names that Snakemake and its Slurm plugin use.

Other executors read the same names or ignore them. `aps.runtime.launch` starts the processes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from aps.errors import UserError
from aps.layout import encoder_file
from aps.settings.blocks import ResourceSettings
from aps.settings.study import Study
from aps.stages import STAGES

WARNING_SECONDS = 300  # before the time limit, when Slurm sends a signal; it may be a minute early
# The group of an encoder's small stages. Its wildcards are the rules'; profiles name it as it is here.
TOGETHER = "{experiment}_seed{seed}_evaluation"
TURN = "turn"  # a resource: the job of a group has one, so its stages run one after the other
MEMORY_GROWTH = 0.5  # share of mem_mb, added for each attempt after the first: the kill may have been for memory
NO_GROUPS: Mapping[tuple[str, str], str] = {}
BY_ATTEMPT = ("mem_mb", "attempt")  # resources that differ between attempts


def runs_here(study: Study, stage: str) -> bool:
    """Whether data or report run beside Snakemake, perhaps on a login node, and are not submitted as jobs."""
    return study.stage_resources(stage).local is not False


class Machine(NamedTuple):
    """What Snakemake may use of the machine on which it runs the jobs itself."""

    cores: int = 1  # --cores; 1 where jobs are submitted
    gpus: int | None = None  # --resources gpu=N, or those that are visible; None: no limit


NO_SHARE = Machine()


def rule_threads(study: Study, stage: str, machine: Machine = NO_SHARE) -> Callable[[Any], int]:
    """A function of the wildcards: the CPU cores of each node.

    Where a job on GPUs says nothing, it shares the machine's cores with the jobs of its stage that can run beside it,
    because one core would not feed a GPU. One without GPUs has one core: more would change how sums are rounded, and
    so figures, from machine to machine.
    """
    jobs = sum(len(e.seeds) for e in study.experiments.values() if stage in e.stages)

    def threads(wildcards: Any) -> int:
        r = _settings(study, stage, wildcards)
        if r.threads or not r.gpus or r.cpus_per_gpu:
            return r.threads or _gpus_per_node(r) * (r.cpus_per_gpu or 1) or 1
        beside = jobs if machine.gpus is None else min(jobs, max(1, machine.gpus // r.gpus))
        return max(_gpus_per_node(r), machine.cores // max(1, beside))

    return threads


def attempt_number(wildcards: Any, attempt: int) -> int:
    """For the verb, which does not repeat an attempt that ended in a mistake."""
    return attempt


def rule_resources(
    study: Study, stage: str, groups: Mapping[tuple[str, str], str] = NO_GROUPS
) -> dict[str, Callable[..., Any]]:
    """For each resource a function of the wildcards, and perhaps the attempt. None means the executor's default.

    `gpu`, `mem_mb`, `runtime` and `nodes` are standard names; the others are those of the Slurm executor.

    Args:
        groups: those of the study, if the profile allows groups.
    """

    def resource(value: Callable[[ResourceSettings], Any]) -> Callable[..., Any]:
        return lambda wildcards: value(_settings(study, stage, wildcards))

    def turn(wildcards: Any) -> int | None:
        return 1 if (wildcards.experiment, stage) in groups else None

    def mem_mb(wildcards: Any, attempt: int) -> int:
        return int((_settings(study, stage, wildcards).mem_mb or 0) * (1 + MEMORY_GROWTH * (attempt - 1)))

    by_attempt: dict[str, Callable[..., Any]] = {"attempt": attempt_number}
    if any(r.mem_mb for r in _variants(study, stage).values()):
        by_attempt["mem_mb"] = mem_mb
    return (
        by_attempt
        | {
            "processes": resource(_processes),
            "workers": resource(lambda r: r.workers),
            "checkpoint_minutes": resource(lambda r: str(r.checkpoint_minutes) if r.checkpoint_minutes else None),
            "runtime": resource(lambda r: r.runtime),
            "gpu": resource(lambda r: r.gpus or None),
            "gpu_model": resource(lambda r: r.gpu_model if r.gpus else None),
            # `threads` would not do: Snakemake limits it to the cores of the machine on which it runs.
            "cpus_per_task": resource(lambda r: None if r.gpus and r.cpus_per_gpu else r.threads),
            "cpus_per_gpu": resource(lambda r: r.cpus_per_gpu if r.gpus else None),
            # A GPU job is one task, in which torchrun starts the processes. Without this, some versions start a task
            # for each GPU.
            "tasks_per_gpu": resource(lambda r: 0 if r.gpus else None),
            "nodes": resource(lambda r: r.nodes or 1),
            # On several nodes, the command calls srun, with one task on each node.
            "mpi": resource(lambda r: "srun" if _nodes(r) > 1 else None),
            "tasks": resource(lambda r: _nodes(r) if _nodes(r) > 1 else None),
            "slurm_partition": resource(lambda r: r.partition),
            "slurm_account": resource(lambda r: r.account),
            "qos": resource(lambda r: r.qos),
            "constraint": resource(lambda r: r.constraint),
            "slurm_extra": _slurm_options(study, stage, groups),
        }
        | ({TURN: turn} if groups else {})
    )


def groups(study: Study) -> dict[tuple[str, str], str]:
    """The group of each small stage (experiment, stage) that has one, with `{seed}` to be filled in.

    A group has the small stages of all experiments that start from one encoder; random weights and timm's are an
    experiment's own. They run one after the other (TURN), so Snakemake asks for the sum of their times, and for the
    maximum of every other resource. What can't be combined is apart, by itself or with its like: several nodes, another
    partition, memory or time for only one of the stages.
    """
    encoders: dict[Any, dict[Any, list[tuple[str, str]]]] = {}  # encoder -> what must be alike -> stages
    for name, e in study.experiments.items():
        kinds = encoders.setdefault(encoder_file(study, name, 0) or name, {})  # seeds never share a group
        for stage in e.stages:
            r = study.stage_resources(stage, name)
            if STAGES[stage].small and _nodes(r) == 1:
                kinds.setdefault(_shared(r), []).append((name, stage))
    found: dict[tuple[str, str], str] = {}
    for kinds in filter(None, encoders.values()):
        first = next(iter(kinds.values()))[0][0]
        for number, jobs in enumerate(sorted(kinds.values(), key=len, reverse=True), 1):
            if len(jobs) > 1 or len(kinds) == 1:
                found |= dict.fromkeys(jobs, _named_after(first) + (f"_{number}" if number > 1 else ""))
    return found


def group(study: Study, stage: str, groups: Mapping[tuple[str, str], str]) -> str | Callable[[Any], str | None] | None:
    """The group of a stage's rule: text where each experiment has its own, else a function of the wildcards.

    None: in no experiment the stage is in one of `groups`, so each is a separate job.
    """
    names = {name: groups.get((name, stage)) for name, e in study.experiments.items() if stage in e.stages}
    if not any(names.values()):
        return None
    if all(value == _named_after(name) for name, value in names.items()):
        return TOGETHER  # planning a function for each job would take longer

    def of_job(wildcards: Any) -> str | None:
        name = names[wildcards.experiment]
        return name and name.format(seed=wildcards.seed)

    return of_job


def _named_after(experiment: str) -> str:
    return TOGETHER.format(experiment=experiment, seed="{seed}")


def _shared(r: ResourceSettings) -> tuple[Any, ...]:
    """The settings that stages must have in common to run in one job."""
    options = (r.partition, r.account, r.qos, r.constraint, r.gpu_model if r.gpus else None, r.checkpoint_minutes)
    return (*options, r.mem_mb is None, r.runtime is None, bool(r.gpus and r.cpus_per_gpu))


def simplest(study: Study, stage: str, value: Callable[..., Any]) -> Any:
    """The value of a function of the wildcards, if it is the same for all experiments; otherwise the function.

    Snakemake spends about 0.1 ms on each function of each job before it calls it, most of the time of a large plan.
    """
    values = [value(ExperimentWildcard(name or None)) for name in _variants(study, stage)]
    return values[0] if all(other == values[0] for other in values) else value


class ExperimentWildcard(NamedTuple):
    """A job's wildcards, as far as resources depend on them."""

    experiment: str | None  # None for data and report


def _settings(study: Study, stage: str, wildcards: Any) -> ResourceSettings:
    return study.stage_resources(stage, getattr(wildcards, "experiment", None))


def _variants(study: Study, stage: str) -> dict[str, ResourceSettings]:
    """The stage's resources in each experiment that has it; those of data and report are under the name ''."""
    names = [name for name, e in study.experiments.items() if stage in e.stages]
    return {name: study.stage_resources(stage, name) for name in names} or {"": study.stage_resources(stage)}


def check_resources(study: Study, stage: str) -> None:
    """Raises UserError if processes don't spread evenly over nodes, if only some experiments set memory, or if a
    stage other than data and report sets `local`."""
    variants = _variants(study, stage)
    for name, r in variants.items():
        if stage in STAGES and r.local is not None:
            raise UserError(
                f"study '{study.study}': resources.{stage}.local = {r.local} (perhaps from resources.default): only data and "
                "report have a choice; set it under resources.data or resources.report"
            )
        key = "gpus" if r.gpus else "processes"
        if _processes(r) % _nodes(r):
            raise UserError(
                f"study '{study.study}': experiment '{name}': resources.{stage}: {key} {_processes(r)} don't spread evenly "
                f"over nodes {_nodes(r)}; make {key} a multiple of nodes"
            )
    without_memory = [name for name, r in variants.items() if not r.mem_mb]
    if without_memory and len(without_memory) < len(variants):
        # A memory resource of Snakemake can't be unset for some jobs.
        raise UserError(
            f"study '{study.study}': resources.{stage}.mem_mb is set for some experiments but not for '{without_memory[0]}'; "
            f"set resources.{stage}.mem_mb or resources.default.mem_mb of the study"
        )


def _nodes(r: ResourceSettings) -> int:
    return r.nodes or 1


def _processes(r: ResourceSettings) -> int:
    return r.gpus or r.processes or _nodes(r)


def _gpus_per_node(r: ResourceSettings) -> int:
    return (r.gpus or 0) // _nodes(r)


def _slurm_options(study: Study, stage: str, groups: Mapping[tuple[str, str], str]) -> Callable[..., str | None]:
    """A function of the wildcards: options of sbatch, the same for all stages of one job."""
    least: dict[str, int] = {}  # group -> the shortest time of its stages: Slurm takes one warning for a job
    for (name, other), together in groups.items():
        if minutes := study.stage_resources(other, name).runtime:
            least[together] = min(minutes, least.get(together, minutes))

    def slurm_extra(wildcards: Any) -> str | None:
        if stage not in STAGES:
            return None
        r = _settings(study, stage, wildcards)
        together = groups.get((wildcards.experiment, stage))
        return _slurm_extra(r, r.runtime if together is None else least.get(together))

    return slurm_extra


def _slurm_extra(r: ResourceSettings, minutes: int | None) -> str:
    seconds = min(WARNING_SECONDS, minutes * 60 // 4) if minutes else WARNING_SECONDS
    extra = [f"--signal=USR1@{seconds}", "--open-mode=append"]  # a requeued job goes on in the same log
    if _nodes(r) > 1:
        extra.append("--ntasks-per-node=1")
        if r.gpus:
            model = f"{r.gpu_model}:" if r.gpu_model else ""
            extra.append(f"--gpus-per-node={model}{_gpus_per_node(r)}")
    return " ".join(extra)
