"""--profile FILE: a readable trace of two batches, and no other result."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import small

from aps.cli import main


@pytest.mark.parametrize("stage", ["pretrain", "finetune", "linear_probe"])
def test_a_profile_traces_the_fourth_and_fifth_batch_and_changes_no_result(
    stage: str, digits: Path, tmp_path: Path
) -> None:
    plain = small.run(small.job(stage, digits, tmp_path / "plain", epochs=3))
    traced = small.job(stage, digits, tmp_path / "traced", epochs=3)
    file = tmp_path / "traces" / "trace.json"
    assert small.run(dataclasses.replace(traced, profile=file)) == plain
    events = json.loads(file.read_text())["traceEvents"]
    names = [event.get("name", "") for event in events if event.get("ph") == "X"]
    assert {"ProfilerStep#3", "ProfilerStep#4"} == {name for name in names if name.startswith("ProfilerStep")}
    assert "aten::linear" in names and any("AdamW" in name or "SGD" in name for name in names)
    assert all("ts" in event and "dur" in event for event in events if event.get("ph") == "X")


def test_a_run_too_short_for_a_trace_says_so_and_finishes(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = dataclasses.replace(small.job("pretrain", digits, tmp_path, epochs=1), profile=tmp_path / "trace.json")
    assert small.run(job)["epochs"] == 1
    assert not (tmp_path / "trace.json").exists()
    assert "no trace, 3 batches were left to train and it takes 5; profile a longer run" in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["knn", "detection"])
def test_stages_without_a_loop_of_ours_refuse_a_profile(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([stage, "--profile", "trace.json"]) == 2
    assert f"--profile traces pretrain, finetune, linear_probe, not {stage}" in capsys.readouterr().err
