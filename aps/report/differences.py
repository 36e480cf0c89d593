"""In what a study's experiments differ, and which of its settings are swept.

Only settings of stages that ran count, and only those that the stage reads. An evaluation also has the settings of the
pretraining that made its encoder.
"""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from typing import Any, NamedTuple

from aps.report.table import Table
from aps.results import flatten
from aps.settings.blocks import SamplingSettings

ABSENT = "(not read)"
LEAST = 3  # values that make a sweep
# Where several settings change together, the first of these is the axis.
FIRST = ("pretrain.method", "sampling.", "pretrain.", "views.", "encoder.")
NOT_COMPARED = ("stage", "experiment", "seed", "upstream")


class Sweep(NamedTuple):
    """Experiments that differ in one setting, with those that follow it (fewer samplings a batch, more epochs)."""

    key: str
    with_it: tuple[str, ...]  # settings that change with it
    lines: dict[str, dict[str, Any]]  # what sets a line apart -> {experiment: its value}

    @property
    def numeric(self) -> bool:
        values = [value for line in self.lines.values() for value in line.values()]
        return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def settings_of(table: Table, name: str) -> dict[str, Any]:
    """Flat settings of an experiment: of its stages that have run, and of the pretraining that it starts from."""
    study, flat = table.study, dict[str, Any]()
    source = study.pretrain_source(name)
    stages = [(source, "pretrain")] if source not in (None, name) else []
    stages += [(name, stage) for stage in study.experiments[name].stages]
    for owner, stage in stages:
        assert owner is not None
        experiment = study.experiments[owner]
        ran = [
            s
            for s in experiment.seeds
            if (owner, s, stage) in table.findings and table.findings[owner, s, stage].metrics
        ]
        if not ran:
            continue
        tree = study.stage_settings(owner, ran[0], stage).relevant()
        own = flatten({key: value for key, value in tree.items() if key not in NOT_COMPARED})
        if isinstance(sampling := tree.get("sampling"), dict):
            own = {
                k: v
                for k, v in own.items()
                if k.removeprefix("sampling.") not in SamplingSettings.unread(sampling["strategy"])
            }
        for key, value in own.items():
            # The dataset of one stage may be another one than that of the others.
            flat.setdefault(key if flat.get(key, value) == value else f"{stage}.{key}", value)
    return flat


def differing(table: Table) -> dict[str, dict[str, list[str]]]:
    """Key -> value as text -> the experiments that have it; only keys of which there are several values."""
    flat = {name: own for name in table.study.experiments if (own := settings_of(table, name))}
    keys = dict.fromkeys(key for own in flat.values() for key in own)
    found: dict[str, dict[str, list[str]]] = {}
    for key in sorted(keys, key=_rank):
        values: dict[str, list[str]] = defaultdict(list)
        for name, own in flat.items():
            if key in own:
                values[shown(own[key])].append(name)
        if len(values) > 1:
            found[key] = dict(values)
    return found


def sweeps(table: Table) -> list[Sweep]:
    """Every setting that takes three values or more while all others stay, or change with it; in the order of `FIRST`."""
    flat = {name: own for name in table.evaluated() if (own := settings_of(table, name))}
    keys = [key for key in differing(table) if key != "encoder.weights"]
    groups = _groups(table, {name: flat[name] for name in flat if not _untrained(table, name)}, keys)

    def value(name: str, key: str) -> Any:
        return flat[name].get(key, ABSENT)

    found = []
    for changed, lists in groups.items():
        apart = [key for key in keys if key not in changed and len({shown(value(own[0], key)) for own in lists}) > 1]
        lines = {}
        for names in lists:
            read = [key for key in apart if key in flat[names[0]]]
            label = ", ".join(f"{key.rpartition('.')[2]} {shown(value(names[0], key))}" for key in read)
            lines[label] = {name: value(name, changed[0]) for name in names}
        found.append(Sweep(changed[0], changed[1:], lines))
    return sorted(found, key=lambda sweep: (_rank(sweep.key), len(sweep.with_it)))


def _groups(table: Table, flat: dict[str, dict[str, Any]], keys: list[str]) -> dict[tuple[str, ...], list[list[str]]]:
    """Settings that change together -> groups of experiments, any two of which differ in all of these and nothing else."""

    def changed(a: str, b: str) -> tuple[str, ...]:
        return tuple(key for key in keys if flat[a].get(key, ABSENT) != flat[b].get(key, ABSENT))

    found: dict[tuple[str, ...], list[list[str]]] = defaultdict(list)
    stages = {name: table.study.experiments[name].stages for name in flat}
    sets = {changed(a, b) for a, b in itertools.combinations(flat, 2) if stages[a] == stages[b]} - {()}
    for together in sorted(sets, key=lambda own: (len(own), keys.index(own[0]))):
        for base in flat:
            members = [base]
            for name in flat:
                if stages[name] == stages[base] and all(changed(name, other) == together for other in members):
                    members.append(name)
            members.sort(key=list(flat).index)
            read = all(key in flat[name] for name in members for key in together)
            # The diagonal of a grid is no sweep: what changes there together also changes alone.
            diagonal = any(set(own) < set(together) for own, lists in found.items() if lists)
            if len(members) >= LEAST and read and not diagonal and members not in found[together]:
                found[together].append(members)
    return {together: lists for together, lists in found.items() if lists}


def _untrained(table: Table, name: str) -> bool:
    return table.study.experiments[name].encoder.weights == "random"


def shown(value: Any) -> str:
    """A setting's value as people write it."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str):
        return value
    return "null" if value is None else json.dumps(value)


def _rank(key: str) -> tuple[int, str]:
    return next((i for i, start in enumerate(FIRST) if key.startswith(start)), len(FIRST)), key
