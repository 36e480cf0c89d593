"""Benchmarks run and leave a result that can be read and repeated; what they measure is not asserted."""

from __future__ import annotations

import ast
import importlib
import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import weakref
import zipfile
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from aps.data.prepare import prepare
from aps.errors import UserError
from aps.results import StageJob
from aps.runtime.processes import processes
from aps.sampling import coverage
from aps.settings.blocks import EncoderSettings, SamplingSettings, UserDataset, ViewSettings
from aps.training import augment, batches, linear_probe
from aps.training.batches import Batch, Batches
from aps.training.finetune import Finetuning
from aps.training.linear_probe import Probing
from aps.training.meter import Meter
from aps.training.pretrain import Pretraining, Trainer
from aps.training.watch import COPIED
from aps.views import draw_parameters
from benchmarks import common, gpu, local_noise, peers, scaling, server, step
from benchmarks.__main__ import KNOWN, NAMES
from benchmarks.choices import CHOICES, FUSED, SEPARATE, made
from benchmarks.choices import COPIED as COPIED_HEADS
from benchmarks.ordinary import sample_image
from benchmarks.peers import MISSING
from benchmarks.study import experiment, inputs, make_trainer

ROOT = Path(__file__).parents[1]


LONG = ("choices", "planning", "scaling", "step")  # several processes or kinds of step


@pytest.mark.end_to_end
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in LONG else n for n in NAMES])
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
    torch.manual_seed(0)  # of 25 inputs one has a gradient that is rounding alone, of which AdamW makes a full step
    with processes() as distributed:
        tensors = inputs(study, distributed.device)
        trainer, other = make_trainer(study, distributed), make_trainer(study, distributed)
        CHOICES[name](other)
        for _ in range(2):  # the second sees what the optimizer did
            ours, theirs = trainer.step(*tensors, 1e-4), other.step(*tensors, 1e-4)
            torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


class Operators(TorchDispatchMode):
    """Counts the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_each_choice_taken_back_changes_the_step_in_every_precision(precision: str) -> None:
    """In bf16 on CPUs attention is separate products already."""
    study = experiment(EncoderSettings(arch="micro", depth=2), 0.25, 8, precision=precision)
    with processes() as distributed:
        tensors = inputs(study, distributed.device)

        def operators(take_back: Callable[[Trainer], None]) -> Counter[str]:
            trainer = make_trainer(study, distributed)
            take_back(trainer)
            trainer.step(*tensors, 1e-4)  # the first checks what the method returns
            with Operators() as called:
                trainer.step(*tensors, 1e-4)
            return called.counts

        ours = operators(lambda _: None)
        assert operators(lambda _: None) == ours
        choices = made(make_trainer(study, distributed))
        fused = any("scaled_dot_product" in name for name in ours)
        assert choices.keys() == CHOICES.keys() - ({FUSED} if fused else {SEPARATE, COPIED_HEADS})
        assert [name for name, take_back in choices.items() if operators(take_back) == ours] == []


def test_running_all_of_them_ends_with_a_table(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "--quick", "--out", str(tmp_path), "sampler"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "sampler-" in done.stdout.splitlines()[-2] and "target 40x" in done.stdout.splitlines()[-1]


def test_an_unknown_benchmark_is_refused_with_the_known_ones() -> None:
    refused = subprocess.run([sys.executable, "-m", "benchmarks", "no_such"], cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 2 and "unknown benchmark no_such; known: views" in refused.stderr


def test_every_benchmark_of_the_readme_can_be_named_and_the_last_two_have_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "benchmarks/README.md").read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(KNOWN)
    started: list[str] = []
    done = SimpleNamespace(returncode=0)
    monkeypatch.setattr(subprocess, "run", lambda command, **_: started.append(command[2]) or done)
    for asked, expected in ((rows, rows), ([], [name for name in NAMES if name != "peers" or not MISSING])):
        started.clear()
        monkeypatch.setattr(sys, "argv", ["benchmarks", "--quick", "--out", str(tmp_path), *asked])
        assert importlib.import_module("benchmarks.__main__").main() == 0
        assert started == [f"benchmarks.{name}" for name in expected]


@pytest.mark.parametrize("name", KNOWN)
def test_every_benchmark_has_a_quick_form(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`python -m benchmarks --quick` passes it on."""
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit):
        importlib.import_module(f"benchmarks.{name}").main()
    assert "--quick" in capsys.readouterr().out


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


@pytest.mark.parametrize("measure", [gpu.share, gpu.minutes])
def test_a_share_of_waiting_that_is_stopped_keeps_its_lines(
    measure: Callable[[Namespace], dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not its first alone, which has the compilation."""
    read = iter({"input_share": share, "step_ms": 1.0} for share in (0.9, 0.1))
    learner = SimpleNamespace(batches=lambda *_: iter(()), meter=SimpleNamespace(read=lambda: next(read)))
    monkeypatch.setattr(gpu, "_learner", lambda *_, **__: learner)
    monkeypatch.setattr(gpu, "_not_compiled", lambda _: [])
    args = Namespace(device="cpu", tiny=False, out=tmp_path, step="share")  # reads a third line
    with pytest.raises(StopIteration):
        measure(args)
    (saved,) = (json.loads(file.read_text()) for file in tmp_path.glob("*.json"))
    assert [row[1] for row in saved["rows"]] == [0.1, 1.0] and len(saved["lines"]) == 2


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


def test_a_gpu_run_looks_for_waits_in_every_loop_that_trains_and_finds_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def learner(*_: object, stage: str) -> SimpleNamespace:
        def step(batch: int, done: int) -> None:
            if stage == "finetune" and done == 2:
                raise RuntimeError("called a synchronizing operation")

        return SimpleNamespace(batches=lambda *_: iter(range(9)), step=step, meter=SimpleNamespace(read=dict))

    monkeypatch.setattr(gpu, "_learner", learner)
    found = gpu.waiting(Namespace(device="cpu", tiny=True, out=tmp_path, step="waiting"))
    assert {stage: len(waits) for stage, waits in found["found"].items()} == {
        "pretrain": 0,
        "finetune": 1,
        "linear_probe": 0,
    }
    assert [row[1] for row in found["rows"]] == [0, 1, 0]


@pytest.fixture
def sync_debug_mode(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The modes that `_waits` sets, the last one at the end; its learners are the CPU's, and their steps do nothing."""
    modes, build = ["default"], gpu._learner
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(
        gpu, "_learner", lambda args, *sizes, stage: build(Namespace(device="cpu"), *sizes, stage=stage)
    )
    for learner in (Pretraining, Finetuning, Probing):
        monkeypatch.setattr(learner, "step", lambda *_: None)
    monkeypatch.setattr(Meter, "read", dict)
    return modes


@pytest.mark.parametrize(
    ("stage", "module", "name"),
    [
        ("finetune", augment, "resized_crop"),
        ("finetune", augment, "on_device"),
        ("finetune", augment, "run_program"),
        ("finetune", augment, "erase"),
        ("linear_probe", linear_probe, "crop_resize"),
        ("pretrain", batches, "apply_view"),
    ],
)
def test_a_wait_in_what_makes_a_batch_is_found(
    stage: str, module: ModuleType, name: str, sync_debug_mode: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where several batches are made at once, the first of them before the search begins."""
    function = getattr(module, name)

    def waits(*given: object) -> object:
        if sync_debug_mode[-1] == "error":
            raise RuntimeError(f"{name} waits")
        return function(*given)

    args = Namespace(device="cuda", tiny=False)
    assert gpu._waits(args, stage) == []
    monkeypatch.setattr(module, name, waits)
    assert [wait.split(":")[0] for wait in gpu._waits(args, stage)] == [f"{name} waits"]
    assert sync_debug_mode == ["default"] + 2 * ["error", "default"]


@pytest.mark.parametrize("stage", ["pretrain", "finetune", "linear_probe"])
def test_the_search_for_waits_sees_the_watch_look_at_losses_that_it_has_sent(
    stage: str, sync_debug_mode: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    searched = []
    learner = {"pretrain": Pretraining, "finetune": Finetuning, "linear_probe": Probing}[stage]
    monkeypatch.setattr(learner, "step", lambda _, batch, done: searched.append((done, sync_debug_mode[-1])))
    gpu._waits(Namespace(device="cuda", tiny=False), stage)
    assert [done for done, _ in searched] == list(range(32))
    assert {mode for done, mode in searched if done + 1 in (COPIED, 2 * COPIED)} == {"error"}


@pytest.mark.parametrize("stage", ["finetune", "linear_probe"])
def test_a_gpu_run_builds_the_learners_of_the_evaluations(stage: str) -> None:
    learner = gpu._learner(Namespace(device="cpu"), "micro", 16, 64, stage=stage)
    learner.step(next(learner.batches(0, 0)), 0)
    assert learner.settings.batch_size == 16 and learner.distributed.device.type == "cpu"


def test_a_gpu_run_leaves_no_images_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    gpu.finetuning(Namespace(device="cpu", tiny=True))
    with pytest.raises(UserError, match="batch_size"):
        gpu._learner(Namespace(device="cpu"), "micro", 64, 32, stage="finetune")
    assert not list(tmp_path.iterdir())


def test_views_and_augmentation_are_compared_with_the_products_that_stages_have(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", chosen.append)
    monkeypatch.setattr(torch, "device", lambda *_: pytest.fail("a tensor was made before") if not chosen else None)
    monkeypatch.setattr(torch, "randint", lambda *_, **__: sys.exit("the first images"))
    with pytest.raises(SystemExit, match="the first images"):
        gpu.agreement(Namespace(device="cuda", tiny=True))
    assert chosen == ["high"]


def test_the_augmentation_of_finetuning_agrees_with_itself_and_a_difference_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu = torch.device("cpu")
    assert [row[1] for row in gpu._augmentation_agrees(8, 32, cpu, cpu)] == [100, 100]
    crop, calls = augment.resized_crop, []

    def another(*inputs: object) -> torch.Tensor:
        calls.append(1)
        return crop(*inputs) + (len(calls) == 2)

    monkeypatch.setattr(augment, "resized_crop", another)
    assert [row[1] for row in gpu._augmentation_agrees(8, 32, cpu, cpu)] == [0, 100]


# Steps of benchmarks/gpu.py in place of the real ones. `steps` has a child and hears no signal but SIGKILL; `finetuning`
# misses its target; `detection` has a full disk.
STEP = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
name, out = sys.argv[sys.argv.index("--step") + 1], Path(sys.argv[sys.argv.index("--out") + 1])
(result,) = out.glob(f"*-{name}.log")
if name == "imagenet":
    result.with_suffix(".json").write_text(json.dumps({"rows": [["figure", 1, "== 1", ""]]}))
if name == "steps":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    child = subprocess.Popen(["sleep", "300"])
    result.with_suffix(".json").write_text(json.dumps({"rows": [["figure", 7, "", ""]]}))
    (out / "started").write_text(f"{os.getpid()} {child.pid}")
    time.sleep(300)
if name == "base":
    sys.exit(3)
if name == "finetuning":
    result.with_suffix(".json").write_text(json.dumps({"rows": [["figure", 2, "== 1", ""]]}))
if name == "detection":
    spare = Path(sys.argv[sys.argv.index("--spare") + 1])
    (spare / result.with_suffix(".json").name).write_text(json.dumps({"rows": [["spared", 5, "", ""]]}))
"""
CONDUCT = "import sys\nfrom benchmarks import gpu\ngpu.__file__, gpu.PROBE = sys.argv.pop(1), ''\nsys.exit(gpu.main())"
Conduct = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def conduct(tmp_path: Path) -> Iterator[Conduct]:
    """Starts benchmarks/gpu.py with the steps of STEP and the folder `out`."""
    (tmp_path / "step.py").write_text(STEP)
    started = []

    def start(*options: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", CONDUCT, str(tmp_path / "step.py"), "--out", str(tmp_path / "out"), *options]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()
    for file in tmp_path.glob("out/started"):
        for number in file.read_text().split():
            if alive(number):
                os.kill(int(number), signal.SIGKILL)


def alive(number: str) -> bool:
    """Whether a process runs. One that has ended may wait for its parent, as a zombie."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", number], capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")


def running(process: subprocess.Popen[str], out: Path) -> list[str]:
    """The numbers of the processes of the step `steps`, as soon as it has started."""
    deadline = time.monotonic() + 60
    while not (out / "started").exists() or len((out / "started").read_text().split()) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    return (out / "started").read_text().split()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_gpu_run_leaves_no_process_and_keeps_what_it_has(
    number: signal.Signals, conduct: Conduct, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = conduct("--only", "steps", "imagenet")
    numbers = running(process, out)
    assert all(map(alive, numbers))
    process.send_signal(number)
    process.send_signal(number)  # `timeout` sends it twice
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert error == f"stopped by {number.name}; what was done is in {out / 'table.txt'}\n"
    assert not any(map(alive, numbers))
    table = (out / "table.txt").read_text()
    assert re.search(rf"^steps: [\d.]+ s, stopped by {number.name}\n  figure +7$", table, re.MULTILINE), table
    assert "imagenet: not run\n" in table


def test_a_gpu_run_that_is_killed_takes_its_step_and_what_that_has_started_with_it(
    conduct: Conduct, tmp_path: Path
) -> None:
    process = conduct("--only", "steps")
    numbers = running(process, tmp_path / "out")
    process.kill()
    deadline = time.monotonic() + 60
    while any(map(alive, numbers)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_second_gpu_run_in_the_same_folder_is_one_sentence(conduct: Conduct, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = conduct("--only", "steps")
    numbers = running(first, out)
    second = conduct("--only", "imagenet")
    output, error = second.communicate(timeout=60)
    assert (second.returncode, output) == (2, "") and error.count("\n") == 1
    assert error.startswith(f"error: another run writes in {out}; ")
    assert all(map(alive, numbers)) and not list(out.glob("*-imagenet.*"))


def test_a_stopped_gpu_run_needs_nobody_who_reads_its_output(conduct: Conduct, tmp_path: Path) -> None:
    process = conduct("--only", "steps")
    numbers = running(process, tmp_path / "out")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()  # as Ctrl-C does where it is piped to `tee`
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130 and "Traceback" not in process.stderr.read()
    assert not any(map(alive, numbers)) and (tmp_path / "out/table.txt").exists()


def test_a_gpu_run_under_nohup_outlives_its_terminal(conduct: Conduct, tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = conduct("--only", "steps")
    finally:
        signal.signal(signal.SIGHUP, before)
    running(process, tmp_path / "out")
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143


def old_result(out: Path, name: str) -> None:
    out.mkdir(exist_ok=True)
    old = {"rows": [["old figure", 1, "== 2", ""]], "wall": 5}
    (out / f"{list(gpu.STEPS).index(name):02d}-{name}.json").write_text(json.dumps(old))


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("steps", ("--minutes", "0.1"), r"[\d.]+ s, stopped after [56] s"),
        ("imagenet", ("--minutes", "0.001"), "no time left"),
        ("base", (), r"[\d.]+ s, ended with status 3, see .*-base\.log"),
    ],
)
def test_a_step_without_its_whole_result_fails_the_gpu_run(
    name: str, options: tuple[str, ...], said: str, conduct: Conduct, tmp_path: Path
) -> None:
    old_result(tmp_path / "out", name)
    process = conduct("--only", name, *options)
    output, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (1, "")
    assert re.search(f"^{name}: {said}$", output, re.MULTILINE), output
    assert "old figure" not in output and (tmp_path / "out/table.txt").read_text() in output


def figures(out: Path, name: str) -> list[str]:
    (file,) = out.glob(f"*-{name}.json")
    return [row[0] for row in json.loads(file.read_text())["rows"]]


def test_a_step_that_measures_nothing_leaves_the_result_of_an_earlier_gpu_run(conduct: Conduct, tmp_path: Path) -> None:
    """One that fails, one that is stopped before its turn; a step with a result replaces the earlier one."""
    out = tmp_path / "out"
    process = conduct("--only", "imagenet")
    process.communicate(timeout=60)
    for name in ("base", "finetuning"):
        old_result(out, name)
    process = conduct("--only", "base", "finetuning")
    process.communicate(timeout=60)
    assert process.returncode == 1
    assert figures(out, "base") == ["old figure"] and figures(out, "finetuning") == ["figure"]
    process = conduct("--only", "steps", "imagenet")
    running(process, out)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and figures(out, "imagenet") == ["figure"]
    said = r"^imagenet: not run\n  07-imagenet.json is of an earlier run, \d{4}-\d\d-\d\dT[\d:]+\+00:00$"
    assert re.search(said, output, re.MULTILINE), output
    assert re.search(r"^base: 5 s, of an earlier run$", output, re.MULTILINE), output


def test_a_gpu_run_that_misses_a_target_ends_otherwise_than_one_that_fails(conduct: Conduct) -> None:
    for names, status in ((("finetuning",), 3), (("finetuning", "base"), 1)):
        process = conduct("--only", *names)
        output, error = process.communicate(timeout=60)
        assert (process.returncode, error) == (status, "") and "MISSED" in output


def test_what_a_step_can_not_write_to_a_full_disk_reaches_the_table(conduct: Conduct, tmp_path: Path) -> None:
    process = conduct("--only", "detection")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "spared" in output and figures(tmp_path / "out", "detection") == ["spared"]


def full_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_text

    def full(path: Path, text: str, *more: str) -> int:
        if path.parent != folder:
            return write(path, text, *more)
        write(path, text[: len(text) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)


def test_a_step_goes_on_where_its_folder_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "spare").mkdir()
    full_disk(tmp_path, monkeypatch)
    gpu._save(Namespace(out=tmp_path, step="base", spare=tmp_path / "spare"), {"rows": []})
    assert [file.name for file in tmp_path.iterdir()] == ["spare"]
    assert [file.name for file in (tmp_path / "spare").iterdir()] == ["06-base.json"]


@pytest.fixture
def run_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Namespace:
    """Of `gpu.conduct` in this process, with the steps of STEP."""
    (tmp_path / "step.py").write_text(STEP)
    monkeypatch.setattr(gpu, "__file__", str(tmp_path / "step.py"))
    monkeypatch.setattr(gpu, "PROBE", "")
    out, only = tmp_path / "out", ["imagenet", "finetuning"]
    return Namespace(device="cpu", tiny=True, out=out, cifar=None, wheels=None, minutes=9, only=only)


def test_a_gpu_run_on_a_full_disk_runs_every_step_and_prints_its_table(
    run_of_all: Namespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run_of_all.out
    full_disk(out, monkeypatch)
    assert gpu.conduct(run_of_all, []) == 1
    output, error = capsys.readouterr()
    assert len(re.findall(r"^  figure  ", output, re.MULTILINE)) == 2, output
    assert error.count("\n") == 1 and error.startswith(f"error: {out} lacks some of that table (No space left")
    assert {file.suffix for file in out.iterdir()} == {".json", ".log"}


def test_wheels_that_a_full_disk_does_not_take_are_one_sentence(
    run_of_all: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "a file")

    run_of_all.wheels = wheel(tmp_path / "wheels", "no_such_one").parent
    monkeypatch.setattr(zipfile.ZipFile, "extractall", full)
    assert gpu.conduct(run_of_all, []) == 2
    assert (
        capsys.readouterr().err == "error: a file: No space left on device; make room, or name another folder (--out)\n"
    )
    assert not list(run_of_all.out.iterdir())


NONE = r"not compiled: there is no /nonexistent; .*"


def test_without_a_compiler_a_gpu_run_measures_what_needs_none_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[bool] = []

    def measured(args: Namespace, arch: str, ratio: float, batch: int, compile: bool) -> tuple[float, float, float]:
        compiled.append(compile)
        return 1.0, 0.358, 1.0

    meter = SimpleNamespace(read=lambda: {"input_share": 0.0, "step_ms": 1.0})
    learner = SimpleNamespace(batches=lambda *_: iter(()), meter=meter)
    monkeypatch.setattr(gpu, "_step", measured)
    monkeypatch.setattr(gpu, "_learner", lambda *_, compile: compiled.append(compile) or learner)
    monkeypatch.setenv("CXX", "/nonexistent")
    args = Namespace(device="cpu", tiny=True, out=tmp_path, step="steps")
    for measure in (gpu.steps, gpu.base, gpu.share):
        *rows, last = measure(args)["rows"]
        assert rows and re.fullmatch(NONE, last[0]) and gpu.verdict(*last[1:3]) == "MISSED"
    assert compiled and not any(compiled)


def test_a_compiler_that_fails_is_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU Python's headers may be missing."""

    def fails(_: object) -> Callable[[torch.Tensor], torch.Tensor]:
        raise RuntimeError("Python.h: No such file or directory")

    monkeypatch.setenv("CXX", sys.executable)
    assert gpu._not_compiled(Namespace(device="cpu", tiny=True)) == []
    monkeypatch.setattr(torch, "compile", fails)
    ((what, *_),) = gpu._not_compiled(Namespace(device="cpu", tiny=False))
    assert what == "not compiled: RuntimeError, see the log"


def test_the_target_of_vit_base_is_that_of_the_compiled_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its speed as it was seen on an H100."""
    monkeypatch.setattr(gpu, "_not_compiled", lambda _: [])
    monkeypatch.setattr(gpu, "_step", lambda *given: (1.0, 0.465 if given[-1] else 0.358, 1.0))
    rows = gpu.base(Namespace(device="cpu", tiny=True, out=tmp_path, step="base"))["rows"]
    assert [gpu.verdict(*row[1:3]) for row in rows] == ["", "", "ok"]


def test_a_result_of_an_earlier_gpu_run_is_called_one_and_decides_nothing(conduct: Conduct, tmp_path: Path) -> None:
    old_result(tmp_path / "out", "knn")
    process = conduct("--only", "imagenet")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert re.search(r"^imagenet: [\d.]+ s$", output, re.MULTILINE)
    assert re.search(r"^knn: 5 s, of an earlier run\n  old figure .* MISSED$", output, re.MULTILINE), output


@pytest.mark.parametrize("content", ['{"rows": [["old figure", 1', "", "[]", "\xff"])
def test_a_damaged_result_of_an_earlier_gpu_run_is_called_unreadable(
    content: str, conduct: Conduct, tmp_path: Path
) -> None:
    old_result(tmp_path / "out", "knn")
    (file,) = (tmp_path / "out").glob("*-knn.json")
    file.write_bytes(content.encode("latin-1"))
    process = conduct("--only", "imagenet")
    output, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (0, "")
    assert "\nknn: unreadable, of an earlier run\n" in f"{output}\n" and "figure" in output


def test_a_result_that_is_cut_off_while_it_is_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk, while `run` adds how long a step took."""
    args = Namespace(device="cpu", tiny=True, out=tmp_path, cifar=None)
    (tmp_path / "step.py").write_text(STEP)
    monkeypatch.setattr(gpu, "__file__", str(tmp_path / "step.py"))
    write = Path.write_text

    def full(path: Path, text: str, *more: str) -> int:
        write(path, text[: len(text) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError):
        gpu.run(args, "imagenet", 60, [])
    (file,) = tmp_path.glob("*-imagenet.json")
    assert json.loads(file.read_text())["rows"] == [["figure", 1, "== 1", ""]]


def test_steps_asked_for_by_several_options_all_run(conduct: Conduct, tmp_path: Path) -> None:
    process = conduct("--only", "share", "--only", "imagenet", "knn")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert [line.split(":")[0] for line in output.splitlines() if ": at most" in line] == ["share", "imagenet", "knn"]


NO_TORCH = "import sys\nsys.modules['torch'] = None  # as where it is not installed\n"


@pytest.mark.parametrize(
    ("device", "torch_is_there", "reason"),
    [
        ("gpu0", True, "device string"),
        ("cuda", True, ""),
        ("cpu", False, "import of torch halted"),
    ],
)
def test_a_gpu_run_without_its_device_ends_in_one_sentence_before_its_first_step(
    device: str, torch_is_there: bool, reason: str, tmp_path: Path
) -> None:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}  # a machine with a GPU shows none
    if not torch_is_there:
        (tmp_path / "site").mkdir()
        (tmp_path / "site/sitecustomize.py").write_text(NO_TORCH)
        environment["PYTHONPATH"] = str(tmp_path / "site")
    old_result(tmp_path / "out", "tests")
    script = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--tiny", "--device", device]
    command = [*script, "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(f"error: --device {device}: ") and reason in done.stderr
    assert len(list((tmp_path / "out").iterdir())) == 1  # what an earlier run has found is still there


def test_a_gpu_run_starts_with_the_standard_library_alone() -> None:
    code = "import sys\nsys.argv = ['gpu.py', '--only', 'no_such']\nfrom benchmarks import gpu\ntry:\n    gpu.main()\n"
    code += "except SystemExit:\n    print(*{name.split('.')[0] for name in sys.modules} - sys.stdlib_module_names)"
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert set(done.stdout.split()) == {"__main__", "benchmarks"}, done.stderr


@pytest.mark.parametrize("name", [*KNOWN, "local_noise", "gpu", "__main__"])
def test_a_file_in_place_of_the_folder_of_results_is_refused_before_anything_is_measured(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each benchmark's own `main`, in this process: importing torch for each takes seconds."""
    if name == "peers" and MISSING:
        pytest.skip("needs lightly and kornia: pip install '.[peers]'")
    (tmp_path / "file").touch()
    module = importlib.import_module(f"benchmarks.{name}")
    for out in ("file", "file/sub"):
        needed = ["manifest.json", "32"] if name == "local_noise" else []
        with pytest.MonkeyPatch.context() as patched, pytest.raises(SystemExit) as ended:
            patched.setattr(sys, "path", list(sys.path))
            patched.setattr(sys, "argv", [f"{name}.py", *needed, "--out", str(tmp_path / out)])
            module.main()
        assert ended.value.code == 2
        assert capsys.readouterr().err.endswith(f"argument --out: {tmp_path / 'file'} is no folder; name another\n")


@pytest.mark.parametrize("file", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda file: file.stem)
def test_every_benchmark_runs_by_what_turns_a_mistake_into_one_sentence(file: Path) -> None:
    """benchmarks/gpu.py alone does it itself: it starts without the package."""
    ends = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.If)]
    started = [ast.unparse(line) for node in ends if "__main__" in ast.unparse(node.test) for line in node.body]
    assert started in ([], ["sys.exit(main())" if file.stem == "gpu" else "run(main)"])


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("local_noise no_such/manifest.json 32 64", "no_such/manifest.json"),
        ("ceiling --quick", "APS_DEVICE=gpu0"),
        ("choices --quick --precision no_such", "precision"),
        ("scaling --quick --processes 3", "a batch of 8 can't be divided by it; choose among 2, 4, 8"),
        ("scaling --quick --processes 1", "one process, and no other number to compare it with"),
        ("server --quick --address http://127.0.0.1:9", "MLflow at http://127.0.0.1:9 can't be used (nothing listens"),
        ("server --quick --address none", "--address none: there is nothing to compare"),
    ],
)
def test_a_mistake_in_a_benchmarks_command_is_one_sentence(command: str, said: str, tmp_path: Path) -> None:
    environment = os.environ | {"APS_DEVICE": "gpu0"}
    name, *options = command.split()
    full = [sys.executable, "-m", f"benchmarks.{name}", *options, "--out", str(tmp_path)]
    done = subprocess.run(full, cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 2 and re.fullmatch("error: .*\n", done.stderr), done.stderr
    assert said in done.stderr and not list(tmp_path.iterdir())


WHOLE = "is not a whole number from"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("large --counts 0", WHOLE),
        ("scaling --processes 0", WHOLE),
        ("server --steps 0", WHOLE),
        ("step --batch-size -1", WHOLE),
        ("server --pause -1", "is not a number from 0"),
        ("server --pause nan", "is not a number from 0"),
    ],
)
def test_a_count_of_none_is_refused_before_anything_is_measured(
    command: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *options = command.split()
    monkeypatch.setattr(sys, "argv", [name, *options])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"benchmarks.{name}").main()
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_the_memory_of_a_step_is_measured_after_the_timed_ones_have_left_it_and_failing_costs_no_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Timed:
        precision = SimpleNamespace(name="fp32")

        def step(self, *_: object) -> None:
            pass

    trainers: list[weakref.ref[Timed]] = []

    def trainer(*_: object) -> Timed:
        made = Timed()
        trainers.append(weakref.ref(made))
        return made

    def child(command: list[str], **_: object) -> SimpleNamespace:
        assert trainers and not any(made() for made in trainers)
        full = "1.0" in command
        return SimpleNamespace(returncode=int(full), stdout="5\n", stderr="Traceback\ntorch.OutOfMemoryError: 79 GiB\n")

    monkeypatch.setattr(step, "make_trainer", trainer)
    monkeypatch.setattr(step, "inputs", lambda *_: ())
    monkeypatch.setattr(step.subprocess, "run", child)
    monkeypatch.setattr(common, "_commit", lambda: None)
    monkeypatch.setattr(sys, "argv", ["step.py", "--quick", "--out", str(tmp_path)])
    assert step.main() == 1
    error = capsys.readouterr().err
    assert error == "  ViT-tiny, r=1: no memory measured (exit status 1) torch.OutOfMemoryError: 79 GiB\n"
    (file,) = tmp_path.glob("*.json")
    found = json.loads(file.read_text())
    assert len(found["rows"]) == 3 and found["memory_gib"].keys() == {"0.125", "0.25", "0.5"}


def test_a_contender_leaves_the_gpu_to_the_next_one_after_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    for name in ("lightly", "lightly.loss", "lightly.models", "lightly.models.modules", "lightly.transforms", "kornia"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "kornia.augmentation", ModuleType("kornia.augmentation"))
    monkeypatch.setattr(peers, "processes", lambda: nullcontext(SimpleNamespace(device=torch.device("cuda"))))
    monkeypatch.setattr(peers, "setup_of", lambda *_: None)
    monkeypatch.setattr(peers, "build", lambda *_: SimpleNamespace(train=lambda: events.append("epoch")))
    monkeypatch.setattr(peers, "seconds", lambda function: function() or events.append("clock") or 1.0)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: events.append("emptied"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5)
    monkeypatch.setattr(peers, "print", lambda text, **_: events.append(text), raising=False)
    monkeypatch.setattr(sys, "stdin", ["train\n", "train\n"])
    peers.serve("kornia", True)
    turn = ["epoch", "clock", "emptied", "1.0"]
    assert events[:-1] == turn + turn


def test_a_contender_that_dies_is_one_sentence() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process.wait()
    with pytest.raises(SystemExit, match="a contender has died"):
        peers.ask(process, "train")
    process.communicate()


def test_a_full_disk_costs_a_benchmark_neither_its_rows_nor_the_file_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(common, "_commit", lambda: None)
    file = common.write("views", {"rows": []}, {}, tmp_path)
    before = file.read_text()
    full_disk(tmp_path, monkeypatch)
    with pytest.raises(UserError, match="No space left on device"):
        common.write("views", {"rows": [common.row("one", common.spread([2.0]))]}, {}, tmp_path)
    assert "one" in capsys.readouterr().out and file.read_text() == before
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("status", [3, 0])
def test_a_stage_that_dies_ends_the_test_of_a_server(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def play(job: StageJob, steps: int, pause: float, barrier: Any, answers: Any) -> None:
        barrier.wait()
        if job.settings.seed == 0:
            answers.put(([0.0], 0.0))
        elif job.settings.seed == 1:
            os._exit(status)
        else:
            time.sleep(600)

    monkeypatch.setattr(server, "play", play)
    with pytest.raises(SystemExit, match=f"a stage has died .status {status}."):
        server.measure("none", 3, 1, 0)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("batches", [1, 3])
def test_scaling_times_what_training_does_within_an_epoch(
    batches: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the first batch of one, which is never made ahead; T steps a batch; a GPU makes a batch ahead to the end."""
    settings: list[dict[str, Any]] = []
    monkeypatch.setattr(scaling, "launch", lambda count, given: settings.append(given) or 1.0)
    monkeypatch.setattr(sys, "argv", ["scaling", "--quick", "--processes", "2", "--out", str(tmp_path)])
    scaling.main()
    events: list[str] = []

    class Noted(Batches):
        def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
            events.append("epoch")
            assert self.batches == batches + 2
            for batch in super().epoch(epoch, first):
                events.append("batch")
                yield batch

    monkeypatch.setattr(scaling, "Batches", Noted)
    monkeypatch.setattr(scaling, "synchronize", lambda: events.append("clock"))
    monkeypatch.setattr(Trainer, "step", lambda *_: events.append("step"))
    scaling.worker(settings[0] | {"batches": batches})
    one = ["batch", *SamplingSettings().samplings * ["step"]]
    assert events == ["epoch", *one, "clock", *batches * one, "clock"]


def test_an_efficiency_is_against_one_process_whatever_numbers_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images_a_second = {1: 100.0, 2: 150.0, 4: 200.0}
    monkeypatch.setattr(scaling, "launch", lambda count, settings: images_a_second[count])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(sys, "argv", ["scaling", "--quick", "--processes", "4", "2", "--out", str(tmp_path)])
    scaling.main()
    (file,) = tmp_path.glob("*.json")
    rows = json.loads(file.read_text())["rows"]
    assert {row["what"].split()[0]: row["ratio"]["median"] for row in rows} == {"2": 75, "4": 50}


def test_the_table_of_all_benchmarks_names_a_file_that_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "old-cpu.json").write_text('{"rows": [')
    command = [sys.executable, "-m", "benchmarks", "--quick", "--out", str(tmp_path), "sampler"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "target 40x" in done.stdout.splitlines()[-1]
    assert done.stderr == f"{tmp_path / 'old-cpu.json'}: unreadable; delete it, or run that benchmark again\n"


def wheel(folder: Path, name: str, content: str = "one = 1\n") -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"{name}.py", content)
    return file


def unpacked(into: Path) -> set[str]:
    return {file.name for file in into.glob("*.py")}


def test_wheels_are_unpacked_again_when_they_change_and_only_then(tmp_path: Path) -> None:
    wheels, into = tmp_path / "wheels", tmp_path / "packages"
    wheel(wheels, "no_such_one")
    wheel(wheels, "numpy")  # Python has it
    gpu.unpack(wheels, into, [])
    assert unpacked(into) == {"no_such_one.py"}
    (into / "kept").touch()
    gpu.unpack(wheels, into, [])
    assert (into / "kept").exists()
    wheel(wheels, "no_such_two")
    gpu.unpack(wheels, into, [])
    assert unpacked(into) == {"no_such_one.py", "no_such_two.py"}
    wheel(wheels, "no_such_one", "one = 'another'\n")
    gpu.unpack(wheels, into, [])
    assert "another" in (into / "no_such_one.py").read_text()
    wheel(wheels, "no_such_two").unlink()
    gpu.unpack(wheels, into, [])
    assert unpacked(into) == {"no_such_one.py"} and {file.name for file in tmp_path.iterdir()} == {"wheels", "packages"}


def truncated(content: bytes) -> bytes:
    return content[:-20]


def damaged(content: bytes) -> bytes:
    return content.replace(b"one = 1", b"one = 2")


def empty(content: bytes) -> bytes:
    return b""


@pytest.mark.parametrize("broken", [truncated, damaged, empty])
def test_a_broken_wheel_is_one_sentence_and_a_whole_one_mends_it(
    broken: Callable[[bytes], bytes], conduct: Conduct, tmp_path: Path
) -> None:
    wheels, packages = tmp_path / "wheels", tmp_path / "out/packages"
    wheel(wheels, "no_such_one")
    file = wheel(wheels, "no_such_two")
    file.write_bytes(broken(file.read_bytes()))
    process = conduct("--wheels", str(wheels), "--only", "imagenet")
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1 and error.count("\n") == 1
    assert error.startswith(f"{file}: a broken wheel (") and "delete it, and copy it again" in error
    assert not packages.exists()
    wheel(wheels, "no_such_two")
    process = conduct("--wheels", str(wheels), "--only", "imagenet")
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (0, "") and unpacked(packages) == {"no_such_one.py", "no_such_two.py"}


def test_an_unpacking_that_was_cut_off_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheels, into = tmp_path / "wheels", tmp_path / "packages"
    wheel(wheels, "no_such_one")
    wheel(wheels, "no_such_two")
    gpu.unpack(wheels, into, [signal.SIGINT])
    assert not into.exists()
    extract, calls = zipfile.ZipFile.extractall, []

    def killed(archive: zipfile.ZipFile, folder: Path) -> None:
        extract(archive, folder)
        calls.append(archive.filename)
        raise SystemExit

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(zipfile.ZipFile, "extractall", killed)
        gpu.unpack(wheels, into, [])
    assert len(calls) == 1 and not into.exists()
    gpu.unpack(wheels, into, [])
    assert unpacked(into) == {"no_such_one.py", "no_such_two.py"}


@pytest.mark.parametrize(("asked", "current"), [("cuda", [0]), ("cuda:0", [0]), ("cuda:1", [1]), ("cpu", [])])
def test_a_step_measures_the_gpu_that_was_asked_for(
    asked: str, current: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", made.append)
    monkeypatch.setitem(gpu.STEPS, "steps", (lambda args: {"rows": [], "current": list(made)}, 5))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--step", "steps", "--device", asked, "--out", str(tmp_path)])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(ROOT)
    assert gpu.main() == 0
    (file,) = tmp_path.glob("*-steps.json")
    assert json.loads(file.read_text())["current"] == made == current


@pytest.mark.parametrize(("asked", "current"), [("cuda", [0]), ("cuda:1", [1]), ("cpu", []), (None, [])])
def test_the_tests_marked_gpu_use_the_gpu_that_was_asked_for(
    asked: str | None, current: list[int], pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", made.append)
    monkeypatch.delenv("APS_TEST_DEVICE", raising=False)
    if asked:
        monkeypatch.setenv("APS_TEST_DEVICE", asked)
    pytestconfig.pluginmanager.get_plugin(str(ROOT / "tests/conftest.py")).pytest_sessionstart()
    assert made == current


def test_the_memory_that_a_benchmark_notes_is_that_of_the_gpu_it_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "second")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 1)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=(index + 1) * 2**30)
    )
    assert common.machine()["gpu_memory_gib"] == 2


def test_local_noise_adds_a_colour_to_each_block_of_each_image(tmp_path: Path) -> None:
    images, labels = np.full((8, 8, 8, 3), 128, np.uint8), np.arange(8) % 2
    np.savez(tmp_path / "plain.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    source = UserDataset(arrays=str(tmp_path / "plain.npz"))
    prepare("plain", tmp_path / "plain", source)
    local_noise.main([str(tmp_path / "plain/manifest.json"), "0", "20", "--out", str(tmp_path)])
    none, some = (np.load(tmp_path / f"plain-local{deviation}.npz") for deviation in (0, 20))
    for split in ("train", "test"):
        assert (none[f"{split}_images"] == images).all() and (some[f"{split}_labels"] == labels).all()
        blocks = some[f"{split}_images"].reshape(8, 2, 4, 2, 4, 3).astype(int)
        assert (blocks == blocks[:, :, :1, :, :1]).all()
        colours = blocks[:, :, 0, :, 0].reshape(-1, 3)
        assert len(np.unique(colours, axis=0)) == len(colours) == 32 and 12 < (colours - 128).std() < 28
    assert (some["train_images"] != some["test_images"]).any()
