"""Samples how busy the machine is while a stage runs: processor, GPU and memory, by MLflow's monitors.

A thread writes the samples into system.jsonl beside the journal, under the names that MLflow shows as system metrics.
The file is sent like the journal, so nothing is lost while the server can't be reached. Stages under a minute have no
samples.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from pathlib import Path
from typing import Any

from aps.tracking.sending import SYSTEM

FIRST_SECONDS = 60.0  # from the start of the stage to the first sample
SAMPLE_SECONDS = 10.0
SAMPLES = 3  # in each mean that is written


class Sampler:
    """A thread that writes a line for every SAMPLES samples."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / SYSTEM
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True, name="system metrics")

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._end.set()

    def _loop(self) -> None:
        if self._end.wait(FIRST_SECONDS):
            return
        with contextlib.suppress(Exception):  # without a sensor or disk space, training goes on
            monitors = _monitors()
            step = len(self._path.read_bytes().splitlines()) if self._path.exists() else 0
            while True:
                for _ in range(SAMPLES):
                    for monitor in monitors:
                        monitor.collect_metrics()
                    if self._end.wait(SAMPLE_SECONDS):
                        return
                means = {f"system/{k}": v for monitor in monitors for k, v in monitor.aggregate_metrics().items()}
                for monitor in monitors:
                    monitor.clear_metrics()
                step += 1
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"step": step, "time": round(time.time(), 3), **means}) + "\n")


def _monitors() -> list[Any]:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor

    logging.getLogger("mlflow.system_metrics").setLevel(logging.ERROR)
    monitors: list[Any] = [CPUMonitor()]
    with contextlib.suppress(Exception):  # no GPU, or no nvidia-ml-py
        monitors.append(GPUMonitor())
    return monitors
