"""7. What each choice of the training step is worth: the step with that one choice taken back, against ours.

    python -m benchmarks.choices

The steps take turns in one process, each with a trainer of its own. Above 1 the choice pays. `compile` is the only one
that is off by default: its figure is the compiled step against ours, and the time of its first step is in the JSON file.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from aps.config import EncoderSettings
from aps.errors import UserError
from aps.models.encoder import Encoder, gather_cells
from aps.models.model import APS
from aps.training.distributed import processes
from aps.training.pretrain import Trainer
from benchmarks.common import arguments, plot, row, seconds, spread, write
from benchmarks.study import experiment, inputs, trainer

Step = Callable[[Trainer, tuple[Tensor, ...]], Any]


def step(own: Trainer, tensors: tuple[Tensor, ...]) -> Any:
    return own.step(*tensors, 1e-4)


def separate_attention(own: Trainer) -> Step:
    for block in own.model.encoder.blocks:
        block.attn.fused_attn = False
    return step


def copied_heads(own: Trainer) -> Step:
    fused = F.scaled_dot_product_attention

    def contiguous(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return fused(q.contiguous(), k.contiguous(), v.contiguous(), **options)

    def run(own: Trainer, tensors: tuple[Tensor, ...]) -> Any:
        with patch.object(F, "scaled_dot_product_attention", contiguous):
            return step(own, tensors)

    return run


def channels_last(own: Trainer) -> Step:
    def run(own: Trainer, tensors: tuple[Tensor, ...]) -> Any:
        views = (x.contiguous(memory_format=torch.channels_last) for x in tensors[:2])
        return own.step(*views, *tensors[2:], 1e-4)

    return run


def projected_then_gathered(own: Trainer) -> Step:
    def embed(self: Encoder, images: Tensor, kept: Tensor) -> Tensor:
        x = self.patch_embed.proj(images).flatten(2).mT + self.pos_embed
        return torch.cat([self.cls_token.to(x.dtype).expand(len(x), -1, -1), gather_cells(x, kept)], dim=1)

    own.model.encoder.embed = MethodType(embed, own.model.encoder)  # type: ignore[method-assign]
    return step


def two_passes(own: Trainer) -> Step:
    def forward(self: APS, view1: Tensor, view2: Tensor, kept1: Tensor, kept2: Tensor) -> tuple[Tensor, ...]:
        z1, z2 = self.projector(self.encoder(view1, kept1)), self.projector(self.encoder(view2, kept2))
        return self.predictor(z1), z1, self.predictor(z2), z2

    own.model.forward = MethodType(forward, own.model)  # type: ignore[method-assign]
    return step


def unfused_optimizer(own: Trainer) -> Step:
    settings = own.settings
    own.optimizer = torch.optim.AdamW(
        own.model.parameters(), betas=settings.betas, weight_decay=settings.weight_decay, foreach=True
    )
    return step


CHOICES: dict[str, Callable[[Trainer], Step]] = {
    "attention in separate products": separate_attention,
    "queries, keys, values copied to one block each": copied_heads,
    "views with channels last": channels_last,
    "all patches projected, then gathered": projected_then_gathered,
    "the views through the encoder one by one": two_passes,
    "AdamW by groups of tensors (foreach), not fused": unfused_optimizer,
}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--arch", default="tiny", choices=["tiny", "small", "base"])
    parser.add_argument("--batch-size", type=int)
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
        steps: dict[str, Callable[[], Any]] = {}

        def add(name: str, own: Trainer, run: Step) -> None:
            steps[name] = lambda: run(own, tensors)

        add("ours", trainer(plain, distributed), step)
        for name, take_back in CHOICES.items():
            add(name, own := trainer(plain, distributed), take_back(own))
        try:
            add("compiled", trainer(compiled, distributed), step)
        except UserError as error:
            print(f"  left out: {error}")
        first = {name: seconds(run) for name, run in steps.items()}
        times: dict[str, list[float]] = {name: [] for name in steps}
        for repeat in range(repeats):
            for name in list(steps)[:: -1 if repeat % 2 else 1]:
                times[name].append(seconds(steps[name]))
        precision = own.precision.name
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
    main()
