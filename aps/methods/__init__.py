"""Pretraining methods, one file each, and the contract between a method and the stage that trains it.

A method's file has a class of the file's name, whatever the case and the underscores: `simclr.py` has
`class SimCLR(Method)`, and `pretrain: {method: simclr}` chooses it. The class defines the method's settings, views,
networks and loss, and what happens before and after a step. `aps.training.pretrain` does the rest, and knows no method.
For each batch:

    views       the augmented views of each image that `views()` lists
    sampled     what `sample` draws for them: `steps` draws, one for each optimizer step
    outputs     `forward(networks, views, sampled)`, compiled and on all processes
    loss        `loss(outputs, progress)`, and figures that are averaged and logged with it
    step        gradients, `before_step`, AdamW, `after_step`

Letters: B images of this process, S image side, V views, N cells of a view, D width of the encoder.

Design: planning validates a method's settings, and planning imports no torch. So a method's file imports torch and related
modules from here (`from aps.methods import F, Method, heads, nn, torch`), where they are stand-ins that import the module
when one of its attributes is used; `lazy("timm.layers")` makes another one. Nothing at a file's top level may use them: no
base class, decorator or default value. A file that imports torch as usual works too, but planning a study that uses it
takes as much longer as the import.

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
    """A pretraining method. The defaults suit a method with two views and one step per batch.

    Attributes:
        Settings: the block `pretrain` of a method's experiments; a subclass adds keys.
        Views: the block `views`; a subclass has other default augmentations, or more keys.
        blocks: names of other shared blocks of settings that the method reads.
        evaluated: the name, in `networks`, of the encoder that is saved and evaluated.
        least_images: fewest images in a part of a batch: 2 with BatchNorm, or where images are contrasted.
        drop_path: stochastic depth of the encoder's last block in training, rising linearly from 0 at the first.
    """

    Settings: ClassVar[type[PretrainSettings]] = PretrainSettings
    Views: ClassVar[type[ViewSettings]] = ViewSettings
    blocks: ClassVar[tuple[str, ...]] = ()
    evaluated: ClassVar[str] = "encoder"
    least_images: ClassVar[int] = 1
    drop_path: float = 0.0

    def __init__(self, experiment: ExperimentSettings | StageSettings) -> None:
        """experiment: all blocks of settings; `self.settings` is its block `pretrain`."""
        for ancestor in type(self).__mro__[:-1]:
            settle(sys.modules[ancestor.__module__])
        self.experiment = experiment
        self.settings: Any = experiment.pretrain

    @classmethod
    def check(cls, experiment: ExperimentSettings) -> None:
        """Raises ValueError where the method's settings do not fit the encoder. Planning calls it, so it uses no torch."""

    @property
    def steps(self) -> int:
        """Optimizer steps per loaded batch."""
        return 1

    def views(self) -> Sequence[View]:
        """The views of an image, in order: here two of the encoder's size."""
        from aps.views import View

        size, augmentation = self.experiment.encoder.image_size, self.experiment.views
        return View(size, augmentation, 1), View(size, augmentation, 2)

    def networks(self, encoder: Encoder) -> nn.ModuleDict:
        """All networks, trained or not, by name: `encoder` as given, heads, momentum copies."""
        raise NotImplementedError

    def sample(self, geometries: Sequence[Geometry], noise: Noise) -> Sequence[Sampled]:
        """Draw what a batch needs besides its views -> `steps` draws, each a tuple of tensors (B, ...).

        geometries: of the V views; noise: the only source of randomness, which does not depend on the number of processes.
        """
        return [()] * self.steps

    def forward(self, networks: nn.ModuleDict, views: tuple[Tensor, ...], sampled: Sampled) -> Any:
        """views: V of (B, 3, S, S) -> what `loss` needs: a tensor, or tuples, lists or dictionaries of tensors.

        It runs in the stage's precision, and compiled if the settings say so. It must use every optimized parameter. torch's
        global generator gives the same numbers in every run, and different ones on every process.
        """
        raise NotImplementedError

    def loss(self, outputs: Any, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """outputs: those of `forward`, in at least float32 -> loss, a scalar; figures, scalars without gradient.

        Figures have the same names at every step, and none of the stage's (`aps.training.contract.RESERVED`). The loss is the
        mean over this process's rows. progress: share of the run's steps that are done, in [0, 1).
        """
        raise NotImplementedError

    def parameters(self, networks: nn.ModuleDict) -> Iterable[nn.Parameter] | Iterable[dict[str, Any]]:
        """The parameters that AdamW optimizes, or groups of them, each with an optional `weight_decay` and `lr_scale`."""
        return [p for p in networks.parameters() if p.requires_grad]

    def weight_decay(self, progress: float) -> float:
        """The weight decay of groups that do not set one."""
        return self.settings.weight_decay

    def before_step(self, networks: nn.ModuleDict, progress: float) -> None:
        """Called when gradients are computed, under no_grad: clip them, or remove some."""

    def after_step(self, networks: nn.ModuleDict, progress: float) -> None:
        """Called when the weights have changed, under no_grad: update momentum copies."""

    def state_dict(self) -> dict[str, Any]:
        """The method's state outside of `networks`: tensors, numbers, text, lists, tuples and dictionaries.

        It has to be equal on all processes, because the first one's is saved.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a `state_dict`, whose tensors are on the training's device."""
