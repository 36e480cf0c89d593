"""Counting without data: operations, memory and parameters against ones worked out by hand or seen in a real step."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from aps.runtime import collectives
from aps.runtime.counting import Uncountable, _Counter, autocast, count

B, W = 10, 1000


class Layers(nn.Module):
    """Square linear layers, each with two sigmoids behind it, whose results the backward pass needs."""

    def __init__(self, depth: int, checkpointed: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(W, W, bias=False), nn.Sigmoid(), nn.Sigmoid()) for _ in range(depth)
        )
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x)
        return x


def train(model: nn.Module, rows: int = B) -> None:
    model(torch.empty(rows, W)).sum().backward()


def test_a_multiply_add_is_two_operations_and_backward_costs_what_needs_a_gradient() -> None:
    product = 2 * B * W * W
    assert count(lambda: Layers(1), train).flops == 2 * product  # forward, the weights' gradient
    assert count(lambda: Layers(2), train).flops == (2 + 3) * product
    assert count(lambda: Layers(2).requires_grad_(False), lambda m: m(torch.empty(B, W))).flops == 2 * product


def test_a_real_step_has_the_same_operations() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 5))

    def step(model: nn.Module) -> None:
        model(torch.zeros(4, 3, 8, 8)).sum().backward()

    model = build()
    with FlopCounterMode(display=False) as counter:
        step(model)
    assert count(build, step).flops == counter.get_total_flops()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("half", [False, True])
def test_attention_is_counted_as_fused_kernels_compute_it(bias: bool, half: bool) -> None:
    heads, tokens, width = 2, 64, 16

    def run(model: nn.Module) -> None:
        with autocast(half):
            q, k, v = (model(torch.empty(B, heads, tokens, width)) for _ in range(3))
            mask = torch.zeros(B, heads, tokens, tokens, requires_grad=True) if bias else None
            result = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        result.sum().backward()

    def without(model: nn.Module) -> None:
        sum(model(torch.empty(B, heads, tokens, width)) for _ in range(3)).sum().backward()

    layer = lambda: nn.Linear(width, width)  # noqa: E731
    attention = count(layer, run).flops - count(layer, without).flops
    product = 2 * B * heads * tokens * tokens * width
    assert attention == (2 + 5) * product  # backward computes the scores again


def test_memory_is_what_is_alive_at_once() -> None:
    weights, row = 4 * W * W, 4 * B * W
    frozen = count(lambda: Layers(5).requires_grad_(False), lambda m: m(torch.empty(B, W)))
    assert 5 * weights + 2 * row <= frozen.peak <= 5 * weights + 4 * row
    many = 1000 * B
    trained = count(lambda: Layers(5), lambda m: train(m, many))
    kept = 5 * weights + (1 + 2 * 5) * 1000 * row
    assert kept < trained.peak <= kept + 3 * 1000 * row  # and what is just being computed
    again = count(lambda: Layers(5, checkpointed=True), lambda m: train(m, many))
    assert again.flops == trained.flops + 5 * 2 * many * W * W  # forward twice
    assert again.peak <= trained.peak - 3 * 1000 * row


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_real_step_keeps_as_much_alive(checkpointed: bool) -> None:
    with _Counter() as real:
        train(Layers(5, checkpointed))
    assert count(lambda: Layers(5, checkpointed), train).peak == real.peak


def test_half_precision_keeps_less() -> None:
    def step(model: nn.Module, half: bool) -> None:
        with autocast(half):
            result = model(torch.empty(1000 * B, W))
        result.sum().backward()

    full, half = (count(lambda: Layers(5), partial(step, half=half)) for half in (False, True))
    assert half.flops == full.flops and half.peak < 0.8 * full.peak


def test_processes_share_the_batch_and_hold_all_parameters() -> None:
    counted = count(lambda: Layers(2), lambda m: train(m, 1000 * B))
    weights = 4 * counted.parameters
    assert counted.parameters == counted.trained == 2 * W * W
    assert counted.memory(0.5) - weights == pytest.approx((counted.peak - weights) / 2)
    assert counted.training_memory(1) == counted.peak + 2 * weights  # AdamW's moments
    assert counted.training_memory(2) == counted.memory(0.5) + 3 * weights  # and buckets of gradients


def test_nothing_is_allocated_and_random_numbers_stay() -> None:
    seen: list[Tensor] = []

    def run(model: nn.Module) -> None:
        torch.manual_seed(1)
        seen.append(model(torch.rand(10**6, W)))  # 4 GB

    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    count(lambda: Layers(1), run)
    assert torch.equal(torch.rand(3), expected)
    assert isinstance(seen[0], FakeTensor)


def test_tensors_that_a_module_made_elsewhere_may_take_part() -> None:
    centre = torch.ones(W)
    assert count(lambda: Layers(1), lambda m: (m(torch.empty(B, W)) - centre).sum().backward()).flops > 0


def test_code_that_asks_for_values_is_named_and_not_counted_wrongly() -> None:
    with pytest.raises(Uncountable, match=r"asks for values of tensors \(aten.nonzero"):
        count(lambda: Layers(1), lambda m: m(torch.empty(B, W)[torch.ones(B, dtype=torch.bool)]))
    with pytest.raises(Uncountable, match="asks for values"):
        count(lambda: Layers(1), lambda m: m(torch.empty(B, W)).sum().item())


def test_a_process_among_several_counts_as_if_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)

    def run(model: nn.Module) -> None:
        rows, first = collectives.gather(model(torch.empty(B, W)))
        assert rows[0].shape == (B, W) and first == 0

    assert collectives.is_distributed()
    count(lambda: Layers(1), run)
    assert collectives.is_distributed()
