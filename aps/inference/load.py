"""`aps.load`: loads a network, ready to use, from an address.

| address                              | what it gives                                              |
|--------------------------------------|------------------------------------------------------------|
| folder of a stage                    | what the stage left: encoder, classifier, probe, detector  |
| folder written by `aps export`       | the model in it                                            |
| .safetensors file of this software   | likewise                                                   |
| `runs:/ID`, `models:/NAME/VERSION`   | what MLflow holds, or the folder its run wrote             |
| `timm:NAME`                          | timm's public weights                                      |

Design: of a linear probe, the head of the chosen learning rate is folded with its BatchNorm into one linear layer. The
probe's encoder is searched from the path in its metrics, also where the results were moved, and its checksum must be the
recorded one. Weights are loaded completely or not at all.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, infer_imagenet_subset, resolve_model_data_config
from timm.data.imagenet_info import ImageNetInfo
from torch import Tensor, nn

from aps.detection import load_engine
from aps.detection.engine import Task
from aps.errors import UserError
from aps.files import expanded, sha256
from aps.inference.images import Transform
from aps.inference.model import Detector, Loaded, Model, Source
from aps.inference.upstream import find_encoder
from aps.models.encoder import Encoder, build_encoder
from aps.models.weights import INFO_KEY, load_encoder, load_state, read_settings, read_tensors
from aps.runtime.processes import Distributed
from aps.seals import read_metrics
from aps.settings.blocks import EncoderSettings
from aps.settings.study import StageSettings

log = logging.getLogger(__name__)

WEIGHTS = ("model.safetensors", "encoder.safetensors")  # files of a folder, of which the first existing one is loaded
PROBE = "linear_probe"


def load(address: str | os.PathLike, device: str | torch.device | None = None) -> Loaded:
    """Load a network from an address.

    Args:
        address: see the table in the docstring of this module.
        device: default: the GPU where there is one, else the CPU; `APS_DEVICE` overrides that.

    Returns:
        A `Model`, or a `Detector` for the detection stage.

    Raises:
        UserError: the address does not exist, its files are not complete, or it holds no weights that can be used alone.
    """
    where = str(address)
    chosen = _chosen_device(device)
    if where.startswith("timm:"):
        return _timm(where, chosen)
    if where.startswith(("runs:/", "models:/")):
        from aps.inference.serving import weights_of

        return _local(weights_of(where), where, chosen)
    return _local(expanded(where), where, chosen)


def _chosen_device(device: str | torch.device | None) -> torch.device:
    chosen = device or os.environ.get("APS_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=chosen)
        return torch.device(chosen)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {chosen} can't be used ({str(error).splitlines()[0]}); use cpu or cuda") from None


def _local(path: Path, address: str, device: torch.device) -> Loaded:
    folder, file = (path, None) if path.is_dir() else (path.parent, path)
    if not address.strip() or not path.exists():
        problem = f"{address} does not exist" if address.strip() else "the address of weights is empty"
        raise UserError(
            f"{problem}; give a stage's folder, a .safetensors file, timm:NAME, runs:/ID or models:/NAME/VERSION"
        )
    metrics = read_metrics(folder / "metrics.json") if (folder / "metrics.json").exists() else {}
    stage = metrics.get("stage")
    if stage == PROBE and (file is None or file.name == "heads.safetensors"):
        return _probe(folder, metrics, address, device)
    if file is None and stage is not None and not any((folder / name).exists() for name in WEIGHTS):
        return _evaluated(folder, metrics, address, device)
    if file is None:
        file = _weights_in(folder, address)
    if file.suffix != ".safetensors":
        raise UserError(f"{address} is no .safetensors file; `aps import-weights` turns a checkpoint into one")
    if file.name == "heads.safetensors":
        raise UserError(f"{address} holds heads without their encoder; load the folder of the stage that made them")
    _check_whole(file, metrics)
    tensors, metadata = read_tensors(file)
    if any(name.startswith("backbone.net.") for name in tensors):
        return _detector(tensors, metadata, metrics, file, address, device)
    settings = read_settings(metadata, file)
    if settings is None:
        raise UserError(
            f"{address} has no encoder settings, so it was not written by this software; load timm's models as timm:NAME"
        )
    info = json.loads(metadata.get(INFO_KEY, "{}"))
    network, classes = _network(tensors, settings, info, address)
    source = Source(address, info.get("stage", stage), settings, _provenance(info, metrics, file), folder)
    return Model(network, _transform(settings, info, address), classes, source, device)


def _check_whole(file: Path, metrics: dict[str, Any]) -> None:
    """Raises UserError where the file differs from the one that the stage wrote."""
    described = metrics.get("files", {}).get(file.name)
    if described is not None and file.is_file() and sha256(file) != described["sha256"]:
        raise UserError(
            f"{file}: it is not the file that metrics.json beside it describes, so it was changed or damaged; run the stage again"
        )


def _weights_in(folder: Path, address: str) -> Path:
    if found := next((folder / name for name in WEIGHTS if (folder / name).is_file()), None):
        return found
    below = sorted({file.parent for name in (*WEIGHTS, "heads.safetensors") for file in folder.glob(f"**/{name}")})
    below = [folder for folder in below if folder.name != "finished"]  # the folder of a saved run
    if below:
        more = f" (and {len(below) - 1} more)" if len(below) > 1 else ""
        raise UserError(f"{address} is no stage's folder; give one inside it, such as {below[0]}{more}")
    raise UserError(f"{address} has neither {' nor '.join(WEIGHTS)}; run the stage that writes there, or give another")


def _network(
    tensors: dict[str, Tensor], settings: EncoderSettings, info: dict[str, Any], address: str
) -> tuple[Encoder, tuple[str, ...]]:
    """An encoder with its classifier, if the file has one, and the names of its classes."""
    network = build_encoder(settings)
    load_state(network, tensors, settings, address)
    if "head.weight" not in tensors:
        return network, ()
    weight, bias = tensors["head.weight"], tensors["head.bias"]
    network.reset_classifier(len(weight))
    _set_linear(network.head, weight, bias)
    return network, _class_names(info.get("classes"), len(weight), address)


def _class_names(stored: Any, count: int, address: str) -> tuple[str, ...]:
    if not isinstance(stored, list):  # an import of the authors' release stores only their number
        return tuple(str(i) for i in range(count))
    if len(stored) != count:
        raise UserError(f"{address}: its head has {count} classes and it names {len(stored)}; make the file again")
    return tuple(str(name) for name in stored)


def _set_linear(layer: nn.Module, weight: Tensor, bias: Tensor) -> None:
    layer.load_state_dict({"weight": weight, "bias": bias}, strict=True)


def _transform(settings: EncoderSettings, info: dict[str, Any], address: str) -> Transform:
    if "mean" not in info or "std" not in info:
        log.warning("%s does not say how its images are normalized; taking ImageNet's mean and std", address)
        info = info | {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
    return Transform.of_stage(settings.image_size, info["mean"], info["std"], info.get("crop", "centre"))


def _provenance(info: dict[str, Any], metrics: dict[str, Any], file: Path) -> dict[str, Any]:
    """What is known about how the weights were made, as plain data without None."""
    found: dict[str, Any] = {key: info.get(key) for key in ("experiment", "stage", "origin")}
    found["settings_digest"] = info.get("digest")
    keys = ("experiment", "stage", "seed", "dataset", "settings_digest", "encoder", "metrics", "headline", "settings",
            "finished", "wall_seconds", "version", "commit", "hardware", "mlflow_run_id")  # fmt: skip
    found |= {key: metrics[key] for key in keys if metrics.get(key) is not None}
    found |= {"weights": str(file), "sha256": metrics.get("files", {}).get(file.name, {}).get("sha256")}
    return {key: value for key, value in found.items() if value is not None}


# --------------------------------------------------------------------------------------------------
# Stages that write no complete network


def _probe(folder: Path, metrics: dict[str, Any], address: str, device: torch.device) -> Model:
    """The encoder with the chosen head, into which BatchNorm is folded."""
    _check_whole(folder / "heads.safetensors", metrics)
    heads, metadata = read_tensors(folder / "heads.safetensors")
    info = json.loads(metadata.get(INFO_KEY, "{}"))
    if "lr" not in info:
        raise UserError(f"{address}: this probe does not name its classes; run linear_probe again with this version")
    network, settings = _encoder_of(folder, metrics, address)
    pick = info["lrs"].index(info["lr"])
    weight, bias = fold(heads, pick)
    if not (weight.isfinite().all() and bias.isfinite().all()):
        raise UserError(
            f"{address}: its head of learning rate {info['lr']:g} has diverged; lower linear_probe.lrs and run linear_probe again"
        )
    network.reset_classifier(len(weight))
    _set_linear(network.head, weight, bias)
    classes = _class_names(info["classes"], len(weight), address)
    source = Source(address, PROBE, settings, _provenance(info, metrics, folder / "heads.safetensors"), folder)
    return Model(network, _transform(settings, info, address), classes, source, device)


def fold(heads: dict[str, Tensor], pick: int) -> tuple[Tensor, Tensor]:
    """Head `pick` of a probe's `Heads` as one linear layer: weight (C, D), bias (C).

    BatchNorm without affine is x -> (x - mean) / sqrt(var + eps), which in evaluation is a linear map, like the head.
    """
    weight, bias = heads[f"heads.{pick}.weight"].double(), heads[f"heads.{pick}.bias"].double()
    if "norm.running_mean" in heads:
        weight = weight / (heads["norm.running_var"].double() + 1e-6).sqrt()
        bias = bias - weight @ heads["norm.running_mean"].double()
    return weight.float(), bias.float()


def _evaluated(folder: Path, metrics: dict[str, Any], address: str, device: torch.device) -> Model:
    """The encoder that a stage without weights (kNN, embed) evaluated."""
    network, settings = _encoder_of(folder, metrics, address)
    file = find_encoder(folder, metrics)
    source = Source(address, metrics["stage"], settings, _provenance({}, metrics, file or folder), folder)
    return Model(network, _transform(settings, metrics.get("pixels", {}), address), (), source, device)


def _encoder_of(folder: Path, metrics: dict[str, Any], address: str) -> tuple[Encoder, EncoderSettings]:
    """The encoder that a stage started from, and its settings.

    Raises:
        UserError: it can't be found, or it has been trained again since.
    """
    settings = StageSettings.from_json(json.dumps(metrics["settings"]))
    spec: Any = metrics["encoder"]["source"]
    if spec != "random" and not str(spec).startswith("timm:"):
        spec = find_encoder(folder, metrics)
        if spec is None:
            raise UserError(
                f"{address}: its encoder {metrics['encoder']['source']} is not there, or another training has replaced it; "
                "put it back, or run the stage again"
            )
    torch.manual_seed(settings.seed)  # for random weights, as in the stage
    return load_encoder(spec, settings.encoder), settings.encoder


# --------------------------------------------------------------------------------------------------
# Detectors


@dataclass(frozen=True)
class _Names:
    """The attributes of a `CocoSplit` that building a detector needs; no image or annotation is read."""

    classes: tuple[str, ...]
    masks: bool
    name: str = "inference"
    annotations: Path = Path("nowhere.json")
    folder: Path = Path("nowhere")


def _detector(
    tensors: dict[str, Tensor],
    metadata: dict[str, str],
    metrics: dict[str, Any],
    file: Path,
    address: str,
    device: torch.device,
) -> Detector:
    info = json.loads(metadata.get(INFO_KEY, "{}"))
    if not info and metrics:
        info = {"settings": metrics["settings"], **metrics["normalization"]}
    if "settings" not in info:
        raise UserError(f"{address} does not say how its detector is built; load the folder of its detection stage")
    settings = StageSettings.from_json(json.dumps(info["settings"]))
    classes = tuple(json.loads(metadata["classes"]))
    names: Any = _Names(classes, masks=any(".mask_" in name for name in tensors))
    task = Task(
        settings=settings.detection,
        encoder=settings.encoder,
        seed=settings.seed,
        train=names,
        val=names,
        mean=tuple(info["mean"]),  # type: ignore[arg-type]
        std=tuple(info["std"]),  # type: ignore[arg-type]
        workers=0,
        processes=Distributed(0, 1, device),
    )
    engine = load_engine(settings.detection.engine)(task)
    try:
        engine.model.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise UserError(f"{address} does not fit its own settings ({str(error).splitlines()[1].strip()})") from None
    source = Source(address, "detection", settings.encoder, _provenance(info, metrics, file), file.parent)
    return Detector(engine, classes, source, device)


# --------------------------------------------------------------------------------------------------
# timm


def _timm(address: str, device: torch.device) -> Model:
    name = address.removeprefix("timm:")
    try:
        network: Any = timm.create_model(name, pretrained=True)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{address}: timm can't give these weights ({reason}); check name and network") from error
    if not hasattr(network, "forward_head"):
        raise UserError(f"{address}: a {type(network).__name__} has no features before a classifier; choose another")
    config = resolve_model_data_config(network)
    _, height, width = config["input_size"]
    if height != width:
        raise UserError(f"{address}: reads images of {height}x{width}, and only square ones are supported")
    whole = config.get("crop_mode") == "squash" and config["crop_pct"] == 1
    transform = Transform(
        size=height,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        resize=None if whole else int(height / config["crop_pct"]),
        interpolation="bilinear" if config["interpolation"] == "bilinear" else "bicubic",
    )
    card = network.pretrained_cfg
    provenance = {
        "weights": address,
        **{key: card[key] for key in ("license", "origin_url", "paper_ids", "url", "hf_hub_id") if card.get(key)},
    }
    return Model(network, transform, _imagenet(network), Source(address, provenance=provenance), device)


def _imagenet(network: nn.Module) -> tuple[str, ...]:
    count = int(getattr(network, "num_classes", 0) or 0)
    subset = infer_imagenet_subset(network) if count else None
    if subset is None:
        return tuple(str(i) for i in range(count))
    names = ImageNetInfo(subset)
    return tuple(names.index_to_description(i) for i in range(count))
