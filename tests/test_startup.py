"""Help and planning import nothing heavy. Asserted on modules, not on time: docs/performance.md has the times."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = {"torch", "torchvision", "timm", "mlflow", "sklearn", "matplotlib", "pandas", "snakemake", "PIL"}


def imported(code: str) -> set[str]:
    """Top-level modules of a fresh interpreter after `code`."""
    end = "\nimport json, sys; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", code + end], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("arguments", [["--help"], ["pretrain", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = f"""
import contextlib, io
from aps.cli import main
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    main({arguments})
"""
    assert not imported(code) & {*HEAVY, "pydantic", "yaml"}  # settings take longer than all of help


@pytest.mark.parametrize(
    "module", ["aps.settings", "aps.workflow.plan", "aps.runtime.launch", "aps.estimate", "aps.results"]
)
def test_what_planning_reads_imports_nothing_heavy(module: str) -> None:
    assert not imported(f"import {module}") & (HEAVY - {"snakemake"})


def test_validating_a_study_imports_nothing_heavy() -> None:
    code = "from aps.settings.reading import load_study; load_study(['config/config.yaml']).jobs()"
    assert not imported(code) & HEAVY


def test_a_heavy_import_would_be_seen() -> None:
    assert "torch" in imported("import aps.sampling")
