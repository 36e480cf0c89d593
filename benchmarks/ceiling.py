"""4. How much of the machine the training step uses: its operations a second against those of one plain matrix product.

    python -m benchmarks.ceiling

The product is one of two square matrices, in the number format of the step and with the same threads. Products and
steps take turns. aps.training.cost counts the operations of the step, without those that are no matrix products: norms,
GELU, softmax, the optimizer.
"""

from __future__ import annotations

import torch

from aps.ranges import whole_number
from aps.runtime.processes import processes
from aps.settings.blocks import EncoderSettings
from aps.training.cost import step_flops
from benchmarks.common import MOST, arguments, plot, row, run, seconds, spread, write
from benchmarks.study import experiment, inputs, make_trainer

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--batch-size", type=whole_number(1, MOST))
    gpu = torch.cuda.is_available()
    half = gpu or torch.backends.cpu.get_cpu_capability() != "AVX2"  # AVX2 computes bf16 in software, for hours
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"] if half else ["fp32"], choices=list(TYPES))
    parser.add_argument("--compile", action="store_true", help="pretrain.compile")
    args = parser.parse_args()
    batch = args.batch_size or (2 if args.quick else 512 if gpu else 128)
    side = 64 if args.quick else 8192 if gpu else 2048
    repeats = 2 if args.quick else 5
    encoder = EncoderSettings(arch="tiny", depth=1 if args.quick else None)
    settings = {"arch": "tiny", "patch_size": 2, "image_size": 32, "ratio": 0.25, "batch": batch, "side": side,
                "compile": args.compile, "repeats": repeats}  # fmt: skip
    with processes() as distributed:
        for precision in args.precision[: 1 if args.quick else None]:
            study = experiment(encoder, 0.25, batch, precision=precision, compile=args.compile)
            flops = step_flops(study)
            trainer, tensors = make_trainer(study, distributed), inputs(study, distributed.device)
            a, b = (torch.randn(side, side, device=distributed.device, dtype=TYPES[precision]) for _ in range(2))
            for _ in range(2):
                trainer.step(*tensors, 1e-4)
                a @ b
            step_rates, product_rates = [], []
            products = max(1, round(flops / (2 * side**3)))  # as long as a step without overhead
            for _ in range(repeats):
                step_rates.append(flops / seconds(lambda trainer=trainer, t=tensors: trainer.step(*t, 1e-4)))  # type: ignore[misc]
                taken = seconds(lambda n=products, a=a, b=b: [a @ b for _ in range(n)])  # type: ignore[misc]
                product_rates.append(products * 2 * side**3 / taken)
            share = spread([100 * x / y for x, y in zip(step_rates, product_rates, strict=True)])
            what = f"step of ViT-tiny/2, B={batch}, {precision}: share of a matrix product's FLOP/s"
            target = 65 if precision == "fp32" and not gpu else None
            result = {
                "rows": [row(what, share, "%", target)], "step_flops_a_second": spread(step_rates),
                "product_flops_a_second": spread(product_rates), "images_a_second": spread([batch * x / flops for x in step_rates]),
                "all": {"step": step_rates, "product": product_rates},
            }  # fmt: skip
            name = f"ceiling-{precision}" + ("-compile" if args.compile else "")
            write(name, result, settings | {"precision": precision}, args.out)
            bars = {
                "step": spread([x / 1e9 for x in step_rates]),
                f"product {side}x{side}": spread([x / 1e9 for x in product_rates]),
            }
            title = f"Training step of ViT-tiny/2, r=0.25, B={batch}, {precision}" + ", compiled" * args.compile
            plot(name, bars, "GFLOP/s", title, {"step"}, args.out)


if __name__ == "__main__":
    run(main)
