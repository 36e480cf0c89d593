"""Snakemake's command line for a study: `aps run` and `aps.run`.

Whatever it is given goes to Snakemake; only what is missing is filled in: the Snakefile of this folder or else the one that
the package carries, with its profile.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from aps.errors import UserError
from aps.layout import SHARE

SNAKEFILES = ("Snakefile", "workflow/Snakefile")  # where Snakemake looks
DEFAULT_STUDY = Path("config/config.yaml")


def command(arguments: Sequence[str]) -> list[str]:
    """The command that runs Snakemake with `arguments`: targets and options, as its own command line has them.

    Raises:
        UserError: no study is named, and there is none in the working directory.
    """
    filled = list(arguments)
    if not _has(arguments, "--configfile", "--configfiles", "-h", "--help") and not DEFAULT_STUDY.exists():
        raise UserError(
            f"no study: {DEFAULT_STUDY} is not here; name one by --configfile FILE, or lay out a folder by `aps init`"
        )
    if not _has(arguments, "--snakefile", "-s") and not any(Path(name).exists() for name in SNAKEFILES):
        filled += ["--snakefile", str(SHARE / "Snakefile")]
        if not _has(arguments, "--profile", "--workflow-profile") and not Path("profiles/default").exists():
            filled += ["--workflow-profile", str(SHARE / "workflow" / "profiles" / "default")]
    return [sys.executable, "-m", "snakemake", *filled]


def _has(arguments: Sequence[str], *options: str) -> bool:
    return any(text == option or text.startswith(f"{option}=") for text in arguments for option in options)
