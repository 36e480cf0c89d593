"""Makes Snakemake's command line for a study, for `aps run` and `aps.run`.

All arguments go to Snakemake, `--set` as its `--config`. What is missing is added: if the working directory has no
Snakefile, the package's Snakefile and its profile.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aps.errors import UserError
from aps.layout import SHARE

SNAKEFILES = ("Snakefile", "workflow/Snakefile")  # the paths that Snakemake looks for
DEFAULT_STUDY = Path("config/config.yaml")


def command(arguments: Sequence[str]) -> list[str]:
    """The command that runs Snakemake with `arguments`, the targets and options of its command line.

    Raises:
        UserError: no study is named, and there is none in the working directory; or a file of it can't be read, which
            Snakemake would say in a traceback, or without the file's name.
    """
    filled = arguments = _with_config(arguments)
    if not _has(arguments, "--configfile", "--configfiles", "-h", "--help") and not DEFAULT_STUDY.exists():
        raise UserError(
            f"no study: {DEFAULT_STUDY} is not here; name one by --configfile FILE, or lay out a folder by `aps init`"
        )
    own_snakefile = _has(arguments, "--snakefile", "-s")
    if not own_snakefile:  # another workflow's settings need not be a study
        _check_files(arguments)
    if not own_snakefile and not any(Path(name).exists() for name in SNAKEFILES):
        filled += ["--snakefile", str(SHARE / "Snakefile")]
        if not _has(arguments, "--profile", "--workflow-profile") and not Path("profiles/default").exists():
            filled += ["--workflow-profile", str(SHARE / "workflow" / "profiles" / "default")]
    return [sys.executable, "-m", "snakemake", *filled]


def _with_config(arguments: Sequence[str]) -> list[str]:
    """The arguments with Snakemake's `--config` in place of the `--set KEY=VALUE ...` of every other verb.

    Raises UserError where a pair is no KEY=VALUE, or `--config` is given too: of two values of one key Snakemake drops one.
    """
    rest, pairs, taking = list[str](), list[str](), False
    for text in arguments:
        if text == "--set" or text.startswith("--set="):
            taking, pairs = True, [*pairs, *([text.removeprefix("--set=")] if text != "--set" else [])]
        elif taking and not text.startswith("-"):
            pairs.append(text)
        else:
            taking = False
            rest.append(text)
    if not pairs and len(rest) == len(arguments):
        return rest
    if not pairs:
        raise UserError("--set has no value; write --set KEY=VALUE, for example --set defaults.pretrain.epochs=10")
    if _has(rest, "--config", "-C"):
        raise UserError("--set and --config lay settings over the study both; give all of them by one of the two")
    from aps.settings.reading import check_names, parse_overrides

    check_names(_files(rest) or ([DEFAULT_STUDY] if DEFAULT_STUDY.exists() else []), pairs)
    return [*rest, "--config", *config_pairs(parse_overrides(pairs))]


def config_pairs(overrides: Mapping[str, Any]) -> list[str]:
    """Settings as arguments of Snakemake's `--config`."""
    return [
        f"{key}={json.dumps(_read_again(value), ensure_ascii=False, default=str)}" for key, value in overrides.items()
    ]


def _read_again(value: Any) -> Any:
    """A value of which reading each text as YAML once more, as `Plan` does for the sake of 1e-3, gives the value."""
    from aps.settings.reading import read_value

    if isinstance(value, Mapping):
        return {key: _read_again(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_read_again(inner) for inner in value]
    if isinstance(value, str):
        try:
            same = read_value(value, "") == value
        except UserError:
            same = False
        return value if same else json.dumps(value, ensure_ascii=False)
    return value


def check_given_once(arguments: Sequence[str]) -> None:
    """Raises UserError where settings are given by the same option of Snakemake twice: it would drop the first without a word."""
    for option in (("--config", "-C"), ("--configfile", "--configfiles")):
        if sum(_has([text], *option) for text in arguments) > 1:
            raise UserError(
                f"{option[0]} is given more than once, of which Snakemake reads the last; give all values after one {option[0]}"
            )


def _check_files(arguments: Sequence[str]) -> None:
    """Raises UserError where a named file of the study can't be read, in the words of every other verb."""
    from aps.settings.reading import read_files

    check_given_once(arguments)
    for file in _files(arguments):
        if not read_files([file]):
            raise UserError(
                f"{file}: is empty, so it has no experiments; add an 'experiments:' block, or leave the file out"
            )


def _files(arguments: Sequence[str]) -> list[Path]:
    """The study's files that Snakemake's arguments name."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--configfile", "--configfiles", nargs="*", default=[], type=Path)
    return list(parser.parse_known_args(arguments)[0].configfile)


def _has(arguments: Sequence[str], *options: str) -> bool:
    return any(text == option or text.startswith(f"{option}=") for text in arguments for option in options)
