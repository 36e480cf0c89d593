"""Workers that decode image files: as many as a process has cores, unless someone says otherwise."""

from __future__ import annotations

import errno
import os
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from aps.errors import UserError
from aps.runtime import cores as module
from aps.runtime.cores import cores, decoding_workers, loading
from aps.runtime.launch import _environment

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve cores without a quota, and much shared memory."""
    monkeypatch.setattr(module, "OWN_CGROUPS", Path("none"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(12), raising=False)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: Usage(2**34, 0, 2**34))
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def test_a_process_has_the_cores_that_it_is_granted_shared_among_those_of_its_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert cores() == decoding_workers(None) == 12
    for processes, share in ((4, 3), (8, 1), (16, 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert cores() == share


V2, V1 = "0::{}\n", "5:memory:/\n4:cpu,cpuacct:{}\n0::/\n"


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        (V2.format("/"), {"cpu.max": "200000 100000\n"}, 2),  # docker run --cpus=2
        (V2.format("/"), {"cpu.max": "250000 100000\n"}, 3),
        (V2.format("/"), {"cpu.max": "50000 100000\n"}, 1),
        (V2.format("/"), {"cpu.max": "max 100000\n"}, 12),
        (V2.format("/"), {"cpu.max": "3200000 100000\n"}, 12),  # more than the machine has
        (V2.format("/"), {}, 12),
        (V2.format("/"), {"cpu.max": "\n"}, 12),
        (V2.format("/pods/one"), {"pods/one/cpu.max": "max 100000\n", "pods/cpu.max": "400000 100000\n"}, 4),
        (V2.format("/pods/one"), {"pods/one/cpu.max": "300000 100000\n", "pods/cpu.max": "400000 100000\n"}, 3),
        (V2.format("/pods/one"), {"pods/two/cpu.max": "300000 100000\n"}, 12),  # another's
        (V2.format("/docker/5f"), {"cpu.max": "200000 100000\n"}, 2),  # the machine's name of a container's group
        (V1.format("/"), {"cpu/cpu.cfs_quota_us": "150000\n", "cpu/cpu.cfs_period_us": "50000\n"}, 3),
        (V1.format("/a/b"), {"cpu/a/cpu.cfs_quota_us": "200000\n", "cpu/a/cpu.cfs_period_us": "100000\n"}, 2),
        (V1.format("/"), {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 12),
    ],
)
def test_a_containers_quota_limits_the_cores(
    own: str, files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    top = tmp_path / "cgroup"
    for name, text in files.items():
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_text(text)
    (tmp_path / "own").write_text(own)
    monkeypatch.setattr(module, "CGROUPS", top)
    monkeypatch.setattr(module, "OWN_CGROUPS", tmp_path / "own")
    assert cores() == decoding_workers(None) == expected
    assert _environment(1)["OMP_NUM_THREADS"] == str(expected)  # of which processes have equal shares
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert cores() == max(1, expected // 2)


def test_threads_that_a_job_was_given_are_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Snakemake sets them; two jobs side by side would otherwise both start a worker for every core."""
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert cores() == 5
    for nonsense in ("", "0", "many", "-1"):
        monkeypatch.setenv("OMP_NUM_THREADS", nonsense)
        assert cores() == 12


def test_what_is_asked_for_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (decoding_workers(0), decoding_workers(3)) == (0, 3)


def test_without_shared_memory_there_are_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: Usage(2**26, 0, 2**26))
    assert (decoding_workers(None), decoding_workers(2)) == (0, 2)
    monkeypatch.setattr(module, "SHARED_MEMORY", tmp_path / "none")  # systems that share memory in another way
    assert decoding_workers(None) == 12


def test_batches_that_are_made_ahead_fit_in_shared_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two views of 1,024 images of 224 pixels are 294 MiB: four batches for each of 16 workers would be 18 GiB."""
    batch = 2 * 1024 * 3 * 224**2
    for free, workers, ahead in (
        (2**40, 16, 4),
        (24 * 2**30, 16, 2),
        (10 * 2**30, 16, 1),
        (5 * 2**30, 8, 1),
        (2**20, 0, None),
    ):
        monkeypatch.setattr(module.shutil, "disk_usage", lambda _, free=free: Usage(2**40, 2**40 - free, free))
        assert loading(16, batch) == {"num_workers": workers, "prefetch_factor": ahead}
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")  # eight processes share it
        assert loading(2, batch) == {"num_workers": workers // 8, "prefetch_factor": ahead}
        monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert loading(0, batch) == {"num_workers": 0, "prefetch_factor": None}
    monkeypatch.setattr(module, "SHARED_MEMORY", tmp_path / "none")
    assert loading(16, batch) == {"num_workers": 16, "prefetch_factor": 4}


def test_every_loader_of_images_reckons_with_shared_memory() -> None:
    """But that of detection's evaluation, whose workers have two images ahead, not batches."""
    root = Path(module.__file__).parents[1]
    found = {
        str(file.relative_to(root)): text.count("num_workers=")
        for file in root.rglob("*.py")
        if "share" not in file.parts and "DataLoader(" in (text := file.read_text())
    }
    assert set(found) == {
        "training/order.py",
        "training/features.py",
        "detection/engines/torchvision.py",
        "detection/engine.py",
    }
    assert {name for name, count in found.items() if count} == {"detection/engine.py"}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_workers_that_have_no_shared_memory_are_refused_where_asked_for_and_else_there_are_none(
    code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(module.multiprocessing, "Lock", refuse)
    assert decoding_workers(None) == decoding_workers(0) == 0
    with pytest.raises(UserError, match=rf"--workers 3: .*{os.strerror(code)}\); set --workers 0 .*/dev/shm larger"):
        decoding_workers(3)


class Broken(torch.utils.data.Dataset):
    def __getitem__(self, i: int) -> int:
        if i == 2:
            raise UserError("photos/2.jpg: cannot be read as an image (UserError: not a JPEG); replace or remove it")
        return i

    def __len__(self) -> int:
        return 4


@pytest.mark.parametrize("workers", [0, 1])
def test_a_mistake_that_a_worker_meets_is_its_sentence(workers: int) -> None:
    batches = iter(torch.utils.data.DataLoader(Broken(), batch_size=1, num_workers=workers))
    assert [int(next(batches)) for _ in range(2)] == [0, 1]
    with pytest.raises(UserError) as caught:
        next(batches)
    assert str(caught.value).startswith("photos/2.jpg: cannot be read as an image (")
    assert "Traceback" not in str(caught.value)
