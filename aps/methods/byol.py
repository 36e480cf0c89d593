"""BYOL: Bootstrap Your Own Latent, arXiv 2006.07733 (section 3.1, algorithm 1).

The loss pulls the online network's prediction of one view towards the target network's projection of the other view. There
are no negatives. The target is a moving average of the online network.

The paper trains ResNets. For a Vision Transformer the settings are those of MoCo v3's benchmark of BYOL (arXiv 2104.02057,
sections 4 and 5): AdamW, its schedule, a patch projection that is not trained. The
encoder is this project's (see `aps.methods.mocov3`).
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from aps.methods import F, Method, Sampled, nn, torch
from aps.settings.base import Natural, Plural, Positive, PositiveFloat, Share, WeightDecay
from aps.settings.blocks import PretrainSettings

if TYPE_CHECKING:
    from torch import Tensor

    from aps.models.encoder import Encoder


class BYOL(Method):
    least_images = 2

    class Settings(PretrainSettings):
        epochs: Positive = Field(300, description="E; MoCo v3's with a ViT, and the paper's shorter one")
        batch_size: Positive = Field(4096, description="B, over all processes; section 3.2")
        lr: PositiveFloat = Field(1.5e-4, description="of a batch of 256; MoCo v3's with a ViT")
        warmup_epochs: Natural = Field(40, description="of the learning rate; MoCo v3's with a ViT")
        schedule: Literal["release", "cosine"] = Field("cosine", description="section 3.2")
        weight_decay: WeightDecay = Field(0.1, description="AdamW's, on all parameters; MoCo v3's with a ViT")
        momentum: Share = Field(
            0.99, description="of the target, rising to 1 as a cosine; the paper's at 300 epochs (0.996 at 1,000)"
        )
        projector: tuple[Positive, Plural] = Field((4096, 256), description="widths of its two layers; section 3.2")
        predictor: tuple[Positive, Plural] = Field(
            (4096, 256), description="widths of its two layers; section 3.2; the last equals the projector's"
        )
        frozen_projection: bool = Field(
            True, description="the patch projection stays as it was drawn; MoCo v3, section 4.2"
        )

        @model_validator(mode="after")
        def _check(self) -> BYOL.Settings:  # type: ignore[override]
            if self.projector[-1] != self.predictor[-1]:
                raise ValueError(
                    f"predictor ends in width {self.predictor[-1]}, the projector in {self.projector[-1]}; make them equal"
                )
            return self

    def networks(self, encoder: Encoder) -> nn.ModuleDict:
        encoder.patch_embed.requires_grad_(not self.settings.frozen_projection)
        projector = mlp(encoder.embed_dim, *self.settings.projector)
        predictor = mlp(self.settings.projector[-1], *self.settings.predictor)
        online = nn.ModuleDict({"encoder": encoder, "projector": projector})
        target = copy.deepcopy(online).requires_grad_(False)
        return nn.ModuleDict({**online, "predictor": predictor, "target": target})

    def forward(self, networks: nn.ModuleDict, views: tuple[Tensor, ...], sampled: Sampled) -> tuple[Tensor, ...]:
        """-> p1, z1, p2, z2: (B, d), the online network's predictions and the target's projections."""
        encoder, projector, predictor = networks["encoder"], networks["projector"], networks["predictor"]
        target: Any = networks["target"]
        images = torch.cat(views)
        p1, p2 = (predictor(projector(features)) for features in encoder(images).chunk(2))
        with torch.no_grad():
            z1, z2 = (target["projector"](features) for features in target["encoder"](images).chunk(2))
        return p1, z1, p2, z2

    def loss(self, outputs: tuple[Tensor, ...], progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Equation 2 in both directions: squared distances of unit vectors, 2 - 2 cos each."""
        p1, z1, p2, z2 = outputs
        cosines = F.cosine_similarity(p1, z2) + F.cosine_similarity(p2, z1)
        return (4 - 2 * cosines).mean(), {"positive_cosine": cosines.mean().detach() / 2}

    def after_step(self, networks: nn.ModuleDict, progress: float) -> None:
        momentum = 1 - (1 - self.settings.momentum) * (1 + math.cos(math.pi * progress)) / 2
        target: Any = networks["target"]
        for name, module in target.items():
            torch._foreach_lerp_(list(module.parameters()), list(networks[name].parameters()), 1 - momentum)


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Linear, BatchNorm, ReLU, linear: (B, inputs) -> (B, outputs). BatchNorm would cancel a bias of the first layer."""
    return nn.Sequential(
        nn.Linear(inputs, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, outputs, bias=False),
    )
