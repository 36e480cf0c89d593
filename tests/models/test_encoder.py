"""The encoder against timm's dense forward, and what its kept cells may and may not change."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import pytest
import torch
from scipy import stats
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from aps.models.encoder import Encoder, build_encoder, gather_cells, patchify
from aps.registry import ARCHS
from aps.settings.blocks import EncoderSettings

SMALL = EncoderSettings(arch="micro", image_size=16, patch_size=4)  # N = 16


def timm_twin(settings: EncoderSettings, encoder: Encoder) -> VisionTransformer:
    """timm's own model with the same weights, and so timm's own forward."""
    arch = ARCHS.load(settings.arch)
    twin = VisionTransformer(
        img_size=settings.image_size,
        patch_size=settings.patch_size,
        num_classes=0,
        embed_dim=arch.dim,
        depth=arch.depth,
        num_heads=arch.heads,
        qkv_bias=False,
        no_embed_class=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-5),
    )
    twin.load_state_dict(encoder.state_dict(), strict=True)
    return twin.eval().to(next(encoder.parameters()).dtype)


@pytest.fixture
def encoder() -> Encoder:
    torch.manual_seed(0)
    return build_encoder(SMALL).double().eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def draw(n: int, rows: int = 3, cells: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.stack([torch.randperm(cells, generator=generator)[:n] for _ in range(rows)])


@pytest.mark.parametrize("kept", [None, torch.arange(16).expand(3, -1)], ids=["no selection", "all selected"])
def test_with_every_cell_kept_it_is_timms_dense_forward(encoder: Encoder, images: Tensor, kept: Tensor | None) -> None:
    twin = timm_twin(SMALL, encoder)
    torch.testing.assert_close(encoder.tokens(images, kept), twin.forward_features(images), rtol=0, atol=1e-12)
    torch.testing.assert_close(encoder(images, kept), twin(images), rtol=0, atol=1e-12)
    torch.testing.assert_close(encoder(images, kept), twin.forward_features(images)[:, 0], rtol=0, atol=1e-12)


def test_gradients_are_those_of_timms_dense_forward(encoder: Encoder, images: Tensor) -> None:
    twin = timm_twin(SMALL, encoder)
    twin(images).square().sum().backward()
    encoder(images, torch.arange(16).expand(3, -1)).square().sum().backward()
    for (name, ours), theirs in zip(encoder.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12, msg=name)


def test_a_subset_is_timms_blocks_on_those_tokens(encoder: Encoder, images: Tensor) -> None:
    twin, kept = timm_twin(SMALL, encoder), draw(5)
    dense = twin.patch_embed(images) + twin.pos_embed
    tokens = torch.stack([dense[i][kept[i]] for i in range(3)])
    expected = twin.norm(twin.blocks(torch.cat([twin.cls_token.expand(3, -1, -1), tokens], dim=1)))
    torch.testing.assert_close(encoder.tokens(images, kept), expected, rtol=0, atol=1e-12)


def test_the_order_of_kept_cells_does_not_change_the_feature(encoder: Encoder, images: Tensor) -> None:
    kept = draw(7)
    torch.testing.assert_close(encoder(images, kept.flip(1)), encoder(images, kept), rtol=0, atol=1e-12)


def test_which_cell_a_patch_came_from_changes_the_feature(encoder: Encoder) -> None:
    flat = torch.full((1, 3, 16, 16), 0.3, dtype=torch.float64)  # every patch alike: only positions differ
    difference = encoder(flat, torch.tensor([[0, 1, 2]])) - encoder(flat, torch.tensor([[0, 1, 3]]))
    assert difference.abs().max() > 1e-6


def test_the_class_token_has_no_position_embedding(encoder: Encoder, images: Tensor) -> None:
    assert encoder.pos_embed.shape == (1, 16, 96)
    for kept in (None, draw(4)):
        assert torch.equal(encoder.embed(images, kept)[:, 0], encoder.cls_token[0].expand(3, -1))


def test_pixels_of_dropped_cells_are_never_touched(encoder: Encoder, images: Tensor) -> None:
    kept = draw(4)
    patches = patchify(images, 4)
    poisoned = torch.full_like(patches, torch.nan)
    rows = torch.arange(3)[:, None]
    poisoned[rows, kept] = patches[rows, kept]
    spoiled = poisoned.view(3, 4, 4, 3, 4, 4).permute(0, 3, 1, 4, 2, 5).reshape(3, 3, 16, 16)
    assert torch.equal(encoder(spoiled, kept), encoder(images, kept))


def test_only_kept_patches_are_projected(encoder: Encoder, images: Tensor) -> None:
    kept = draw(4)
    with FlopCounterMode(display=False) as counter:
        encoder.embed(images, kept)
    assert counter.get_total_flops() == 2 * 3 * 4 * (3 * 4 * 4) * 96  # 2 * B * n * 3PP * D


def test_patchify_and_gather_agree_with_slicing() -> None:
    images = torch.arange(2 * 3 * 8 * 8).view(2, 3, 8, 8)
    kept = torch.tensor([[5, 0], [15, 2]])  # G = 4: cell 5 is row 1, column 1
    patches = gather_cells(patchify(images, 2), kept)
    for b in range(2):
        for i, cell in enumerate(kept[b].tolist()):
            top, left = 2 * (cell // 4), 2 * (cell % 4)
            assert torch.equal(patches[b, i], images[b, :, top : top + 2, left : left + 2].flatten())


# S, P, arch -> parameters; at 224 these are timm's vit_*_patch16_224 less head, qkv biases and the class token's position.
PARAMETERS = {
    (32, 2, "tiny"): 5_383_680,
    (32, 2, "small"): 21_384_192,
    (32, 2, "base"): 85_235_712,
    (224, 16, "tiny"): 5_517_312,
    (224, 16, "small"): 21_651_456,
    (224, 16, "base"): 85_770_240,
}


@pytest.mark.parametrize(("size", "patch", "arch"), PARAMETERS)
def test_parameter_counts_are_those_of_the_formula(size: int, patch: int, arch: str) -> None:
    d, depth, heads = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12)}[arch]
    cells = (size // patch) ** 2
    block = 2 * (2 * d) + 3 * d * d + (d * d + d) + (4 * d * d + 4 * d) + (4 * d * d + d)  # norms, qkv, proj, fc1, fc2
    formula = d + cells * d + (3 * patch * patch * d + d) + depth * block + 2 * d
    with torch.device("meta"):
        encoder = build_encoder(EncoderSettings(arch=arch, image_size=size, patch_size=patch))
    assert formula == PARAMETERS[size, patch, arch] == sum(p.numel() for p in encoder.parameters())
    assert (encoder.embed_dim, len(encoder.blocks), encoder.blocks[0].attn.num_heads) == (d, depth, heads)


def test_it_is_built_as_the_release_is() -> None:
    torch.manual_seed(0)
    encoder = build_encoder(EncoderSettings(arch="small"))
    assert not any(name.endswith("qkv.bias") for name, _ in encoder.named_parameters())
    norms = [m for m in encoder.modules() if isinstance(m, nn.LayerNorm)]
    assert len(norms) == 2 * 12 + 1 and {norm.eps for norm in norms} == {1e-5}
    assert encoder.cls_token.std().item() == pytest.approx(0.02, rel=0.15)
    assert encoder.pos_embed.std().item() == pytest.approx(0.02, rel=0.02)
    assert all(block.attn.fused_attn for block in encoder.blocks)


@pytest.mark.parametrize("init", ["torch", "timm"])
def test_every_tensor_starts_with_the_distribution_of_its_initialization(init: str) -> None:
    """Those of one kind in all blocks together, against the distribution function (Kolmogorov and Smirnov)."""
    torch.manual_seed(0)
    settings = EncoderSettings(arch="tiny", depth=4, image_size=32, patch_size=4, qkv_bias=True, init=init)
    tensors: dict[str, list[Tensor]] = {}
    for name, value in build_encoder(settings).named_parameters():
        tensors.setdefault(re.sub(r"blocks\.\d+", "blocks", name), []).append(value.detach().flatten())
    ones, zeros = "value is 1", "value is 0"
    normal = stats.truncnorm(-100, 100, scale=0.02)  # cut at 2, which no value of this deviation reaches

    def uniform(inputs: int) -> Any:
        return stats.uniform(-(inputs**-0.5), 2 * inputs**-0.5)

    expected: dict[str, Any] = {"cls_token": normal, "pos_embed": normal}
    expected |= {f"{norm}.weight": ones for norm in ("blocks.norm1", "blocks.norm2", "norm")}
    expected |= {f"{norm}.bias": zeros for norm in ("blocks.norm1", "blocks.norm2", "norm")}
    expected |= {f"patch_embed.proj.{part}": uniform(3 * 4 * 4) for part in ("weight", "bias")}  # timm's is PyTorch's
    for layer, inputs in {"attn.qkv": 192, "attn.proj": 192, "mlp.fc1": 192, "mlp.fc2": 768}.items():
        weight, bias = (uniform(inputs), uniform(inputs)) if init == "torch" else (normal, zeros)
        expected |= {f"blocks.{layer}.weight": weight, f"blocks.{layer}.bias": bias}
    assert tensors.keys() == expected.keys()
    for name, law in expected.items():
        values = torch.cat(tensors[name]).double()
        if law in (ones, zeros):
            assert torch.equal(values, torch.full_like(values, law == ones)), name
        else:
            assert stats.kstest(values.numpy(), law.cdf).pvalue > 1e-4, name
            assert values.std().item() == pytest.approx(law.std(), rel=5 * len(values) ** -0.5), name


def test_the_releases_initialization_is_the_default() -> None:
    assert EncoderSettings().init == "torch"
    torch.manual_seed(0)
    encoder = build_encoder(EncoderSettings(arch="tiny", depth=1))
    deviations = {name: p.std().item() for name, p in encoder.blocks[0].named_parameters() if p.ndim == 2}
    expected = {"attn.qkv.weight": 0.042, "attn.proj.weight": 0.042, "mlp.fc1.weight": 0.042, "mlp.fc2.weight": 0.021}
    assert deviations == pytest.approx(expected, rel=0.02)  # docs/method.md, Model


def test_drop_path_reaches_the_blocks_and_acts_in_training_only() -> None:
    torch.manual_seed(0)
    encoder = build_encoder(SMALL, drop_path=0.3)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in encoder.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert rates == [getattr(block.drop_path2, "drop_prob", 0.0) for block in encoder.blocks]
    images = torch.randn(64, 3, 16, 16)
    assert torch.equal(encoder.eval()(images), encoder(images))
    assert not torch.equal(encoder.train()(images), encoder(images))


def test_activation_checkpointing_changes_no_gradient(encoder: Encoder, images: Tensor) -> None:
    kept = draw(5)
    encoder(images, kept).square().sum().backward()
    expected = [p.grad.clone() for p in encoder.parameters()]
    encoder.zero_grad()
    encoder.set_grad_checkpointing()
    encoder(images, kept).square().sum().backward()
    for p, grad in zip(encoder.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad)


def test_a_classifier_head_reads_the_class_token(encoder: Encoder, images: Tensor) -> None:
    feature = encoder(images)
    encoder.reset_classifier(7)
    torch.testing.assert_close(encoder(images), encoder.head.to(torch.float64)(feature))


def test_images_of_another_size_are_refused(encoder: Encoder) -> None:
    with pytest.raises(ValueError, match="32x32"):
        encoder(torch.zeros(1, 3, 32, 32, dtype=torch.float64))
