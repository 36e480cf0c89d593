"""5. Linear probing: many heads in one pass over the features, against one head after the other.

    python -m benchmarks.probe

Both run the stage on the digits: one run with all learning rates, against a run for each.
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from pathlib import Path

import torch

from aps.data.prepare import prepare
from aps.models.encoder import build_encoder
from aps.models.weights import save_encoder
from aps.results import StageJob
from aps.settings.blocks import DatasetSettings, EncoderSettings, LinearProbeSettings, SourceSettings
from aps.settings.study import StageSettings
from aps.training import linear_probe
from benchmarks.common import arguments, compare, plot, row, run, write


def main() -> None:
    args = arguments(__doc__).parse_args()
    os.environ["MLFLOW_TRACKING_URI"] = "none"
    encoder = EncoderSettings(arch="micro", depth=1 if args.quick else None, image_size=16, patch_size=2)
    lrs = LinearProbeSettings().lrs[: 2 if args.quick else None]
    images, epochs = (300, 1) if args.quick else (1438, 3)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            prepare("digits", folder / "digits", SourceSettings())
        torch.manual_seed(0)
        save_encoder(build_encoder(encoder), encoder, folder / "encoder.safetensors")

        def probe(*chosen: float) -> None:
            settings = StageSettings(
                stage="linear_probe", experiment="benchmark", seed=0, encoder=encoder,
                dataset=DatasetSettings(name="digits", train_limit=images),
                linear_probe=LinearProbeSettings(epochs=epochs, lrs=chosen),
            )  # fmt: skip
            with tempfile.TemporaryDirectory(dir=folder) as run, contextlib.redirect_stderr(io.StringIO()):
                linear_probe.run(
                    StageJob(
                        settings, folder / "digits" / "manifest.json", Path(run) / "out", Path(run) / "checkpoints",
                        folder / "encoder.safetensors",
                    )
                )  # fmt: skip

        def one_after_the_other() -> None:
            for lr in lrs:
                probe(lr)

        timings = compare(lambda: probe(*lrs), one_after_the_other, repeats=2 if args.quick else 3, warmup=1)
    rows = [row(f"linear probe, {len(lrs)} learning rates at once", timings["ratio"])]
    settings = {"heads": len(lrs), "encoder": encoder.model_dump(), "images": images, "epochs": epochs, "batch": 256}
    write("probe", {"rows": rows, **timings}, settings, args.out)
    bars = {f"ours: {len(lrs)} heads, one pass": timings["ours"], "ordinary: one after the other": timings["ordinary"]}
    plot("probe", bars, "seconds", f"Linear probe of {len(lrs)} learning rates, ViT-micro, digits", {next(iter(bars))},
         args.out)  # fmt: skip


if __name__ == "__main__":
    run(main)
