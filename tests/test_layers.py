"""Imports between the rooms of the package run one way, also those inside functions and those for types alone."""

from __future__ import annotations

import ast
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "aps"


def room(module: str) -> str:
    """`aps.data.walk` is in the room `data`, `aps.files` is one by itself."""
    return module.split(".")[1]


def imports(package: Path) -> dict[str, set[str]]:
    """Room -> the other rooms that its modules import. aps/__init__.py, which only names the public doors, is left out."""
    files = {
        ".".join(("aps", *file.relative_to(package).with_suffix("").parts)): file for file in package.rglob("*.py")
    }
    modules = {name.removesuffix(".__init__"): file for name, file in files.items()}
    found: dict[str, set[str]] = defaultdict(set)
    for module, file in modules.items():
        if module == "aps":
            continue
        named = []
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                named += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                named += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        inside = {
            room(name) for name in named if name.startswith("aps.") and room(name) in map(room, {*modules} - {"aps"})
        }
        found[room(module)] |= inside - {room(module)}
    return found


def test_no_import_runs_upward() -> None:
    found = imports(PACKAGE)
    assert {"results", "files"} <= set(found) and "files" in found["results"]
    order = list(TopologicalSorter(found).static_order())
    assert order.index("settings") < order.index("data") < order.index("training") < order.index("cli")


def test_a_circle_would_be_seen(tmp_path: Path) -> None:
    package = tmp_path / "aps"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "low.py").write_text("def f():\n    from aps import high\n")
    (package / "high.py").write_text("from aps.low import f\n")
    with pytest.raises(CycleError):
        list(TopologicalSorter(imports(package)).static_order())
