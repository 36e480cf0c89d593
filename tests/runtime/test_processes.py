"""The environment that a shell left over: right, or one sentence."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
import torch.distributed as dist

from aps.errors import Preempted, UserError
from aps.models.encoder import build_encoder
from aps.runtime.cores import cores, threads_given
from aps.runtime.launch import _environment
from aps.runtime.precision import Precision
from aps.runtime.processes import processes
from aps.runtime.slurm import allocation, job_id
from aps.settings.blocks import EncoderSettings


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


def gpus(count: int, monkeypatch: pytest.MonkeyPatch, **environment: str) -> list[torch.device]:
    """Pretend that there are GPUs; returns those that are made current."""
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return current


@pytest.mark.parametrize(("asked", "index"), [("", 0), ("cuda", 0), ("cuda:0", 0), ("cuda:1", 1)])
def test_the_gpu_that_was_asked_for_is_used(asked: str, index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    current = gpus(2, monkeypatch, APS_DEVICE=asked)
    with processes() as distributed:
        assert [distributed.device] == current == [torch.device("cuda", index)]


def test_a_number_above_the_gpus_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(2, monkeypatch, APS_DEVICE="cuda:2")
    with pytest.raises(UserError, match="APS_DEVICE=cuda:2: torch sees 2 GPUs here"), processes():
        pass


def torchrun(rank: int, world: int) -> dict[str, str]:
    own = {name: str(rank) for name in ("RANK", "LOCAL_RANK")}
    return own | {name: str(world) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")} | {"TORCHELASTIC_RUN_ID": "x"}


def test_processes_that_would_share_a_gpu_are_one_sentence_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in range(3):
        gpus(2, monkeypatch, **torchrun(rank, 3))
        with pytest.raises(UserError, match="3 processes on a machine with 2 GPUs: each needs its own"), processes():
            pass


@pytest.mark.parametrize(
    ("error", "waits"), [(None, True), (Preempted("stopped"), True), (UserError("of one process"), False)]
)
def test_a_process_that_fails_does_not_wait_for_the_others_on_gpus(
    error: Exception | None, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL's group ends when all processes end it, and the others may wait for this one's gradients."""
    current, ended = gpus(2, monkeypatch, **torchrun(1, 2)), []
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **_: ended.append(backend))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: ended.append("waited"))
    with suppress(Preempted, UserError), processes():
        if error is not None:
            raise error
    assert current == [torch.device("cuda", 1)] and ended == ["nccl", *(["waited"] if waits else [])]


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


def test_a_state_of_a_gpu_without_loss_scaling_goes_on_on_one_with_it() -> None:
    one = Precision("fp32", torch.device("cpu"))
    saved = one.scaler.state_dict()
    one.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)  # as `auto` makes where there is no bf16
    one.load_scaler(saved)
    other = Precision("fp32", torch.device("cpu"))
    other.scaler = torch.amp.GradScaler("cpu")
    other.load_scaler(one.scaler.state_dict())
    assert other.scaler.get_scale() == one.scaler.get_scale() == 8


@pytest.mark.parametrize(
    ("setting", "device", "fused"), [("fp32", "cpu", True), ("bf16", "cpu", False), ("bf16", "cuda", True)]
)
def test_attention_is_fused_except_in_bf16_on_a_cpu(setting: str, device: str, fused: bool) -> None:
    encoder = build_encoder(EncoderSettings(arch="micro", depth=2, image_size=16, patch_size=4))
    images = torch.randn(2, 3, 16, 16)
    before = encoder(images)
    Precision(setting, torch.device(device)).prepare(encoder)
    assert [block.attn.fused_attn for block in encoder.blocks] == [fused, fused]
    assert torch.allclose(encoder(images), before, atol=1e-6)
