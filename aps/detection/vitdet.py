"""ViTDet's backbone in plain torch: a Vision Transformer with window attention, and a simple feature pyramid on top.

Exploring Plain Vision Transformer Backbones for Object Detection, arXiv 2203.16527; relative positions as in MViTv2,
arXiv 2112.01526 (section 3.1, decomposed).

Design: there is no class token and no final norm, as in ViTDet: the feature map is the output of the last block.
Parameters have the names of timm's encoder and of detectron2's ViTDet, so that weights load by name in both directions
(tests/detection/test_vitdet.py compares the outputs too). The position embedding keeps the grid it was made for, by
default that of pretraining, and is interpolated at each forward pass.

It does not know where weights come from (`aps.detection.placement`) nor which heads use the pyramid.

Letters: B images, H and W rows and columns of cells, D width, M heads, w window side in cells.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d, Mlp
from torch import Tensor, nn

from aps.detection.geometry import positions_grid, strides
from aps.models.archs import dimensions
from aps.settings.blocks import DetectionSettings, EncoderSettings


class Attention(nn.Module):
    """Self-attention over a grid of cells, optionally with relative positions along rows and columns."""

    def __init__(self, dim: int, heads: int, qkv_bias: bool, grid: int | None) -> None:
        """grid: side, in cells, of the grid whose relative positions are learned; None: no relative positions."""
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.relative = grid is not None
        if grid is not None:
            self.rel_pos_h = nn.Parameter(torch.zeros(2 * grid - 1, dim // heads))
            self.rel_pos_w = nn.Parameter(torch.zeros(2 * grid - 1, dim // heads))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, H, W, D) -> (B, H, W, D)."""
        B, H, W, D = x.shape
        q, k, v = self.qkv(x).view(B, H * W, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        bias = self._bias(q, H, W) if self.relative else None
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(x.transpose(1, 2).reshape(B, H, W, D))

    def _bias(self, q: Tensor, height: int, width: int) -> Tensor:
        """q: (B, M, H*W, d) -> (B, M, H*W, H*W): q . r_{row offset} + q . r_{column offset}."""
        (B, M, _, d), H, W = q.shape, height, width
        q = q.reshape(B, M, H, W, d)
        rows = torch.einsum("bmhwd,hkd->bmhwk", q, relative_table(self.rel_pos_h, H))
        columns = torch.einsum("bmhwd,wkd->bmhwk", q, relative_table(self.rel_pos_w, W))
        return (rows.unsqueeze(-1) + columns.unsqueeze(-2)).reshape(B, M, H * W, H * W)


def relative_table(learned: Tensor, size: int) -> Tensor:
    """learned: (2*grid - 1, d), one row per offset -> (size, size, d): entry [i, j] belongs to offset i - j.

    Where `size` is not `grid`, offsets are interpolated linearly.
    """
    if len(learned) != 2 * size - 1:
        learned = F.interpolate(learned.T.unsqueeze(0), size=2 * size - 1, mode="linear")[0].T
    cells = torch.arange(size, device=learned.device)
    return learned[cells[:, None] - cells[None, :] + size - 1]


class Block(nn.Module):
    """Pre-norm transformer block with attention in windows of w x w cells, or over the whole map (window 0)."""

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        eps: float,
        drop_path: float,
        window: int,
        grid: int | None,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, heads, qkv_bias, grid)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, H, W, D) -> (B, H, W, D)."""
        attended = self.norm1(x)
        if self.window:
            H, W = x.shape[1:3]
            attended = join_windows(self.attn(split_windows(attended, self.window)), self.window, H, W)
        else:
            attended = self.attn(attended)
        x = x + self.drop_path(attended)
        return x + self.drop_path(self.mlp(self.norm2(x)))


def split_windows(x: Tensor, w: int) -> Tensor:
    """x: (B, H, W, D) -> (B * windows, w, w, D); padded with zeros below and on the right where w does not divide H, W."""
    _, H, W, _ = x.shape
    x = F.pad(x, (0, 0, 0, -W % w, 0, -H % w))
    x = x.unflatten(1, (-1, w)).unflatten(3, (-1, w))  # (B, H/w, w, W/w, w, D)
    return x.transpose(2, 3).reshape(-1, w, w, x.shape[-1])


def join_windows(x: Tensor, w: int, height: int, width: int) -> Tensor:
    """Inverse of `split_windows`: (B * windows, w, w, D) -> (B, H, W, D)."""
    rows, columns = -(-height // w), -(-width // w)
    x = x.view(-1, rows, columns, w, w, x.shape[-1]).transpose(2, 3)
    return x.reshape(-1, rows * w, columns * w, x.shape[-1])[:, :height, :width]


class PatchEmbed(nn.Module):
    def __init__(self, patch: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=patch, stride=patch)

    def forward(self, images: Tensor) -> Tensor:
        """images: (B, 3, S, S) -> (B, H, W, D)."""
        return self.proj(images).permute(0, 2, 3, 1)


class ViT(nn.Module):
    """Images (B, 3, ., .) -> feature map (B, D, H, W); H and W are the image's sides divided by the patch side."""

    def __init__(self, encoder: EncoderSettings, settings: DetectionSettings) -> None:
        super().__init__()
        dim, depth, heads = dimensions(encoder)
        self.patch_embed = PatchEmbed(encoder.patch_size, dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, positions_grid(settings, encoder) ** 2, dim))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.blocks = nn.ModuleList()
        for number in range(depth):
            window = settings.window if number not in settings.global_blocks else 0
            grid = window or settings.image_size // encoder.patch_size
            self.blocks.append(
                Block(
                    dim,
                    heads,
                    encoder.mlp_ratio,
                    encoder.qkv_bias,
                    encoder.layer_norm_eps,
                    settings.drop_path * number / max(1, depth - 1),
                    window,
                    grid if settings.relative_position else None,
                )
            )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images)
        x = x + interpolate_positions(self.pos_embed, x.shape[1], x.shape[2])
        for block in self.blocks:
            x = block(x)
        return x.permute(0, 3, 1, 2)


def interpolate_positions(learned: Tensor, height: int, width: int) -> Tensor:
    """learned: (1, G*G, D) -> (1, H, W, D), bicubic."""
    G = math.isqrt(learned.shape[1])
    grid = learned.view(1, G, G, -1)
    if (height, width) == (G, G):
        return grid
    return F.interpolate(grid.permute(0, 3, 1, 2), size=(height, width), mode="bicubic").permute(0, 2, 3, 1)


class ConvNorm(nn.Conv2d):
    """A convolution without bias, then a LayerNorm over channels."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        self.norm = LayerNorm2d(outputs)  # eps 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


class SimpleFeaturePyramid(nn.Module):
    """Pyramid levels made from the last feature map alone, and one more level by subsampling the coarsest.

    Attributes:
        names: p{log2 of the pixels per cell}, finest first, the subsampled level last.
        out_channels: channels of every level; torchvision's detectors read this attribute.
    """

    def __init__(self, encoder: EncoderSettings, settings: DetectionSettings) -> None:
        super().__init__()
        self.net = ViT(encoder, settings)
        dim, self.out_channels = dimensions(encoder).dim, settings.pyramid_dim
        stages = [stride.bit_length() - 1 for stride in strides(settings, encoder.patch_size)]
        self.names = [f"p{stage}" for stage in [*stages, stages[-1] + 1]]
        self._levels: list[nn.Sequential] = []
        for stage, scale in zip(stages, settings.pyramid_scales, strict=True):
            layers, width = _resampling(dim, scale)
            level = nn.Sequential(
                *layers, ConvNorm(width, self.out_channels, 1), ConvNorm(self.out_channels, self.out_channels, 3)
            )
            self.add_module(f"simfp_{stage}", level)
            self._levels.append(level)

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """images: (B, 3, S, S) -> name: (B, C, S/stride, S/stride)."""
        x = self.net(images)
        levels = [level(x) for level in self._levels]
        levels.append(levels[-1][:, :, ::2, ::2])
        return OrderedDict(zip(self.names, levels, strict=True))


def _resampling(dim: int, scale: float) -> tuple[list[nn.Module], int]:
    """Layers that enlarge a map of `dim` channels by `scale`, and the number of channels of their output."""
    enlarge = partial(nn.ConvTranspose2d, kernel_size=2, stride=2)
    if scale == 4.0:
        return [enlarge(dim, dim // 2), LayerNorm2d(dim // 2), nn.GELU(), enlarge(dim // 2, dim // 4)], dim // 4
    if scale == 2.0:
        return [enlarge(dim, dim // 2)], dim // 2
    return ([nn.MaxPool2d(2)] if scale == 0.5 else []), dim
