"""Starts attempts as forks of an interpreter that has imported everything, which takes milliseconds.

For each attempt it reads a line of JSON (arguments of `python -m aps`, environment, log) and prints two: the process
id, and at its end the exit status (minus the signal that killed it) and the peak memory in KiB.

Design: a fork differs from a real start only in the imports. It happens before a stage has threads or any state. The
child has a new session and fresh signal handlers, and ends as any interpreter does. This module does not know about
kills.
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
    "aps.inference.stage", "aps.tracking.sending", "aps.settings.reading", "aps.findings", "mlflow.tracking", "mlflow.entities",
)  # fmt: skip


def main() -> None:
    for name in PRELOADED:
        __import__(name)
    gc.collect()
    gc.freeze()
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            return become(request)
        print(json.dumps({"pid": child}), flush=True)
        _, status, used = os.wait4(child, 0)
        print(json.dumps({"status": os.waitstatus_to_exitcode(status), "peak": used.ru_maxrss}), flush=True)


def become(request: dict) -> None:  # type: ignore[type-arg]
    """Make this process `python -m aps ARGUMENTS`."""
    os.setsid()
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    null = os.open(os.devnull, os.O_RDONLY)
    for target, source in ((0, null), (1, log), (2, log)):
        os.dup2(source, target)
    os.closerange(3, 256)
    os.chdir(request["folder"])
    os.environ.update(request["environment"])
    sys.argv = ["aps", *request["arguments"]]
    from aps.__main__ import run

    run()


if __name__ == "__main__":
    main()
