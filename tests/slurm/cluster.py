"""A real Slurm on this machine: two nodes with four pretended GPUs each and two without, for the tests.

Starts munged, slurmctld and four slurmd as children and stops them again. It writes /etc/slurm/slurm.conf and
gres.conf, because jobs lose a SLURM_CONF set in the shell; so it refuses a machine that has a Slurm of its own.
The GPUs are character devices equal to /dev/null: Slurm counts and hands them out, nothing can compute on them.
Nodes and CPUs are declared larger than the machine is (`config_overrides`), so that jobs run side by side.

To try things by hand, `python tests/slurm/cluster.py` keeps a cluster up until Ctrl-C.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import psutil

ETC = Path("/etc/slurm")
MARK = "# Written by the tests of aps-vit; removed when they end."
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "sinfo", "scancel")
NAME = "apstest"
PATIENCE = 120  # seconds for one command of Slurm; a machine with other things to do takes more than a moment
GPUS = {"n1": 4, "n2": 4, "n3": 0, "n4": 0}

SLURM_CONF = """{mark}
ClusterName={name}
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=16817
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={state}/munge.socket
StateSaveLocation={state}/ctld
SlurmctldPidFile={state}/slurmctld.pid
SlurmctldLogFile={state}/slurmctld.log
SlurmdSpoolDir={state}/%n
SlurmdPidFile={state}/slurmd-%n.pid
SlurmdLogFile={state}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=1
JobAcctGatherParams=OverMemoryKill
GresTypes=gpu
KillWait=20
MinJobAge=600
DefMemPerNode=1000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=normal Nodes=n1,n2 Default=YES MaxTime=60 PriorityTier=1 PreemptMode=OFF
PartitionName=spot Nodes=n3 MaxTime=60 PriorityTier=1
PartitionName=cheap Nodes=n4 MaxTime=60 PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=n1,n2,n3,n4 MaxTime=60 PriorityTier=9 PreemptMode=OFF
"""


def why_not() -> str | None:
    """Why this machine can't run the test cluster; None where it can."""
    if missing := [name for name in PROGRAMS if shutil.which(name) is None]:
        return f"no {', '.join(missing)} on the PATH: apt-get install slurmctld slurmd slurm-client munge"
    if os.geteuid() != 0:
        return "needs root, to write /etc/slurm and to make device files"
    conf = ETC / "slurm.conf"
    if conf.exists() and MARK not in conf.read_text():
        return f"{conf} belongs to another Slurm"
    return None


class Cluster:
    """Context manager: the daemons run inside the `with` block.

    Args:
        state: folder for logs, spool, sockets and devices; short, because a socket's path has at most 107 characters.

    Raises:
        RuntimeError: a daemon ended or no node became idle in time; the message holds its log.
    """

    def __init__(self, state: Path) -> None:
        self.state = state
        self.daemons: list[subprocess.Popen[bytes]] = []
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Cluster:
        self._lock = Path("/tmp/aps-slurm.lock").open("w")  # one cluster at a time on a machine
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.state.mkdir(parents=True, exist_ok=True)
        self.state.chmod(0o755)
        self._configure()
        try:
            self._start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.daemons:
            with contextlib.suppress(RuntimeError, subprocess.TimeoutExpired):
                subprocess.run(["scancel", "--user=root"], capture_output=True, timeout=PATIENCE)
                self._wait_until(lambda: not run("squeue", "-h"), 25)
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in reversed(self.daemons):
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
        for process in psutil.process_iter():
            # linuxproc loses sight of a job's processes when their parent dies; cgroups would not.
            with contextlib.suppress(psutil.Error):
                if process.environ().get("SLURM_CLUSTER_NAME") == NAME:
                    process.kill()
        for name in ("slurm.conf", "gres.conf"):
            (ETC / name).unlink(missing_ok=True)
        self._lock.close()

    def _configure(self) -> None:
        ETC.mkdir(exist_ok=True)
        nodes, devices = [], []
        for index, (node, gpus) in enumerate(GPUS.items()):
            gres = f" Gres=gpu:pretended:{gpus}" if gpus else ""
            nodes.append(
                f"NodeName={node} NodeHostname=localhost NodeAddr=127.0.0.1 Port={16821 + index} "
                f"CPUs=16 RealMemory=32000 Feature={'gpu' if gpus else 'cpu'}{gres}"
            )
            for number in range(gpus):
                device = self.state / f"{node}gpu{number}"
                if not device.exists():
                    os.mknod(device, 0o020666, os.makedev(1, 3))
            if gpus:
                devices.append(f"NodeName={node} Name=gpu Type=pretended File={self.state}/{node}gpu[0-{gpus - 1}]")
        conf = SLURM_CONF.format(mark=MARK, name=NAME, state=self.state, nodes="\n".join(nodes))
        (ETC / "slurm.conf").write_text(conf)
        (ETC / "gres.conf").write_text("\n".join([MARK, *devices, ""]))
        key = self.state / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)

    def _start(self) -> None:
        files = {
            kind: f"{self.state}/munge.{kind.removesuffix('-file')}"
            for kind in ("socket", "pid-file", "log-file", "seed-file")
        }
        munge = [f"--{kind}={file}" for kind, file in files.items()]
        self._spawn("munged", "--foreground", "--force", f"--key-file={self.state}/munge.key", *munge)
        self._wait_until(lambda: (self.state / "munge.socket").exists(), PATIENCE)
        self._spawn("slurmctld", "-D", "-c")
        for node in GPUS:
            self.nodes[node] = self._spawn("slurmd", "-D", "-c", "-N", node)
        if not self._wait_until(
            lambda: set(run("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").split()) == set(GPUS), PATIENCE
        ):
            raise RuntimeError(f"Slurm did not come up: {run('sinfo', '-R')}\n{self.logs()}")

    def crash(self, node: str) -> None:
        """The node dies with everything on it, and comes back empty."""
        slurmd = self.nodes[node]
        self.daemons.remove(slurmd)
        slurmd.kill()
        jobs = tuple(f"slurmstepd: [{job}." for job in run("squeue", "-h", "-w", node, "-o", "%i").split())
        for process in psutil.process_iter(["cmdline"]):
            if jobs and " ".join(process.info["cmdline"] or ()).startswith(jobs):
                for victim in [process, *process.children(recursive=True)]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        victim.kill()
        slurmd.wait()
        run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=crash")
        self.nodes[node] = self._spawn("slurmd", "-D", "-c", "-N", node)
        self._wait_until(lambda: run("scontrol", "update", f"NodeName={node}", "State=RESUME") == "", 20)

    def _spawn(self, *command: str) -> subprocess.Popen[bytes]:
        log = (self.state / f"{command[0]}{len(self.daemons)}.out").open("ab")
        # Their own session: a Ctrl-C in the terminal must reach the tests, not the daemons.
        self.daemons.append(subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True))
        return self.daemons[-1]

    def _wait_until(self, condition: Callable[[], bool], seconds: float) -> bool:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if condition():
                return True
            for daemon in self.daemons:
                if daemon.poll() is not None:
                    raise RuntimeError(f"{daemon.args} ended with status {daemon.returncode}\n{self.logs()}")
            time.sleep(0.1)
        return condition()

    def logs(self) -> str:
        """The last lines of every daemon's log."""
        files = sorted([*self.state.glob("*.log"), *self.state.glob("*.out")])
        return "\n".join(f"--- {f.name}\n{f.read_text(errors='replace')[-1500:]}" for f in files)


def run(*command: str) -> str:
    """Standard output of a Slurm command, or its standard error where it failed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    return (done.stdout if done.returncode == 0 else done.stderr).strip()


def job_fields(job: str) -> dict[str, str]:
    """What Slurm says of a job, by the names of Slurm 22.05. Newer ones say ReqTRES for TRES and gres/gpu for gres:gpu."""
    fields = dict(re.findall(r"(\S+?)=(\S+)", run("scontrol", "show", "job", "-d", "-o", job)))
    if "ReqTRES" in fields:
        fields["TRES"] = fields["ReqTRES"]
    return {name: text.replace("gres/gpu", "gres:gpu") if "Tres" in name else text for name, text in fields.items()}


if __name__ == "__main__":
    if reason := why_not():
        raise SystemExit(reason)
    with Cluster(Path("/tmp/aps-slurm")) as cluster:
        print(run("sinfo", "-N", "-o", "%N %P %T %c CPUs %m MB %G"), "\nCtrl-C stops it.", flush=True)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
