"""The environment that a shell left over: right, or one sentence."""

from __future__ import annotations

import pytest
import torch

from aps.errors import UserError
from aps.runtime.cores import cores, threads_given
from aps.runtime.launch import _environment
from aps.runtime.processes import processes
from aps.runtime.slurm import allocation, job_id


@pytest.mark.parametrize("asked", ["nonsense", "gpu", "CUDA", "cuda:x", "cpu:", "mps", " cpu", "cuda,cpu", "meta"])
def test_a_device_that_is_none_is_one_sentence(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APS_DEVICE", asked)
    with pytest.raises(UserError, match=f"APS_DEVICE={asked}: is none of cpu and cuda; set it"), processes():
        pass


@pytest.mark.parametrize("asked", ["cuda", "cuda:0", "cuda:7"])
def test_a_gpu_that_is_not_there_is_one_sentence(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("APS_DEVICE", asked)
    with pytest.raises(UserError, match=f"APS_DEVICE={asked}: torch sees no GPU here; set APS_DEVICE=cpu"), processes():
        pass


@pytest.mark.parametrize("asked", ["", "cpu"])
def test_without_a_gpu_the_device_is_the_cpu(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("APS_DEVICE", asked)
    with processes() as distributed:
        assert distributed.device.type == "cpu"


@pytest.mark.parametrize(
    ("text", "threads"),
    [
        ("2,1", 2),
        ("8", 8),
        (" 4 ", 4),
        ("", None),
        ("0", None),
        ("x", None),
        ("-1", None),
        ("1.5", None),
        (",", None),
        ("²", None),
    ],
)
def test_threads_are_the_first_of_a_list_and_nonsense_says_nothing(
    text: str, threads: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    assert threads_given() == threads
    assert cores() == threads if threads else cores() >= 1
    assert int(_environment(1)["OMP_NUM_THREADS"]) >= 1


@pytest.mark.parametrize("left_over", ["abc", "", "-3", "12abc", "²"])
def test_a_job_number_that_is_none_is_no_job(left_over: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", left_over)
    assert job_id() is None and allocation() is None
