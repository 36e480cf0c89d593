"""The hot loop asks the device for nothing between two log lines: on a GPU each such question would make the host wait.

Here without a GPU: an operation whose result the host needs (`item`, `nonzero`, a boolean index) is refused while a batch
is sampled, trained on and counted; views are made of images on the meta device, which have no values to ask for; and
every loop runs on a GPU that is not there, where tensors of two devices and copies that wait are refused too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fake_gpu import DEVICE, fake_gpu
from small import OWN, job
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from aps.registry import METHODS
from aps.runtime.processes import Distributed
from aps.settings.blocks import ViewSettings
from aps.training.finetune import Finetuning
from aps.training.linear_probe import Probing
from aps.training.pace import Pace
from aps.training.pretrain import Pretraining
from aps.views import apply_crops, apply_view, draw_parameters

ASKS = {"_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "unique_consecutive", "_unique2"}


class Refuse(TorchDispatchMode):
    """Raises where the host asks a tensor for its values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        if name in ASKS or any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in indices):
            raise AssertionError(f"{func} makes the host wait for the device")
        return func(*args, **(kwargs or {}))


class RefuseLists(TorchFunctionMode):
    """`tolist` passes by what `Refuse` sees."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.tolist:
            raise AssertionError("tolist makes the host wait for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", METHODS.names())
def test_a_batch_of_pretraining_is_sampled_trained_on_and_counted_without_waiting(
    method: str, digits: Path, tmp_path: Path
) -> None:
    own = {} if method in OWN else {"method": method}
    learner = Pretraining(job("pretrain", digits, tmp_path, method, **own), Distributed(0, 1, torch.device("cpu")))
    learner.watch.active = False  # on a CPU it looks at each loss, which waits for nobody; on a GPU see test_watch.py
    for done, batch in enumerate(learner.batches(0, 0)):
        with Refuse(), RefuseLists():
            learner.step(batch, done)
    assert learner.meter.read()["loss"] > 0


def test_the_refusal_sees_what_waits() -> None:
    x = torch.ones(3)
    for ask in (
        lambda: x.sum().item(),
        lambda: float(x[0]),
        lambda: bool(x[0] > 0),
        lambda: x[x > 0],
        lambda: x.tolist(),
    ):
        with pytest.raises(AssertionError, match="wait"), Refuse(), RefuseLists():
            ask()


@pytest.mark.parametrize("files", [False, True])
def test_views_ask_nothing_of_the_images(files: bool) -> None:
    augmentation = ViewSettings(blur=(0.5, 0.5), solarize=(0.5, 0.5))
    parameters = draw_parameters(1, 8, 32, 32, augmentation, torch.Generator().manual_seed(0))
    images = torch.empty(8, 3, 32, 32, dtype=torch.uint8, device="meta")
    mean, std = (0.5,) * 3, (0.25,) * 3
    made = apply_crops(images, parameters, mean, std) if files else apply_view(images, parameters, 32, mean, std)
    assert made.shape == (8, 3, 32, 32) and made.is_meta


LOOPS: dict[str, tuple[Any, dict[str, Any]]] = {
    "pretrain": (Pretraining, {"method": "aps"}),
    "pretrain, many views": (Pretraining, {"method": "dino"}),
    "finetune": (Finetuning, {"erasing": 0.5, "clip_grad": 1.0}),
    "finetune, crops": (Finetuning, {"crop": "resized", "rand_augment": None, "mixup": 0.0, "cutmix": 0.0, "ema": 0.0}),
    "linear_probe": (Probing, {}),
}


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_on_a_gpu_mixes_no_devices_and_copies_without_waiting(
    name: str, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner_of, changes = LOOPS[name]
    monkeypatch.setattr(Pace, "_count", lambda *_: 1.0)  # counts on fake tensors of its own
    with fake_gpu(monkeypatch) as gpu:
        learner = learner_of(job(name.split(",")[0], digits, tmp_path, **changes), Distributed(0, 1, DEVICE))
        batches = (learner.data.epoch if learner_of is Pretraining else learner.batches)(0, 0)
        for done in range(2):
            gpu.refuses = done > 0  # the first batch of an epoch may wait for the epoch's order
            learner.step(next(batches), done)


@pytest.mark.parametrize("crop", ["pad", "resized"])
def test_images_that_workers_decoded_are_sent_from_pinned_memory(
    crop: str, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fake_gpu(monkeypatch) as gpu:
        examples: Any = Finetuning(job("finetune", digits, tmp_path, crop=crop), Distributed(0, 1, DEVICE)).examples
        decoded = (torch.zeros(32, 3, 16, 16, dtype=torch.uint8).pin_memory() for _ in range(9))
        examples._array = None
        rows = examples._order.epoch(0).to(DEVICE)
        gpu.refuses = True
        made = list(examples._augmented(0, range(2), rows[:2], decoded))
    assert [x.images.shape for x in made] == [(32, 3, 16, 16)] * 2


def test_the_fake_gpu_refuses_what_waits_and_what_mixes(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_gpu(monkeypatch) as gpu:
        x, gpu.refuses = torch.ones(3, device=DEVICE), True
        x.add_(torch.ones(3).pin_memory().to(DEVICE, non_blocking=True))
        for wait in (
            lambda: torch.tensor([1.0], device=DEVICE),
            lambda: torch.ones(3).to(DEVICE, non_blocking=True),
            lambda: torch.cat([torch.ones(3).pin_memory()]).to(DEVICE, non_blocking=True),
            lambda: torch.ones(3).pin_memory().to(DEVICE),
            lambda: x.cpu(),
            lambda: x[torch.tensor([0])],
        ):
            with pytest.raises(AssertionError, match="wait"):
                wait()
        with pytest.raises(RuntimeError):
            x + torch.ones(3)
        with pytest.raises(RuntimeError):
            x.sum().item()
