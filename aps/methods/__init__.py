"""Pretraining methods, one file each, and the contract between a method and the stage that trains it.

A method's file has a class of the file's name, whatever the case: `simclr.py` has `class SimCLR(Method)`, and
`pretrain: {method: simclr}` chooses it. The class says what is the method's own: its settings, views, networks, loss, and
what happens around a step. `aps.training.pretrain` does the rest, and knows no method. For each batch:

    views       what `views()` asks for, augmented, for each image
    sampled     what `sample` draws for them: `steps` draws, one for each optimizer step
    outputs     `forward(networks, views, sampled)`, compiled and over all processes
    loss        `loss(outputs, progress)`, and figures that are averaged and logged beside it
    step        gradients, `before_step`, AdamW, `after_step`

Letters: B images of this process, S image side, V views, N cells of a view, D width of the encoder.

Design: planning validates a method's settings, and planning imports no torch. So a method's file takes torch and its
relatives from here (`from aps.methods import F, Method, heads, nn, torch`), where they are stand-ins that import the module
when one of its attributes is used; for anything else there is `lazy("timm.layers")`. Nothing at a file's top level may
use them: no base class, decorator or default value. A file that imports torch as usual works too; planning a study that
uses it then takes the seconds that the import takes.

The contract does not know optimizers, precision, processes, checkpoints or files.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from aps.methods._lazy import lazy, settle
from aps.settings.blocks import PretrainSettings, ViewSettings
from aps.settings.study import ExperimentSettings, StageSettings

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn

    from aps.models import heads
    from aps.models.encoder import Encoder
    from aps.runtime import collectives
    from aps.sampling import Geometry, Noise
    from aps.views import View
else:
    torch, nn, F = lazy("torch"), lazy("torch.nn"), lazy("torch.nn.functional")
    heads, collectives = lazy("aps.models.heads"), lazy("aps.runtime.collectives")

__all__ = ["F", "Method", "collectives", "heads", "lazy", "nn", "torch"]

Sampled = tuple["Tensor", ...]  # of one optimizer step, each (B, ...)


class Method:
    """A pretraining method. Defaults are those of a method that looks at two views once.

    Attributes:
        Settings: the block `pretrain` of a method's experiments; its own keys are a subclass's.
        Views: the block `views`; a subclass has other default augmentations, or more keys.
        blocks: names of other shared blocks of settings that the method reads.
        evaluated: the name among `networks` of the encoder that is saved and evaluated.
        least_images: that a part of a batch needs: 2 where it has BatchNorm or contrasts images with each other.
        drop_path: stochastic depth of the encoder's last block in training, rising linearly from 0 at the first.
    """

    Settings: ClassVar[type[PretrainSettings]] = PretrainSettings
    Views: ClassVar[type[ViewSettings]] = ViewSettings
    blocks: ClassVar[tuple[str, ...]] = ()
    evaluated: ClassVar[str] = "encoder"
    least_images: ClassVar[int] = 1
    drop_path: float = 0.0

    def __init__(self, experiment: ExperimentSettings | StageSettings) -> None:
        """experiment: all blocks; `self.settings` is the method's own."""
        for ancestor in type(self).__mro__[:-1]:
            settle(sys.modules[ancestor.__module__])
        self.experiment = experiment
        self.settings: Any = experiment.pretrain

    @classmethod
    def check(cls, experiment: ExperimentSettings) -> None:
        """Raises ValueError where the method's settings do not fit the encoder; planning calls it, so without torch."""

    @property
    def steps(self) -> int:
        """Optimizer steps of one loaded batch."""
        return 1

    def views(self) -> Sequence[View]:
        """The views of an image, in order: here two of the encoder's size."""
        from aps.views import View

        size, augmentation = self.experiment.encoder.image_size, self.experiment.views
        return View(size, augmentation, 1), View(size, augmentation, 2)

    def networks(self, encoder: Encoder) -> nn.ModuleDict:
        """All that is trained or kept, by name: `encoder` as given, heads, momentum copies."""
        raise NotImplementedError

    def sample(self, geometries: Sequence[Geometry], noise: Noise) -> Sequence[Sampled]:
        """What is drawn for a batch beside its views -> `steps` draws, each a tuple of tensors (B, ...).

        geometries: of the V views; noise: the only source of chance, which does not depend on the number of processes.
        """
        return [()] * self.steps

    def forward(self, networks: nn.ModuleDict, views: tuple[Tensor, ...], sampled: Sampled) -> Any:
        """views: V of (B, 3, S, S) -> what `loss` needs: a tensor, or tuples, lists or dictionaries of them.

        Runs in the stage's precision, compiled where the settings say so. Every parameter that is optimized must take
        part. What the global generator gives is the same in every run, and another one on every process.
        """
        raise NotImplementedError

    def loss(self, outputs: Any, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """outputs: `forward`'s, in at least float32 -> loss, a scalar; figures, scalars without gradient.

        The loss is the mean over this process's rows. progress: share of the run's steps that are done, in [0, 1).
        """
        raise NotImplementedError

    def parameters(self, networks: nn.ModuleDict) -> Iterable[nn.Parameter] | Iterable[dict[str, Any]]:
        """What AdamW optimizes: parameters, or groups of them, each with a `weight_decay` or an `lr_scale` of its own."""
        return [p for p in networks.parameters() if p.requires_grad]

    def weight_decay(self, progress: float) -> float:
        """Of the groups that have none of their own."""
        return self.settings.weight_decay

    def before_step(self, networks: nn.ModuleDict, progress: float) -> None:
        """After the gradients are there: clip them, or take some away. Without gradients of its own."""

    def after_step(self, networks: nn.ModuleDict, progress: float) -> None:
        """After the weights have changed: momentum copies follow. Without gradients."""

    def state_dict(self) -> dict[str, Any]:
        """What the method keeps from step to step outside of `networks`: tensors and plain data."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """state: of `state_dict`, on the training's device."""
