"""7. What each choice in the training step gains: the step without that choice, against ours.

    python -m benchmarks.choices

The steps take turns in one process, each with a separate trainer. Above 1, the choice makes the step faster. `compile`
is the only one that is off by default: its ratio is that of the compiled step to ours, and the JSON file has the time
of its first step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aps.errors import UserError
from aps.models.encoder import gather_cells
from aps.ranges import whole_number
from aps.runtime.processes import processes
from aps.settings.blocks import EncoderSettings
from aps.training.pretrain import Trainer
from benchmarks.common import MOST, arguments, plot, row, run, seconds, spread, write
from benchmarks.study import experiment, inputs, make_trainer


def attention(fused: bool, trainer: Trainer) -> None:
    for block in trainer.encoder.blocks:
        block.attn.fused_attn = fused


def copied_heads(trainer: Trainer) -> None:
    fused, forward = F.scaled_dot_product_attention, trainer.method.forward

    def contiguous(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return fused(q.contiguous(), k.contiguous(), v.contiguous(), **options)

    def patched(*given: Any) -> Any:
        with patch.object(F, "scaled_dot_product_attention", contiguous):
            return forward(*given)

    trainer.method.forward = patched  # type: ignore[method-assign,assignment]


def channels_last(trainer: Trainer) -> None:
    forward = trainer.method.forward

    def converted(networks: nn.ModuleDict, views: tuple[Tensor, ...], kept: tuple[Tensor, ...]) -> Any:
        return forward(networks, tuple(x.contiguous(memory_format=torch.channels_last) for x in views), kept)

    trainer.method.forward = converted  # type: ignore[method-assign,assignment]


def projected_then_gathered(trainer: Trainer) -> None:
    encoder = trainer.encoder

    def embed(images: Tensor, kept: Tensor) -> Tensor:
        x = encoder.patch_embed.proj(images).flatten(2).mT + encoder.pos_embed
        return torch.cat([encoder.cls_token.to(x.dtype).expand(len(x), -1, -1), gather_cells(x, kept)], dim=1)

    encoder.embed = embed  # type: ignore[method-assign,assignment]


def two_passes(trainer: Trainer) -> None:
    def forward(networks: Any, views: tuple[Tensor, ...], kept: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        z1, z2 = (networks.projector(networks.encoder(*given)) for given in zip(views, kept, strict=True))
        return networks.predictor(z1), z1, networks.predictor(z2), z2

    trainer.method.forward = forward  # type: ignore[method-assign,assignment]


def unfused_optimizer(trainer: Trainer) -> None:
    settings = trainer.settings
    trainer.optimizer = torch.optim.AdamW(
        trainer.networks.parameters(), betas=settings.betas, weight_decay=settings.weight_decay, foreach=True
    )


SEPARATE, FUSED = "attention in separate products", "attention fused, not in separate products"
COPIED = "queries, keys, values copied to one block each"
CHOICES: dict[str, Callable[[Trainer], None]] = {  # each takes a choice back, in a trainer that it changes
    SEPARATE: partial(attention, False),
    FUSED: partial(attention, True),
    COPIED: copied_heads,
    "views with channels last": channels_last,
    "all patches projected, then gathered": projected_then_gathered,
    "the views through the encoder one by one": two_passes,
    "AdamW by groups of tensors (foreach), not fused": unfused_optimizer,
}


def made(trainer: Trainer) -> dict[str, Callable[[Trainer], None]]:
    """Those of CHOICES that a step has made: its attention is fused, or separate products (`Precision.prepare`)."""
    others = {FUSED} if trainer.encoder.blocks[0].attn.fused_attn else {SEPARATE, COPIED}
    return {name: take_back for name, take_back in CHOICES.items() if name not in others}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--arch", default="tiny", choices=["tiny", "small", "base"])
    parser.add_argument("--batch-size", type=whole_number(1, MOST))
    parser.add_argument("--precision", default="auto")
    args = parser.parse_args()
    batch = args.batch_size or (2 if args.quick else 512 if torch.cuda.is_available() else 64)
    repeats = 2 if args.quick else 7
    encoder = EncoderSettings(arch=args.arch, depth=1 if args.quick else None)
    plain, compiled = (
        experiment(encoder, 0.25, batch, precision=args.precision, compile=given) for given in (False, True)
    )
    with processes() as distributed:
        tensors = inputs(plain, distributed.device)
        trainers = {"ours": make_trainer(plain, distributed)}
        for name, take_back in made(trainers["ours"]).items():
            trainers[name] = make_trainer(plain, distributed)
            take_back(trainers[name])
        try:
            trainers["compiled"] = make_trainer(compiled, distributed)
        except UserError as error:
            print(f"  left out: {error}")
        steps = {name: partial(trainer.step, *tensors, 1e-4) for name, trainer in trainers.items()}
        first = {name: seconds(run) for name, run in steps.items()}
        times: dict[str, list[float]] = {name: [] for name in steps}
        for repeat in range(repeats):
            for name in list(steps)[:: -1 if repeat % 2 else 1]:
                times[name].append(seconds(steps[name]))
        precision = trainers["ours"].precision.name
    ratios = {
        name: spread([other / ours for ours, other in zip(times["ours"], taken, strict=True)])
        for name, taken in times.items()
        if name != "ours"
    }
    result = {
        "rows": [row(name, ratio) for name, ratio in ratios.items()], "first_step_seconds": first,
        "time": {name: spread(taken) for name, taken in times.items()}, "seconds": times,
    }  # fmt: skip
    settings = {"arch": args.arch, "patch_size": 2, "image_size": 32, "ratio": 0.25, "batch": batch, "repeats": repeats,
                "precision": precision}  # fmt: skip
    name = "choices" if args.arch == "tiny" else f"choices-{args.arch}"
    write(name, result, settings, args.out)
    title = f"Step of ViT-{args.arch}/2 with one choice taken back, r=0.25, B={batch}, {precision}"
    plot(name, {"ours": spread([1.0])} | ratios, "time, ours = 1", title, {"ours"}, args.out)


if __name__ == "__main__":
    run(main)
