"""The cluster, once for all tests of this folder; where it can't run they are skipped with the reason."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, why_not


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if reason := why_not():
        pytest.skip(f"no Slurm can run here: {reason}")
    state = Path(tempfile.mkdtemp(prefix="aps-slurm-"))
    try:
        with Cluster(state) as running:
            yield running
    finally:
        shutil.rmtree(state, ignore_errors=True)
