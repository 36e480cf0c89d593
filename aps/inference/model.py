"""What `aps.load` returns: a network with its transform, its class names and its provenance.

There are two kinds: a `Model`, a Vision Transformer with or without a classifier, and a `Detector`. Both have every method;
one that a network does not support raises an error that says what to load instead.

Design: a linear probe is a classifier like a finetuned model, because in evaluation its BatchNorm and head are one linear
layer (`aps.inference.load` folds them), so every method and export works on it. Any other timm network, also a
convolutional one, can embed and predict too.

It does not know where weights are stored (`aps.inference.load`), nor files of features, pictures or exports.

Letters: M images, S image side, D width, C classes, G cells along a side, K detections of an image.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from pycocotools import mask as rle
from timm.models.vision_transformer import Attention, VisionTransformer
from torch import Tensor, nn

from aps.data.manifest import content_digest
from aps.detection.engine import Engine
from aps.errors import UserError
from aps.inference.convert import class_attention, features, timm_twin, write_onnx
from aps.inference.images import ImageLike, Images, Transform, as_list, decoded, read
from aps.progress import Progress
from aps.ranges import share, whole
from aps.runtime.precision import Precision

T = TypeVar("T")

BATCH = 64
DETECTED_AT_ONCE = 4
THRESHOLD = 0.5  # score from which a detection counts
_ENCODER = "a pretrained, finetuned or probed encoder"
# Method -> what it does, and what to load for it; for error messages.
VERBS = {
    "embed": ("embed images", _ENCODER),
    "predict": ("predict classes", "the folder of a finetune or linear_probe stage"),
    "detect": ("detect objects", "the folder of a detection stage"),
    "attention": ("show attention", _ENCODER),
    "transform": ("prepare images", _ENCODER),
    "to_timm": ("become a timm model", _ENCODER),
    "to_onnx": ("become an ONNX file", _ENCODER),
}


@dataclass(frozen=True)
class Predictions:
    """A classifier's predictions for M images."""

    probabilities: Tensor  # float32 (M, C), columns in the order of the model's `classes`
    names: tuple[str, ...]  # (C,), names of the columns

    def __len__(self) -> int:
        return len(self.probabilities)

    @property
    def classes(self) -> list[str]:
        """The likeliest class of each image, (M,)."""
        return [self.names[i] for i in self.probabilities.argmax(1).tolist()]

    def top(self, k: int = 5) -> list[list[tuple[str, float]]]:
        """The k likeliest classes of each image with their probabilities, the likeliest first.

        Raises:
            UserError: k is not a whole number above 0.
        """
        values, columns = self.probabilities.topk(min(whole(k, "k"), len(self.names)))
        return [
            [(self.names[c], p) for c, p in zip(cs, ps, strict=True)]
            for cs, ps in zip(columns.tolist(), values.tolist(), strict=True)
        ]


@dataclass(frozen=True)
class Detections:
    """Detections in one image, best first."""

    boxes: Tensor  # float32 (K, 4): left, top, right, bottom in pixels of the image
    scores: Tensor  # float32 (K,)
    labels: list[str]  # (K,), names of classes
    masks: Tensor | None  # bool (K, H, W); None where the detector was trained on boxes alone

    def __len__(self) -> int:
        return len(self.labels)

    def run_lengths(self) -> list[dict[str, Any]]:
        """The masks in COCO's compressed form, as plain data; an empty list where there are none."""
        if self.masks is None:
            return []
        codes = rle.encode(np.asfortranarray(self.masks.permute(1, 2, 0).numpy().astype(np.uint8)))
        return [{"size": [int(x) for x in code["size"]], "counts": code["counts"].decode()} for code in codes]


@dataclass(frozen=True)
class Source:
    """Where a network comes from.

    Attributes:
        address: as given to `aps.load`.
        stage: the stage that made it; None: other software.
        settings: of the encoder, if it is one of this project.
        provenance: plain data for people and model cards: experiment, seed, dataset, commit, scores ...
        folder: of the stage's results, if there is one.
    """

    address: str
    stage: str | None = None
    settings: Any = None
    provenance: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None


class Loaded:
    """The base class of `Model` and `Detector`.

    Attributes:
        network: the module, in evaluation mode, on the device.
        classes: names of classes; () where it has no classifier.
        source: where it comes from.
    """

    def __init__(self, network: Any, classes: Iterable[str], source: Source, device: torch.device) -> None:
        self.device = device
        self.network: Any = network.to(device).eval().requires_grad_(False)
        self.classes = tuple(classes)
        self.source = source

    @property
    def provenance(self) -> dict[str, Any]:
        return self.source.provenance

    @cached_property
    def digest(self) -> str:
        """sha256 over names and values of the weights; it does not depend on the file."""
        state = self.network.state_dict()
        return content_digest(
            list(state),
            *(x.cpu().contiguous().flatten().view(torch.uint8).numpy().data for x in state.values()),
        )

    @property
    def verbs(self) -> frozenset[str]:
        """The methods that it supports, of VERBS."""
        return frozenset()

    def check(self, verb: str) -> None:
        """Raises UserError where it does not support `verb`; the message says what to load instead."""
        if verb in self.verbs:
            return
        doing, instead = VERBS[verb]
        kind = "is a detector" if isinstance(self, Detector) else "has no detector"
        if verb == "predict" and not isinstance(self, Detector):
            kind = "has no classifier"
        raise UserError(f"{self.source.address} {kind}, so it can't {doing}; load {instead}")

    def transform(self, image: ImageLike) -> Tensor:
        raise self._unable("transform")

    def embed(self, images: Images, batch_size: int = BATCH, progress: bool | None = None) -> Tensor:
        raise self._unable("embed")

    def predict(self, images: Images, batch_size: int = BATCH, progress: bool | None = None) -> Predictions:
        raise self._unable("predict")

    def detect(
        self,
        images: Images,
        threshold: float = THRESHOLD,
        batch_size: int = DETECTED_AT_ONCE,
        progress: bool | None = None,
    ) -> list[Detections]:
        raise self._unable("detect")

    def attention(
        self, images: Images, block: int = -1, batch_size: int = BATCH, progress: bool | None = None
    ) -> Tensor:
        raise self._unable("attention")

    def to_timm(self) -> nn.Module:
        raise self._unable("to_timm")

    def to_onnx(self, path: str | Path) -> Path:
        raise self._unable("to_onnx")

    def _unable(self, verb: str) -> Exception:
        self.check(verb)
        return NotImplementedError(verb)

    def _batches(
        self,
        images: list[ImageLike],
        prepare: Callable[[ImageLike, str], Tensor],
        compute: Callable[[list[Tensor]], T],
        batch_size: int,
        progress: bool | None,
        verb: str,
    ) -> Iterator[T]:
        """`compute` of each batch of prepared images, with a progress bar.

        Raises:
            UserError: one of `images` is not an image, or `batch_size` is not a whole number above 0.
        """
        batch_size = whole(batch_size, "batch_size")
        shown = len(images) > batch_size if progress is None else progress
        label = f"{verb} by {self.source.stage or self.source.address}"
        with Progress(label, len(images), "images", shown=shown) as bar:
            for batch in decoded(images, prepare, batch_size):
                if refused := next((x for x in batch if isinstance(x, UserError)), None):
                    raise refused
                yield compute(batch)  # type: ignore[arg-type]
                bar.update(len(batch), len(batch))


class Model(Loaded):
    """A Vision Transformer, or another timm network, that embeds and, where it has a classifier, predicts.

    Example:
        >>> import aps
        >>> model = aps.load("results/demo/aps/seed0/finetune")
        >>> model.embed(["a.jpg", "b.jpg"]).shape
        torch.Size([2, 96])
        >>> model.predict("a.jpg").top(1)
        [[('3', 0.93)]]
    """

    def __init__(
        self, network: Any, transform: Transform, classes: Iterable[str], source: Source, device: torch.device
    ) -> None:
        super().__init__(network, classes, source, device)
        self.preprocessing = transform
        self.precision = Precision("auto", device)

    @property
    def verbs(self) -> frozenset[str]:
        return frozenset(VERBS) - {"detect"} - (set() if self.classes else {"predict"})

    @property
    def dim(self) -> int:
        """D, width of an embedding."""
        return int(getattr(self.network, "head_hidden_size", None) or self.network.num_features)

    def transform(self, image: ImageLike) -> Tensor:
        """An image -> (3, S, S) float32, resized and normalized for the network by `preprocessing`."""
        return self.preprocessing(image)

    def embed(self, images: Images, batch_size: int = BATCH, progress: bool | None = None) -> Tensor:
        """The feature of each image: the class token after the last norm, or the network's pooled features.

        Args:
            images: one or more paths, Pillow images, arrays or tensors, of mixed kinds; see `aps.inference.images.read`.
            progress: whether to show a progress bar; None: if there is more than one batch.

        Returns:
            float32 (M, D), on the CPU.

        Raises:
            UserError: one of `images` is not an image, or `batch_size` is not a whole number above 0.
        """
        return torch.cat(list(self._computed(images, self.features_of, batch_size, progress, "embed")))

    def predict(self, images: Images, batch_size: int = BATCH, progress: bool | None = None) -> Predictions:
        """Classes and probabilities. Arguments are as in `embed`.

        Raises:
            UserError: the network has no classifier, or an argument is refused as in `embed`.
        """
        self.check("predict")
        probabilities = torch.cat(list(self._computed(images, self.probabilities_of, batch_size, progress, "predict")))
        return Predictions(probabilities, self.classes)

    def attention(
        self, images: Images, block: int = -1, batch_size: int = BATCH, progress: bool | None = None
    ) -> Tensor:
        """Attention of the class token to the patches, in each head of a block.

        Args:
            block: from 0, or negative from the end; the last by default.

        Returns:
            float32 (M, heads, G, G): attention to each patch. The remainder to a sum of 1 is attention to the class token.

        Raises:
            UserError: the network has no class token or no such block, or another argument is refused as in `embed`.
        """
        self._attention_layer(block)
        maps = self._computed(
            images, lambda pixels: self.attention_of(pixels, block), batch_size, progress, "attention"
        )
        return torch.cat(list(maps))

    def to_timm(self) -> nn.Module:
        """A plain timm model on the CPU with a copy of these weights."""
        settings = self.source.settings
        if settings is None:
            return copy.deepcopy(self.network).cpu()
        return timm_twin(self.network.state_dict(), settings, len(self.classes))

    def to_onnx(self, path: str | Path) -> Path:
        """Write an ONNX file.

        Its input is `images`, (B, 3, S, S) as made by `transform`, for any B. Its outputs are `probabilities` (B, C), if
        there is a classifier, and `features` (B, D).

        Raises:
            UserError: the packages for it are not installed, or the file can't be written.
        """
        about = {
            "classes": list(self.classes),
            "transform": self.preprocessing.timm_config(),
            "weights": self.digest,
        }
        write_onnx(self.network, bool(self.classes), self.preprocessing.size, about, Path(path))
        return Path(path)

    # ----------------------------------------------------------------------------------------------

    def prepared(self, images: Iterable[ImageLike], batch_size: int) -> Iterator[list[Tensor | UserError]]:
        """Batches of (3, S, S) in [0, 1], with a UserError in place of an unreadable image."""
        return decoded(images, self.preprocessing.pixels, batch_size)

    def features_of(self, pixels: list[Tensor]) -> Tensor:
        """Features of B images, (3, S, S) in [0, 1] each -> float32 (B, D), on the CPU."""
        return self._run(pixels, lambda x: features(self.network, x))

    def probabilities_of(self, pixels: list[Tensor]) -> Tensor:
        """Probabilities for B images, (3, S, S) in [0, 1] each -> float32 (B, C), on the CPU."""
        return self._run(pixels, lambda x: self.network(x).float().softmax(1))

    def attention_of(self, pixels: list[Tensor], block: int = -1) -> Tensor:
        """Attention maps of B images, (3, S, S) in [0, 1] each -> float32 (B, heads, G, G), on the CPU."""
        layer = self._attention_layer(block)

        def maps(x: Tensor) -> Tensor:
            caught: list[Tensor] = []
            hook = layer.register_forward_pre_hook(lambda module, args: caught.append(args[0]))
            try:
                features(self.network, x)
            finally:
                hook.remove()
            return class_attention(layer, caught[0], self.network.num_prefix_tokens)

        return self._run(pixels, maps)

    @torch.inference_mode()
    def _run(self, pixels: list[Tensor], compute: Callable[[Tensor], Tensor]) -> Tensor:
        x = self.preprocessing.normalize(torch.stack(pixels).to(self.device, non_blocking=True))
        with self.precision.autocast():
            return compute(x).float().cpu().clone()  # a view of the class token would hold all tokens in memory

    def _computed(
        self,
        images: Images,
        compute: Callable[[list[Tensor]], Tensor],
        batch_size: int,
        progress: bool | None,
        verb: str,
    ) -> Iterator[Tensor]:
        return self._batches(as_list(images), self.preprocessing.pixels, compute, batch_size, progress, verb)

    def _attention_layer(self, block: int) -> Attention:
        network = self.network
        if not isinstance(network, VisionTransformer) or not network.has_class_token:
            raise UserError(
                f"{self.source.address}: a {type(network).__name__} without a class token has no attention of one; load a "
                "Vision Transformer with one"
            )
        depth, block = len(network.blocks), whole(block, "block", least=None)
        if not -depth <= block < depth:
            raise UserError(f"block {block}: the network has blocks 0 to {depth - 1}, or -1 to -{depth} from the end")
        layer = network.blocks[block].attn
        if not isinstance(layer, Attention):
            raise UserError(
                f"{self.source.address}: block {block} has a {type(layer).__name__}, whose attention is not that of a "
                "plain Vision Transformer; choose another model"
            )
        return layer


class Detector(Loaded):
    """Mask R-CNN of a detection stage, of either engine."""

    def __init__(self, engine: Engine, classes: Iterable[str], source: Source, device: torch.device) -> None:
        super().__init__(engine.model, classes, source, device)
        self.engine = engine

    @property
    def verbs(self) -> frozenset[str]:
        return frozenset({"detect"})

    def detect(
        self,
        images: Images,
        threshold: float = THRESHOLD,
        batch_size: int = DETECTED_AT_ONCE,
        progress: bool | None = None,
    ) -> list[Detections]:
        """Boxes, masks, labels and scores of each image.

        Args:
            images: as in `Model.embed`, of any size.
            threshold: detections with a lower score are left out; from 0 to 1.

        Raises:
            UserError: `threshold` is not such a number, or another argument is refused as in `Model.embed`.
        """
        threshold = share(threshold, "threshold")
        detections: list[Detections] = []
        for batch in self._batches(as_list(images), as_bytes, self.engine.predict, batch_size, progress, "detect"):
            for one in batch:
                kept = one.scores >= threshold
                labels = [self.classes[i] for i in one.labels[kept].tolist()]
                masks = one.masks[kept] if one.masks is not None else None
                detections.append(Detections(one.boxes[kept].float(), one.scores[kept].float(), labels, masks))
        return detections


def as_bytes(image: ImageLike, name: str) -> Tensor:
    """The pixels of an image as uint8 (3, H, W)."""
    x = read(image, name)
    return x if x.dtype == torch.uint8 else (x.clamp(0, 1) * 255).round().to(torch.uint8)
