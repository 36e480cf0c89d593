"""Asymmetric Patch Sampling for Contrastive Learning, arXiv 2306.02854 (method.md, Sampling, Model and Loss).

The encoder sees a few patches of each view, chosen so that the two share little appearance. A batch gives T optimizer
steps: the same two views, another subset of patches each time. There is no momentum encoder and no queue: the keys are
the other view's projections without gradient, gathered from all processes.

Both views pass the encoder in one batch, because it has no batch statistics, and the heads one after the other, because
their BatchNorm has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from aps.methods import F, Method, Sampled, collectives, heads, lazy, nn, torch
from aps.settings.base import Plural, Positive, Temperature
from aps.settings.blocks import PretrainSettings
from aps.settings.study import ExperimentSettings

if TYPE_CHECKING:
    from torch import Tensor

    from aps import sampling
    from aps.models.encoder import Encoder
    from aps.sampling import Geometry, Noise
else:
    sampling = lazy("aps.sampling")


class APS(Method):
    least_images = 2

    class Settings(PretrainSettings):
        temperature: Temperature = Field(0.1, description="tau of the contrastive loss")
        projector: tuple[Positive, Positive, Plural] = Field((512, 512, 128), description="widths of its three layers")
        predictor: tuple[Positive, Positive, Plural] = Field(
            (512, 512, 128), description="widths of its three layers; the last equals the projector's"
        )

        @model_validator(mode="after")
        def _check(self) -> APS.Settings:  # type: ignore[override]
            if self.projector[-1] != self.predictor[-1]:
                raise ValueError(
                    f"predictor ends in width {self.predictor[-1]}, the projector in {self.projector[-1]}; make them equal"
                )
            return self

    blocks = ("sampling",)

    @classmethod
    def check(cls, experiment: ExperimentSettings) -> None:
        sampling, cells = experiment.sampling, experiment.encoder.grid**2
        kept = int(cells * sampling.ratio)
        if kept < 1:
            raise ValueError(f"sampling.ratio {sampling.ratio} of {cells} cells keeps none; raise it")
        if sampling.strategy != "full" and sampling.samplings * kept > cells:
            raise ValueError(
                f"sampling.samplings {sampling.samplings} x {kept} kept cells exceed the {cells} cells of a view; "
                "lower sampling.samplings or sampling.ratio"
            )

    @property
    def steps(self) -> int:
        """T."""
        return self.experiment.sampling.samplings

    def networks(self, encoder: Encoder) -> nn.ModuleDict:
        projector, predictor = self.settings.projector, self.settings.predictor
        return nn.ModuleDict(
            {
                "encoder": encoder,
                "projector": heads.projection_head((encoder.embed_dim, *projector)),
                "predictor": heads.projection_head((projector[-1], *predictor)),
            }
        )

    def sample(self, geometries: Sequence[Geometry], noise: Noise) -> Sequence[Sampled]:
        """T draws of the cells kept of view 1 and of view 2, each (B, n)."""
        view1, view2 = geometries
        kept = sampling.draw(self.experiment.sampling, self.experiment.encoder.grid, view1, view2, noise)
        return list(zip(kept.view1, kept.view2, strict=True))

    def forward(self, networks: nn.ModuleDict, views: tuple[Tensor, ...], sampled: Sampled) -> tuple[Tensor, ...]:
        """-> p1, z1, p2, z2: (B, d), predictions and projections of both views, not normalized."""
        encoder, projector, predictor = networks["encoder"], networks["projector"], networks["predictor"]
        features1, features2 = encoder(torch.cat(views), torch.cat(sampled)).chunk(2)
        z1, z2 = projector(features1), projector(features2)
        return predictor(z1), z1, predictor(z2), z2

    def loss(self, outputs: tuple[Tensor, ...], progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        p1, z1, p2, z2 = outputs
        loss, positive_cosine = contrastive_loss(p1, z1, p2, z2, self.settings.temperature)
        return loss, {"positive_cosine": positive_cosine}


def contrastive_loss(p1: Tensor, z1: Tensor, p2: Tensor, z2: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy of `p_a @ sg(z_b)^T / tau` with the other view of the same image as target, over both directions.

    Compute it in at least float32: at tau = 0.1 a bfloat16 logit is wrong by several hundredths.

    Args:
        p1, z1, p2, z2: (B, d) predictions and projections of this process's rows, not normalized.
        temperature: tau.

    Returns:
        loss: scalar, the mean over this process's rows; the mean over processes is the whole batch's.
        positive_cosine: scalar without gradient, the mean cosine of the positive pairs of this process.
    """
    p1, z1, p2, z2 = (F.normalize(x, dim=-1) for x in (p1, z1, p2, z2))
    z1, z2 = z1.detach(), z2.detach()
    (keys1, keys2), first = collectives.gather(z1, z2)
    targets = first + torch.arange(len(p1), device=p1.device)
    loss = F.cross_entropy(p1 @ keys2.T / temperature, targets) + F.cross_entropy(p2 @ keys1.T / temperature, targets)
    with torch.no_grad():
        positive_cosine = ((p1 * z2).sum(-1) + (p2 * z1).sum(-1)).mean() / 2
    return loss, positive_cosine
