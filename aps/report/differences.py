"""In what a study's experiments differ, and which of its settings are swept.

Only settings of stages that ran count, and only those that the stage reads. An evaluation also has the settings of the
pretraining that made its encoder.
"""

from __future__ import annotations

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
    """Every setting that takes three values or more while all others stay, in the order of `FIRST`."""
    flat = {name: own for name in table.evaluated() if (own := settings_of(table, name))}
    keys = [key for key in differing(table) if key != "encoder.weights"]
    trained = [name for name in flat if table.study.experiments[name].encoder.weights != "random"]
    groups: dict[tuple[str, ...], list[list[str]]] = defaultdict(list)
    for base in trained:
        others: dict[tuple[str, ...], list[str]] = defaultdict(list)
        for name in trained:
            if table.study.experiments[name].stages != table.study.experiments[base].stages:
                continue
            changed = tuple(key for key in keys if flat[name].get(key, ABSENT) != flat[base].get(key, ABSENT))
            if changed:
                others[changed].append(name)
        for changed, names in others.items():
            members = [name for name in trained if name in (base, *names)]
            distinct = {shown(flat[name].get(changed[0], ABSENT)) for name in members}
            if len(distinct) == len(members) >= LEAST and members not in groups[changed]:
                groups[changed].append(members)
    found = []
    for changed, lists in groups.items():
        whole = [names for names in lists if not any(set(names) < set(other) for other in lists)]
        apart = [
            key for key in keys if key not in changed and len({shown(flat[n[0]].get(key, ABSENT)) for n in whole}) > 1
        ]
        lines = {}
        for names in whole:
            label = ", ".join(f"{key.rpartition('.')[2]} {shown(flat[names[0]].get(key, ABSENT))}" for key in apart)
            lines[label] = {name: flat[name].get(changed[0], ABSENT) for name in names}
        found.append(Sweep(changed[0], changed[1:], lines))
    return sorted(found, key=lambda sweep: (_rank(sweep.key), len(sweep.with_it)))


def shown(value: Any) -> str:
    """A setting's value as people write it."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str):
        return value
    return "null" if value is None else json.dumps(value)


def _rank(key: str) -> tuple[int, str]:
    return next((i for i, start in enumerate(FIRST) if key.startswith(start)), len(FIRST)), key
