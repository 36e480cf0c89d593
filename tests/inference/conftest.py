"""Photographs of three kinds in folders, and a study that has run on them: every stage, as a user would find it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import yaml

from aps.cli import main
from aps.settings.reading import load_study

KINDS = {"blue": (60, 80, 210), "green": (60, 190, 70), "red": (210, 70, 60)}
STUDY: dict[str, Any] = {
    "study": "photos",
    "sources": {"folder": {"path": "photos"}},
    "tracking_uri": "none",
    "defaults": {
        "dataset": "folder",
        "encoder": {"arch": "micro", "image_size": 32, "patch_size": 8, "dim": 48, "depth": 2, "heads": 3},
        "pretrain": {"epochs": 2, "batch_size": 16, "warmup_epochs": 1, "projector": [16, 16, 8], "predictor": [16, 16, 8]},
        "finetune": {"epochs": 6, "batch_size": 16, "warmup_epochs": 0, "mixup": 0.0, "cutmix": 0.0, "lr": 0.02},
        "linear_probe": {"epochs": 4, "batch_size": 16, "lrs": [0.01, 1.0], "batch_norm": True},
        "knn": {"k": [3]},
        "embed": {"queries": 4, "neighbours": 3},
        # Hardly trained: every class keeps about 1/11 of each box, above the 0.05 from which engines report a detection.
        # After 60 iterations at 3e-3 the best scores were 0.0503 on one processor and below 0.05 on another.
        "detection": {
            "image_size": 32, "iterations": 20, "batch_size": 2, "warmup_iterations": 3, "lr": 1e-5, "lr_drops": [], "window": 4,
            "global_blocks": [1], "pyramid_scales": [2.0, 1.0], "pyramid_dim": 16, "head_convs": 1, "head_dim": 16,
            "proposals": 20, "rois": 16,
        },
    },
    "experiments": {
        "mine": {"stages": ["pretrain", "finetune", "linear_probe", "knn", "embed", "detection"]},
        "floor": {"inherits": "mine", "encoder": {"weights": "random"}, "stages": ["linear_probe"]},
        "digits": {"inherits": "mine", "dataset": "digits", "encoder": {"weights": "random"}, "stages": ["finetune", "embed"],
                   "finetune": {"epochs": 1, "batch_size": 128}},
    },
}  # fmt: skip


def photograph(kind: str, number: int) -> np.ndarray:
    """uint8 (H, W, 3): a colour, a shade from one side and a spot; of many sizes."""
    generator = np.random.default_rng([list(KINDS).index(kind), number])
    height, width = generator.integers(40, 80, 2)
    rows, columns = np.mgrid[0:height, 0:width]
    shade = (rows / height * generator.uniform(-50, 50) + columns / width * generator.uniform(-50, 50))[..., None]
    image = np.array(KINDS[kind]) + shade + generator.normal(0, 6, (height, width, 3))
    spot = (rows - generator.integers(10, height - 10)) ** 2 + (columns - generator.integers(10, width - 10)) ** 2 < 64
    image[spot] = generator.integers(0, 255, 3)
    return image.clip(0, 255).astype(np.uint8)


def take_photographs(folder: Path, each: int = 20) -> Path:
    """A folder a kind, of JPEG files."""
    for kind in KINDS:
        (folder / kind).mkdir(parents=True)
        for number in range(each):
            PIL.Image.fromarray(photograph(kind, number)).save(folder / kind / f"{number:03d}.jpg", quality=95)
    return folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with photos/, study.yaml and results/ of the whole study."""
    folder = tmp_path_factory.mktemp("photos")
    take_photographs(folder / "photos")
    (folder / "study.yaml").write_text(yaml.safe_dump(STUDY))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", "none")
        study = load_study(["study.yaml"])
        for dataset in study.dataset_names():
            assert main(["data", dataset, "--configfile", "study.yaml"]) == 0
        for experiment, seed, stage in study.jobs():
            own = ["--experiment", experiment, "--seed", str(seed)]
            assert main([stage, "--configfile", "study.yaml", *own]) == 0
    yield folder


@pytest.fixture
def stages(finished: Path) -> Path:
    """The folder with a folder a stage."""
    return finished / "results" / "photos" / "mine" / "seed0"
