"""Projector and predictor: linear layers without bias, BatchNorm after each, the last BatchNorm without affine.

Design: BatchNorm statistics are of one view (the caller passes the views one after the other) and of all processes
(`synchronize_batch_norm`). torch's SyncBatchNorm refuses CPU tensors, and on GPUs the host waits for the device in each of its
layers. `CrossProcessBatchNorm` does not wait; it has two small all-reduces a layer, and is exact enough for float64 comparisons.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from aps.runtime.collectives import is_distributed, sum_with_gradient


def projection_head(dims: Sequence[int]) -> nn.Sequential:
    """A head (B, in) -> (B, out) with widths `dims` = (in, hidden, ..., out) (method.md, Model).

    In a head of three layers, indices 0, 3, 6 are linear layers and 1, 4, 7 their norms.
    """
    layers: list[nn.Module] = []
    for i, (fan_in, fan_out) in enumerate(pairwise(dims)):
        last = i == len(dims) - 2
        layers += [nn.Linear(fan_in, fan_out, bias=False), nn.BatchNorm1d(fan_out, affine=not last)]
        if not last:
            layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


def synchronize_batch_norm(module: nn.Module) -> nn.Module:
    """Replace every BatchNorm1d in `module` by one with statistics over all processes; names and parameters stay."""
    if type(module) is nn.BatchNorm1d:
        return CrossProcessBatchNorm.of(module)
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):  # `named_children` leaves out a child's second name
            if type(child) is nn.BatchNorm1d:
                parent.add_module(name, CrossProcessBatchNorm.of(child))
    return module


class CrossProcessBatchNorm(nn.BatchNorm1d):
    """BatchNorm1d over the rows of all processes, on any device and backend; processes may have different numbers."""

    @classmethod
    def of(cls, norm: nn.BatchNorm1d) -> CrossProcessBatchNorm:
        """A replacement for `norm` that shares its parameters and running statistics."""
        replacement = cls(
            norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats, device="meta"
        )
        for name, parameter in norm.named_parameters(recurse=False):
            replacement.register_parameter(name, parameter)
        for name, value in norm.named_buffers(recurse=False):
            replacement.register_buffer(name, value)
        return replacement.train(norm.training)

    def forward(self, input: Tensor) -> Tensor:
        """(B, D) -> (B, D)"""
        if not (self.training and is_distributed()):
            return super().forward(input)
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        sums = sum_with_gradient(torch.cat([x.sum(0), x.new_full((1,), len(x))]))
        rows, mean = sums[-1].detach(), sums[:-1] / sums[-1].detach()
        centered = x - mean
        variance = sum_with_gradient(centered.square().sum(0)) / rows
        with torch.no_grad():
            self.num_batches_tracked.add_(1)  # type: ignore
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)  # type: ignore
            unbiased = variance * (rows / (rows - 1))
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)  # type: ignore
        y = centered * torch.rsqrt(variance + self.eps)
        if self.affine:
            y = torch.addcmul(self.bias, y, self.weight)
        return y.to(input.dtype)
