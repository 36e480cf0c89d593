"""Disks and memory that run out, for real: small file systems in memory, limits of the kernel's.

Each command ends in one sentence and exit status 2, and the same command, given room, ends with what an undisturbed one does.
Needs root, to mount; elsewhere these tests are skipped, aloud.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torchvision.io import write_png

from aps import cli
from aps.files import TEMPORARY

ROOT = Path(__file__).parent.parent
STUDY: dict[str, Any] = {
    "study": "full",
    "results": "disk/results",
    "datasets": {"photos": {"folder": "photos"}},
    "defaults": {
        "dataset": {"name": "digits", "train_limit": 64},
        "encoder": {"arch": "micro", "image_size": 16, "patch_size": 4, "dim": 24, "depth": 1, "heads": 3},
        "pretrain": {"epochs": 2, "batch_size": 32, "projector": [16, 16, 8], "predictor": [16, 16, 8]},
        "embed": {"queries": 2, "neighbours": 2},
    },
    "experiments": {
        "one": {"stages": ["pretrain"]},
        "floor": {"stages": ["embed"], "encoder": {"weights": "random"}},
        "files": {"dataset": {"name": "photos", "train_limit": 32}, "stages": ["pretrain"]},
    },
}


def can_mount() -> str | None:
    """Why not, else None."""
    if os.geteuid() != 0 or shutil.which("mount") is None or shutil.which("unshare") is None:
        return "needs root, mount and unshare"
    tried = subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, text=True)
    return f"no file system can be mounted here ({tried.stderr.strip()})" if tried.returncode else None


REFUSED = can_mount()
pytestmark = pytest.mark.skipif(REFUSED is not None, reason=str(REFUSED))


@contextmanager
def disk(folder: Path, options: str) -> Iterator[Callable[[str], None]]:
    """A file system in memory on `folder` -> how to give it other options."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], check=True)

    def remount(options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)

    try:
        yield remount
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def folder(tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a study, whose results go to `disk`, and the digits prepared beside it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "none")
    monkeypatch.setenv("APS_DEVICE", "cpu")
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY))
    return tmp_path


def stage(name: str, experiment: str, digits: Path) -> list[str]:
    return [
        name, "--configfile", "study.yaml", "--experiment", experiment, "--manifest", str(digits),
        "--checkpoint-minutes", "0",
    ]  # fmt: skip


def said(capsys: pytest.CaptureFixture[str], command: list[str]) -> tuple[int, str]:
    """Exit status and the last line on standard error."""
    capsys.readouterr()
    status = cli.main(command)
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    return status, (shown.splitlines() or [""])[-1]


def weights(folder: Path, experiment: str = "one") -> dict[str, torch.Tensor]:
    return load_file(folder / f"results/full/{experiment}/seed0/pretrain/encoder.safetensors")


def temporaries(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if TEMPORARY.fullmatch(path.name) or path.name.endswith(".part")]


def assert_sentence(status: int, sentence: str) -> None:
    assert status == 2, sentence
    assert sentence.startswith("error: ") and "disk/" in sentence, sentence
    assert "free " in sentence or "choose " in sentence, sentence


@pytest.fixture
def undisturbed(folder: Path, digits: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, torch.Tensor]:
    status, sentence = said(capsys, [*stage("pretrain", "one", digits), "--set", "results=whole/results"])
    assert status == 0, sentence
    return weights(folder / "whole")


SIZES = ["4k", "12k", "24k", "60k", "100k", "160k", "240k", "320k", "400k", "480k", "560k", "640k"]


@pytest.mark.parametrize("limit", ["size", "nr_inodes"])
def test_a_stage_on_a_full_disk_is_one_sentence_and_goes_on_where_there_is_room(
    limit: str, folder: Path, digits: Path, undisturbed: dict[str, torch.Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    """The disk is full at many moments: the lock, the journal, a checkpoint, the outputs, putting them in place."""
    values = SIZES if limit == "size" else [str(n) for n in range(2, 26, 2)]
    failed = 0
    for value in values:
        with disk(folder / "disk", f"{limit}={value}") as remount:
            status, sentence = said(capsys, stage("pretrain", "one", digits))
            if status:
                failed += 1
                assert_sentence(status, sentence)
                remount("size=64m,nr_inodes=1000")
                status, sentence = said(capsys, stage("pretrain", "one", digits))
            assert status == 0, sentence
            assert not temporaries(folder / "disk")
            found = weights(folder / "disk")
            assert all(torch.equal(found[name], x) for name, x in undisturbed.items())
            lines = (folder / "disk/results/full/one/seed0/pretrain/history.jsonl").read_text().splitlines()
            assert [json.loads(line)["step"] for line in lines] == [8, 16]
    assert failed >= 5


def test_a_dataset_that_does_not_fit_is_one_sentence_and_is_prepared_where_there_is_room(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["data", "digits", "--configfile", "study.yaml"]
    for options in ("size=4k", "size=40k", "size=100k", "nr_inodes=2", "nr_inodes=4", "nr_inodes=5"):
        with disk(folder / "disk", options) as remount:
            assert_sentence(*said(capsys, command))
            remount("size=64m,nr_inodes=1000")
            assert said(capsys, command)[0] == 0
            assert (folder / "disk/results/data/digits/manifest.json").exists()
            assert not temporaries(folder / "disk")


def test_features_that_do_not_fit_are_one_sentence_and_are_written_where_there_is_room(
    folder: Path, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = 0
    for options in ("size=20k", "size=60k", "size=100k", "size=160k", "nr_inodes=8", "nr_inodes=12", "nr_inodes=14"):
        with disk(folder / "disk", options) as remount:
            status, sentence = said(capsys, stage("embed", "floor", digits))
            if status:
                failed += 1
                assert_sentence(status, sentence)
                remount("size=64m,nr_inodes=1000")
                assert said(capsys, stage("embed", "floor", digits))[0] == 0
            assert (folder / "disk/results/full/floor/seed0/embed/features.parquet").exists()
            assert not temporaries(folder / "disk")
    assert failed >= 4


def test_a_disk_that_is_read_only_is_one_sentence(
    folder: Path, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with disk(folder / "disk", "size=64m") as remount:
        remount("ro")
        for command in (stage("pretrain", "one", digits), ["data", "digits", "--configfile", "study.yaml"]):
            status, sentence = said(capsys, command)
            assert_sentence(status, sentence)
            assert "Read-only file system" in sentence


def test_files_that_may_not_grow_are_one_sentence(
    folder: Path, digits: Path, undisturbed: dict[str, torch.Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (10, 200, 1000, 20_000, 60_000):
        shutil.rmtree(folder / "disk", ignore_errors=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            status, sentence = said(capsys, stage("pretrain", "one", digits))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert_sentence(status, sentence)
        assert said(capsys, stage("pretrain", "one", digits))[0] == 0
        found = weights(folder / "disk")
        assert all(torch.equal(found[name], x) for name, x in undisturbed.items())


# --------------------------------------------------------------------------------------------------
# In processes of their own, whose /dev/shm or memory is little.


@pytest.fixture
def photos(folder: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "test"):
        for label in "ab":
            target = folder / "photos" / split / label
            target.mkdir(parents=True)
            for number in range(16):
                pixels = torch.randint(0, 256, (3, 24, 24), generator=generator, dtype=torch.uint8)
                write_png(pixels, str(target / f"{number}.png"))
    assert said(capsys, ["data", "photos", "--configfile", "study.yaml"])[0] == 0
    return folder / "disk/results/data/photos/manifest.json"


def command(folder: Path, before: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`aps ARGUMENTS` under a shell that has done something before, in a mount namespace of its own."""
    line = f'{before} && exec "$@"'
    return subprocess.run(
        ["unshare", "-m", "bash", "-c", line, "sh", sys.executable, "-m", "aps", *arguments], cwd=folder, text=True,
        capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, timeout=300,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("options", ["size=4k", "size=32k", "ro"])
def test_shared_memory_that_is_full_or_read_only_is_one_sentence_that_names_the_workers(
    options: str, folder: Path, photos: Path
) -> None:
    more = ("--configfile", "study.yaml", "--experiment", "files", "--manifest", str(photos))
    mount = f"mount -t tmpfs -o {options} none /dev/shm"
    done = command(folder, mount, "pretrain", *more, "--workers", "1")
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "workers 0" in done.stderr.splitlines()[-1] and "/dev/shm" in done.stderr.splitlines()[-1], done.stderr
    assert command(folder, mount, "pretrain", *more, "--workers", "0").returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("megabytes", [300, 1000, 3000])
def test_too_little_memory_is_one_sentence(megabytes: int, folder: Path, digits: Path) -> None:
    done = command(folder, f"ulimit -v {megabytes * 1000}", *stage("pretrain", "one", digits))
    assert done.returncode in (0, 2), done.stderr
    if done.returncode:
        assert "Traceback" not in done.stderr and "memory" in done.stderr.splitlines()[-1], done.stderr


@pytest.mark.parametrize(
    "options", ["nr_inodes=3", "nr_inodes=6", "nr_inodes=9", "nr_inodes=11", "size=4k", "size=12k", "size=16k"]
)
def test_a_new_folder_on_a_full_disk_is_one_sentence_and_leaves_no_part_in_the_way(
    options: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with disk(folder / "disk", options) as remount:
        status, sentence = said(capsys, ["init", "disk"])
        assert status == 2 and "No space left on device" in sentence and sentence.count("disk") == 1, sentence
        remount("size=10m,nr_inodes=100")
        assert said(capsys, ["init", "disk"])[0] == 0
