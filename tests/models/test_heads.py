"""Norms and statistics of the heads."""

from __future__ import annotations

import torch

from aps.models.heads import CrossProcessBatchNorm, projection_head, synchronize_batch_norm


def test_the_output_is_standardized_over_the_batch() -> None:
    torch.manual_seed(0)
    z = projection_head((96, 512, 512, 128))(torch.randn(256, 96))
    assert z.shape == (256, 128)
    torch.testing.assert_close(z.mean(0), torch.zeros(128), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.var(0, unbiased=False), torch.ones(128), atol=2e-3, rtol=0)


def test_synchronizing_keeps_names_and_values_and_changes_nothing_in_one_process() -> None:
    torch.manual_seed(0)
    head, x = projection_head((8, 16, 16, 4)), torch.randn(32, 8)
    names, parameters = list(head.state_dict()), list(head.parameters())  # an optimizer may hold them already
    expected = head(x)
    synchronized = synchronize_batch_norm(head)
    assert sum(isinstance(layer, CrossProcessBatchNorm) for layer in synchronized.modules()) == 3
    assert list(synchronized.state_dict()) == names
    assert all(one is other for one, other in zip(synchronized.parameters(), parameters, strict=True))
    assert torch.equal(synchronized(x), expected)


def test_a_norm_that_has_two_names_is_synchronized_under_both() -> None:
    norm = torch.nn.BatchNorm1d(4)
    shared = synchronize_batch_norm(torch.nn.ModuleDict({"one": norm, "other": norm}))
    assert all(type(child) is CrossProcessBatchNorm for child in shared._modules.values())
