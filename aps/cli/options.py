"""The options of each verb: a function adds those of the verb of its name; `study`, `attempt`, `stage` are shared."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from aps.cli.completion import experiments
from aps.cli.study import DEFAULT_STUDY
from aps.ranges import whole_number
from aps.stages import STAGES

LARGEST_SEED = 2**64 - 1

# --------------------------------------------------------------------------------------------------
# A type of values.


def minutes(text: str) -> float:
    """The type of an option that is a finite number of minutes, 0 or more."""
    try:
        if 0 <= (value := float(text)) < math.inf:
            return value
    except ValueError:
        pass
    from aps.settings.sentences import shown

    raise argparse.ArgumentTypeError(f"{shown(text)} is no number of minutes from 0; give one, for example 10")


class AddUp(argparse.Action):
    """Values of an option that is given again are added, in place of the default (argparse's `extend` would keep that)."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, [*([] if before is self.default else before), *values])


# --------------------------------------------------------------------------------------------------
# Options that several verbs share.


def study(p: argparse._ActionsContainer) -> None:
    p.add_argument(
        "--configfile",
        nargs="*",
        action=AddUp,
        default=[DEFAULT_STUDY],
        metavar="YAML",
        help=f"study (default: {DEFAULT_STUDY})",
    )
    p.add_argument(
        "--set",
        nargs="+",
        action=AddUp,
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="lay settings over the study",
    )


def attempt(p: argparse._ActionsContainer) -> None:
    p.add_argument(
        "--attempt",
        type=whole_number(1, 1_000_000),
        default=1,
        help="of this job, as Snakemake counts; rules give it (default: 1)",
    )
    p.add_argument(
        "--mistake", type=Path, metavar="FILE",
        help="where exit status 2 is noted, so that a further attempt fails at once with the same sentence (rules give it)",
    )  # fmt: skip


def stage(p: argparse.ArgumentParser) -> None:
    people = p.add_argument_group("which run (people)")
    study(people)
    one = people.add_argument("--experiment", help="an experiment of the study (default: its first)")
    one.completer = experiments  # type: ignore[attr-defined]
    people.add_argument(
        "--seed", type=whole_number(0, LARGEST_SEED), help="one of the experiment's seeds (default: its first)"
    )
    rules = p.add_argument_group("which run (rules give all of it)")
    rules.add_argument("--settings", metavar="JSON", help="resolved settings of the stage, instead of a study")
    rules.add_argument("--study", help="name under which MLflow groups the runs, beside --settings (default: study)")
    rules.add_argument("--results", type=Path, help="folder of all results, beside --settings (default: results)")
    rules.add_argument("--tracking", metavar="ADDRESS", help="MLflow's server or store, or none (default: the study's)")
    rules.add_argument("--manifest", type=Path, help="manifest.json of the dataset")
    rules.add_argument("--encoder", type=Path, help="weights to start from (.safetensors)")
    rules.add_argument("--out", type=Path, help="folder for the results")
    attempt(rules)
    execution = p.add_argument_group("how to run it (changes no result)")
    execution.add_argument("--again", action="store_true", help="start afresh, whatever is saved or finished")
    execution.add_argument(
        "--processes",
        type=whole_number(1, 100_000),
        default=1,
        help="over all nodes, one a GPU, by torchrun (default: 1)",
    )
    execution.add_argument(
        "--nodes", type=whole_number(1, 10_000), default=1, help="of this Slurm job, by srun (default: 1)"
    )
    execution.add_argument(
        "--workers",
        type=whole_number(0, 10_000),
        help="image-decoding workers of each process, for image files (default: its cores)",
    )
    execution.add_argument("--checkpoint-minutes", type=minutes, default=10.0, help="between checkpoints (default: 10)")
    traced = ", ".join(row.name for row in STAGES.values() if row.traced)
    execution.add_argument(
        "--profile",
        type=Path,
        metavar="JSON",
        help=f"save a profiler trace of two batches, for ui.perfetto.dev ({traced})",
    )


# --------------------------------------------------------------------------------------------------
# Options of one verb.


def init(p: argparse.ArgumentParser) -> None:
    p.add_argument("folder", type=Path, help="the folder to make")
    p.add_argument("--study", default="demo", help="demo, cifar or own-images (default: demo)")


def run(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "arguments",
        nargs="*",
        metavar="...",
        help="targets and options of Snakemake: -n, --cores, --profile, --configfile; and --set KEY=VALUE",
    )


def data(p: argparse.ArgumentParser) -> None:
    p.add_argument("name", help="a dataset's name; an unknown one lists them")
    p.add_argument("--out", type=Path, help="folder of the prepared dataset (default: its own under results/data)")
    p.add_argument(
        "--source", help="folder with the dataset's archives or unpacked files (default: the study's, or download)"
    )
    p.add_argument("--no-download", action="store_true", help="fail rather than download")
    p.add_argument(
        "--entry", metavar="JSON", help="its entry in a study's `datasets`, instead of a study (rules give it)"
    )
    p.add_argument("--again", action="store_true", help="prepare it again, whatever was prepared before")


def import_weights(p: argparse.ArgumentParser) -> None:
    p.add_argument("checkpoint", type=Path, help="a state dict (.pt, .pth)")
    p.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder for encoder.safetensors and heads.safetensors, or model.safetensors",
    )
    p.add_argument(
        "--attention-heads", type=whole_number(1, 10_000), help="heads of its encoder (default: of width 64)"
    )


def show_views(p: argparse.ArgumentParser) -> None:
    p.add_argument("--out", type=Path, required=True, help="the .png file to write")
    p.add_argument("--images", type=whole_number(1, 10_000), default=5, help="how many (default: 5)")
    one = p.add_argument("--experiment", help="the experiment whose settings to show (default: the study's first)")
    one.completer = experiments  # type: ignore[attr-defined]
    p.add_argument("--manifest", type=Path, help="manifest.json of another dataset than the experiment's")
    p.add_argument(
        "--seed",
        type=whole_number(0, LARGEST_SEED),
        default=0,
        help="of the choice of images and of everything drawn (default: 0)",
    )


def report(p: argparse.ArgumentParser) -> None:
    p.add_argument("--out", type=Path, help="folder of the report (default: results/STUDY/report)")


def status(p: argparse.ArgumentParser) -> None:
    p.add_argument("--picture", type=Path, metavar="FILE", help="draw it: experiments by stages (.svg or .png)")


def compare(p: argparse.ArgumentParser) -> None:
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders results/STUDY/EXPERIMENT/seedN/STAGE")


def ui(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--port", type=whole_number(1, 65_535), default=5000, help="of the server that it starts (default: 5000)"
    )


def estimate(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--gpu",
        default="a100",
        help="kind of GPU, or cpu: cores of this machine; an unknown one lists them (default: a100)",
    )
    p.add_argument(
        "--utilization", type=float, help="share of the GPU's peak that is reached (default: assumed by width)"
    )


def gc(p: argparse.ArgumentParser) -> None:
    p.add_argument("studies", nargs="+", type=Path, metavar="YAML", help="every study that is still needed")
    p.add_argument("--delete", action="store_true", help="delete what is listed")
