"""Benchmarks run and leave a result that can be read and repeated; what they measure is not asserted."""

from __future__ import annotations

import ast
import json
import math
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from aps.runtime.processes import processes
from aps.sampling import coverage
from aps.settings.blocks import EncoderSettings, SamplingSettings, ViewSettings
from aps.views import draw_parameters
from benchmarks import gpu
from benchmarks.__main__ import NAMES
from benchmarks.choices import CHOICES
from benchmarks.ordinary import sample_image
from benchmarks.peers import MISSING
from benchmarks.study import experiment, inputs, make_trainer

ROOT = Path(__file__).parents[1]


@pytest.mark.end_to_end
@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_writes_its_figure_with_settings_and_machine_and_draws_it(name: str, tmp_path: Path) -> None:
    if name == "peers" and MISSING:
        pytest.skip("needs lightly and kornia: pip install '.[peers]'")
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("*.json")
    found = json.loads(file.read_text())
    assert found["benchmark"].split("-")[0] == name
    assert found["command"].startswith(f"python -m benchmarks.{name} --quick")
    assert found["settings"] and {"cpu", "cores", "torch_threads", "python", "torch"} <= found["machine"].keys()
    assert found["rows"]
    for row in found["rows"]:
        figure = row["ratio"]
        assert 0 < figure["min"] <= figure["low"] <= figure["median"] <= figure["high"] <= figure["max"] < math.inf
    (picture,) = tmp_path.glob("*.png")
    assert picture.stem == file.stem and picture.read_bytes().startswith(b"\x89PNG")


def test_the_baseline_sampler_keeps_what_the_method_says() -> None:
    """Disjoint chunks of view 1; cells of view 2 that are free of them wherever enough are."""
    settings, grid, images = SamplingSettings(), 8, 16
    generator = torch.Generator().manual_seed(0)
    one, two = (draw_parameters(view, images, 32, 32, ViewSettings(), generator) for view in (1, 2))
    random = np.random.default_rng(0)
    for i in range(images):
        boxes = [tuple(p.boxes[i].tolist()) for p in (one, two)]
        kept1, kept2 = sample_image(
            boxes[0], bool(one.flips[i]), boxes[1], bool(two.flips[i]), grid, 0.25, 4, settings.gamma, random
        )
        assert sorted(kept1.flatten()) == list(range(grid * grid))
        mask = torch.zeros(1, 4, grid * grid).scatter_(2, torch.from_numpy(kept1)[None], 1)
        row = slice(i, i + 1)
        covered = coverage(one.rows(row).geometry(), mask, two.rows(row).geometry(), grid)[0]
        for t in range(4):
            assert len(set(kept2[t])) == 16
            if (covered[t] < 0.999).sum() >= 16:
                assert (covered[t][kept2[t]] < 0.9999).all()


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_taken_back_is_the_same_step(name: str) -> None:
    study = experiment(EncoderSettings(arch="micro", depth=2), 0.25, 8)
    with processes() as distributed:
        tensors = inputs(study, distributed.device)
        trainer, other = make_trainer(study, distributed), make_trainer(study, distributed)
        CHOICES[name](other)
        for _ in range(2):  # the second sees what the optimizer did
            ours, theirs = trainer.step(*tensors, 1e-4), other.step(*tensors, 1e-4)
            torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


def test_running_all_of_them_ends_with_a_table(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "--quick", "--out", str(tmp_path), "sampler"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "sampler-" in done.stdout.splitlines()[-2] and "target 40x" in done.stdout.splitlines()[-1]


def test_an_unknown_benchmark_is_refused_with_the_known_ones() -> None:
    refused = subprocess.run([sys.executable, "-m", "benchmarks", "no_such"], cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 2 and "unknown benchmark no_such; known: views" in refused.stderr


def test_the_share_of_waiting_counts_each_batch_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A learner's batches measure how long they take; who measures them again reports twice the share."""
    meter = SimpleNamespace(waited=0, read=lambda: {"input_share": float(meter.waited), "step_ms": 1.0})

    def fetch(batches: Iterator[int]) -> int | None:
        meter.waited += 1
        return next(batches, None)

    def batches(epoch: int, first: int) -> Iterator[int]:
        numbers = iter(range(100))
        while (batch := meter.fetch(numbers)) is not None:
            yield batch

    meter.fetch, steps = fetch, []
    learner = SimpleNamespace(batches=batches, meter=meter, step=lambda batch, done: steps.append(batch))
    monkeypatch.setattr(gpu, "_learner", lambda *_, **__: learner)
    found = gpu.share(Namespace(device="cpu", tiny=True, out=tmp_path))
    assert found["rows"][0][:2] == ("input_share", len(steps)) and steps == [0, 1]


def test_every_test_that_needs_a_gpu_is_one_that_make_gpu_runs() -> None:
    """`make gpu` runs what is marked; a test that is only skipped without a GPU would run nowhere."""
    skipped = {}
    for file in sorted(Path(__file__).parent.rglob("test_*.py")):
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                marks = [ast.unparse(mark) for mark in node.decorator_list]
                if any("cuda.is_available" in mark for mark in marks):
                    skipped[f"{file.name}::{node.name}"] = "pytest.mark.gpu" in marks
    assert len(skipped) >= 3 and all(skipped.values()), skipped
