"""Counts operations, memory and parameters of training code by running it on tensors without data.

Design: the code runs under torch's FakeTensorMode, where a tensor has a shape and a size but no storage, so a step of
ViT-Base on 512 images is counted in about a second on any machine. Operations are those of torch's counter: matrix
products, convolutions and attention, a multiply-add as two; norms, activations and the optimizer are left out. Its
formulas are used without its FlopCounterMode, whose hooks on modules keep tensors alive. Memory is the largest total of
tensors that exist at the same time.

Attention is counted as the fused kernels of GPUs compute it: scores are not kept for the backward pass but computed again.

It does not know the temporary memory of kernels, nor how allocators round sizes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from aps.errors import UserError
from aps.runtime import collectives


class Counted(NamedTuple):
    flops: float
    peak: float  # bytes alive at once: parameters, inputs, activations, gradients
    parameters: int
    trained: int  # parameters that get a gradient

    def memory(self, share: float = 1.0) -> float:
        """Bytes of a process that has `share` of the batch and all parameters."""
        weights = 4 * self.parameters
        return weights + share * (self.peak - weights)

    def training_memory(self, processes: int = 1) -> float:
        """Bytes of each of the processes that share the batch, with AdamW's two moments and, for several processes, the
        buckets in which they exchange gradients."""
        return self.memory(1 / processes) + self.trained * (8 + 4 * (processes > 1))


class Uncountable(UserError):
    """The code reads values of tensors, so it can't be run on tensors without data."""


def count(build: Callable[[], nn.Module], run: Callable[[nn.Module], object]) -> Counted:
    """Count one call of `run` on the module that `build` returns.

    It is counted as for a single process, and the state of random generators stays as it was.

    Args:
        build: called with the meta device as default.
        run: called with the module on fake CPU tensors; it makes its inputs, and calls `backward` where that is to be
            counted.

    Raises:
        Uncountable: `run` reads values of tensors.
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices), collectives.single_process():
        with torch.device("meta"):
            module = build()
        with (
            FakeTensorMode(allow_non_fake_inputs=True),  # such as tensors that a method keeps outside its networks
            _Counter() as counter,
            _fused_attention(),
        ):
            module._apply(lambda x: torch.empty(x.shape, dtype=x.dtype))
            try:
                run(module)
            except (DataDependentOutputException, DynamicOutputShapeException) as error:
                raise Uncountable(
                    f"operations can't be counted, because a step asks for values of tensors ({error.func}); use masks "
                    "and torch.where instead of indices that depend on values"
                ) from error
        sizes = [(p.numel(), p.requires_grad) for p in module.parameters()]
    return Counted(counter.flops, counter.peak, sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained))


def autocast(half: bool) -> torch.autocast:
    """Autocast for counting: 16 bits (`half`), as stages use them on a GPU, or 32. Operations are the same."""
    return torch.autocast("cpu", torch.bfloat16, enabled=half)


class _Counter(TorchDispatchMode):
    """Adds up operations, and the sizes of existing storages, each once even if several tensors view it."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.alive = self.peak = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = flop_registry.get(func.overloadpacket)
        if formula is None and func.namespace == "aten":  # it may decompose into operations that have a formula
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and (storage := x.untyped_storage()) not in self._known:
                self._known.add(storage)
                weakref.finalize(storage, self._freed, storage.nbytes())
                self.alive += storage.nbytes()
        self.peak = max(self.peak, self.alive)
        return result

    def _freed(self, size: int) -> None:
        self.alive -= size


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Replace `F.scaled_dot_product_attention` by the fused kernel.

    Otherwise torch would use the CPU's fused kernel, which the counter does not know, and plain products where a bias is
    learned. A `torch.overrides` mode would need no patch, but it is off while blocks are recomputed in a backward pass.
    Code that imports the function by its name is counted as plain products.
    """
    original = F.scaled_dot_product_attention

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """(B, heads, queries, d), (B, heads, keys, d), (B, heads, keys, d) -> (B, heads, queries, d)."""
        if query.dim() != 4 or enable_gqa:
            return original(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if attn_mask is not None:
            attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:-1], key.shape[-2])
        kernel = torch.ops.aten._scaled_dot_product_efficient_attention
        return kernel(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)[0]

    F.scaled_dot_product_attention = attention  # type: ignore[assignment]
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        F.scaled_dot_product_attention = original
