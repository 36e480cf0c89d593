"""A store like that of a results folder, made once a session because MLflow takes seconds to make one."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path

import pytest

from aps.tracking import tracker
from aps.tracking.server import prepare_store


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("store") / "mlflow.db"
    prepare_store(file)
    return file


@pytest.fixture
def store(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Under tmp_path/results, as by default; on a busy machine it is waited for."""
    file = tmp_path / "results" / "mlflow.db"
    file.parent.mkdir(exist_ok=True)
    with contextlib.closing(sqlite3.connect(empty_store)) as whole, contextlib.closing(sqlite3.connect(file)) as copy:
        whole.backup(copy)  # a copied file would lack what is still in the write-ahead log
    address = f"sqlite:///{file}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.setattr(tracker, "FINISH_SECONDS", 300)
    return address


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an address leaves in the environment ends with its test."""
    before = dict(os.environ)
    monkeypatch.setattr(os, "environ", os.environ)
    yield
    for name in set(os.environ) - set(before):
        del os.environ[name]
    os.environ.update(before)
