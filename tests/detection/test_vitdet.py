"""The backbone of engine torchvision against our encoder, and against detectron2's ViTDet where that is installed."""

import pytest
import torch
from torch import nn

from aps.detection.placement import backbone_tensors, load_backbone
from aps.detection.vitdet import SimpleFeaturePyramid, ViT, join_windows, relative_table, split_windows
from aps.models.archs import dimensions
from aps.models.encoder import build_encoder
from aps.settings.blocks import DetectionSettings, EncoderSettings

ENCODER = EncoderSettings(arch="micro", image_size=64, patch_size=4)
GLOBAL = DetectionSettings(
    image_size=64, window=0, relative_position=False, pyramid_scales=(2.0, 1.0, 0.5), drop_path=0.0
)
WINDOWED = DetectionSettings(
    image_size=96, window=7, global_blocks=(1, 3), pyramid_scales=(2.0, 1.0, 0.5), pyramid_dim=32, drop_path=0.0
)


def noisy(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter drawn at random, so that none is 0 or 1 where its absence would go unseen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def detectron2_pyramid(encoder: EncoderSettings, settings: DetectionSettings) -> nn.Module:
    pytest.importorskip("detectron2", reason="detectron2 is not installed")
    from detectron2.config import instantiate

    from aps.detection.engines.detectron2 import backbone_config

    return instantiate(backbone_config(encoder, settings))


def patch_tokens(encoder: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Our encoder's tokens as ViTDet uses them: without the class token, before the final norm; (B, D, G, G)."""
    x = encoder.blocks(encoder.embed(images)[:, 1:])
    return x.transpose(1, 2).unflatten(2, (ENCODER.grid, ENCODER.grid))


@pytest.mark.parametrize("qkv_bias", [False, True])
def test_at_the_pretraining_size_the_feature_map_is_our_encoders_patch_tokens(qkv_bias):
    settings = ENCODER.model_copy(update={"qkv_bias": qkv_bias})
    encoder, vit = noisy(build_encoder(settings)), ViT(settings, GLOBAL).eval()
    load_backbone(vit, backbone_tensors(encoder).tensors, GLOBAL, prefix="")
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(vit(images), patch_tokens(encoder, images), atol=1e-5, rtol=1e-5)


@pytest.mark.detectron2
@pytest.mark.parametrize("qkv_bias", [False, True])
def test_at_the_pretraining_size_detectron2s_feature_map_is_our_encoders_patch_tokens(qkv_bias):
    settings = ENCODER.model_copy(update={"qkv_bias": qkv_bias})
    encoder, pyramid = noisy(build_encoder(settings)), detectron2_pyramid(settings, GLOBAL).eval()
    load_backbone(pyramid, backbone_tensors(encoder).tensors, GLOBAL, prefix="net.")
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            pyramid.net(images)["last_feat"], patch_tokens(encoder, images), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("engine", ["torchvision", pytest.param("detectron2", marks=pytest.mark.detectron2)])
def test_with_repeated_positions_a_window_is_our_encoders_patch_tokens_of_it(engine):
    settings = GLOBAL.model_copy(
        update={"image_size": 128, "window": ENCODER.grid, "global_blocks": (), "positions": "repeat"}
    )
    encoder = noisy(build_encoder(ENCODER))
    pyramid = (SimpleFeaturePyramid if engine == "torchvision" else detectron2_pyramid)(ENCODER, settings).eval()
    load_backbone(pyramid, backbone_tensors(encoder).tensors, settings, prefix="net.")
    images = torch.randn(2, 3, 128, 128)
    with torch.no_grad():
        found = pyramid.net(images)
        found = found if engine == "torchvision" else found["last_feat"]
        for y in (0, 1):
            for x in (0, 1):
                tokens = patch_tokens(encoder, images[:, :, 64 * y : 64 * (y + 1), 64 * x : 64 * (x + 1)])
                window = found[:, :, 16 * y : 16 * (y + 1), 16 * x : 16 * (x + 1)]
                torch.testing.assert_close(window, tokens, atol=1e-5, rtol=1e-5)


@pytest.mark.detectron2
@pytest.mark.parametrize("side", [64, 96])
@pytest.mark.parametrize("scales", [(4.0, 2.0, 1.0, 0.5), (1.0, 0.5)])
def test_windows_relative_positions_and_pyramid_equal_detectron2s_weight_for_weight(side, scales):
    encoder = ENCODER.model_copy(update={"patch_size": 8, "qkv_bias": True})
    settings = WINDOWED.model_copy(update={"pyramid_scales": scales})
    ours, theirs = noisy(SimpleFeaturePyramid(encoder, settings)), detectron2_pyramid(encoder, settings).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    images = torch.randn(1, 3, side, side)
    with torch.no_grad():
        expected, found = theirs(images), ours(images)
    assert list(found) == list(expected)
    for name, level in expected.items():
        torch.testing.assert_close(found[name], level, atol=1e-4, rtol=1e-4)


def test_windows_come_back_as_they_were_split_where_the_map_is_no_multiple_of_the_window():
    x = torch.randn(2, 10, 13, 5)
    windows = split_windows(x, 4)
    assert windows.shape == (2 * 3 * 4, 4, 4, 5)
    assert torch.equal(windows[1], x[0, 0:4, 4:8])
    assert torch.equal(join_windows(windows, 4, 10, 13), x)


def test_relative_positions_index_the_offset_and_stretch_to_another_size():
    learned = torch.arange(7.0)[:, None]  # offsets -3..3 of 4 cells
    table = relative_table(learned, 4)[..., 0]
    assert table[2, 0] == 5 and table[0, 3] == 0 and table[1, 1] == 3
    assert relative_table(learned, 6).shape == (6, 6, 1)


def test_drop_path_rises_to_the_configured_rate_at_the_last_block():
    vit = ViT(ENCODER, GLOBAL.model_copy(update={"drop_path": 0.3}))
    depth = dimensions(ENCODER).depth
    assert [round(block.drop_path.drop_prob, 6) for block in vit.blocks] == [
        round(0.3 * i / (depth - 1), 6) for i in range(depth)
    ]
