"""The study that a command names, and commands in messages that work as printed."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from aps.errors import UserError
from aps.stages import STAGES

if TYPE_CHECKING:  # settings take half of the time that `--help` does
    from aps.settings.study import Study

DEFAULT_STUDY = "config/config.yaml"
ANY_STUDY = " --configfile STUDY.yaml"  # in hints of code that doesn't know the study
STUDY_VERBS = (
    *STAGES,
    "data",
    "sync",
    "results",
    "report",
    "status",
    "check",
    "estimate",
)  # with --configfile and --set


def load(args: argparse.Namespace) -> Study:
    from aps.settings.reading import check_names, load_study, parse_overrides

    check_names(args.configfile, args.overrides)
    return load_study(args.configfile, parse_overrides(args.overrides))


def is_missing(args: argparse.Namespace) -> bool:
    """Whether the command names no study and there is no default one; some verbs can do without."""
    return args.configfile in ([], [DEFAULT_STUDY]) and not args.overrides and not Path(DEFAULT_STUDY).exists()


def tracking_address(study: Study) -> str:
    """The address of MLflow, as it may be shown."""
    from aps.tracking import addresses

    return addresses.tracking_address(study.tracking_uri, study.results)


def study_options(args: argparse.Namespace) -> str:
    """Options by which another verb reads the same study; empty if it is the default one."""
    configfile = f"--configfile {shlex.join(args.configfile)}" if args.configfile != [DEFAULT_STUDY] else ""
    return f"{configfile} --set {shlex.join(args.overrides)}".strip() if args.overrides else configfile


def runnable(text: str, args: argparse.Namespace) -> str:
    """`text`, with this command's study and settings added to the commands in it, so that they work as printed.

    Where the working directory has no Snakefile, `aps run` stands for `snakemake`.
    """
    if getattr(args, "settings", None) is not None:
        return text  # a rule gave the settings
    from aps.workflow.start import SNAKEFILES

    text = _with_study(text, args)
    if any(Path(name).exists() for name in SNAKEFILES):
        return text
    return re.sub(r"`snakemake (?=[^`]*`)", "`python -m aps run ", text)


def _with_study(text: str, args: argparse.Namespace) -> str:
    if not getattr(args, "configfile", None):
        return text  # the verb reads no study
    from aps.settings.reading import parse_overrides
    from aps.workflow.start import config_pairs

    try:
        overrides = parse_overrides(args.overrides)
    except UserError:  # which is what the text says
        return text
    for_aps = f" {study_options(args)}".rstrip()
    configfile = f" --configfile {shlex.join(args.configfile)}" if args.configfile != [DEFAULT_STUDY] else ""
    pairs = [shlex.quote(pair) for pair in config_pairs(overrides)]
    for_snakemake = configfile + (f" --config {' '.join(pairs)}" if pairs else "")

    def complete(match: re.Match[str]) -> str:
        command = match[1].removesuffix(ANY_STUDY)
        return f"`{command}{for_snakemake if command.startswith('snakemake') else for_aps}`"

    return re.sub(rf"`((?:python -m aps (?:{'|'.join(STUDY_VERBS)})|snakemake )\b[^`]*)`", complete, text)
