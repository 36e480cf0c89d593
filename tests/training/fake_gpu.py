"""A GPU that is not there: its tensors have shapes and no values (torch's FakeTensorMode), those of the CPU are real.

An operation on tensors of two devices fails as on a GPU, and so does one whose result the host needs. With `refuses`, a copy for
which the host would wait fails too: to the host, or to the device from memory that is not pinned. There is no backward
pass, because autograd asks for the device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("cuda", 0)


class FakeGpu(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.fake, self.refuses = FakeTensorMode(allow_non_fake_inputs=True), False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        there = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda"
        if not there and not any(isinstance(x, FakeTensor) for x in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        if self.refuses and name in ("_to_copy", "copy_"):
            source = args[1] if name == "copy_" else args[0]
            target = args[0].device if name == "copy_" else torch.device(kwargs.get("device") or source.device)
            waits = not (kwargs.get("non_blocking") or args[2:] == (True,))
            unpinned = target.type == "cuda" and not getattr(source, "pinned", False)
            if source.device.type != target.type and (waits or unpinned):
                raise AssertionError(f"{func}: a copy that makes the host wait for the device")
        if self.refuses and name in ("index", "index_put", "index_put_"):
            indices = [x for x in args[1] if x is not None]
            if any(x.dtype == torch.bool or not x.is_cuda for x in indices):
                raise AssertionError(f"{func}: indices that make the host wait for the device")
        if "generator" in kwargs:  # it gives no values
            kwargs = {**kwargs, "generator": None}
        with self.fake:
            return func(*args, **kwargs)


class Stub:
    """A stream, an event."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def wait_stream(self, other: Any) -> None: ...
    def wait_event(self, other: Any) -> None: ...
    def record(self, *_: Any) -> None: ...
    def record_event(self) -> Stub:
        return self

    def query(self) -> bool:
        return True


class Generator(torch.Generator):
    """One of the CPU that says it is of the device it was asked for."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        made = super().__new__(cls, "cpu")
        made.asked = torch.device(device)
        return made

    @property
    def device(self) -> torch.device:
        return self.asked


@contextlib.contextmanager
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    stubs = {"Stream": Stub, "Event": Stub, "current_stream": Stub, "stream": contextlib.nullcontext,
             "_lazy_init": lambda: None, "is_bf16_supported": lambda **_: True}  # fmt: skip
    for name, stub in stubs.items():
        monkeypatch.setattr(torch.cuda, name, stub)
    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(torch, "tensor", _tensor(torch.tensor))
    monkeypatch.setattr(Tensor, "pin_memory", _pinned)
    monkeypatch.setattr(Tensor, "record_stream", lambda *_: None)
    monkeypatch.setattr(Tensor, "backward", _backward)
    monkeypatch.setattr(nn.Module, "to", _to)
    with FakeGpu() as gpu:
        yield gpu


def _tensor(real: Any) -> Any:
    """`torch.tensor(x, device=...)` is a tensor of the CPU that is copied, for which the host waits."""

    def tensor(data: Any, device: Any = None, **more: Any) -> Tensor:
        return real(data, **more) if device is None else real(data, **more).to(device)

    return tensor


def _pinned(x: Tensor) -> Tensor:
    copy: Any = x.clone()
    copy.pinned = True
    return copy


def _to(module: nn.Module, device: Any) -> nn.Module:
    """`Module.to`, which would swap tensors; those that are shared stay shared."""
    moved: dict[Tensor, Tensor] = {}

    def move(x: Tensor) -> Tensor:
        if x not in moved:
            copy = x.detach().to(device)
            moved[x] = nn.Parameter(copy, x.requires_grad) if isinstance(x, nn.Parameter) else copy
        return moved[x]

    for part in module.modules():
        for table in (part._parameters, part._buffers):
            table.update({name: move(x) for name, x in table.items() if x is not None})  # type: ignore[arg-type]
    return module


def _backward(loss: Tensor) -> None:
    """Gradients of zero for all parameters that the loss depends on."""
    left, seen = [loss.grad_fn], set()
    while left:
        node: Any = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [following for following, _ in node.next_functions]
            if hasattr(node, "variable"):
                node.variable.grad = torch.zeros_like(node.variable)
