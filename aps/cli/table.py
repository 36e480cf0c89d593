"""The table of verbs, and the argument parser made from it.

A new tool is a row here, its options in options.py and its function in verbs.py. Stages come from `aps.stages`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from aps import __version__
from aps.cli import options, verbs
from aps.cli.stage import stage_verb
from aps.inference import verbs as inference
from aps.stages import STAGES


class Verb(NamedTuple):
    """One verb. Its help starts with a small letter and has no full stop."""

    name: str
    run: Callable[[argparse.Namespace], None]
    help: str
    options: tuple[Callable[[argparse.ArgumentParser], None], ...]  # each adds some


MORE_OPTIONS = {"embed": (inference.add_embed,)}  # of stages; this one also takes images without a study
VERBS = (
    Verb("init", verbs.init,
         "lay out a folder: a study, a Snakefile that includes the packaged workflow, profiles, a README",
         (options.init,)),
    Verb("run", verbs.run,
         "run the study in this folder, or one named by --configfile: Snakemake with the right arguments",
         (options.run,)),
    Verb("data", verbs.data, "prepare a dataset: fetch or find it, verify it, write its manifest",
         (options.data, options.study, options.attempt)),
    *(Verb(row.name, stage_verb(row.name), row.help, (options.stage, *MORE_OPTIONS.get(row.name, ())))
      for row in STAGES.values()),
    Verb("import-weights", verbs.import_weights,
         "turn a checkpoint of the authors' release into weights of this project",
         (options.import_weights,)),
)  # fmt: skip
# The verbs that use an encoder are listed between these (aps/inference/verbs.py).
MORE_VERBS = (
    Verb("show-views", verbs.show_views, "draw images of a dataset with their views, kept cells and coverage",
         (options.show_views, options.study)),
    Verb("report", verbs.report, "tables and figures over the finished runs of a study",
         (options.report, options.study, options.attempt)),
    Verb("results", verbs.results, "print the table of a study's finished runs, where they lie and how to browse them",
         (options.study,)),
    Verb("status", verbs.status, "what is done, running, queued, failed or outdated of a study, while it runs too",
         (options.status, options.study)),
    Verb("compare", verbs.compare,
         "print what finished runs differ in: settings, data, what made them, cost and scores",
         (options.compare,)),
    Verb("ui", verbs.ui,
         "show a study's runs in MLflow: start its server where there is none, and print the page's address",
         (options.ui, options.study)),
    Verb("check", verbs.check, "validate a study and list what it would run",
         (options.study,)),
    Verb("estimate", verbs.estimate, "operations, GPU hours, memory and disk of every stage of a study, before it runs",
         (options.estimate, options.study)),
    Verb("gc", verbs.gc,
         "list saved runs and results that no study of the given files needs, and delete them when told to",
         (options.gc,)),
    Verb("sync", verbs.sync, "send MLflow what it missed of finished runs",
         (options.study,)),
)  # fmt: skip


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="aps" if Path(sys.argv[0]).name == "aps" else "python -m aps",
        description="Asymmetric Patch Sampling: every stage of the pipeline, and its tools.",
        epilog="The whole DAG: snakemake all. One verb's options: python -m aps VERB --help.",
    )
    top.add_argument("--version", action="version", version=f"aps {__version__}")
    subparsers = top.add_subparsers(metavar="VERB", required=True, title="verbs")

    def add(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        verb_parser = subparsers.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        verb_parser.set_defaults(run=run, verb=name)
        return verb_parser

    def add_all(rows: tuple[Verb, ...]) -> None:
        for row in rows:
            verb_parser = add(row.name, row.run, row.help)
            for add_options in row.options:
                add_options(verb_parser)

    add_all(VERBS)
    inference.add(add)
    add_all(MORE_VERBS)
    return top


def parse(arguments: list[str]) -> argparse.Namespace:
    """The parsed command; `run` is the function of its verb."""
    top = parser()
    if arguments[:1] == ["run"] and arguments[1:2] not in (["-h"], ["--help"]):  # whatever follows is Snakemake's
        args = top.parse_args(["run"])
        args.arguments = arguments[1:]
        return args
    args, rest = top.parse_known_args(arguments)
    if isinstance(getattr(args, "images", None), list) and not any(text.startswith("-") for text in rest):
        args.images += rest  # argparse stops collecting optional positionals at the first option
    elif rest:
        top.parse_args(arguments)  # refuses them
    return args
