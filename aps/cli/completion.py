"""Completion by Tab of `aps`: the shell starts `aps` with variables of argcomplete's and reads what it offers.

Nothing heavy is imported, and argcomplete itself only then.
"""

from __future__ import annotations

import argparse
import os
from typing import Any


def asked() -> bool:
    """Whether a shell asks what could come next, instead of running the command."""
    return "_ARGCOMPLETE" in os.environ


def offer(parser: argparse.ArgumentParser) -> None:
    """Tell the shell, and exit."""
    import argcomplete

    from aps.cli.options import AddUp

    argcomplete.safe_actions.add(AddUp)  # so that `experiments` gets the files that --configfile names
    argcomplete.autocomplete(parser)


def experiments(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    """The names of the experiments of the study that the command names so far; none where it can't be read."""
    from aps.errors import UserError
    from aps.settings.reading import read_files

    try:
        names = read_files(parsed_args.configfile).get("experiments")
    except UserError:
        return []
    return [str(name) for name in names] if isinstance(names, dict) else []
