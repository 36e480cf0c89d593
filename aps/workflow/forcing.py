"""Makes `--forcerun finetune` force the jobs behind the target `finetune`, and files that are old targets like rules, by
changing Snakemake's internal state.

Snakemake takes a name after `--forcerun` as the name of a rule. The rule `finetune` is only a target without a job, so
nothing would run. Snakemake has no supported way to let a target stand for other rules
(https://github.com/snakemake/snakemake/issues/660 asks for one), and while it reads the rules the forced names are not
known yet. So `dag_settings`, the attribute that Snakemake sets later, becomes a property that translates the names. In the
same place targets get the mark of what has to be made again (`Plan.marks`): rules name it, a file that is a target can't.

Written for Snakemake 9 (`>=9.12`, pyproject.toml). tests/workflow/test_plan.py forces every target, and fails when a
version of Snakemake no longer sets `workflow.dag_settings` or reads `forcerun` from elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any


def force_by(
    workflow: Any, force: Callable[[Iterable[str]], frozenset[str]], marks: Callable[[Iterable[str]], list[str]]
) -> None:
    """Replace the names that the user forces by what `force` returns for them, and add `marks` of the targets to these."""

    def set_settings(self: Any, value: Any) -> None:
        if value is not None:
            value.forcerun = force(value.forcerun)
            if more := marks(value.targets):
                value.targets = [*value.targets, *more]
        self.__dict__["dag_settings"] = value

    base = type(workflow)
    translated = property(lambda self: self.__dict__.get("dag_settings"), set_settings)
    workflow.__class__ = type(base.__name__, (base,), {"dag_settings": translated})
