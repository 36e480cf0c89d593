"""Every method learns: at the demo's size and operations its encoder tells digits apart better than random weights do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from aps.cli import main
from aps.registry import METHODS

pytestmark = [pytest.mark.slow, pytest.mark.soak]

FLOPS = 1.5e12  # half a minute of a core, half of the demo's
HEADS: dict[
    str, dict[str, Any]
] = {  # widths that suit the encoder, momenta that suit few steps; the rest is the paper's
    "simclr": {"projector": [256, 64]},
    "mocov3": {"projector": [256, 256, 64], "predictor": [256, 64], "momentum": 0.98},
    "byol": {"projector": [256, 64], "predictor": [256, 64], "momentum": 0.98},
    # at the others' lr it collapses to a uniform output after some 40 steps
    "dino": {"head": [256, 256, 64], "prototypes": 256, "momentum": 0.98, "lr": 2e-3},
    "mae": {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2},
}
VIEWS: dict[str, dict[str, Any]] = {"dino": {"local_crops": 2}}


def scores(folder: Path, experiment: str) -> tuple[float, float]:
    """kNN and linear probe, percent."""
    stages = [
        json.loads((folder / f"results/s/{experiment}/seed0/{s}/metrics.json").read_text())
        for s in ("knn", "linear_probe")
    ]
    return stages[0]["metrics"]["knn_top1_k20"], stages[1]["metrics"]["test_top1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("learning")
    study = {
        "study": "s",
        "tracking_uri": "none",
        "defaults": {
            "dataset": "digits",
            "encoder": {"arch": "micro", "dim": 64, "depth": 2, "heads": 2, "image_size": 16, "patch_size": 2},
            "pretrain": {"budget": {"flops": FLOPS}, "epochs": 16, "batch_size": 128, "lr": 6e-3, "warmup_epochs": 2, "schedule": "cosine"},
            "linear_probe": {"epochs": 10, "batch_size": 64, "lrs": [0.3, 1.0, 3.0], "batch_norm": True, "crop_scale": [0.6, 1.0], "flip": 0.0},
            "knn": {"k": [20]},
        },
        "experiments": {
            **{
                name: {
                    "stages": ["pretrain", "linear_probe", "knn"],
                    "views": {"crop_scale": [0.4, 1.0], "flip": 0.0, "color_jitter_prob": 0.0, "grayscale": 0.0, **VIEWS.get(name, {})},
                    "pretrain": {"method": name, **HEADS.get(name, {})},
                }
                for name in METHODS.names()
            },
            "floor": {"encoder": {"weights": "random"}, "stages": ["linear_probe", "knn"]},
        },
    }  # fmt: skip
    (folder / "study.yaml").write_text(yaml.safe_dump(study))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["data", "digits"]) == 0
        for stage in ("linear_probe", "knn"):
            assert main([stage, "--configfile", "study.yaml", "--experiment", "floor"]) == 0
    return folder


@pytest.mark.parametrize("name", METHODS.names())
def test_it_learns_beyond_random_weights(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a linear probe and, most of them, by kNN; five points are more than two of the floor's standard deviations over seeds."""
    monkeypatch.chdir(folder)
    for stage in ("pretrain", "linear_probe", "knn"):
        assert main([stage, "--configfile", "study.yaml", "--experiment", name]) == 0
    (knn, probe), floor = scores(folder, name), scores(folder, "floor")
    print(f"{name}: kNN {knn:.1f}, linear probe {probe:.1f}; random weights {floor[0]:.1f}, {floor[1]:.1f}")
    assert probe > floor[1] + 5, (name, probe, floor)
    assert knn > floor[0] + 5 or name == "mae", (
        name,
        knn,
        floor,
    )  # MAE's features want a trained head (its section 4.3)
