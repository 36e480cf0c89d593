"""torch.compile, with a clear error where the compiler that it calls is missing."""

from __future__ import annotations

import os
import shutil

import torch
from torch import nn

from aps.errors import UserError


def compile_module(module: nn.Module, key: str, device: torch.device) -> nn.Module:
    """`module`, compiled at its first call.

    Args:
        key: the setting that asks for it, for the error message.
        device: a CPU needs a C++ compiler (for Inductor), a GPU a C compiler (for Triton's launchers).

    Raises:
        UserError: there is no such compiler.
    """
    if (missing := missing_compiler(device)) is not None:
        raise UserError(f"{key}: true needs a compiler, and {missing}, or set {key}: false")
    return torch.compile(module)  # type: ignore[return-value]


def missing_compiler(device: torch.device) -> str | None:
    """What is missing for torch.compile and how to mend that, as a clause; None where there is a compiler."""
    variable, usual = ("CXX", ("g++",)) if device.type == "cpu" else ("CC", ("gcc", "clang"))
    names = (os.environ[variable],) if os.environ.get(variable) else usual
    if any(shutil.which(name) for name in names):
        return None
    return f"there is no {' or '.join(names)}; install one, name yours in {variable}"
