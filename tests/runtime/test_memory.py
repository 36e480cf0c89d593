from __future__ import annotations

import errno
import platform
import re
import subprocess
import sys

import pytest
import torch

from aps.runtime.memory import lost_worker, out_of_memory
from aps.settings.blocks import ResourceSettings
from aps.settings.reading import load_study
from aps.stages import STAGES

CODE = """
import resource, sys, torch
from aps.runtime.memory import keep_memory
torch.set_num_threads(1)
if sys.argv[1] == "keep":
    assert keep_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def work():
    return [torch.ones(9 * 2**20) for _ in range(2)]  # blocks of 36 MiB, above glibc's largest threshold
for _ in range(8):  # until the holes fit: an aligned block needs a little more than it fills
    work()
before = faults()
for _ in range(4):
    work()
print(faults() - before)
"""


def faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", CODE, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_blocks_are_used_again_without_new_pages() -> None:
    assert faults("keep") < faults("leave") / 4


@pytest.mark.parametrize(
    ("error", "setting"),
    [
        (MemoryError(), "lower encoder.image_size"),
        (MemoryError("Unable to allocate 8.00 GiB for an array"), "resources.knn.mem_mb"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            "lower encoder.image_size",
        ),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "lower encoder.image_size"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "resources.knn.gpus"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "on the GPU"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "lower encoder.image_size"),
        (RuntimeError("unable to write to file </torch_1_2>: No space left on device (28)"), "--workers 0"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."), "make /dev/shm larger"),
    ],
)
def test_too_little_memory_is_one_sentence_that_names_the_setting(error: Exception, setting: str) -> None:
    sentence = out_of_memory(error, "knn")
    assert sentence is not None and sentence.startswith("knn: ") and setting in sentence and "\n" not in sentence


SHARED_KERNEL = (
    "out of resource: shared memory, Required: 147456, Hardware limit: 101376. Reducing block sizes may help."
)
HELD = "which another process may hold (nvidia-smi lists them)"


class OutOfResources(Exception):  # as Triton's, which is no RuntimeError
    pass


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"), HELD),
        (RuntimeError("CUDA driver error: out of memory"), HELD),
        (RuntimeError("NCCL error: ncclUnhandledCudaError: Last error:\nCuda failure 2 'out of memory'"), HELD),
        (RuntimeError("NCCL error: unhandled system error\nFailed to CUDA calloc async 6291456 bytes"), HELD),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), HELD),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
            "on the GPU; lower pretrain.batch_size",
        ),
        (OutOfResources(SHARED_KERNEL), "set pretrain.compile: false"),
        (RuntimeError(f"backend='inductor' raised:\nOutOfResources: {SHARED_KERNEL}"), "set pretrain.compile: false"),
    ],
)
def test_a_gpu_that_lacks_memory_is_not_taken_for_the_machine(error: Exception, told: str) -> None:
    sentence = out_of_memory(error, "pretrain") or ""
    assert told in sentence and not any(other in sentence for other in ("--workers", "mem_mb", "/dev/shm"))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_the_settings_that_a_sentence_names_are_keys(stage: str, error: Exception) -> None:
    sentence = out_of_memory(error, stage) or ""
    named = re.findall(r"\b(?:resources\.\w+|[a-z]+(?:_[a-z]+)*)\.[a-z_]+\b", sentence)
    assert len(named) >= 2, sentence
    experiment = load_study([], {"experiments": {"e": {"dataset": "digits"}}}).experiments["e"]
    for key in named:
        block, name = key.rsplit(".", 1)
        fields = ResourceSettings if block.startswith("resources.") else type(getattr(experiment, block))
        assert name in fields.model_fields, key


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), OSError(errno.ENOENT, "No such file"), ValueError("x"), KeyError("shm")]
)
def test_another_error_is_not_taken_for_too_little_memory(error: Exception) -> None:
    assert out_of_memory(error, "knn") is None


@pytest.mark.parametrize("end", ["(pid 7) is killed by signal: Killed. ", "(pid(s) 7) exited unexpectedly"])
def test_a_worker_that_was_killed_is_one_sentence(end: str) -> None:
    error = RuntimeError(f"DataLoader worker {end}")
    assert out_of_memory(error, "knn") is None
    sentence = lost_worker(error, "knn")
    assert sentence is not None and "run it again" in sentence and "resources.knn.workers: 0" in sentence
    assert lost_worker(RuntimeError("shapes differ"), "knn") is None
