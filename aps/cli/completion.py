"""Completion by Tab of `aps`: the shell starts `aps` with variables of argcomplete's and reads what it offers.

Nothing heavy is imported, and argcomplete itself only then.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
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
    """The names of the experiments of the study that the command names so far; none of a file that can't be read."""
    names: dict[str, None] = {}
    for file in parsed_args.configfile:
        names |= dict.fromkeys(_experiments_of(Path(file)))
    return list(names)


def _experiments_of(file: Path, parents: tuple[Path, ...] = ()) -> list[str]:
    """The keys of `experiments` in a study's file and in those it includes: importing the settings would take as long again."""
    import yaml

    try:
        content = yaml.load(file.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return []
    if not isinstance(content, dict) or file.resolve() in parents:
        return []
    includes, own = content.get("include"), content.get("experiments")
    names = []
    for name in includes if isinstance(includes, list) else ():
        names += _experiments_of(file.parent / str(name), (*parents, file.resolve()))
    return [*names, *map(str, own if isinstance(own, dict) else ())]
