"""Which code made a result: digests of the files that define a run's method, sampling strategy and detection engine.

They are no part of a run's key: a comment may have changed, and an upgrade is not to throw results away. So nobody
computes a result again for them; who shows or reuses one that other code made says so.

It imports nothing that a method or a strategy imports, so that planning stays quick.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from aps.errors import UserError
from aps.files import sha256
from aps.registry import ENGINES, METHODS, STRATEGIES, shown_file

Code = dict[str, list[str]]  # kind -> SHA-256 of its file; of each version, where it changed while the run was at work

# Kind -> where a run's settings name it, and the registry that knows its file.
KINDS = {
    "method": ("pretrain", "method", METHODS),
    "strategy": ("sampling", "strategy", STRATEGIES),
    "engine": ("detection", "engine", ENGINES),
}


class Source(NamedTuple):
    """A file as it is now."""

    digest: str | None  # SHA-256; None where it is not here
    file: str


def source_now(kind: str, name: str) -> Source:
    """The file that defines a method, strategy or engine. One of this package is named from the package on."""
    file = KINDS[kind][2].file(name)
    try:
        digest = sha256(file) if file is not None else None
    except UserError:
        digest = None
    return Source(digest, shown_file(file))


def code_of(settings: dict[str, Any]) -> Code:
    """The files that define a run with these settings, for its metrics.json."""
    return {kind: [digest] for kind, name in _named(settings) if (digest := source_now(kind, name).digest) is not None}


def known_code(value: Any) -> Code:
    """`value` if it is what `code_of` returns; else empty, as in files of earlier versions."""
    is_code = isinstance(value, dict) and all(
        isinstance(digests, list) and digests and all(isinstance(digest, str) for digest in digests)
        for digests in value.values()
    )
    return value if is_code else {}


def changed_code(code: Any, settings: dict[str, Any], now: Callable[[str, str], Source] = source_now) -> list[str]:
    """For each file that is another than those that made a result, a clause: `other code of method 'x' (FILE has changed
    since)`. There is none of a file that is not here.

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
