"""The estimate against steps that are really taken and counted, and the command as a user runs it."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from aps.data import REGISTRY
from aps.errors import UserError
from aps.estimate import (
    DATASETS,
    activation_bytes,
    detection_image_flops,
    encoder_flops,
    estimate,
    finetuning_image_flops,
    kept,
    parameters,
    pretraining_step_flops,
    stage_cost,
)
from aps.methods.aps import APS
from aps.models.archs import dimensions
from aps.models.encoder import build_encoder
from aps.settings.blocks import DetectionSettings, EncoderSettings
from aps.settings.reading import load_study
from aps.settings.study import ExperimentSettings
from aps.training.pretrain import Forward


def experiment(encoder: dict[str, Any], **blocks: Any) -> ExperimentSettings:
    return ExperimentSettings.model_validate({"dataset": "cifar10", "encoder": encoder, **blocks})


MICRO = {"arch": "micro", "image_size": 32, "patch_size": 4}
EXPERIMENTS = {
    "micro": experiment(MICRO, pretrain={"batch_size": 16}),
    "many tokens": experiment(
        {"arch": "micro", "depth": 2, "image_size": 32, "patch_size": 1},
        sampling={"ratio": 0.5, "samplings": 1},
        pretrain={"batch_size": 2},
    ),
    "tiny on CIFAR": experiment({"arch": "tiny"}, pretrain={"batch_size": 8}),
    "full": experiment(MICRO, sampling={"strategy": "full"}, pretrain={"batch_size": 8}),
    "large batch": experiment({**MICRO, "depth": 1}, pretrain={"batch_size": 512}),
    "odd widths": experiment({**MICRO, "mlp_ratio": 2.5, "qkv_bias": True}, pretrain={"batch_size": 8}),
    "checkpointing": experiment(MICRO, pretrain={"batch_size": 8, "activation_checkpointing": True}),
}


def fused_attention(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """Operations of scores and of their product with the values."""
    *batch, tokens, width = query
    return 2 * math.prod(batch) * tokens * key[-2] * (width + value[-1])


def fused_attention_backward(
    _: Any, query: Sequence[int], key: Sequence[int], value: Sequence[int], *__: Any, **___: Any
) -> int:
    """Scores once more, then two products for each of the forward's two."""
    *batch, tokens, width = query
    return 2 * math.prod(batch) * tokens * key[-2] * (3 * width + 2 * value[-1])


def counted() -> FlopCounterMode:
    """torch's counter, which has formulas for the fused attention of GPUs but not in every version for the CPU's."""
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return FlopCounterMode(display=False, custom_mapping={forward: fused_attention, backward: fused_attention_backward})


def views(e: ExperimentSettings) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, S, N = e.pretrain.batch_size, e.encoder.image_size, e.encoder.grid**2
    cells = torch.stack([torch.randperm(N)[: kept(e)] for _ in range(2 * B)]).view(2, B, -1)
    return torch.randn(B, 3, S, S), torch.randn(B, 3, S, S), cells[0], cells[1]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_counted_pretraining_step_agrees_within_two_percent(name: str) -> None:
    e = EXPERIMENTS[name]
    encoder = build_encoder(e.encoder)
    encoder.set_grad_checkpointing(e.pretrain.activation_checkpointing)
    method = APS(e)
    forward = Forward(method, method.networks(encoder))
    with counted() as counter:
        view1, view2, *cells = views(e)
        loss, _ = method.loss(forward((view1, view2), tuple(cells)), 0.0)
        loss.backward()
    assert pretraining_step_flops(e) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_the_step_is_cheaper_by_about_the_sampling_ratio() -> None:
    dense = experiment({"arch": "base"}, sampling={"strategy": "full"})
    sparse = experiment({"arch": "base"}, sampling={"ratio": 0.25})
    assert 3.5 < pretraining_step_flops(dense) / pretraining_step_flops(sparse) < 4.5


@pytest.mark.parametrize("name", ["micro", "many tokens", "odd widths"])
def test_a_counted_finetuning_step_and_a_frozen_forward_agree_too(name: str) -> None:
    e = EXPERIMENTS[name]
    model = build_encoder(e.encoder)
    model.reset_classifier(100)
    images = torch.randn(2, 3, 32, 32)
    with counted() as counter:
        model(images).sum().backward()
    assert 2 * finetuning_image_flops(e, 100).training == pytest.approx(counter.get_total_flops(), rel=0.02)
    model.reset_classifier(0)
    with torch.no_grad(), counted() as counter:
        model(images)
    assert 2 * encoder_flops(e.encoder).forward == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize("changes", [{}, {"window": 0, "relative_position": False}, {"pyramid_scales": (2.0, 1.0)}])
def test_a_counted_detection_step_agrees_too(changes: dict[str, Any]) -> None:
    from aps.detection.engines.torchvision import build_model

    encoder = EncoderSettings(arch="micro", image_size=32, patch_size=8, depth=3)
    settings = DetectionSettings.model_validate(
        {"image_size": 80, "window": 4, "global_blocks": (1,), "pyramid_dim": 32, "head_dim": 64, "rois": 32} | changes
    )
    task: Any = SimpleNamespace(
        settings=settings, encoder=encoder, seed=0, mean=(0.5,) * 3, std=(0.2,) * 3,
        train=SimpleNamespace(classes=("a", "b", "c")),
    )  # fmt: skip
    model = build_model(task).train()
    regions: dict[str, int] = {}
    for head in ("box_head", "mask_head"):
        getattr(model.roi_heads, head).register_forward_hook(
            lambda _, x, y, head=head: regions.update({head: len(x[0])})
        )
    masks = torch.zeros(1, 80, 80, dtype=torch.uint8)
    masks[:, 8:40, 8:40] = 1
    target = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([1]), "masks": masks}
    with counted() as counter:
        losses = model([torch.rand(3, 80, 80)], [target])
        sum(losses.values()).backward()
    flops = detection_image_flops(encoder, settings, 3, regions["box_head"], regions["mask_head"])
    assert flops.training == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize("name", ["micro", "tiny on CIFAR", "odd widths"])
@pytest.mark.parametrize("bf16", [False, True])
def test_kept_activations_are_those_autograd_saves(name: str, bf16: bool) -> None:
    e = EXPERIMENTS[name]
    encoder = build_encoder(e.encoder)
    seen = {p.untyped_storage().data_ptr(): 0 for p in encoder.parameters()}
    weights = {shape for p in encoder.parameters() for shape in (p.shape, p.shape[::-1])}  # and their bf16 copies
    alive = []

    def pack(x: Tensor) -> Tensor:
        size = 0 if x.shape in weights else x.untyped_storage().nbytes()
        seen.setdefault(x.untyped_storage().data_ptr(), size)
        alive.append(x)
        return x

    images, _, cells, _ = views(e)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), torch.autocast("cpu", enabled=bf16):
        encoder(images, cells)
    expected = len(images) * activation_bytes(e.encoder, kept(e) + 1, 2 if bf16 else 4)
    assert sum(seen.values()) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_parameters_are_counted_right(name: str) -> None:
    settings = EXPERIMENTS[name].encoder
    assert parameters(settings) == sum(p.numel() for p in build_encoder(settings).parameters())


def test_a_pretraining_run_is_its_steps() -> None:
    e = experiment({"arch": "tiny"})  # 1600 epochs, B = 512, T = 4, the last batch dropped
    steps = 1600 * (50_000 // 512) * 4
    assert stage_cost(e, "pretrain", DATASETS["cifar10"], 1).flops == steps * pretraining_step_flops(e)
    limited = experiment({"arch": "tiny"}, dataset={"name": "cifar10", "train_limit": 5120})
    assert stage_cost(limited, "pretrain", DATASETS["cifar10"], 1).flops == 1600 * 10 * 4 * pretraining_step_flops(e)


def test_evaluations_follow_their_epochs_and_splits() -> None:
    counts, e = DATASETS["cifar10"], experiment({"arch": "tiny"}, finetune={"epochs": 7, "holdout": 0.1})
    image, seen = finetuning_image_flops(e, 10), encoder_flops(e.encoder).forward
    expected = 7 * (45_000 * image.training + 5_000 * image.forward) + 3 * 10_000 * image.forward
    assert stage_cost(e, "finetune", counts, 1).flops == pytest.approx(expected)
    heads = 6 * 2 * 2 * 192 * 10  # six rates, forward and the weights' gradient
    expected = 100 * 45_000 * (seen + heads) + 15_000 * seen
    assert stage_cost(e, "linear_probe", counts, 1).flops == pytest.approx(expected)


def test_gpus_share_activations_but_not_weights() -> None:
    e = experiment({"arch": "base"})
    one, four = (stage_cost(e, "pretrain", DATASETS["cifar10"], gpus).memory for gpus in (1, 4))
    assert one / 4 < four < one
    assert four > 18 * parameters(e.encoder)


def test_every_dataset_but_the_users_own_has_its_size() -> None:
    assert set(DATASETS) == set(REGISTRY) - {"folder"}


def test_sizes_stated_are_those_of_the_recipes() -> None:
    from aps.data.composites import RECIPES
    from aps.data.digits import TEST_IMAGES, scans

    assert DATASETS["digits"][:2] == (len(scans()[1]) - TEST_IMAGES, TEST_IMAGES)
    for name, recipe in RECIPES.items():
        assert DATASETS[name][:2] == (recipe.train, recipe.val)


STUDY = """
study: two
results: {results}
defaults: {{dataset: cifar10}}
resources: {{pretrain: {{gpus: 4}}}}
experiments:
  tiny: {{seeds: [0, 1, 2]}}
  huge: {{encoder: {{arch: base, image_size: 224, patch_size: 4}}, sampling: {{strategy: full}}, stages: [pretrain]}}
"""


@pytest.fixture
def study_file(tmp_path: Path) -> Path:
    (tmp_path / "study.yaml").write_text(STUDY.format(results=tmp_path / "results"))
    return tmp_path / "study.yaml"


def test_the_table_has_a_row_for_each_stage_and_adds_up(study_file: Path) -> None:
    study = load_study([study_file])
    text = estimate(study, "h100", share=0.5)
    rows = [line.split() for line in text.splitlines() if line.startswith(("tiny ", "huge "))]
    assert [(row[0], row[1]) for row in rows] == [
        ("tiny", "pretrain"), ("tiny", "finetune"), ("tiny", "linear_probe"), ("tiny", "knn"), ("huge", "pretrain")
    ]  # fmt: skip
    assert [row[2] for row in rows] == ["3"] * 4 + ["1"] and [row[5] for row in rows] == ["4", "1", "1", "1", "4"]
    flops = stage_cost(study.experiments["tiny"], "pretrain", DATASETS["cifar10"], 4).flops
    numbers = [[float(x.replace(",", "")) for x in row[2:]] for row in rows]
    assert numbers[0][1] == pytest.approx(flops / 1e15, rel=0.01)
    assert numbers[0][2] == pytest.approx(flops / (0.5 * 989e12) / 3600, rel=0.01)
    total = float(re.search(r"all runs: ([\d.,e+]+) GPU hours", text)[1].replace(",", ""))
    assert total == pytest.approx(sum(row[0] * row[2] for row in numbers), rel=0.02)
    assert "more than a H100 SXM has: huge pretrain" in text


def test_a_prepared_dataset_is_counted_by_its_manifest(study_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from aps.data.manifest import Manifest, Split, Statistics

    study = load_study(
        [study_file],
        {"experiments": {"own": {"dataset": "folder", "stages": ["knn"], "encoder": {"weights": "random"}}}},
    )
    with pytest.raises(
        UserError, match="size of dataset 'folder' is known once it is prepared; run `python -m aps data folder`"
    ):
        estimate(study)
    Manifest(
        name="folder", kind="classification", classes=("a", "b"), image_size=None,
        splits={"train": Split(count=1000), "test": Split(count=100)},
        statistics=Statistics(measured=None), digest="0", digest_of="", origin="",
    ).write(Path(study.results) / "data" / "folder" / "manifest.json")  # fmt: skip
    row = next(line.split() for line in estimate(study).splitlines() if line.startswith("own "))
    D = dimensions(study.experiments["own"].encoder).dim
    flops = 1100 * encoder_flops(study.experiments["own"].encoder).forward + 2 * 1000 * 100 * D
    assert float(row[3]) == pytest.approx(flops / 1e15, rel=0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"gpu": "a1000"}, "--gpu a1000 is unknown; known: v100"), ({"share": 1.5}, r"not in \(0, 1\]")],
)
def test_bad_arguments_are_one_sentence(study_file: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        estimate(load_study([study_file]), **arguments)


def test_the_command_needs_neither_data_nor_torch(study_file: Path) -> None:
    code = "import sys; sys.modules['torch'] = None; from aps.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "estimate", "--configfile", str(study_file), "--gpu", "a100"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "study 'two' on A100 SXM 80 GB" in done.stdout and "tiny" in done.stdout
