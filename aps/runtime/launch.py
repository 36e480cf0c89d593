"""How a stage's processes are started and what it asks the executor for; how it computes is decided elsewhere.

One process runs as it is. More on one node run under torchrun; several nodes of a Slurm job run one torchrun each under
srun, meeting on the first. Numbers don't depend on it: batch, learning rate, sampling and seeds are global.

Signals. Slurm sends SIGUSR1 to all processes of a job's steps before the time limit, SIGTERM on preemption, scancel and
at the limit. Snakemake, its shell and `tee` would die of them before the stage has saved its state, so Snakemake and
the shell are shielded (`shield`, SHELL_PREFIX), and torchrun, which would kill its workers, passes on SIGUSR1 instead.

Imports no torch: Snakemake reads it on a login node.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil

from aps.errors import UserError
from aps.runtime.signals import note
from aps.runtime.slurm import place
from aps.settings import STAGES, ResourceSettings, Study

STOP_SIGNALS = {signal.SIGUSR1, signal.SIGTERM, signal.SIGINT}
WARNING_SECONDS = 300  # before the time limit; Slurm may be a minute early
# The ignored signals are inherited by tee and by Python, which undoes it. 137 is SIGKILL, of which a stage can't tell.
SHELL_PREFIX = (
    "trap '' USR1 TERM INT; "
    "trap 'test $? != 137 || echo \"killed by SIGKILL, most often for its memory: raise mem_mb\" >&2' EXIT; "
    "set -euo pipefail; "
)
MEMORY_GROWTH = 0.5  # of mem_mb for each attempt after the first: retries happen after a kill for memory, too


def shield() -> None:
    """For the Snakemake process around a stage: SIGUSR1 is meant for the stage, and its default action kills."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


# --------------------------------------------------------------------------------------------------
# Resources, as Snakemake and its Slurm executor name them. Other executors read the same ones or ignore them.


def runs_here(study: Study, stage: str) -> bool:
    """Whether data or report run where snakemake itself does, on a login node, and are not submitted."""
    return study.stage_resources(stage).local is not False


def rule_threads(study: Study, stage: str) -> Callable[[Any], int]:
    """CPU cores of each node."""

    def threads(wildcards: Any) -> int:
        r = _settings(study, stage, wildcards)
        return r.threads or _gpus_per_node(r) * (r.cpus_per_gpu or 1) or 1

    return threads


def rule_resources(study: Study, stage: str) -> dict[str, Callable[..., Any]]:
    """One function of (wildcards, attempt) for each resource; None leaves a resource to the executor's default.

    `gpu`, `mem_mb`, `runtime`, `nodes` are Snakemake's usual names, the rest those of its Slurm executor.

    """

    def resource(value: Callable[[ResourceSettings], Any]) -> Callable[..., Any]:
        return lambda wildcards: value(_settings(study, stage, wildcards))

    def mem_mb(wildcards: Any, attempt: int) -> int:
        return int((_settings(study, stage, wildcards).mem_mb or 0) * (1 + MEMORY_GROWTH * (attempt - 1)))

    memory = {"mem_mb": mem_mb} if any(r.mem_mb for r in _variants(study, stage).values()) else {}
    return memory | {
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
        "slurm_extra": resource(_slurm_extra if stage in STAGES else lambda r: None),
    }


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


def _slurm_extra(r: ResourceSettings) -> str:
    seconds = min(WARNING_SECONDS, r.runtime * 60 // 4) if r.runtime else WARNING_SECONDS
    extra = [f"--signal=USR1@{seconds}", "--open-mode=append"]  # a requeued job goes on in the same log
    if _nodes(r) > 1:
        extra.append("--ntasks-per-node=1")
        if r.gpus:
            model = f"{r.gpu_model}:" if r.gpu_model else ""
            extra.append(f"--gpus-per-node={model}{_gpus_per_node(r)}")
    return " ".join(extra)


# --------------------------------------------------------------------------------------------------
# Processes.


def inside() -> bool:
    """Whether this process is one of those that torchrun started."""
    return "RANK" in os.environ


def run(processes: int, nodes: int) -> None:
    """Run this command line again in `processes` processes over `nodes` nodes, and wait for them.

    Returns too when they were asked to stop and have saved their state: look whether the results are there.

    Raises:
        UserError: the processes can't be spread over the nodes, or there is no Slurm job to take nodes from.
        SystemExit: they failed, with the exit status of the one that failed first, whose message is in the log.
    """
    command = [*_agents(processes, nodes), "-m", "aps", *sys.argv[1:]]
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # inherited by the agent; workers undo it
    child = subprocess.Popen(command, env=_environment(processes // nodes))
    asked = 0
    while child.poll() is None:
        if (info := signal.sigtimedwait(STOP_SIGNALS, 0.2)) is not None:
            note(info.si_signo)
            asked += info.si_signo == signal.SIGINT
            # srun forwards it to the agents of all nodes. A second Ctrl-C waits for no checkpoint.
            child.send_signal(signal.SIGQUIT if asked > 1 else signal.SIGUSR1)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS - {signal.SIGUSR1})
    if asked > 1:
        raise KeyboardInterrupt
    if child.returncode:
        raise SystemExit(child.returncode if child.returncode > 0 else 128 - child.returncode)


def _agents(processes: int, nodes: int) -> list[str]:
    """The command that starts one torchrun on each node."""
    if processes % nodes:
        raise UserError(
            f"--processes {processes} over --nodes {nodes}: not the same number on each node; make it a multiple"
        )
    torchrun = [sys.executable, "-m", "aps.runtime.launch", f"--nproc-per-node={processes // nodes}"]
    if nodes == 1:
        return [*torchrun, "--standalone"]
    if "SLURM_JOB_ID" not in os.environ:
        raise UserError(f"--nodes {nodes}: several nodes need a Slurm job; run it through `snakemake --profile slurm`")
    srun = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
    if cpus := os.environ.get("OMP_NUM_THREADS"):
        srun.append(f"--cpus-per-task={cpus}")
    port = 20000 + int(os.environ["SLURM_JOB_ID"]) % 10000
    shielded = ["sh", "-c", """trap '' USR1 TERM INT; exec "$@\"""", "sh"]
    return [*srun, *shielded, *torchrun, f"--nnodes={nodes}", f"--master-port={port}"]


def _environment(per_node: int) -> dict[str, str]:
    """Snakemake sets OMP_NUM_THREADS to the node's threads; the processes share them."""
    threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    return os.environ | {"OMP_NUM_THREADS": str(max(1, threads // per_node))}


def _agent(arguments: list[str]) -> int:
    """torchrun on one node, with two differences.

    It passes a request to stop on to its workers and waits, where torchrun kills them. And it ends with the status of
    the worker that failed first, whose own message stands, where torchrun prints a traceback of its own.
    """
    if any(argument.startswith("--nnodes=") for argument in arguments):
        # Under srun. Rank 0 is on the first node, at the address by which the others' srun was reached.
        node, address = os.environ["SLURM_NODEID"], os.environ["SLURM_LAUNCH_NODE_IPADDR"]
        arguments = [f"--node-rank={node}", f"--master-addr={address}", *arguments]
        print(f"node {node}: {place()}", file=sys.stderr, flush=True)
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    threading.Thread(target=_pass_on, daemon=True).start()
    import logging

    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args
    from torch.distributed.run import run as torchrun

    logging.disable(logging.ERROR)
    try:
        torchrun(parse_args(arguments))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            more = ": killed from outside, most often for its memory" if name == "SIGKILL" else ""
            print(f"process {rank} died of {name}{more}", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as error:
        return 128 + error.sigval
    return 0


def _pass_on() -> None:
    """Again and again, for workers that did not exist yet; one that has the signal pending doesn't notice."""
    signal.sigwait(STOP_SIGNALS)
    while True:
        for worker in psutil.Process().children():
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.send_signal(signal.SIGUSR1)
        time.sleep(1)


if __name__ == "__main__":
    sys.exit(_agent(sys.argv[1:]))
