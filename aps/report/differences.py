"""Finds the settings in which a study's experiments differ, and those that are swept.

Only settings count that a finished stage reads. An evaluation also has the settings of the runs that made its encoder.
"""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from typing import Any, NamedTuple

from aps.layout import makers_of
from aps.report.table import Table
from aps.results import flatten
from aps.settings.blocks import SamplingSettings

ABSENT = "(not read)"
FEWEST_VALUES = 3  # of a sweep
# Where several settings change together, the first of these is the axis.
FIRST = ("pretrain.method", "sampling.", "pretrain.", "views.", "encoder.")
NOT_COMPARED = ("stage", "experiment", "seed", "upstream")


class Sweep(NamedTuple):
    """Experiments that differ in one setting, and perhaps in others that change with it (more epochs)."""

    key: str
    with_it: tuple[str, ...]  # other settings that change with `key`
    lines: dict[str, dict[str, Any]]  # label of a line -> {experiment: its value of `key`}

    @property
    def numeric(self) -> bool:
        values = [value for line in self.lines.values() for value in line.values()]
        return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def settings_of(table: Table, name: str) -> dict[str, Any]:
    """Settings of an experiment as `a.b` keys: of its finished stages, and of those of other experiments that make its encoder."""
    study, flat = table.study, dict[str, Any]()
    own = [(name, stage) for stage in study.experiments[name].stages]
    # Every stage has the same encoder, and every seed one of the same settings.
    makers = [makers_of(study, (name, study.experiments[name].seeds[0], stage)) for _, stage in own]
    longest = max(map(list, makers), key=len)
    for owner, stage in [(owner, stage) for owner, _, stage in reversed(longest) if owner != name] + own:
        experiment = study.experiments[owner]
        ran = [
            s
            for s in experiment.seeds
            if (owner, s, stage) in table.findings and table.findings[owner, s, stage].metrics
        ]
        if not ran:
            continue
        tree = study.stage_settings(owner, ran[0], stage).relevant()
        stage_settings = flatten({key: value for key, value in tree.items() if key not in NOT_COMPARED})
        if isinstance(sampling := tree.get("sampling"), dict):
            unread = {f"sampling.{key}" for key in SamplingSettings.unread(sampling["strategy"])}
            stage_settings = {key: value for key, value in stage_settings.items() if key not in unread}
        if owner != name:  # where its maker started from is no setting of this one
            stage_settings.pop("encoder.weights", None)
        for key, value in stage_settings.items():
            # One stage may use another dataset than the others.
            flat.setdefault(key if flat.get(key, value) == value else f"{stage}.{key}", value)
    return flat


def differing(table: Table) -> dict[str, dict[str, list[str]]]:
    """Key -> value as text -> the experiments that have it. Only keys with several values."""
    flat = {name: settings for name in table.study.experiments if (settings := settings_of(table, name))}
    keys = dict.fromkeys(key for settings in flat.values() for key in settings)
    several: dict[str, dict[str, list[str]]] = {}
    for key in sorted(keys, key=_rank):
        values: dict[str, list[str]] = defaultdict(list)
        for name, settings in flat.items():
            if key in settings:
                values[shown(settings[key])].append(name)
        if len(values) > 1:
            several[key] = dict(values)
    return several


def sweeps(table: Table) -> list[Sweep]:
    """Every setting with three values or more while all others stay the same or change with it; in `FIRST`'s order."""
    flat = {name: settings for name in table.evaluated() if (settings := settings_of(table, name))}
    keys = [key for key in differing(table) if key != "encoder.weights"]
    groups_by_keys = _groups(table, {name: flat[name] for name in flat if not _untrained(table, name)}, keys)

    def value(name: str, key: str) -> Any:
        return flat[name].get(key, ABSENT)

    result = []
    for swept, groups in groups_by_keys.items():
        # What tells the lines of the figure apart: settings in which the groups differ from each other.
        apart = [key for key in keys if key not in swept and len({shown(value(group[0], key)) for group in groups}) > 1]
        lines = {}
        for group in groups:
            read = [key for key in apart if key in flat[group[0]]]
            label = ", ".join(f"{key.rpartition('.')[2]} {shown(value(group[0], key))}" for key in read)
            lines[label] = {name: value(name, swept[0]) for name in group}
        result.append(Sweep(swept[0], swept[1:], lines))
    return sorted(result, key=lambda sweep: (_rank(sweep.key), len(sweep.with_it)))


def _groups(table: Table, flat: dict[str, dict[str, Any]], keys: list[str]) -> dict[tuple[str, ...], list[list[str]]]:
    """Settings that change together -> groups of experiments, of which any two differ in exactly these settings."""

    def changed(a: str, b: str) -> tuple[str, ...]:
        return tuple(key for key in keys if flat[a].get(key, ABSENT) != flat[b].get(key, ABSENT))

    groups: dict[tuple[str, ...], list[list[str]]] = defaultdict(list)
    stages = {name: table.study.experiments[name].stages for name in flat}
    # Each pair is compared once: settings that change -> experiment -> those that differ from it in exactly these.
    partners: dict[tuple[str, ...], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for a, b in itertools.combinations(flat, 2):
        if stages[a] == stages[b] and (together := changed(a, b)):
            partners[together][a].append(b)
            partners[together][b].append(a)
    place = {name: number for number, name in enumerate(flat)}
    for together in sorted(partners, key=lambda changing: (len(changing), keys.index(changing[0]))):
        differing_from = {name: set(others) for name, others in partners[together].items()}
        for base in sorted(differing_from, key=place.__getitem__):
            members = [base]
            for name in partners[together][base]:
                if all(name in differing_from[other] for other in members):
                    members.append(name)
            members.sort(key=place.__getitem__)
            read = all(key in flat[name] for name in members for key in together)
            # The diagonal of a grid is no sweep: the settings that change together there also change alone.
            diagonal = any(set(fewer) < set(together) for fewer, members_of in groups.items() if members_of)
            if len(members) >= FEWEST_VALUES and read and not diagonal and members not in groups[together]:
                groups[together].append(members)
    return {together: members_of for together, members_of in groups.items() if members_of}


def _untrained(table: Table, name: str) -> bool:
    return table.study.experiments[name].encoder.weights == "random"


def shown(value: Any) -> str:
    """A setting's value as a study's file has it."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str):
        return value
    return "null" if value is None else json.dumps(value)


def _rank(key: str) -> tuple[int, str]:
    return next((i for i, start in enumerate(FIRST) if key.startswith(start)), len(FIRST)), key
