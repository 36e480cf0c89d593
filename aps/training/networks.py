"""Builds a pretraining method and its networks from settings, for training and for counting (`aps.training.cost`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from aps.models.encoder import build_encoder
from aps.registry import METHODS
from aps.training import contract

if TYPE_CHECKING:
    from aps.methods import Method
    from aps.settings.study import ExperimentSettings, StageSettings


def build_method(settings: ExperimentSettings | StageSettings) -> Method:
    """The method that the settings name."""
    method: Method = METHODS.load(settings.pretrain.method)(settings)
    return method


def build_networks(method: Method) -> nn.ModuleDict:
    """The method's networks with a new encoder, in training mode."""
    settings = method.experiment
    encoder = build_encoder(settings.encoder, method.drop_path)
    encoder.any_size = any(view.size != settings.encoder.image_size for view in contract.views(method))
    encoder.set_grad_checkpointing(settings.pretrain.activation_checkpointing)
    return contract.networks(method, encoder).train()


def at_least_float32(x: Tensor) -> Tensor:
    """x in at least float32, in which losses are computed; tensors of whole numbers stay as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32)) if x.is_floating_point() else x
