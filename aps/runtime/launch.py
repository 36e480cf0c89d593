"""Starts a stage's processes. The resources it requests are decided elsewhere (`aps.workflow.resources`).

A single process is not started again. Several processes on one node run under torchrun; on several nodes of a Slurm job,
srun starts one torchrun per node, and they connect to the first node. Results don't depend on the number of processes:
batch, learning rate, sampling and seeds are global.

Signals. Slurm sends SIGUSR1 to all processes of a job's steps before the time limit, and SIGTERM on preemption, at
scancel and at the limit. These would kill Snakemake, its shell and `tee` before the stage has saved its state. So
Snakemake and the shell ignore them (`shield`, SHELL_PREFIX), and torchrun, which would kill its workers, sends them
SIGUSR1 instead. If this process is killed, torchrun is asked to stop; if torchrun is killed, so are its workers.

Imports no torch: Snakemake reads it on a login node.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time

import psutil

from aps.errors import UserError
from aps.runtime.cores import granted, threads_given
from aps.runtime.ranks import TOLD
from aps.runtime.signals import PARENT, end_with_parent, remember
from aps.runtime.slurm import allocation, job_id

STOP_SIGNALS = {signal.SIGUSR1, signal.SIGTERM, signal.SIGINT}
if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup makes a process ignore it
    STOP_SIGNALS.add(signal.SIGHUP)
# tee and Python inherit the ignored signals; Python stops ignoring them. Status 137 means SIGKILL, 135 SIGBUS, which no
# stage can catch.
SHELL_PREFIX = (
    "trap '' USR1 TERM INT; "
    "trap 'case $? in "
    '137) echo "killed by SIGKILL, most often for its memory: raise mem_mb" >&2;; '
    '135) echo "killed by SIGBUS: /dev/shm is full, or the image went away (docs/containers.md)" >&2;; '
    "esac' EXIT; "
    "set -euo pipefail; "
)


def shield() -> None:
    """Make this Snakemake process ignore SIGUSR1, which is meant for the stage; its default action kills."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def run(processes: int, nodes: int) -> None:
    """Run this command line again in `processes` processes over `nodes` nodes, and wait for them.

    It also returns when they were asked to stop and have saved their state, so the caller must check for results.

    Raises:
        UserError: the processes can't be spread evenly over the nodes, or there is no Slurm job that has nodes.
        SystemExit: a process failed; the exit status is that of the first to fail, whose message is in the log.
    """
    command = [*_agents(processes, nodes), "-m", "aps", *sys.argv[1:]]
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # the agent inherits this mask; workers reset it
    child = subprocess.Popen(command, env=_environment(processes // nodes) | {PARENT: str(os.getpid())})
    asked = 0
    while child.poll() is None:
        if (info := signal.sigtimedwait(STOP_SIGNALS, 0.2)) is not None:
            remember(info.si_signo)
            asked += info.si_signo == signal.SIGINT
            # srun forwards the signal to the agents of all nodes. A second Ctrl-C does not wait for a checkpoint.
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
        # By itself torchrun gives the processes the machine's name, which may not lead to the machine: they wait ten minutes.
        return [*torchrun, "--standalone", "--local-addr=localhost"]
    if (job := job_id()) is None:
        raise UserError(f"--nodes {nodes}: several nodes need a Slurm job; run it through `snakemake --profile slurm`")
    srun = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
    if cpus := threads_given():
        srun.append(f"--cpus-per-task={cpus}")
    port = 20000 + int(job) % 10000
    shielded = ["sh", "-c", """trap '' USR1 TERM INT; exec "$@\"""", "sh"]
    return [*srun, *shielded, *torchrun, f"--nnodes={nodes}", f"--master-port={port}"]


def _environment(per_node: int) -> dict[str, str]:
    """The environment of each process: its share of OMP_NUM_THREADS, which Snakemake sets to the threads of the node."""
    threads = threads_given() or granted()
    return os.environ | {"OMP_NUM_THREADS": str(max(1, threads // per_node))}


def _agent(arguments: list[str]) -> int:
    """Run torchrun on one node, with two differences.

    When asked to stop, it tells its workers and waits; torchrun would kill them. It exits with the status of the worker
    that failed first, which has printed a message; torchrun would print a traceback as well.
    """
    if any(argument.startswith("--nnodes=") for argument in arguments):
        # Under srun. Rank 0 is on the first node, which has the address from which srun was started.
        node, address = os.environ["SLURM_NODEID"], os.environ["SLURM_LAUNCH_NODE_IPADDR"]
        arguments = [f"--node-rank={node}", f"--master-addr={address}", *arguments]
        print(f"node {node}: {allocation()}", file=sys.stderr, flush=True)
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    if "--standalone" in arguments:  # under srun the parent is Slurm's, which ends the processes of a job itself
        end_with_parent(signal.SIGTERM)
    os.environ[PARENT] = str(os.getpid())  # of the workers
    threading.Thread(target=_pass_on, daemon=True).start()
    import logging

    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args
    from torch.distributed.run import run as torchrun

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # it repeats a failure at length
    try:
        with tempfile.TemporaryDirectory(prefix="aps-") as folder:
            os.environ[TOLD] = os.path.join(folder, "told")  # of the workers
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
    """Wait for a stop signal, then send SIGUSR1 to the workers every second, because some may not have started yet.

    A worker that has received the signal already does not notice another."""
    signal.sigwait(STOP_SIGNALS)
    while True:
        for worker in psutil.Process().children():
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.send_signal(signal.SIGUSR1)
        time.sleep(1)


if __name__ == "__main__":
    sys.exit(_agent(sys.argv[1:]))
