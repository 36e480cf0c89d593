"""The encoder: timm's Vision Transformer, reading any subset of an image's patches.

Design: the kept cells are gathered from the pixels, before the patch projection, so dropped cells cost nothing. Parameter
names are timm's, so weights load by name in both directions. If every cell is kept, the output equals timm's
(tests/models/test_encoder.py).

It does not know how cells are chosen (`aps.sampling`) nor where weights come from (`aps.models.weights`).

Letters: B images, S image side, P patch side, G = S/P, N = G*G cells in row-major order, n kept cells, D width.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from aps.models.archs import dimensions
from aps.settings.blocks import EncoderSettings


def patchify(images: Tensor, patch: int) -> Tensor:
    """images: (B, 3, S, S) -> (B, N, 3*P*P), each row ordered like a convolution kernel: channel, row, column."""
    B, C, H, W = images.shape
    x = images.view(B, C, H // patch, patch, W // patch, patch)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(B, (H // patch) * (W // patch), C * patch * patch)


def gather_cells(x: Tensor, kept: Tensor) -> Tensor:
    """x: (B, N, D), kept: (B, n) -> (B, n, D). index_select of whole rows is several times faster than gather."""
    B, N, D = x.shape
    rows = kept + N * torch.arange(B, device=kept.device).unsqueeze(1)
    return x.flatten(0, 1).index_select(0, rows.flatten()).view(B, -1, D)


class Encoder(VisionTransformer):
    """Vision Transformer (arXiv 2010.11929) on a subset of patches; pre-norm, class token as feature.

    The position embedding has a row for each of the N cells and none for the class token (`no_embed_class`).
    With `any_size` it accepts images of other sizes too (see `positions`).
    With `reset_classifier(classes)` it becomes a classifier, like any timm model.
    """

    cls_token: nn.Parameter  # (1, 1, D)
    pos_embed: nn.Parameter  # (1, N, D)
    any_size: bool = False

    def forward(self, images: Tensor, kept: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """images: (B, 3, S, S), kept: (B, n) int64 cells or None for all -> (B, D), or (B, classes) with a head."""
        return self.forward_head(self.tokens(images, kept))

    def tokens(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        """images: (B, 3, S, S), kept: (B, n) or None -> (B, 1+n, D) after the final norm; 0 is the class token."""
        x = self.embed(images, kept)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.grad_checkpointing else block(x)
        return self.norm(x)

    def embed(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        """images: (B, 3, S, S), kept: (B, n) or None -> (B, 1+n, D), the input of the first block.

        Raises:
            ValueError: the images are not of the size the encoder was built for, and `any_size` is off.
        """
        B, _, H, W = images.shape
        positions: Tensor = self.pos_embed
        if self.patch_embed.img_size != (H, W):
            if not self.any_size:
                raise ValueError(f"images are {H}x{W}, the encoder was built for {self.patch_embed.img_size}")
            positions = self.positions(H, W)
        pixels = patchify(images, self.patch_embed.patch_size[0])
        if kept is not None:
            pixels = gather_cells(pixels, kept)
            # index_select, not gather: the gradient of gather would be a (B, N, D) tensor
            positions = positions[0].index_select(0, kept.flatten()).view(B, -1, self.embed_dim)
        projection = self.patch_embed.proj  # a PxP convolution of stride P is one product over a patch's pixels
        x = F.linear(pixels, projection.weight.flatten(1), projection.bias) + positions
        return torch.cat([self.cls_token.to(x.dtype).expand(B, -1, -1), x], dim=1)

    def positions(self, height: int, width: int) -> Tensor:
        """Position embeddings (1, N, D) for images of another size: `pos_embed`, interpolated bicubically.

        height, width: pixels, multiples of the patch side. Interpolation is a matrix product, whose gradient sums in the
        same order every time. DINO uses it for its small crops (arXiv 2104.14294).
        """
        (G, _), P = self.patch_embed.grid_size, self.patch_embed.patch_size[0]
        identity = torch.eye(G, device=self.pos_embed.device)[None, None]
        rows, columns = (  # (cells of the images, G): a bicubic interpolation along one axis is a matrix
            F.interpolate(identity, size=(side // P, G), mode="bicubic", align_corners=False)[0, 0].to(
                self.pos_embed.dtype
            )
            for side in (height, width)
        )
        table = self.pos_embed.unflatten(1, (G, G))
        return torch.einsum("rg,bghd,ch->brcd", rows, table, columns).flatten(1, 2)


def build_encoder(settings: EncoderSettings, drop_path: float = 0.0) -> Encoder:
    """A newly initialized encoder (method.md, Model).

    Class token and position embedding are drawn from a truncated normal of standard deviation 0.02. Linear layers and patch
    projection depend on `settings.init`: `torch` uses PyTorch's defaults, weights and biases uniform within 1/sqrt(inputs),
    as the authors' release does; `timm` draws the weights of linear layers from a truncated normal of 0.02, and sets their
    biases to zero.

    Args:
        settings: architecture, image and patch size, initialization.
        drop_path: stochastic depth rate of the last block, rising linearly from 0 at the first.
    """
    dim, depth, heads = dimensions(settings)
    encoder = Encoder(
        img_size=settings.image_size,
        patch_size=settings.patch_size,
        num_classes=0,
        global_pool="token",
        embed_dim=dim,
        depth=depth,
        num_heads=heads,
        mlp_ratio=settings.mlp_ratio,
        qkv_bias=settings.qkv_bias,
        no_embed_class=True,
        drop_path_rate=drop_path,
        norm_layer=partial(nn.LayerNorm, eps=settings.layer_norm_eps),  # type: ignore[arg-type]
    )
    nn.init.trunc_normal_(encoder.cls_token, std=0.02)  # timm uses a normal of std 1e-6
    if settings.init == "torch":  # class token and position embedding are not changed
        for module in encoder.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.reset_parameters()
    return encoder
