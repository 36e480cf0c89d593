"""Answers requests in MLflow's server: images as base64 in, classes, embeddings or boxes out.

MLflow calls `_load_pyfunc` (the contract of its `loader_module`); no object is pickled. The server never opens a path from
a request.
"""

from __future__ import annotations

import base64
import binascii
import io
from typing import Any

import numpy as np
import pandas as pd
import PIL.Image

from aps.errors import UserError
from aps.inference.load import load
from aps.inference.model import Detections, Detector, Loaded, Predictions

COLUMN = "image"


def _load_pyfunc(path: str) -> Served:
    return Served(load(path))


class Served:
    """A network behind MLflow's interface."""

    def __init__(self, model: Loaded) -> None:
        self.model = model

    def predict(self, frame: Any, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """One row of results for each image.

        Args:
            frame: column `image`: an image file of any format as base64 text (or bytes).

        Returns:
            `class`, `probability` and `probabilities` (of every class) for a classifier; `embedding` for an encoder;
            `boxes` (left, top, right, bottom), `labels`, `scores` and `masks` (COCO's run lengths) for a detector.

        Raises:
            UserError: a row holds no image.
        """
        images = [decode(value, f"row {row}") for row, value in enumerate(_column(frame))]
        if isinstance(self.model, Detector):
            return pd.DataFrame([_detected(found) for found in self.model.detect(images, progress=False)])
        if self.model.classes:
            return pd.DataFrame(_classified(self.model.predict(images, progress=False)))
        return pd.DataFrame({"embedding": self.model.embed(images, progress=False).numpy().tolist()})


def _column(frame: Any) -> list[Any]:
    if isinstance(frame, pd.DataFrame):
        if COLUMN not in frame.columns:
            raise UserError(f"the request has columns {', '.join(map(str, frame.columns))}; send one named '{COLUMN}'")
        return frame[COLUMN].tolist()
    return list(np.atleast_1d(np.asarray(frame, dtype=object)))


def decode(value: Any, name: str) -> PIL.Image.Image:
    """The image in base64 text, with or without a `data:` prefix, or in bytes. Raises UserError where there is none."""
    try:
        if isinstance(value, str):
            value = base64.b64decode(value.partition(",")[2] if value.startswith("data:") else value, validate=True)
        image = PIL.Image.open(io.BytesIO(value))
        image.load()
        return image
    except (binascii.Error, TypeError, OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{name}: no image ({error}); send a PNG or JPEG file as base64 text") from None


def _classified(found: Predictions) -> dict[str, list[Any]]:
    return {
        "class": found.classes,
        "probability": found.probabilities.max(1).values.tolist(),
        "probabilities": [dict(zip(found.names, row, strict=True)) for row in found.probabilities.tolist()],
    }


def _detected(found: Detections) -> dict[str, Any]:
    return {
        "boxes": found.boxes.tolist(),
        "labels": found.labels,
        "scores": found.scores.tolist(),
        "masks": found.run_lengths(),
    }
