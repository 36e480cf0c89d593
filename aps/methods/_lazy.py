"""Modules that a method's file names without importing them: planning reads its settings, and imports no torch.

Design: `lazy("torch")` is a stand-in that imports torch at the first use of an attribute. Before a method is used, `settle`
puts the real modules in the place of the stand-ins of its file, so that torch.compile meets none.
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
    """Put real modules in the place of the stand-ins among a module's names."""
    for name, value in list(vars(module).items()):
        if isinstance(value, _StandIn):
            setattr(module, name, import_module(value._name))
