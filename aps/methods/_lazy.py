"""Stand-ins for modules that a method's file uses, because planning reads its settings and imports no torch.

Design: `lazy("torch")` is a stand-in that imports torch at the first use of an attribute. Before a method is used, `settle`
replaces the stand-ins in its file by the real modules, so that torch.compile sees no stand-in.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class _StandIn:
    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(import_module(self._name), attribute)

    def __repr__(self) -> str:
        return f"<{self._name}, not imported yet>"


def lazy(name: str) -> Any:
    """The module `name`, or a stand-in for it where it is not imported yet."""
    return sys.modules.get(name) or _StandIn(name)


def settle(module: ModuleType) -> None:
    """Replace the stand-ins among a module's names by the real modules."""
    for name, value in list(vars(module).items()):
        if isinstance(value, _StandIn):
            setattr(module, name, import_module(value._name))
