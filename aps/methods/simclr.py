"""SimCLR: A Simple Framework for Contrastive Learning of Visual Representations, arXiv 2002.05709.

Both views of an image pass encoder and projector. The loss NT-Xent (section 2.1, algorithm 1) compares each of the 2B
projections of the batch, of all processes together, with the others: the other view of its image has to be closer than the
2B - 2 views of other images. Every projection is both query and key, and gradients pass through both.

The paper trains ResNets. For a Vision Transformer the settings are those of MoCo v3's benchmark of SimCLR (arXiv
2104.02057, sections 4 and 5): AdamW, its schedule, a patch projection that is not trained. The
encoder is this project's (see `aps.methods.mocov3`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from aps.methods import F, Method, Sampled, collectives, heads, nn, torch
from aps.settings.base import Natural, Plural, Positive, PositiveFloat, Temperature, WeightDecay
from aps.settings.blocks import PretrainSettings

if TYPE_CHECKING:
    from torch import Tensor

    from aps.models.encoder import Encoder


class SimCLR(Method):
    least_images = 2

    class Settings(PretrainSettings):
        epochs: Positive = Field(300, description="E; MoCo v3's with a ViT")
        batch_size: Positive = Field(4096, description="B, over all processes; the paper's, sections 2.2 and 5.2")
        lr: PositiveFloat = Field(1.5e-4, description="of a batch of 256; MoCo v3's with a ViT")
        warmup_epochs: Natural = Field(40, description="of the learning rate; MoCo v3's with a ViT")
        schedule: Literal["release", "cosine"] = Field("cosine", description="the paper's, section 2.2")
        weight_decay: WeightDecay = Field(0.1, description="AdamW's, on all parameters; MoCo v3's with a ViT")
        temperature: Temperature = Field(0.1, description="tau; table 5 (0.5 on CIFAR-10, section B.9)")
        projector: tuple[Positive, Plural] = Field(
            (2048, 128), description="widths of its two layers; section 2.1, its hidden layer as wide as a ResNet-50"
        )
        frozen_projection: bool = Field(
            True, description="the patch projection stays as it was drawn; MoCo v3, section 4.2"
        )

    def networks(self, encoder: Encoder) -> nn.ModuleDict:
        encoder.patch_embed.requires_grad_(not self.settings.frozen_projection)
        projector = heads.projection_head((encoder.embed_dim, *self.settings.projector))
        return nn.ModuleDict({"encoder": encoder, "projector": projector})

    def forward(self, networks: nn.ModuleDict, views: tuple[Tensor, ...], sampled: Sampled) -> tuple[Tensor, ...]:
        """-> z1, z2: (B, d), not normalized."""
        encoder, projector = networks["encoder"], networks["projector"]
        features1, features2 = encoder(torch.cat(views)).chunk(2)
        return projector(features1), projector(features2)

    def loss(self, outputs: tuple[Tensor, ...], progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        z1, z2 = outputs
        loss = nt_xent(z1, z2, self.settings.temperature)
        return loss, {"positive_cosine": F.cosine_similarity(z1, z2).mean().detach()}


def nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """Mean, over the rows of both views, of -log softmax(cosine / tau) at the image's other view, among all other rows.

    z1, z2: (B, d) of this process -> scalar; the mean over processes is the whole batch's.
    """
    pairs = F.normalize(torch.stack([z1, z2], dim=1), dim=-1)  # (B, 2, d): views of an image are neighbours
    all_pairs, first = collectives.gather_with_gradient(pairs)
    logits = pairs.flatten(0, 1) @ all_pairs.flatten(0, 1).T / temperature  # (2B, 2B of all processes)
    positions = 2 * first + torch.arange(len(logits), device=logits.device)  # of this process's rows among all
    logits = logits.scatter(1, positions[:, None], float("-inf"))  # a row is not compared with itself
    return F.cross_entropy(logits, positions ^ 1)  # position p ^ 1 is the image's other view
