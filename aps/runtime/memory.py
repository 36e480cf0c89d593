"""Keeps the C library's memory for training on CPUs, and turns out-of-memory errors into sentences.

glibc returns a large block to the system as soon as it is freed, and the next block consists of new pages, each of which
the system must clear. A training step frees and allocates the same blocks again and again, which takes a tenth of its time
(docs/performance.md).
"""

from __future__ import annotations

import ctypes
import errno
import re

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
NEVER = 2**31 - 4096  # bytes: the largest multiple of a page that mallopt accepts


def keep_memory() -> bool:
    """Make the C library reuse freed blocks; returns whether it can (glibc only). Computed values do not change.

    For steps that always allocate the same sizes: their peak does not grow. With varying sizes, memory could fragment.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, NEVER))


# Signs of a GPU come first: they have the words of the others in them.
COMPILED = "out of resource: "  # Triton's, of a kernel that needs more of a GPU's own shared memory than there is
GPU_FULL = re.compile(r"(cuda|hip)\b.{0,20}out of memory|cu\w+_alloc_failed|failed to cuda \w*alloc\b")
SHARED = ("shared memory", "shm", "bus error", "unable to write to file </torch", "unable to mmap")
FULL = (
    "can't allocate memory", "cannot allocate memory", "out of memory", "unable to allocate", "std::bad_alloc",
    "failed to map segment",  # of a library
)  # fmt: skip

SIZES = {  # the settings that say how much memory a stage takes; of the others the encoder's alone
    **{stage: f"{stage}.batch_size or encoder.image_size" for stage in ("pretrain", "finetune", "linear_probe")},
    "detection": "detection.batch_size or detection.image_size",
}


def out_of_memory(error: BaseException, stage: str) -> str | None:
    """One sentence for an error that means too little memory, shared, a GPU's or other; None for any other error."""
    words = " ".join(str(error).split())
    short = f" ({words[:157] + '...' if len(words) > 160 else words})" if words else ""
    smaller, signs = f"lower {SIZES.get(stage, 'encoder.image_size')}", words.lower()
    if signs.startswith(COMPILED) or f": {COMPILED}" in signs:
        return f"{stage}: a compiled kernel does not fit on this GPU{short}; set {stage}.compile: false"
    if GPU_FULL.search(signs):
        held = ";"
        if "cuda out of memory" not in signs:  # torch's own; here not even a context or NCCL found room
            held = (
                ", which another process may hold (nvidia-smi lists them): wait for it, or name another GPU by "
                "CUDA_VISIBLE_DEVICES, or"
            )
        cheaper = (
            " set pretrain.activation_checkpointing: true, raise pretrain.accumulate," if stage == "pretrain" else ""
        )
        return (
            f"{stage}: not enough memory{short} on the GPU{held} {smaller},{cheaper} or spread the batch over more GPUs by "
            f"resources.{stage}.gpus"
        )
    if not isinstance(error, (OSError, MemoryError, RuntimeError, ImportError)):
        return None
    if any(sign in signs for sign in SHARED):
        return (
            f"{stage}: no shared memory for its decoding workers{short}; set --workers 0 (resources.{stage}.workers: 0), or "
            "make /dev/shm larger"
        )
    full = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    if full or any(sign in signs for sign in FULL):
        return f"{stage}: not enough memory{short}; {smaller}, set --workers 0, or ask for more by resources.{stage}.mem_mb"
    return None


def lost_worker(error: BaseException, stage: str) -> str | None:
    """One sentence for the end of a decoding worker that was killed from outside; None for any other error."""
    words = " ".join(str(error).split())
    if not re.search(r"DataLoader worker .*(killed by signal|exited unexpectedly)", words):
        return None
    return (
        f"{stage}: a decoding worker was killed from outside, most often for its memory ({words[:120]}); run it again, it goes on "
        f"from its last checkpoint if it left one, with --workers 0 (resources.{stage}.workers: 0) or more resources.{stage}.mem_mb"
    )
