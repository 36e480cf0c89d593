"""A real Slurm on this machine: two nodes with two pretended GPUs each, for the tests of this folder.

Starts munged, slurmctld and two slurmd as children and stops them again. It writes /etc/slurm/slurm.conf and
gres.conf, because jobs lose a SLURM_CONF set in the shell; so it refuses a machine that has a Slurm of its own.
The GPUs are character devices equal to /dev/null: Slurm counts and hands them out, nothing can compute on them.
Nodes and CPUs are declared larger than the machine is (`config_overrides`), so that jobs run side by side.

To try things by hand, `python tests/slurm/cluster.py` keeps a cluster up until Ctrl-C.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import TracebackType

ETC = Path("/etc/slurm")
MARK = "# Written by the tests of aps-vit; removed when they end."
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "sinfo", "scancel")
NODES = ("n1", "n2")
GPUS_PER_NODE = 2

SLURM_CONF = """{mark}
ClusterName=aps
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
KillWait=10
MinJobAge=600
DefMemPerNode=1000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port=16821 CPUs=8 RealMemory=8000 Gres=gpu:pretended:2
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port=16822 CPUs=8 RealMemory=8000 Gres=gpu:pretended:2
PartitionName=normal Nodes=n1,n2 Default=YES MaxTime=60 PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes=n1,n2 MaxTime=60 PriorityTier=9 PreemptMode=OFF
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
        RuntimeError: a daemon ended or no node became idle within half a minute; the message holds its log.
    """

    def __init__(self, state: Path) -> None:
        self.state = state
        self.daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Cluster:
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
            subprocess.run(["scancel", "--user=root", "--full"], capture_output=True, timeout=20)
            self._wait_until(lambda: not run("squeue", "-h"), 15)
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in reversed(self.daemons):
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
        for name in ("slurm.conf", "gres.conf"):
            (ETC / name).unlink(missing_ok=True)

    def _configure(self) -> None:
        ETC.mkdir(exist_ok=True)
        (ETC / "slurm.conf").write_text(SLURM_CONF.format(mark=MARK, state=self.state))
        devices = []
        for node in NODES:
            for index in range(GPUS_PER_NODE):
                device = self.state / f"{node}gpu{index}"
                if not device.exists():
                    os.mknod(device, 0o020666, os.makedev(1, 3))
            files = f"{self.state}/{node}gpu[0-{GPUS_PER_NODE - 1}]"
            devices.append(f"NodeName={node} Name=gpu Type=pretended File={files}")
        (ETC / "gres.conf").write_text("\n".join([MARK, *devices, ""]))
        key = self.state / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)

    def _start(self) -> None:
        munge = [f"--{kind}={self.state}/munge.{kind.removesuffix('-file')}" for kind in ("socket", "pid-file", "log-file", "seed-file")]
        self._spawn("munged", "--foreground", "--force", f"--key-file={self.state}/munge.key", *munge)
        self._wait_until(lambda: (self.state / "munge.socket").exists(), 10)
        self._spawn("slurmctld", "-D", "-c")
        for node in NODES:
            self._spawn("slurmd", "-D", "-c", "-N", node)
        if not self._wait_until(lambda: run("sinfo", "-h", "-t", "idle", "-o", "%D") == str(len(NODES)), 30):
            raise RuntimeError(f"Slurm did not come up: {run('sinfo', '-R')}\n{self.logs()}")

    def _spawn(self, *command: str) -> None:
        log = (self.state / f"{command[0]}{len(self.daemons)}.out").open("wb")
        # Their own session: a Ctrl-C in the terminal must reach the tests, not the daemons.
        self.daemons.append(subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True))

    def _wait_until(self, condition, seconds: float) -> bool:  # type: ignore[no-untyped-def]
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
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return (done.stdout if done.returncode == 0 else done.stderr).strip()


if __name__ == "__main__":
    if reason := why_not():
        raise SystemExit(reason)
    with Cluster(Path("/tmp/aps-slurm")) as cluster:
        print(run("sinfo", "-N", "-o", "%N %T %c CPUs %m MB %G"), "\nCtrl-C stops it.", flush=True)
        signal.sigwait({signal.SIGINT, signal.SIGTERM})
