"""Asymmetric Patch Sampling."""

from __future__ import annotations

from pydantic import Field, model_validator

from aps.settings.base import Positive, PositiveFloat
from aps.settings.blocks import PretrainSettings, ViewSettings


class APS:
    Views = ViewSettings
    blocks = ("sampling",)

    class Settings(PretrainSettings):
        temperature: PositiveFloat = Field(0.1, description="tau of the contrastive loss")
        projector: tuple[Positive, Positive, Positive] = Field(
            (512, 512, 128), description="widths of its three layers"
        )
        predictor: tuple[Positive, Positive, Positive] = Field(
            (512, 512, 128), description="widths of its three layers; the last equals the projector's"
        )

        @model_validator(mode="after")
        def _check(self) -> APS.Settings:
            if self.projector[-1] != self.predictor[-1]:
                raise ValueError(
                    f"predictor ends in width {self.predictor[-1]}, the projector in {self.projector[-1]}; make them equal"
                )
            return self
