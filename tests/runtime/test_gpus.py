"""Stages side by side use GPUs of their own: pretended ones, with real locks of real processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pretended_gpus import pretend_gpus

from aps.cli.table import parse
from aps.inference import verbs
from aps.runtime import gpus
from aps.runtime.gpus import hold, visible

ROOT = Path(__file__).parent.parent.parent
HERE = [f"GPU-{kind}-1" for kind in "abcd"]
STAGE = """
import os, sys
from pathlib import Path
from aps.runtime import gpus
gpus.LOCKS = Path(sys.argv[1])
with gpus.hold(int(sys.argv[2])):
    print(os.environ["CUDA_VISIBLE_DEVICES"], flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with the GPUs of HERE, as its driver's program says, and a folder for locks; returns the latter."""
    pretend_gpus(tmp_path / "bin", HERE, monkeypatch)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(gpus, "LOCKS", tmp_path)
    return tmp_path


class Stages:
    """Stages that use GPUs until they end."""

    def __init__(self, locks: Path) -> None:
        self.locks, self.all = locks, list[subprocess.Popen[str]]()

    def start(self, count: int = 1) -> tuple[subprocess.Popen[str], str]:
        """A stage, and the GPUs that it and its processes see."""
        command = [sys.executable, "-c", STAGE, str(self.locks), str(count)]
        stage = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.all.append(stage)
        assert stage.stdout is not None
        return stage, stage.stdout.readline().strip()


@pytest.fixture
def stages(machine: Path) -> Iterator[Stages]:
    made = Stages(machine)
    yield made
    for stage in made.all:
        stage.kill()
        stage.communicate()


def said(stage: subprocess.Popen[str]) -> str:
    stage.kill()
    return stage.communicate()[1]


def test_stages_side_by_side_use_gpus_of_their_own_and_the_first_too_many_shares(stages: Stages) -> None:
    first, used = stages.start(2)
    assert used == "0,1"
    assert stages.start(1)[1] == "2"
    third, used = stages.start(2)
    assert used == "0,3"
    assert "warning: this stage uses 2 GPUs and others leave 1 of 4 free, so it shares" in said(third)
    assert not said(first)  # killed: its GPUs are free again, and so is the third's
    assert stages.start(3)[1] == "0,1,3"


def test_one_that_sees_some_of_them_by_number_or_uuid_keeps_to_these(
    stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 1")
    assert [stages.start()[1], stages.start()[1]] == ["3", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-b,GPU-c")  # the first is that of number 1
    assert stages.start()[1] == "GPU-c"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1,MIG-2")
    assert [stages.start()[1], stages.start()[1]] == ["MIG-1", "MIG-2"]


@pytest.mark.parametrize(
    ("given", "names"),
    [(None, "0 1 2 3"), ("", ""), ("-1", ""), ("2,9,0", "2"), ("NoDevFiles", ""), (" 1 ", "1"), ("GPU-d", "GPU-d")],
)
def test_what_is_visible_is_what_cuda_would_see(
    given: str | None, names: str, machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if given is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert list(visible()) == names.split()


def test_without_a_driver_nothing_is_visible_and_nothing_is_set(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(machine))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with hold(1):
        assert not visible() and os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"


@pytest.mark.parametrize(("given", "count", "used"), [("1,2", 2, "1,2"), ("1,2", 1, "2"), ("1", 2, "1")])
def test_what_slurm_gave_to_one_stage_is_its_own_and_what_it_gave_to_several_is_shared_out(
    given: str, count: int, used: str, stages: Stages, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    stages.start()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with hold(count):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == used
    assert os.environ["CUDA_VISIBLE_DEVICES"] == given and not capsys.readouterr().err


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_a_device_that_is_named_stays(device: str, machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APS_DEVICE", device)
    with hold(1):
        assert "CUDA_VISIBLE_DEVICES" not in os.environ


def test_a_place_without_locks_is_used_as_if_all_were_free(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "LOCKS", machine / "missing")
    with hold(1):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"
    (machine / "aps-GPU-a-1").symlink_to(machine / "bin")  # of somebody else
    monkeypatch.setattr(gpus, "LOCKS", machine)
    with hold(1):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"


def test_locks_can_be_taken_by_every_user(machine: Path) -> None:
    before = os.umask(0o077)
    try:
        with hold(1):
            assert (machine / "aps-GPU-a-1").stat().st_mode & 0o777 == 0o755
    finally:
        os.umask(before)


USES = {
    "embed": ["W", "x.png"], "predict": ["W", "x.png"], "detect": ["W", "x.png"], "attention": ["W", "x.png"],
    "neighbours": ["W", "x.png", "--index", "f.parquet"], "curate": ["W", "x.png"],
}  # fmt: skip


@pytest.mark.parametrize("verb", USES)
def test_a_verb_that_uses_an_encoder_takes_a_free_gpu(
    verb: str, stages: Stages, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saw: list[str | None] = []
    monkeypatch.setattr(verbs, f"_{verb}", lambda args: saw.append(os.environ.get("CUDA_VISIBLE_DEVICES")))
    stages.start(3)
    for device in ([], ["--device", "cuda"], ["--device", "cpu"], ["--device", "cuda:1"]):
        args = parse([verb, *USES[verb], *device])
        args.run(args)
    assert saw == ["3", "3", None, None] and not capsys.readouterr().err
    stages.start(1)
    args.device = None
    args.run(args)
    sentence = "warning: this command uses 1 GPU and others leave 0 of 4 free, so it shares; where that is too slow "
    assert capsys.readouterr().err.startswith(sentence) and saw[-1] == "0"


def test_a_verb_that_needs_no_encoder_takes_no_gpu(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saw: list[str | None] = []
    for name in ("curate", "export"):
        monkeypatch.setattr(verbs, f"_{name}", lambda args: saw.append(os.environ.get("CUDA_VISIBLE_DEVICES")))
    for command in (["curate", "--index", "f.parquet"], ["export", "W", "--out", "x"]):
        args = parse(command)
        args.run(args)
    assert saw == [None, None]
