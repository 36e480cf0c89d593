"""DINO: Emerging Properties in Self-Supervised Vision Transformers, arXiv 2104.14294 (section 3, algorithm 1).

The student learns to give, for any crop of an image, the distribution over K prototypes that the teacher gives for another,
large crop. The teacher is a moving average of the student. Two operations that balance each other keep the outputs from
collapsing: the teacher's outputs are centred by their running mean, and sharpened by a low temperature.

Two large crops pass both networks, several small ones the student alone, with an interpolated position embedding. The
teacher is evaluated, as in the paper.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from aps.methods import F, Method, Sampled, collectives, lazy, nn, torch
from aps.settings.base import (
    Natural,
    NonNegative,
    Plural,
    Positive,
    PositiveFloat,
    Probability,
    Share,
    Side,
    Temperature,
    WeightDecay,
    check_range,
)
from aps.settings.blocks import PretrainSettings, ViewSettings
from aps.settings.study import ExperimentSettings

if TYPE_CHECKING:
    import timm.layers as layers
    from torch import Tensor

    from aps.models.encoder import Encoder
    from aps.views import View
else:
    layers = lazy("timm.layers")


class DINO(Method):
    class Settings(PretrainSettings):
        epochs: Positive = Field(300, description="E; tables 6 to 8")
        batch_size: Positive = Field(1024, description="B, over all processes; section 3.2")
        lr: PositiveFloat = Field(5e-4, description="of a batch of 256; section 3.2")
        warmup_epochs: Natural = Field(10, description="of the learning rate; section 3.2")
        schedule: Literal["release", "cosine"] = Field("cosine", description="section 3.2")
        weight_decay: WeightDecay = Field(
            0.04, description="AdamW's at the start, but for biases and norms; section 3.2"
        )
        final_weight_decay: WeightDecay = Field(0.4, description="at the end, along a cosine; section 3.2")
        momentum: Share = Field(0.996, description="of the teacher, rising to 1 as a cosine; section 3.1")
        temperature: Temperature = Field(0.1, description="the student's; section 3.2")
        teacher_temperature: tuple[Temperature, Temperature] = Field(
            (0.04, 0.07), description="[first, last], the teacher's, rising linearly; section 3.2"
        )
        teacher_warmup_epochs: Natural = Field(30, description="of the teacher's temperature; section 3.2")
        center_momentum: Share = Field(0.9, description="of the centre of the teacher's outputs; table 13")
        head: tuple[Positive, Positive, Plural] = Field(
            (2048, 2048, 256), description="widths of the layers before the prototypes; section 3.1, appendix C"
        )
        prototypes: Plural = Field(65536, description="K; appendix C")
        frozen_epochs: Natural = Field(1, description="in which the prototypes stay as they were drawn; the release's")
        clip_grad: NonNegative = Field(
            3.0, description="largest norm of each parameter's gradient; 0: any; the release's"
        )
        drop_path: Share = Field(0.1, description="the student's stochastic depth, linear from 0; the release's")

    class Views(ViewSettings):
        crop_scale: tuple[PositiveFloat, PositiveFloat] = Field(
            (0.4, 1.0), description="[low, high] share of the image's area in a large crop; the release's"
        )
        local_crops: Natural = Field(8, description="small crops of each image; the release's")
        local_scale: tuple[PositiveFloat, PositiveFloat] = Field(
            (0.05, 0.4), description="[low, high] share of the image's area in a small crop; the release's"
        )
        local_size: Side | None = Field(
            None,
            description="side of a small crop, pixels; null: the multiple of P nearest to 3/7 of S, the paper's 96 of 224",
        )
        local_blur: Probability = Field(
            0.0, description="probability in small crops (the release's at 224 pixels: 0.5)"
        )

        @model_validator(mode="after")
        def _check_local(self) -> DINO.Views:
            check_range("local_scale", self.local_scale)
            if self.local_scale[1] > 1:
                raise ValueError(f"local_scale is a share of the image's area: {self.local_scale[1]} is above 1")
            return self

    evaluated = "teacher"

    def __init__(self, experiment: Any) -> None:
        super().__init__(experiment)
        self.drop_path = self.settings.drop_path
        self.center = torch.zeros(self.settings.prototypes)
        self.means: list[Tensor] = []  # (K,) of the teacher's outputs for each part of the step's batch

    @classmethod
    def check(cls, experiment: ExperimentSettings) -> None:
        views: Any = experiment.views
        size, patch = views.local_size, experiment.encoder.patch_size
        if size is not None and size % patch:
            raise ValueError(f"views.local_size {size} is not a multiple of encoder.patch_size {patch}; change either")

    def views(self) -> Sequence[View]:
        large = list(super().views())
        views: Any = self.experiment.views
        patch = self.experiment.encoder.patch_size
        size = views.local_size or max(1, round(self.experiment.encoder.image_size * 3 / 7 / patch)) * patch
        local = {"crop_scale": views.local_scale, "blur": 2 * (views.local_blur,), "solarize": (0.0, 0.0)}
        small = large[0]._replace(size=size, augmentation=views.model_copy(update=local))
        return large + views.local_crops * [small]

    def networks(self, encoder: Encoder) -> nn.ModuleDict:
        encoder.any_size = True
        widths = (encoder.embed_dim, *self.settings.head)
        head: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            linear = nn.Linear(inputs, outputs)
            nn.init.trunc_normal_(linear.weight, std=0.02)  # the release's
            nn.init.zeros_(linear.bias)
            head += [linear, nn.GELU()]
        student = nn.ModuleDict({"encoder": encoder, "head": nn.Sequential(*head[:-1])})
        student["prototypes"] = nn.Linear(widths[-1], self.settings.prototypes, bias=False)
        teacher = copy.deepcopy(student).requires_grad_(False)
        for module in teacher["encoder"].modules():
            if isinstance(module, layers.DropPath):
                module.drop_prob = 0.0
        teacher_networks = {
            "teacher": teacher["encoder"],
            "teacher_head": teacher["head"],
            "teacher_prototypes": teacher["prototypes"],
        }
        return nn.ModuleDict({**student, **teacher_networks})

    def forward(self, networks: nn.ModuleDict, views: tuple[Tensor, ...], sampled: Sampled) -> tuple[Tensor, Tensor]:
        """-> outputs before the softmax: of the student (V, B, K) for every crop, of the teacher (2, B, K) for large ones."""
        large, small, V, B = torch.cat(views[:2]), views[2:], len(views), len(views[0])
        features = networks["encoder"](large)
        if small:
            features = torch.cat([features, networks["encoder"](torch.cat(small))])
        student = scores(networks["head"](features), networks["prototypes"])
        with torch.no_grad():
            features = networks["teacher"](large)
            teacher = scores(networks["teacher_head"](features), networks["teacher_prototypes"])
        return student.view(V, B, -1), teacher.view(2, B, -1)

    def loss(self, outputs: tuple[Tensor, Tensor], progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        student, teacher = outputs
        s, self.center = self.settings, self.center.to(teacher.device)
        first, last = s.teacher_temperature
        warm = min(1.0, progress * s.epochs / s.teacher_warmup_epochs) if s.teacher_warmup_epochs else 1.0
        targets = ((teacher - self.center) / (first + (last - first) * warm)).softmax(-1)
        loss = cross_entropy_of_crops(student / s.temperature, targets)
        with torch.no_grad():
            self.means.append(teacher.mean((0, 1)))
            entropy = -(targets * targets.clamp(min=1e-12).log()).sum(-1).mean()  # 0 or log K means a collapse
        return loss, {"teacher_entropy": entropy}

    def parameters(self, networks: nn.ModuleDict) -> Iterable[dict[str, Any]]:
        trained = [p for p in networks.parameters() if p.requires_grad]
        decayed = [p for p in trained if p.ndim > 1]  # as in the release: no decay of biases and norms
        return [{"params": decayed}, {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}]

    def weight_decay(self, progress: float) -> float:
        first, last = self.settings.weight_decay, self.settings.final_weight_decay
        return last + (first - last) * (1 + math.cos(math.pi * progress)) / 2

    def before_step(self, networks: nn.ModuleDict, progress: float) -> None:
        if self.settings.clip_grad:
            for p in networks.parameters():
                if p.grad is not None:
                    p.grad.mul_((self.settings.clip_grad / (p.grad.norm() + 1e-6)).clamp(max=1.0))
        if progress * self.settings.epochs < self.settings.frozen_epochs:
            networks["prototypes"].weight.grad = None

    def after_step(self, networks: nn.ModuleDict, progress: float) -> None:
        momentum = 1 - (1 - self.settings.momentum) * (1 + math.cos(math.pi * progress)) / 2
        pairs = {"teacher": "encoder", "teacher_head": "head", "teacher_prototypes": "prototypes"}
        for teacher, student in pairs.items():
            mean: list[Tensor] = list(networks[teacher].parameters())
            new: list[Tensor] = list(networks[student].parameters())
            torch._foreach_lerp_(mean, new, 1 - momentum)
        whole = collectives.mean(torch.stack(self.means).mean(0))  # once a step, however the batch is cut
        self.center = self.center.lerp(whole, 1 - self.settings.center_momentum)
        self.means.clear()

    def state_dict(self) -> dict[str, Any]:
        return {"center": self.center}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.center = state["center"]


def scores(x: Tensor, prototypes: nn.Module) -> Tensor:
    """x: (B, d) -> (B, K), its cosines with the prototypes, as by weight normalization with lengths fixed at 1."""
    weight: Any = prototypes.weight
    return F.linear(F.normalize(x, dim=-1), F.normalize(weight, dim=-1))


def cross_entropy_of_crops(student: Tensor, targets: Tensor) -> Tensor:
    """Equation 3: the mean, over images and all pairs of different crops, of -sum of target log softmax(student).

    student: (V, B, K), divided by its temperature; targets: (2, B, K), distributions -> scalar. Crops 0 and 1 are the large
    ones.
    """
    (V, B, _), teachers = student.shape, len(targets)
    losses = -torch.einsum("tbk,vbk->tv", targets, student.log_softmax(-1)) / B
    same = torch.eye(teachers, V, dtype=torch.bool, device=losses.device)
    return losses.masked_fill(same, 0).sum() / (teachers * (V - 1))
