from __future__ import annotations

import platform
import subprocess
import sys

import pytest

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
