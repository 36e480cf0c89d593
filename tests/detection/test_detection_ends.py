"""The least and the greatest numbers that a detector's settings accept train, or end in a sentence that names them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from ends import extremes

from aps.detection import geometry
from aps.detection.engine import Task
from aps.detection.engines.torchvision import Engine
from aps.errors import UserError
from aps.settings.blocks import DetectionSettings
from aps.training.loop import all_finite, weights_not_finite


@pytest.mark.parametrize(("key", "value"), extremes(DetectionSettings))
def test_the_least_and_the_greatest_number_train_or_are_named(key: str, value: Any, task: Task) -> None:
    settings = task.settings.model_copy(update={"iterations": 1, "warmup_iterations": 0, key: value})
    try:
        geometry.strides(settings, task.encoder.patch_size)
    except ValueError as error:
        assert f"detection.{key}" in str(error)
        return
    try:
        engine = Engine(dataclasses.replace(task, settings=settings))
        engine.train(0, lambda done, losses: None)
        if not all_finite(engine.state()):
            raise UserError(weights_not_finite("detection"))
    except UserError as error:
        assert "\n" not in str(error) and f"detection.{key}" in str(error), str(error)
