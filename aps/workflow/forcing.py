"""What Snakemake is forced to run: a change of its own state, kept in this one place.

`--forcerun finetune` means the jobs behind that target.

Snakemake takes a name after `--forcerun` for a rule's, and would force the target `finetune`, which has no job of its
own, so nothing would run. There is no supported way to say that a target stands for other rules
(https://github.com/snakemake/snakemake/issues/660 asks for one), and while the rules are read the forced names are not
known yet. So the attribute that Snakemake sets later, `dag_settings`, becomes a property that translates them.

Written for Snakemake 9 (`>=9.12`, pyproject.toml). tests/workflow/test_plan.py forces every target, and fails when a
version of Snakemake no longer sets `workflow.dag_settings` or reads `forcerun` from elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any


def force_by(workflow: Any, force: Callable[[Iterable[str]], frozenset[str]]) -> None:
    """When Snakemake learns what the user forces, it gets what `force` makes of it."""

    def set_settings(self: Any, value: Any) -> None:
        if value is not None:
            value.forcerun = force(value.forcerun)
        self.__dict__["dag_settings"] = value

    base = type(workflow)
    own = property(lambda self: self.__dict__.get("dag_settings"), set_settings)
    workflow.__class__ = type(base.__name__, (base,), {"dag_settings": own})
