"""Lets a stage in a container use Slurm's programs, which are outside.

Snakemake starts the container from outside, within the job. It answers the stage on a socket that has a name and no file,
so the container need not show it. The stage finds the name in its environment. Only the same user is answered.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import struct
import subprocess
import threading
import uuid

NAME = "APS_SLURM_DOOR"
PROGRAMS = {"scontrol", "sacct"}
SECONDS = 20.0  # for one answer


def open_door() -> None:
    """Answer the stages that this process starts, until it ends. The caller makes sure that it is in a Slurm job."""
    name = f"aps-{uuid.uuid4().hex}"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"\0{name}")
    listener.listen()
    os.environ[NAME] = name
    threading.Thread(target=_answer_all, args=(listener,), daemon=True, name="door").start()


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's programs, outside if this process is in a container without it.

    Raises:
        OSError: the program is missing, or nobody answers outside.
        subprocess.TimeoutExpired: it hangs.
    """
    name = os.environ.get(NAME)
    if name is None or shutil.which(command[0]) is not None:
        return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    with socket.socket(socket.AF_UNIX) as outside:
        outside.settimeout(SECONDS + 5)
        outside.connect(f"\0{name}")
        outside.sendall(json.dumps(command).encode() + b"\n")
        with outside.makefile("rb") as file:
            answer = file.readline()
    if not answer:
        raise OSError(f"{command[0]}: not answered from outside the container")
    return subprocess.CompletedProcess(command, *json.loads(answer))


def _answer_all(listener: socket.socket) -> None:
    while True:
        visitor, _ = listener.accept()
        with visitor, contextlib.suppress(OSError, ValueError, subprocess.TimeoutExpired):
            visitor.settimeout(SECONDS)
            _answer(visitor)


def _answer(visitor: socket.socket) -> None:
    _, user, _ = struct.unpack("3i", visitor.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    if user != os.getuid():
        return
    with visitor.makefile("rb") as file:
        command = json.loads(file.readline())
    if command[0] in PROGRAMS:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        visitor.sendall(json.dumps([done.returncode, done.stdout, done.stderr]).encode() + b"\n")
