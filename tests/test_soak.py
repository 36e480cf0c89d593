"""The soak test in small: some trials of `python -m tests.soak`, which docs/reliability.md has the long run of."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_stages_killed_at_random_end_with_what_an_undisturbed_run_ends_with(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.soak", "--out", str(tmp_path), "--trials", "3", "--only", "pretrain", "knn"]
    done = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    trials = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text().splitlines()]
    assert len(trials) == 3 and sum(trial["kills"] for trial in trials) >= 1
    assert all(not trial["losses"] and trial["server"]["memory"] > 0 for trial in trials)
