"""Which code made a result: a digest of the files of a run's method, sampling strategy and detection engine.

The files are the one that defines it and those of its own package or folder that it imports.

They are no part of a run's key: a comment may have changed, and an upgrade is not to throw results away. So nobody
computes a result again for them; who shows or reuses one that other code made says so.

It imports nothing that a method or a strategy imports, so that planning stays quick.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from aps.errors import UserError
from aps.files import sha256
from aps.registry import ENGINES, METHODS, PACKAGE, STRATEGIES, shown_file

Code = dict[str, list[str]]  # kind -> SHA-256 of its code; of each version, where it changed while the run was at work

# Kind -> where a run's settings name it, and the registry that knows its file.
KINDS = {
    "method": ("pretrain", "method", METHODS),
    "strategy": ("sampling", "strategy", STRATEGIES),
    "engine": ("detection", "engine", ENGINES),
}


class Source(NamedTuple):
    """The code of a method, strategy or engine as it is now."""

    digest: str | None  # SHA-256; None where a file of it can't be read
    file: str  # the one that defines it, for people, and whether there are more


def source_now(kind: str, name: str) -> Source:
    """The code of a method, strategy or engine. A file of this package is named from the package on."""
    registry = KINDS[kind][2]
    if (file := registry.file(name)) is None:
        return Source(None, shown_file(file))
    files = _files(registry.module(name), file)
    shown = shown_file(file) if len(files) == 1 else f"{shown_file(file)} or a file that it imports"
    try:
        digests = [sha256(each) for each in files]
    except UserError:
        return Source(None, shown)
    return Source(digests[0] if len(files) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest(), shown)


def _files(module: str, file: Path) -> list[Path]:
    """A module's file, then those of its own package or folder that are imported with it.

    Of this package they are files of the same folder, for a result also has the version and commit of the package.
    """
    packages = module.split(".")[: None if file.stem == "__init__" else -1]
    top, inside = file.parents[len(packages)], file.is_relative_to(PACKAGE)
    home = file.parent if inside else top.joinpath(*packages[:1])
    if home == PACKAGE or home.name in ("site-packages", "dist-packages"):
        return [file]
    found = [file]
    for each in found:  # it grows
        names = {parents for name in _imports(each, top) for parents in accumulate((part,) for part in name)}
        for path in (top.joinpath(*name) for name in names):
            for other in (path.with_name(f"{path.name}.py"), path / "__init__.py"):
                shared = inside and other.parent == home and other.name == "__init__.py"
                if other not in found and other.is_relative_to(home) and not shared and other.is_file():
                    found.append(other)
    return [file, *sorted(found[1:])]


def _imports(file: Path, top: Path) -> Iterator[tuple[str, ...]]:
    """Names that a file imports, each split at its dots, and those that may be modules or attributes of one."""
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return
    package = file.parent.relative_to(top).parts
    yield package  # it is imported first
    for node in ast.walk(tree):
        match node:
            case ast.Import(names):
                yield from (tuple(alias.name.split(".")) for alias in names)
            case ast.ImportFrom(module, names, level):
                start = package[: len(package) + 1 - level] if level else ()
                start += tuple(module.split(".")) if module else ()
                yield start
                yield from ((*start, alias.name) for alias in names)
            case ast.Call(ast.Name("lazy"), [ast.Constant(str(name))]):  # that of aps.methods
                yield tuple(name.split("."))


def code_of(settings: dict[str, Any]) -> Code:
    """The code of a run with these settings, for its metrics.json."""
    return {kind: [digest] for kind, name in _named(settings) if (digest := source_now(kind, name).digest) is not None}


def known_code(value: Any) -> Code:
    """`value` if it is what `code_of` returns; else empty, as in files of earlier versions."""
    is_code = isinstance(value, dict) and all(
        isinstance(digests, list) and digests and all(isinstance(digest, str) for digest in digests)
        for digests in value.values()
    )
    return value if is_code else {}


def changed_code(code: Any, settings: dict[str, Any], now: Callable[[str, str], Source] = source_now) -> list[str]:
    """For each code that is another than what made a result, a clause: `other code of method 'x' (FILE has changed
    since)`. There is none of code that is not here.

    Args:
        code: what metrics.json or run.json has of it; None in those of earlier versions.
        settings: those of the result.
    """
    clauses, code = [], known_code(code)
    for kind, name in _named(settings) if code else ():
        known, (digest, file) = code.get(kind), now(kind, name)
        if known and digest is not None and known != [digest]:
            when = "since" if len(known) == 1 else "while it trained"
            clauses.append(f"other code of {kind} '{name}' ({file} has changed {when})")
    return clauses


def _named(settings: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(kind, name) of what the settings name."""
    for kind, (block, key, _) in KINDS.items():
        name = settings.get(block, {}).get(key)
        if isinstance(name, str):
            yield kind, name
