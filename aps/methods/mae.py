"""MAE: Masked Autoencoders Are Scalable Vision Learners, arXiv 2111.06377 (section 3).

The encoder sees a quarter of an image's patches. A small decoder gets the encoded patches, and a mask token for every other
patch, and predicts the pixels. The loss is the mean squared error on the masked patches alone.

The encoder is the same as for all methods here, so its position embedding is learned and it starts as `encoder.init` says;
in the paper the embedding is fixed and weights start uniform by Xavier. The decoder has both as there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from aps.methods import F, Method, Sampled, lazy, nn, torch
from aps.settings.base import Depth, Natural, Positive, PositiveFloat, Probability, Share, WeightDecay, Width
from aps.settings.blocks import PretrainSettings, ViewSettings
from aps.settings.study import ExperimentSettings

if TYPE_CHECKING:
    import timm.layers as layers
    import timm.models.vision_transformer as vit
    from torch import Tensor

    import aps.models.encoder as encoders
    from aps.models.encoder import Encoder
    from aps.sampling import Geometry, Noise
    from aps.views import View
else:
    layers, vit, encoders = lazy("timm.layers"), lazy("timm.models.vision_transformer"), lazy("aps.models.encoder")


class MAE(Method):
    class Settings(PretrainSettings):
        epochs: Positive = Field(800, description="E; section 4.1")
        batch_size: Positive = Field(4096, description="B, over all processes; table 8")
        lr: PositiveFloat = Field(1.5e-4, description="of a batch of 256; table 8")
        warmup_epochs: Natural = Field(40, description="of the learning rate; table 8")
        schedule: Literal["release", "cosine"] = Field("cosine", description="table 8")
        weight_decay: WeightDecay = Field(0.05, description="AdamW's, but for biases and norms; table 8")
        betas: tuple[Share, Share] = Field((0.9, 0.95), description="AdamW's; table 8")
        mask_ratio: Annotated[float, Field(gt=0, lt=1)] = Field(
            0.75, description="share of patches masked; section 4.1"
        )
        decoder_dim: Width = Field(512, description="its width, a multiple of 4; table 1b")
        decoder_depth: Depth = Field(8, description="its blocks; table 1a")
        decoder_heads: Positive = Field(16, description="its attention heads; the release's")
        normalized_target: bool = Field(True, description="paint each patch less its mean over its deviation; table 1d")

    class Views(ViewSettings):
        crop_scale: tuple[PositiveFloat, PositiveFloat] = Field(
            (0.2, 1.0), description="[low, high] share of the image's area in a crop; the release's"
        )
        color_jitter_prob: Probability = Field(0.0, description="probability; table 1e: no colours change")
        grayscale: Probability = Field(0.0, description="probability; table 1e")

    @classmethod
    def check(cls, experiment: ExperimentSettings) -> None:
        settings, cells = experiment.pretrain, experiment.encoder.grid**2
        kept = kept_cells(cells, settings.mask_ratio)
        if not kept:
            raise ValueError(f"pretrain.mask_ratio {settings.mask_ratio} leaves none of {cells} cells; lower it")
        if kept == cells:
            raise ValueError(f"pretrain.mask_ratio {settings.mask_ratio} masks none of {cells} cells; raise it")
        for divisor, what in ((4, "4"), (settings.decoder_heads, f"pretrain.decoder_heads {settings.decoder_heads}")):
            if settings.decoder_dim % divisor:
                raise ValueError(f"pretrain.decoder_dim {settings.decoder_dim} is not a multiple of {what}; change it")

    def views(self) -> Sequence[View]:
        return super().views()[:1]

    def networks(self, encoder: Encoder) -> nn.ModuleDict:
        s, grid, patch = self.settings, encoder.patch_embed.grid_size, encoder.patch_embed.patch_size[0]
        blocks = [vit.Block(s.decoder_dim, s.decoder_heads, qkv_bias=True) for _ in range(s.decoder_depth)]
        embed = nn.Linear(encoder.embed_dim, s.decoder_dim)
        decoder = nn.Sequential(*blocks, nn.LayerNorm(s.decoder_dim), nn.Linear(s.decoder_dim, 3 * patch**2))
        for module in (embed, *decoder.modules()):
            if isinstance(module, nn.Linear):  # appendix A.1
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        positions = layers.build_sincos2d_pos_embed(list(grid), s.decoder_dim)  # (N, W)
        tokens = {
            "mask": nn.Parameter(nn.init.normal_(torch.empty(1, 1, s.decoder_dim), std=0.02)),
            "positions": nn.Parameter(positions, requires_grad=False),
        }
        return nn.ModuleDict(
            {"encoder": encoder, "embed": embed, "tokens": nn.ParameterDict(tokens), "decoder": decoder}
        )

    def sample(self, geometries: Sequence[Geometry], noise: Noise) -> Sequence[Sampled]:
        """A random order of each image's cells, (B, N): the first n are kept, the others masked."""
        return [(noise(self.experiment.encoder.grid**2).argsort(dim=1),)]

    def forward(self, networks: nn.ModuleDict, views: tuple[Tensor, ...], sampled: Sampled) -> tuple[Tensor, ...]:
        """-> predictions, targets: (B, N - n, 3*P*P), of the masked patches."""
        (images,), (order,) = views, sampled
        encoder: Any = networks["encoder"]
        tokens: Any = networks["tokens"]
        B, N = order.shape
        n = kept_cells(N, self.settings.mask_ratio)
        kept, masked = order[:, :n], order[:, n:]

        encoded = networks["embed"](encoder.tokens(images, kept))  # (B, 1+n, W)
        mask = tokens["mask"].to(encoded.dtype).expand(B, N - n, -1)
        cells = torch.cat([encoded[:, 1:], mask], dim=1)
        cells = encoders.gather_cells(cells, order.argsort(dim=1)) + tokens["positions"]  # in the image's order again
        decoded = networks["decoder"](torch.cat([encoded[:, :1], cells], dim=1))[:, 1:]  # (B, N, 3*P*P)

        patches = encoders.patchify(images, self.experiment.encoder.patch_size)
        return encoders.gather_cells(decoded, masked), encoders.gather_cells(patches, masked)

    def loss(self, outputs: tuple[Tensor, ...], progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        predicted, target = outputs
        if self.settings.normalized_target:
            variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
            target = (target - mean) / (variance + 1e-6).sqrt()
        return F.mse_loss(predicted, target), {}

    def parameters(self, networks: nn.ModuleDict) -> Iterable[dict[str, Any]]:
        trained = [p for p in networks.parameters() if p.requires_grad]
        decayed = [p for p in trained if p.ndim > 1]  # as in the release: no decay of biases and norms
        return [{"params": decayed}, {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}]


def kept_cells(cells: int, mask_ratio: float) -> int:
    """n, the cells of an image that the encoder sees."""
    return int(cells * (1 - mask_ratio))
