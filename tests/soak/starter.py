"""Starts attempts from one interpreter that has imported everything: a fork each, so a process starts in milliseconds.

Reads a line of JSON for each attempt (arguments of `python -m aps`, environment, log) and answers two: its process id, and,
when it has ended, its exit status (minus the signal that killed it) and peak memory in KiB.

Design: what is left out of a real start is the import alone. A fork happens before any thread or any state of a stage
exists; the child is a process of its own session, with fresh signal handlers, and ends as any interpreter does. It knows
nothing of kills.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys

PRELOADED = (
    "aps.cli", "aps.training.pretrain", "aps.training.finetune", "aps.training.linear_probe", "aps.training.knn",
    "aps.methods.aps", "aps.detection.stage", "aps.detection.engines.torchvision", "aps.inference.serving",
    "aps.inference.stage",     "aps.tracking.sending", "aps.settings.reading", "aps.findings", "mlflow.tracking", "mlflow.entities",
)  # fmt: skip


def main() -> None:
    for name in PRELOADED:
        __import__(name)
    gc.collect()
    gc.freeze()
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if child == 0:
            return become(asked)
        print(json.dumps({"pid": child}), flush=True)
        _, status, used = os.wait4(child, 0)
        print(json.dumps({"status": os.waitstatus_to_exitcode(status), "peak": used.ru_maxrss}), flush=True)


def become(asked: dict) -> None:  # type: ignore[type-arg]
    """Turns this process into `python -m aps ARGUMENTS`."""
    os.setsid()
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    null = os.open(os.devnull, os.O_RDONLY)
    for target, source in ((0, null), (1, log), (2, log)):
        os.dup2(source, target)
    os.closerange(3, 256)
    os.chdir(asked["folder"])
    os.environ.update(asked["environment"])
    sys.argv = ["aps", *asked["arguments"]]
    from aps.__main__ import run

    run()


if __name__ == "__main__":
    main()
