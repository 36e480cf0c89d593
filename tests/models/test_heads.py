"""Shapes, norms and statistics of projector and predictor."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from aps.methods.aps import APS as METHOD
from aps.models.encoder import build_encoder
from aps.models.heads import CrossProcessBatchNorm, projection_head, synchronize_batch_norm
from aps.models.model import APS, build_heads
from aps.settings.blocks import EncoderSettings


@pytest.fixture
def model() -> APS:
    torch.manual_seed(0)
    encoder = build_encoder(EncoderSettings(arch="micro", image_size=16, patch_size=4, depth=1))
    return APS(encoder, *build_heads(96, METHOD.Settings()))


def test_heads_are_the_three_layers_of_the_method() -> None:
    projector, predictor = build_heads(192, METHOD.Settings())
    for head, dims in ((projector, (192, 512, 512, 128)), (predictor, (128, 512, 512, 128))):
        kinds = [type(layer) for layer in head]
        assert kinds == [nn.Linear, nn.BatchNorm1d, nn.ReLU] * 2 + [nn.Linear, nn.BatchNorm1d]
        linears = [layer for layer in head if isinstance(layer, nn.Linear)]
        assert [tuple(layer.weight.shape) for layer in linears] == [
            (dims[1], dims[0]), (dims[2], dims[1]), (dims[3], dims[2])
        ]  # fmt: skip
        assert all(layer.bias is None for layer in linears)
        assert [layer.affine for layer in head if isinstance(layer, nn.BatchNorm1d)] == [True, True, False]
        parameters = sum(a * b for a, b in pairwise(dims)) + 2 * (dims[1] + dims[2])
        assert sum(p.numel() for p in head.parameters()) == parameters


def test_the_output_is_standardized_over_the_batch() -> None:
    torch.manual_seed(0)
    z = projection_head((96, 512, 512, 128))(torch.randn(256, 96))
    assert z.shape == (256, 128)
    torch.testing.assert_close(z.mean(0), torch.zeros(128), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.var(0, unbiased=False), torch.ones(128), atol=2e-3, rtol=0)


def test_statistics_are_those_of_one_view(model: APS) -> None:
    """Both views in one pass through the heads would mix the statistics of unlike views."""
    view1, view2 = torch.randn(16, 3, 16, 16), 3 + 2 * torch.randn(16, 3, 16, 16)
    p1, z1, p2, z2 = model(view1, view2)
    for x in (p1, z1, p2, z2):
        torch.testing.assert_close(x.mean(0), torch.zeros(128), atol=1e-5, rtol=0)
    features = model.encoder(torch.cat([view1, view2]))
    mixed1, mixed2 = model.projector(features).chunk(2)
    assert (mixed1 - z1).abs().max() > 0.1 and (mixed2 - z2).abs().max() > 0.1


def test_one_forward_of_both_views_is_two_forwards(model: APS) -> None:
    view1, view2 = torch.randn(8, 3, 16, 16), torch.randn(8, 3, 16, 16)
    kept1, kept2 = (torch.stack([torch.randperm(16)[:4] for _ in range(8)]) for _ in range(2))
    p1, z1, p2, z2 = model(view1, view2, kept1, kept2)
    for view, kept, p, z in ((view1, kept1, p1, z1), (view2, kept2, p2, z2)):
        expected = model.projector(model.encoder(view, kept))
        torch.testing.assert_close(z, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(p, model.predictor(expected), rtol=1e-4, atol=1e-4)


def test_every_parameter_gets_a_gradient(model: APS) -> None:
    """DistributedDataParallel waits for ever for a parameter that gets none."""
    kept = torch.arange(4).expand(8, -1)
    p1, _, p2, _ = model(torch.randn(8, 3, 16, 16), torch.randn(8, 3, 16, 16), kept, kept)
    (p1.square() * torch.randn(128) + p2 * torch.randn(128)).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_it_compiles_without_a_graph_break(model: APS) -> None:
    def inputs() -> tuple[Tensor, ...]:
        kept = torch.stack([torch.randperm(16)[:4] for _ in range(8)])
        return torch.randn(8, 3, 16, 16), torch.randn(8, 3, 16, 16), kept, kept.flip(0)

    batch = inputs()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)  # fullgraph: a break is an error
    for ours, expected in zip(compiled(*batch), model(*batch), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


def test_synchronizing_keeps_names_and_values_and_changes_nothing_in_one_process() -> None:
    torch.manual_seed(0)
    head, x = projection_head((8, 16, 16, 4)), torch.randn(32, 8)
    names = list(head.state_dict())
    expected = head(x)
    synchronized = synchronize_batch_norm(head)
    assert sum(isinstance(layer, CrossProcessBatchNorm) for layer in synchronized.modules()) == 3
    assert list(synchronized.state_dict()) == names
    assert torch.equal(synchronized(x), expected)
