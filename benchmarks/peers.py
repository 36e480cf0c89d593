"""9. Ours against what a user would take instead: the same ViT, images and batch with lightly, kornia and torchvision.

    pip install --constraint constraints.txt '.[peers]'
    python -m benchmarks.peers

Each contender has a separate process, and they take turns: an epoch of input alone, then an epoch of input and training
steps. Those that work on one image at a time use as many DataLoader workers as ours has threads, started before the
clock. Memory is the peak of the process above its memory after the imports, plus the unshared memory of its workers. On
a GPU it is the allocator's peak.

    aps, simclr, mae       this project's methods, on batched views; aps at r = 0.25, one sampling a batch
    lightly simclr, mae    lightly's transforms, heads, losses and masking, on timm's ViT, put together as its documentation does
    kornia                 kornia's batched augmentations, then the SimCLR step of lightly
    torchvision            torchvision's transforms on PIL images in workers, then the same step

Crops, flips and colours are those of the CIFAR recipe everywhere, the optimizer is fused AdamW.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from aps.data.load import ArraySplit
from aps.models.encoder import build_encoder
from aps.registry import METHODS
from aps.results import StageJob
from aps.runtime.memory import keep_memory
from aps.runtime.processes import Distributed, processes
from aps.sampling import global_noise
from aps.settings.blocks import DatasetSettings, EncoderSettings, SamplingSettings, ViewSettings
from aps.settings.study import StageSettings
from aps.training.batches import Batches
from aps.training.order import SAMPLING, seeded
from aps.training.pretrain import Trainer
from benchmarks.common import arguments, plot, row, run, seconds, spread, synchronize, write
from benchmarks.step import resident

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
JITTER, SCALE, SIZE, PATCH = (0.4, 0.4, 0.4, 0.1), (0.15, 1.0), 32, 2
HEAD = (512, 128)  # widths of the layers of SimCLR's projector
DECODER = {"decoder_dim": 192, "decoder_depth": 4, "decoder_heads": 3}  # of MAE
OURS = ("aps", "simclr", "mae")
MISSING = [package for package in ("lightly", "kornia") if find_spec(package) is None]
PEERS = {
    "lightly simclr": "simclr",
    "lightly mae": "mae",
    "kornia": "simclr",
    "torchvision": "simclr",
}  # peer -> our method to compare with


@dataclass(frozen=True)
class Setup:
    """What all contenders share."""

    encoder: EncoderSettings
    batch: int
    images: int
    workers: int
    distributed: Distributed

    @property
    def pixels(self) -> np.ndarray:
        return np.random.default_rng(0).integers(0, 256, (self.images, SIZE, SIZE, 3), np.uint8)


class Contender:
    """An epoch's batches on the device, and the training step for a batch."""

    def __init__(self, batches: Callable[[], Iterable[Any]], step: Callable[[Any], Any]) -> None:
        self.batches, self.step = batches, step

    def input(self) -> None:
        for _ in self.batches():
            pass

    def train(self) -> None:
        for batch in self.batches():
            self.step(batch)


# --------------------------------------------------------------------------------------------------
# Ours


def ours(name: str, setup: Setup) -> Contender:
    if setup.distributed.device.type == "cpu":
        keep_memory()
    method, changes = METHODS.load(name), {"simclr": {"projector": HEAD}, "mae": DECODER}.get(name, {})
    pretrain = method.Settings(method=name, batch_size=setup.batch, **changes)
    views = ViewSettings(
        **({"crop_scale": (0.2, 1.0), "color_jitter_prob": 0, "grayscale": 0} if name == "mae" else {})
    )
    settings = StageSettings(
        stage="pretrain", experiment="benchmark", seed=0, dataset=DatasetSettings(name="cifar10"), encoder=setup.encoder,
        sampling=SamplingSettings(samplings=1), views=views, pretrain=pretrain,
    )  # fmt: skip
    device, trainer = setup.distributed.device, Trainer(StageJob(settings, Path(), Path(), Path()), setup.distributed)
    split = ArraySplit(
        torch.from_numpy(setup.pixels).permute(0, 3, 1, 2).contiguous(), torch.zeros(setup.images).long(), ("a",)
    )
    batches = Batches(split, trainer.method.views(), setup.batch, (MEAN, STD), 0, setup.distributed)

    def step(batch: Any) -> None:
        noise = global_noise(setup.batch, device, seeded(0, SAMPLING, 0, device=device))
        for sampled in trainer.method.sample(batch.geometries, noise):
            trainer.step(batch.views, sampled, 1e-4)

    return Contender(lambda: batches.epoch(0), step)


# --------------------------------------------------------------------------------------------------
# Theirs


class Pictures(Dataset):
    """PIL images, each turned into a list of views by a transform."""

    def __init__(self, pixels: np.ndarray, transform: Callable[[Image.Image], list[Tensor]]) -> None:
        self.pixels, self.transform = pixels, transform

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, i: int) -> list[Tensor]:
        return self.transform(Image.fromarray(self.pixels[i]))


def from_workers(
    setup: Setup, transform: Callable[[Image.Image], list[Tensor]]
) -> Callable[[], Iterable[list[Tensor]]]:
    device = setup.distributed.device
    loader = DataLoader(
        Pictures(setup.pixels, transform), setup.batch, shuffle=True, drop_last=True, num_workers=setup.workers,
        persistent_workers=True, pin_memory=device.type == "cuda",
    )  # fmt: skip
    return lambda: ([view.to(device, non_blocking=True) for view in views] for views in loader)


def optimized(
    parameters: Iterable[nn.Parameter], loss: Callable[[Any], Tensor], device: torch.device
) -> Callable[[Any], Any]:
    """A step of AdamW, in the number format that ours has."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.05, fused=True)

    def step(batch: Any) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            value = loss(batch)
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def simclr_step(setup: Setup) -> Callable[[list[Tensor]], Any]:
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead

    device = setup.distributed.device
    backbone = build_encoder(setup.encoder).to(device)  # a timm ViT; with all cells kept, its forward is timm's
    head = SimCLRProjectionHead(backbone.embed_dim, *HEAD).to(device)
    criterion = NTXentLoss(temperature=0.1)

    def loss(views: list[Tensor]) -> Tensor:
        return criterion(*(head(backbone(view)) for view in views))

    return optimized([*backbone.parameters(), *head.parameters()], loss, device)


def lightly_simclr(setup: Setup) -> Contender:
    from lightly.transforms import SimCLRTransform

    brightness, contrast, saturation, hue = JITTER
    transform = SimCLRTransform(
        SIZE, cj_bright=brightness, cj_contrast=contrast, cj_sat=saturation, cj_hue=hue, min_scale=SCALE[0],
        gaussian_blur=0.0, normalize={"mean": list(MEAN), "std": list(STD)},
    )  # fmt: skip
    return Contender(from_workers(setup, transform), simclr_step(setup))


def lightly_mae(setup: Setup) -> Contender:
    from lightly.models import utils
    from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM
    from lightly.transforms import MAETransform

    device = setup.distributed.device
    vit = build_encoder(setup.encoder)
    # lightly adds the position embedding to the class token too, and fixes it
    vit.pos_embed = nn.Parameter(torch.zeros(1, 1 + vit.patch_embed.num_patches, vit.embed_dim))
    vit.no_embed_class = False
    encoder = MaskedVisionTransformerTIMM(vit).to(device)
    decoder = MAEDecoderTIMM(
        num_patches=vit.patch_embed.num_patches, patch_size=PATCH, embed_dim=vit.embed_dim,
        decoder_embed_dim=DECODER["decoder_dim"], decoder_depth=DECODER["decoder_depth"],
        decoder_num_heads=DECODER["decoder_heads"],
    ).to(device)  # fmt: skip
    tokens = encoder.sequence_length

    def loss(views: list[Tensor]) -> Tensor:
        (images,) = views
        keep, mask = utils.random_token_mask((len(images), tokens), mask_ratio=0.75, device=device)
        visible = decoder.embed(encoder.encode(images, idx_keep=keep))
        all_tokens = utils.repeat_token(decoder.mask_token, (len(images), tokens))
        all_tokens = utils.set_at_index(all_tokens, keep, visible.type_as(all_tokens))
        predicted = decoder.predict(utils.get_at_index(decoder.decode(all_tokens), mask))
        target = utils.get_at_index(utils.patchify(images, PATCH), mask - 1)
        return nn.functional.mse_loss(predicted, target)

    transform = MAETransform(SIZE, normalize={"mean": list(MEAN), "std": list(STD)})
    parameters = [p for p in (*encoder.parameters(), *decoder.parameters()) if p.requires_grad]
    return Contender(from_workers(setup, transform), optimized(parameters, loss, device))


def kornia(setup: Setup) -> Contender:
    import kornia.augmentation as K

    device = setup.distributed.device
    images = torch.from_numpy(setup.pixels).permute(0, 3, 1, 2).contiguous().to(device)
    mean, std = (torch.tensor(x, device=device) for x in (MEAN, STD))
    augment = nn.Sequential(
        K.RandomResizedCrop((SIZE, SIZE), scale=SCALE), K.RandomHorizontalFlip(), K.ColorJitter(*JITTER, p=0.8),
        K.RandomGrayscale(p=0.2), K.Normalize(mean, std),
    )  # fmt: skip

    def batches() -> Iterable[list[Tensor]]:
        for rows in torch.randperm(len(images)).split(setup.batch):
            x = images[rows.to(device)].float() / 255
            with torch.no_grad():
                views = [augment(x), augment(x)]
            yield views

    return Contender(batches, simclr_step(setup))


def torchvision(setup: Setup) -> Contender:
    from torchvision.transforms import v2

    view = v2.Compose(
        [
            v2.RandomResizedCrop(SIZE, scale=SCALE), v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(*JITTER)], p=0.8), v2.RandomGrayscale(p=0.2), v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD),
        ]
    )  # fmt: skip
    return Contender(from_workers(setup, lambda image: [view(image), view(image)]), simclr_step(setup))


# --------------------------------------------------------------------------------------------------
# Taking turns


def build(name: str, setup: Setup) -> Contender:
    theirs = {
        "lightly simclr": lightly_simclr,
        "lightly mae": lightly_mae,
        "kornia": kornia,
        "torchvision": torchvision,
    }
    return theirs[name](setup) if name in theirs else ours(name, setup)


def serve(name: str, quick: bool) -> None:
    """A contender's process: for each line `input` or `train`, it prints the seconds of an epoch; then the memory."""
    with processes() as distributed:
        setup = setup_of(quick, distributed)
        import kornia.augmentation  # noqa: F401
        import lightly.loss
        import lightly.models.modules
        import lightly.transforms  # noqa: F401

        before = resident("VmRSS")
        contender = build(name, setup)
        for line in sys.stdin:
            taken = seconds(getattr(contender, line.strip()))
            if distributed.device.type == "cuda":
                torch.cuda.empty_cache()  # the GPU is the next one's
            print(json.dumps(taken), flush=True)
        synchronize()
        peak = resident("VmHWM") - before
        if distributed.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated()
        worker_memory = [child.memory_full_info().uss for child in psutil.Process().children(recursive=True)]
        print(json.dumps(peak + sum(worker_memory)), flush=True)


def setup_of(quick: bool, distributed: Distributed) -> Setup:
    gpu = distributed.device.type == "cuda"
    batch = 4 if quick else 512 if gpu else 32
    encoder = EncoderSettings(arch="tiny", patch_size=PATCH, image_size=SIZE, depth=1 if quick else None)
    return Setup(encoder, batch, (2 if quick else 8) * batch, torch.get_num_threads(), distributed)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if MISSING:
        parser.error(f"{' and '.join(MISSING)} missing; pip install --constraint constraints.txt '.[peers]'")
    if args.serve:
        return serve(args.serve, args.quick)
    names = [name for name in OURS if name in METHODS.names()] + list(PEERS)
    repeats = 2 if args.quick else 5
    running = {name: start(name, args.quick) for name in names}
    taken: dict[str, dict[str, list[float]]] = {what: {name: [] for name in names} for what in ("input", "train")}
    for repeat in range(-1, repeats):
        for what, each in taken.items():
            for name in names[:: 1 if repeat % 2 else -1]:
                time = ask(running[name], what)
                if repeat >= 0:
                    each[name].append(time)
    memory = {name: finish(process) for name, process in running.items()}
    with processes() as distributed:
        setup = setup_of(args.quick, distributed)
    rates = {
        what: {name: spread([setup.images / x for x in each[name]]) for name in names} for what, each in taken.items()
    }
    rows = []
    for what, each in taken.items():
        for peer, counterpart in PEERS.items():
            for method in dict.fromkeys(("aps", counterpart)):
                if method in names and not (method == "aps" and what == "input" and counterpart == "mae"):
                    ratio = spread([b / a for a, b in zip(each[method], each[peer], strict=True)])
                    label = "input alone" if what == "input" else "input and steps"
                    share = f" ({memory[peer] / memory[method]:.3g}x memory)" if what == "train" else ""
                    rows.append(row(f"{label}: {method} against {peer}{share}", ratio))
    chosen = {
        "arch": "tiny", "patch_size": PATCH, "image_size": SIZE, "ratio": 0.25, "batch": setup.batch, "images": setup.images,
        "workers": setup.workers, "repeats": repeats, "projector": HEAD, "decoder": DECODER,
        "peers": {package: version(package) for package in ("lightly", "kornia", "torchvision")},
    }  # fmt: skip
    result = {
        "rows": rows,
        "images_a_second": rates,
        "memory_gib": {n: m / 2**30 for n, m in memory.items()},
        "seconds": taken,
    }
    write("peers", result, chosen, args.out)
    bars = {f"{name}: {memory[name] / 2**30:.2g} GiB": rates["train"][name] for name in names}
    title = f"Pretraining ViT-tiny/{PATCH}, {SIZE} px, B={setup.batch}: images a second, and peak memory"
    plot("peers", bars, "images a second", title, {label for label in bars if label.split(":")[0] in OURS}, args.out)


def start(name: str, quick: bool) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.peers", "--serve", name, *(["--quick"] * quick)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def ask(process: subprocess.Popen[str], what: str) -> float:
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # `answer` says that it has died
        process.stdin.write(what + "\n")
        process.stdin.flush()
    return float(answer(process))


def finish(process: subprocess.Popen[str]) -> int:
    """End a contender's process -> its peak memory in bytes."""
    assert process.stdin is not None
    process.stdin.close()
    peak = int(answer(process))
    process.wait()
    return peak


def answer(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    if not (line := process.stdout.readline()):
        sys.exit(f"a contender has died (status {process.wait()}), so that nothing was measured; what it said is above")
    return line


if __name__ == "__main__":
    run(main)
