"""MoCo v3: An Empirical Study of Training Self-Supervised Vision Transformers, arXiv 2104.02057 (algorithm 1).

A query of one view has to match the key of the other view of its image, among the keys of the whole batch. Queries come
from encoder, projector and predictor; keys come from moving averages of encoder and projector. There is no queue.

The encoder is this project's: its position embedding is learned and it starts as `encoder.init` says; the paper's embedding is
fixed, of sines and cosines, and its weights start uniform by Xavier.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from aps.methods import F, Method, Sampled, collectives, heads, nn, torch
from aps.settings.base import Natural, Plural, Positive, PositiveFloat, Share, Temperature, WeightDecay
from aps.settings.blocks import PretrainSettings

if TYPE_CHECKING:
    from torch import Tensor

    from aps.models.encoder import Encoder


class MoCoV3(Method):
    least_images = 2

    class Settings(PretrainSettings):
        epochs: Positive = Field(300, description="E; section 5")
        batch_size: Positive = Field(4096, description="B, over all processes; section 4.1")
        lr: PositiveFloat = Field(1.5e-4, description="of a batch of 256; the release's for ViT-S and ViT-B")
        warmup_epochs: Natural = Field(40, description="of the learning rate; section 4.1")
        schedule: Literal["release", "cosine"] = Field("cosine", description="section 4.1")
        weight_decay: WeightDecay = Field(0.1, description="AdamW's, on all parameters; section 4.1")
        temperature: Temperature = Field(0.2, description="tau; the release's for ViT-S and ViT-B")
        momentum: Share = Field(0.99, description="of the moving average, rising to 1 as a cosine; the release's")
        projector: tuple[Positive, Positive, Plural] = Field(
            (4096, 4096, 256), description="widths of its three layers; section 4"
        )
        predictor: tuple[Positive, Plural] = Field(
            (4096, 256), description="widths of its two layers; section 4; the last equals the projector's"
        )
        frozen_projection: bool = Field(True, description="the patch projection stays as it was drawn; section 4.2")

        @model_validator(mode="after")
        def _check(self) -> MoCoV3.Settings:  # type: ignore[override]
            if self.projector[-1] != self.predictor[-1]:
                raise ValueError(
                    f"predictor ends in width {self.predictor[-1]}, the projector in {self.projector[-1]}; make them equal"
                )
            return self

    def networks(self, encoder: Encoder) -> nn.ModuleDict:
        encoder.patch_embed.requires_grad_(not self.settings.frozen_projection)
        projector = heads.projection_head((encoder.embed_dim, *self.settings.projector))
        predictor = heads.projection_head((self.settings.projector[-1], *self.settings.predictor))
        base = nn.ModuleDict({"encoder": encoder, "projector": projector})
        followers = copy.deepcopy(base).requires_grad_(False)
        return nn.ModuleDict({**base, "predictor": predictor, "followers": followers})

    def forward(self, networks: nn.ModuleDict, views: tuple[Tensor, ...], sampled: Sampled) -> tuple[Tensor, ...]:
        """-> q1, k1, q2, k2: (B, d), not normalized."""
        encoder, projector, predictor = networks["encoder"], networks["projector"], networks["predictor"]
        followers: Any = networks["followers"]
        images = torch.cat(views)
        q1, q2 = (predictor(projector(features)) for features in encoder(images).chunk(2))
        with torch.no_grad():
            k1, k2 = (followers["projector"](features) for features in followers["encoder"](images).chunk(2))
        return q1, k1, q2, k2

    def loss(self, outputs: tuple[Tensor, ...], progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        q1, k1, q2, k2 = (F.normalize(x, dim=-1) for x in outputs)
        loss = contrast(q1, k2, self.settings.temperature) + contrast(q2, k1, self.settings.temperature)
        return loss, {"positive_cosine": ((q1 * k2).sum(-1) + (q2 * k1).sum(-1)).mean().detach() / 2}

    def after_step(self, networks: nn.ModuleDict, progress: float) -> None:
        momentum = 1 - (1 - self.settings.momentum) * (1 + math.cos(math.pi * progress)) / 2
        followers: Any = networks["followers"]
        for name, follower in followers.items():
            torch._foreach_lerp_(list(follower.parameters()), list(networks[name].parameters()), 1 - momentum)


def contrast(queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """Algorithm 1, `ctr`: cross-entropy of `q k^T / tau` with the key of the same image as target, times 2 tau.

    queries, keys: (B, d) of this process, of unit length; keys have no gradient -> scalar.
    """
    (all_keys,), first = collectives.gather(keys)
    targets = first + torch.arange(len(queries), device=queries.device)
    return 2 * temperature * F.cross_entropy(queries @ all_keys.T / temperature, targets)
