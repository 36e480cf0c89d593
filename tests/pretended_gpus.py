"""A machine with GPUs, as its driver's program tells."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

NAMES = ("CUDA_VISIBLE_DEVICES", "APS_DEVICE", "SLURM_JOB_ID")


def pretend_gpus(folder: Path, uuids: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """For this process and those that it starts; the program is put in `folder`."""
    program = folder / "nvidia-smi"
    program.parent.mkdir(exist_ok=True)
    program.write_text("#!/bin/sh\n" + "".join(f"echo {uuid}\n" for uuid in uuids))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
