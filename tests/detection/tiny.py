"""Settings of the smallest detector that is all there."""

from __future__ import annotations

from aps.settings.blocks import DatasetSettings, DetectionSettings, EncoderSettings
from aps.settings.study import StageSettings

ENCODER = EncoderSettings(arch="micro", depth=2, image_size=16, patch_size=4, weights="random")
SETTINGS = DetectionSettings(
    image_size=32,
    iterations=45,
    batch_size=2,
    lr=1e-3,
    warmup_iterations=5,
    lr_drops=(0.8,),
    window=4,
    global_blocks=(1,),
    pyramid_scales=(2.0, 1.0),
    pyramid_dim=16,
    head_convs=1,
    head_dim=32,
    proposals=20,
    rois=16,
    jitter_scale=(0.7, 1.4),
)


def stage_settings(**detection: object) -> StageSettings:
    return StageSettings(
        stage="detection",
        experiment="tiny",
        seed=3,
        dataset=DatasetSettings(name="digits_coco"),
        encoder=ENCODER,
        detection=SETTINGS.model_copy(update=detection),
    )
