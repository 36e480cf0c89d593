"""What each stage asks the executor for, in the words of Snakemake and its Slurm plugin.

Other executors read the same names or ignore them. How processes are started is `aps.runtime.launch`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from aps.errors import UserError
from aps.settings.blocks import ResourceSettings
from aps.settings.study import Study
from aps.stages import STAGES

WARNING_SECONDS = 300  # before the time limit; Slurm may be a minute early
TOGETHER = "{experiment}_seed{seed}_evaluation"  # the group of an encoder's small stages; its wildcards are the rules'
TURN = "turn"  # a resource of which a group's job has one: its stages run one after the other
MEMORY_GROWTH = 0.5  # of mem_mb for each attempt after the first: retries happen after a kill for memory, too
BY_ATTEMPT = ("mem_mb", "attempt")  # resources that another attempt changes


def runs_here(study: Study, stage: str) -> bool:
    """Whether data or report run where snakemake itself does, on a login node, and are not submitted."""
    return study.stage_resources(stage).local is not False


def rule_threads(study: Study, stage: str) -> Callable[[Any], int]:
    """CPU cores of each node."""

    def threads(wildcards: Any) -> int:
        r = _settings(study, stage, wildcards)
        return r.threads or _gpus_per_node(r) * (r.cpus_per_gpu or 1) or 1

    return threads


def rule_resources(study: Study, stage: str, together: bool = False) -> dict[str, Callable[..., Any]]:
    """One function of (wildcards, attempt) for each resource; None leaves a resource to the executor's default.

    `gpu`, `mem_mb`, `runtime`, `nodes` are Snakemake's usual names, the rest those of its Slurm executor.

    Args:
        together: in one job with the other stages of its `group`.
    """

    def resource(value: Callable[[ResourceSettings], Any]) -> Callable[..., Any]:
        return lambda wildcards: value(_settings(study, stage, wildcards))

    def mem_mb(wildcards: Any, attempt: int) -> int:
        return int((_settings(study, stage, wildcards).mem_mb or 0) * (1 + MEMORY_GROWTH * (attempt - 1)))

    memory = {"mem_mb": mem_mb} if any(r.mem_mb for r in _variants(study, stage).values()) else {}
    return (
        memory
        | {
            "attempt": lambda wildcards, attempt: attempt,  # told to the verb, which does not meet a mistake twice
            "processes": resource(_processes),
            "workers": resource(lambda r: r.workers),
            "checkpoint_minutes": resource(lambda r: str(r.checkpoint_minutes) if r.checkpoint_minutes else None),
            "runtime": resource(lambda r: r.runtime),
            "gpu": resource(lambda r: r.gpus or None),
            "gpu_model": resource(lambda r: r.gpu_model if r.gpus else None),
            # Not left to `threads`: Snakemake caps those by the cores of the machine it runs on.
            "cpus_per_task": resource(lambda r: None if r.gpus and r.cpus_per_gpu else r.threads),
            "cpus_per_gpu": resource(lambda r: r.cpus_per_gpu if r.gpus else None),
            # A GPU job is one task: its processes are torchrun's. Left out, some versions start it once for each GPU.
            "tasks_per_gpu": resource(lambda r: 0 if r.gpus else None),
            "nodes": resource(lambda r: r.nodes or 1),
            # On several nodes the command itself calls srun, one task a node.
            "mpi": resource(lambda r: "srun" if _nodes(r) > 1 else None),
            "tasks": resource(lambda r: _nodes(r) if _nodes(r) > 1 else None),
            "slurm_partition": resource(lambda r: r.partition),
            "slurm_account": resource(lambda r: r.account),
            "qos": resource(lambda r: r.qos),
            "constraint": resource(lambda r: r.constraint),
            "slurm_extra": _warning(study, stage, together),
        }
        | ({TURN: lambda wildcards: 1} if together else {})
    )


def group(study: Study, stage: str) -> str | None:
    """The group in whose job a stage runs, where the executor's profile puts several stages into one job.

    Its stages run one after the other (TURN), so that Snakemake asks for the sum of their times and the most of everything
    else. None: the stage is not small, or some experiment's asks for what can't be put together: several nodes, another
    partition, memory or time for one stage and none for another.
    """
    if stage not in _small():
        return None
    for name, e in study.experiments.items():
        asked = [study.stage_resources(other, name) for other in _small() if other in e.stages]
        if any(_nodes(r) > 1 for r in asked) or len({_shared(r) for r in asked}) > 1:
            return None
    return TOGETHER


def _small() -> list[str]:
    return [name for name, row in STAGES.items() if row.small]


def _shared(r: ResourceSettings) -> tuple[Any, ...]:
    """What jobs must have in common to be one."""
    words = (r.partition, r.account, r.qos, r.constraint, r.gpu_model if r.gpus else None, r.checkpoint_minutes)
    return (*words, r.mem_mb is None, r.runtime is None, bool(r.gpus and r.cpus_per_gpu))


def simplest(study: Study, stage: str, value: Callable[..., Any]) -> Any:
    """What a rule is given of a function of the wildcards: its value where all experiments have the same, else itself.

    Snakemake spends about 0.1 ms on each function of each job before it calls it: more than all else in a large plan.
    """
    values = [value(Of(name or None)) for name in _variants(study, stage)]
    return values[0] if all(other == values[0] for other in values) else value


class Of(NamedTuple):
    """Wildcards of a job; None: of data or the report."""

    experiment: str | None


def _settings(study: Study, stage: str, wildcards: Any) -> ResourceSettings:
    return study.stage_resources(stage, getattr(wildcards, "experiment", None))


def _variants(study: Study, stage: str) -> dict[str, ResourceSettings]:
    """The stage's resources in each experiment that has it; the study's own for data and report."""
    names = [name for name, e in study.experiments.items() if stage in e.stages]
    return {name: study.stage_resources(stage, name) for name in names} or {"": study.stage_resources(stage)}


def check_resources(study: Study, stage: str) -> None:
    """Raises UserError where processes don't spread evenly over nodes, only some experiments set memory, or a stage
    that computes is to run on the login node."""
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
    without = [name for name, r in variants.items() if not r.mem_mb]
    if without and len(without) < len(variants):
        # Snakemake takes no "unset" for a memory resource.
        raise UserError(
            f"study '{study.study}': resources.{stage}.mem_mb is set for some experiments but not for '{without[0]}'; "
            f"set resources.{stage}.mem_mb or resources.default.mem_mb of the study"
        )


def _nodes(r: ResourceSettings) -> int:
    return r.nodes or 1


def _processes(r: ResourceSettings) -> int:
    return r.gpus or r.processes or _nodes(r)


def _gpus_per_node(r: ResourceSettings) -> int:
    return (r.gpus or 0) // _nodes(r)


def _warning(study: Study, stage: str, together: bool) -> Callable[..., str | None]:
    """When Slurm warns of the time limit, and what else its options say; stages of one job say the same."""

    def slurm_extra(wildcards: Any) -> str | None:
        if stage not in STAGES:
            return None
        r = _settings(study, stage, wildcards)
        asked = [r]
        if together and wildcards.experiment:
            ran = study.experiments[wildcards.experiment].stages
            asked = [_settings(study, name, wildcards) for name in _small() if name in ran]
        return _slurm_extra(r, min((other.runtime for other in asked if other.runtime), default=None))

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
