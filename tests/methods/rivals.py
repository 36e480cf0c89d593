"""What the tests of the methods share."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from aps.methods import Method
from aps.models.encoder import build_encoder
from aps.settings.blocks import EncoderSettings
from aps.settings.study import ExperimentSettings, experiment_model

DIM = 24
ENCODER = EncoderSettings(arch="micro", dim=DIM, depth=2, image_size=16, patch_size=4)  # N = 16


def experiment(method: type[Method], views: dict[str, Any] | None = None, **own: Any) -> ExperimentSettings:
    """Its paper's settings, on a small encoder."""
    name = method.__module__.rpartition(".")[2]  # its file's
    blocks = {"pretrain": {"method": name, **own}, "encoder": ENCODER.model_dump(), "views": views or {}}
    return experiment_model(name).model_validate({"dataset": "digits", **blocks})


def build(method: type[Method], views: dict[str, Any] | None = None, **own: Any) -> Any:
    return method(experiment(method, views, **own))


def networks(method: type[Method], **own: Any) -> Any:
    torch.manual_seed(0)
    return build(method, **own).networks(build_encoder(ENCODER)).train()


def copy_parameters(source: nn.Module, target: nn.Module) -> None:
    """In order, those of linear layers; norms keep their start, which is the identity in both."""
    linear = [[m for m in module.modules() if isinstance(m, nn.Linear)] for module in (source, target)]
    for one, other in zip(*linear, strict=True):
        with torch.no_grad():
            other.weight.copy_(one.weight)
            if other.bias is not None:
                other.bias.zero_() if one.bias is None else other.bias.copy_(one.bias)
