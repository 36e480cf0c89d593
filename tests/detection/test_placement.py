"""An encoder's weights in a detector: everything by name, nothing silently left out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from aps.detection.engine import Task
from aps.detection.placement import backbone_tensors, load_backbone, table
from aps.detection.vitdet import SimpleFeaturePyramid
from aps.errors import UserError
from aps.models.encoder import build_encoder
from aps.settings.blocks import DetectionSettings, EncoderSettings

ENCODER = EncoderSettings(arch="micro", image_size=16, patch_size=4)
SETTINGS = DetectionSettings(image_size=64, window=4, global_blocks=(3,), pyramid_scales=(2.0, 1.0), pyramid_dim=16)


class Detector(nn.Module):
    """A backbone with our names, and a head."""

    def __init__(self, encoder: EncoderSettings = ENCODER) -> None:
        super().__init__()
        self.backbone = SimpleFeaturePyramid(encoder, SETTINGS)
        self.head = nn.Linear(2, 2)


def test_every_parameter_is_loaded_interpolated_or_new_and_every_weight_placed_or_named():
    encoder, detector = build_encoder(ENCODER), Detector()
    found = backbone_tensors(encoder)
    placed = load_backbone(detector, found.tensors, SETTINGS)
    names = {*placed.loaded, *placed.new, *(name.split(" ")[0] for name in placed.interpolated)}
    assert names == set(detector.state_dict()) and placed.repeated == ()
    assert set(found.tensors) | set(found.dropped) == set(encoder.state_dict())
    assert found.dropped == ("cls_token", "norm.weight", "norm.bias")
    assert placed.interpolated == ("backbone.net.pos_embed (4x4 -> 16x16)",)
    new = [name for name in placed.new if name.startswith("backbone.net.")]
    assert new == [f"backbone.net.blocks.{i}.attn.rel_pos_{axis}" for i in range(4) for axis in "hw"]
    for name, value in found.tensors.items():
        assert torch.equal(detector.state_dict()[f"backbone.net.{name}"], value), name


def test_at_the_pretraining_grid_the_position_embedding_counts_as_loaded():
    placed = load_backbone(
        Detector(), backbone_tensors(build_encoder(ENCODER)).tensors, SETTINGS.model_copy(update={"image_size": 16})
    )
    assert placed.interpolated == () and "backbone.net.pos_embed" in placed.loaded


def test_repeated_positions_are_the_pretraining_grid_in_every_window_cut_where_the_image_ends():
    settings = SETTINGS.model_copy(update={"positions": "repeat", "image_size": 40})  # two and a half windows
    encoder, pyramid = build_encoder(ENCODER), SimpleFeaturePyramid(ENCODER, settings)
    placed = load_backbone(pyramid, backbone_tensors(encoder).tensors, settings, prefix="net.")
    assert placed.repeated == ("net.pos_embed (4x4 -> 10x10)",) and placed.interpolated == ()
    found = pyramid.net.pos_embed.view(10, 10, -1)
    learned = encoder.pos_embed.view(4, 4, -1)
    for y in range(10):
        for x in range(10):
            assert torch.equal(found[y, x], learned[y % 4, x % 4])


def test_the_final_norm_never_reaches_a_pyramid_norm():
    encoder, detector = build_encoder(ENCODER), Detector()
    nn.init.constant_(encoder.norm.weight, 7.0)
    before = {name: x.clone() for name, x in detector.state_dict().items() if "simfp" in name}
    load_backbone(detector, backbone_tensors(encoder).tensors, SETTINGS)
    assert all(torch.equal(detector.state_dict()[name], x) for name, x in before.items())


@pytest.mark.detectron2
def test_detectron2s_detector_takes_the_same_names_and_refuses_the_same_mismatches(task: Task):
    pytest.importorskip("detectron2", reason="detectron2 is not installed")
    from aps.detection.engines import detectron2, torchvision

    encoder = build_encoder(task.encoder)
    found = backbone_tensors(encoder)
    ours, theirs = (
        load_backbone(module.Engine(task).model, found.tensors, task.settings) for module in (torchvision, detectron2)
    )
    assert set(theirs.loaded) == set(ours.loaded) and theirs.interpolated == ours.interpolated
    assert [name for name in theirs.new if name.startswith("backbone.net.")] == [
        f"backbone.net.blocks.{i}.attn.rel_pos_{axis}" for i in range(2) for axis in "hw"
    ]
    model = detectron2.Engine(task).model
    for different in ({"dim": 192}, {"depth": 3}, {"patch_size": 2}, {"qkv_bias": True}, {"image_size": 32}):
        other = build_encoder(task.encoder.model_copy(update=different))
        with pytest.raises(UserError):
            load_backbone(model, backbone_tensors(other).tensors, task.settings)


@pytest.mark.parametrize(
    ("different", "message"),
    [
        ({"arch": "tiny", "depth": 4}, "encoder.dim"),
        ({"patch_size": 2}, "encoder.patch_size"),
        ({"image_size": 32}, "encoder.image_size"),
        ({"depth": 3}, r"'blocks\.3\..*' is not among the encoder's weights"),
        ({"depth": 5}, r"'blocks\.4\..*' has no place"),
        ({"qkv_bias": True}, r"'blocks\.0\.attn\.qkv\.bias' has no place"),
        ({"mlp_ratio": 2.0}, "has shape"),
    ],
)
def test_an_encoder_of_another_make_is_refused_and_leaves_the_detector_as_it_was(different, message):
    detector = Detector()
    before = {name: x.clone() for name, x in detector.state_dict().items()}
    other = build_encoder(ENCODER.model_copy(update=different))
    with pytest.raises(UserError, match=message):
        load_backbone(detector, backbone_tensors(other).tensors, SETTINGS)
    assert all(torch.equal(x, before[name]) for name, x in detector.state_dict().items())


def test_the_table_names_everything():
    encoder, detector = build_encoder(ENCODER), Detector()
    found = backbone_tensors(encoder)
    text = table(load_backbone(detector, found.tensors, SETTINGS), found.dropped, "encoder.safetensors")
    assert text.startswith("weights of the detector, encoder from encoder.safetensors: 46 loaded, 1 interpolated, ")
    for part in ("backbone.net.blocks.3.{norm1.weight", "pos_embed (4x4 -> 16x16)", "left behind", "head.weight"):
        assert part in text
