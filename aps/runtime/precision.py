"""Decides the number format of every stage.

| setting | CUDA                              | CPU     |
|---------|-----------------------------------|---------|
| auto    | bf16 where supported, else fp16   | float32 |
| fp32    | float32 (TF32 products)           | float32 |
| bf16    | bfloat16 autocast                 | bfloat16 autocast |
| fp16    | float16 autocast, loss scaling    | refused |

Weights and optimizer state are always float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from aps.errors import UserError


class Precision:
    """Autocast and loss scaling for `setting` on `device`.

    Raises:
        UserError: fp16 on a CPU.
    """

    def __init__(self, setting: str, device: torch.device) -> None:
        if setting == "auto":
            setting = "fp32"
            if device.type == "cuda":
                setting = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        if setting == "fp16" and device.type == "cpu":
            raise UserError("precision fp16 needs a GPU; set precision: fp32 or auto")
        self.name = setting
        self._device = device.type
        self._dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(setting)
        self.scaler = torch.amp.GradScaler(device.type, enabled=setting == "fp16")

    def load_scaler(self, state: dict[str, Any]) -> None:
        """Load a state of `scaler`, unless it is empty: that of an attempt on a GPU that computes in bf16."""
        if state:
            self.scaler.load_state_dict(state)

    def prepare(self, networks: nn.Module) -> None:
        """Let timm's attention be separate products where the fused one is slower: in bf16 on CPUs.

        The gradient of torch's fused attention takes four times as long there as in float32 (docs/performance.md).
        """
        if self._device == "cpu" and self._dtype is not None:
            for module in networks.modules():
                if hasattr(module, "fused_attn"):
                    module.fused_attn = False  # type: ignore[assignment]

    def autocast(self) -> torch.autocast:
        return torch.autocast(self._device, self._dtype, enabled=self._dtype is not None)


@contextmanager
def full_products() -> Iterator[None]:
    """A context in which float32 products are float32 on a GPU too, not TF32: where close values are told apart."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
