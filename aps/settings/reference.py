"""Makes the tables of settings in config/README.md, and the JSON schema with which editors complete and check a study.

`python -m aps.settings.reference` writes both into config/ (`make reference`); a test compares them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from aps.files import atomic_path
from aps.registry import METHODS
from aps.settings.base import HIGHEST, MOST, NAME
from aps.settings.blocks import CocoFiles, ResourceSettings, SourceSettings, UserDataset
from aps.settings.reading import RESERVED_NAMES, SHARED_FOLDERS
from aps.settings.study import ExperimentSettings, StudySettings, experiment_model
from aps.stages import STAGES

FOLDER = Path("config")
BEGIN, END = "<!-- settings: generated -->", "<!-- settings: end -->"
BLOCKS = ("dataset", "encoder", "views", "sampling", *STAGES)
Row = tuple[str, str, str, str]  # key, what is allowed, default, description


def tables() -> dict[str, list[Row]]:
    """Every setting, by heading."""
    study = [row for row in _rows(StudySettings, "") if row[0] != "experiments"]
    experiments = ("experiments", "block", "required", "the experiments by name; a name becomes a folder")
    found = {
        "A study": [
            *study,
            experiments,
            *_rows(SourceSettings, "sources.NAME."),
            *_rows(UserDataset, "datasets.NAME."),
            *_rows(CocoFiles, "datasets.NAME.coco.SPLIT."),
        ],
        "An experiment": [row for row in _rows(ExperimentSettings, "") if row[0] not in (*BLOCKS, "resources")],
    }
    shared = {}
    for block in BLOCKS:
        shared[block] = _rows(_block(ExperimentSettings, block), f"{block}.")
        found[f"{block}:"] = shared[block]
        if block == "pretrain":
            for method in METHODS.names():  # the keys that a method adds, and the defaults that it changes
                model = experiment_model(method)
                rows = [*_rows(_block(model, "pretrain"), "pretrain."), *_rows(_block(model, "views"), "views.")]
                known = [*shared["pretrain"], *shared["views"]]
                found[f"pretrain: with method: {method}"] = [row for row in rows if row not in known]
    found["resources:"] = _rows(ResourceSettings, "resources.")
    return {title: rows for title, rows in found.items() if rows}


def markdown() -> str:
    """The part of config/README.md from BEGIN to END."""
    parts = []
    for title, rows in tables().items():
        head = ["| key | allowed | default | what it is |", "|---|---|---|---|"]
        parts.append("\n".join([f"## {title}", "", *head, *(f"| {' | '.join(row)} |" for row in rows)]))
    return "\n\n".join([BEGIN, *parts, END])


def schema() -> dict[str, Any]:
    """JSON schema of a study's file. No key of an experiment is required, because experiments inherit keys. A block may
    be null, which is what remains of it when all of its keys are commented out."""
    methods = {method: experiment_model(method).model_json_schema() for method in METHODS.names()}
    default = methods[str(_block(ExperimentSettings, "pretrain").model_fields["method"].default)]
    definitions = dict(default.pop("$defs", {}))
    block: dict[str, Any] = {"type": ["object", "null"], "properties": dict(default["properties"])}
    block["additionalProperties"] = False
    block["properties"]["dataset"] = {"anyOf": [{"type": "string"}, block["properties"]["dataset"]]}
    for method in methods.values():
        for name, definition in method.get("$defs", {}).items():
            definitions.setdefault(name, definition)
    pretrain, views = (_of_all(_block(experiment_model(m), name) for m in methods) for name in ("pretrain", "views"))
    definitions["Pretrain"], definitions["Views"] = pretrain, views
    block["properties"]["pretrain"] = {"$ref": "#/$defs/Pretrain"}
    block["properties"]["views"] = {"$ref": "#/$defs/Views"}
    whole = StudySettings.model_json_schema()
    definitions = whole.pop("$defs", {}) | definitions | {"Experiment": block}
    for shared in (*BLOCKS, "resources"):
        block["properties"][shared] = _or_null(block["properties"][shared])
    names = {"pattern": f"^{NAME}$", "not": {"enum": list(RESERVED_NAMES)}}
    experiment = {"$ref": "#/$defs/Experiment"}
    whole["properties"]["experiments"] = {"type": "object", "propertyNames": names, "additionalProperties": experiment}
    whole["properties"]["defaults"] = experiment
    whole["properties"]["study"]["not"] = {"enum": list(SHARED_FOLDERS)}
    whole["properties"]["datasets"]["additionalProperties"] = False
    for shared in ("sources", "datasets", "resources", "include"):
        whole["properties"][shared] = _or_null(whole["properties"][shared])
    whole.pop("required", None)
    for definition in definitions.values():
        definition.pop("required", None)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A study",
        **{key: value for key, value in whole.items() if key not in ("title", "description")},
        "$defs": definitions,
    }


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    if "anyOf" in schema:
        return schema | {"anyOf": [*schema["anyOf"], {"type": "null"}]}
    kept: dict[str, Any] = {key: schema[key] for key in ("title", "description", "default") if key in schema}
    rest = {key: value for key, value in schema.items() if key not in kept}
    return {**kept, "anyOf": [rest, {"type": "null"}]}


def _of_all(blocks: Iterable[type[BaseModel]]) -> dict[str, Any]:
    """A block with the keys of all `blocks`; a key that they define differently allows what any of them allows."""
    meanings: dict[str, list[dict[str, Any]]] = {}
    for block in blocks:
        for key, value in block.model_json_schema()["properties"].items():
            meaning = {word: said for word, said in value.items() if word not in ("default", "description", "title")}
            known = meanings.setdefault(key, [value])
            if not any(meaning.items() <= other.items() for other in known):
                known.append(meaning)
    keys = {key: known[0] if len(known) == 1 else {"anyOf": known} for key, known in meanings.items()}
    return {"type": "object", "properties": keys, "additionalProperties": False}


def write(folder: Path = FOLDER) -> None:
    """Write the tables into `folder`/README.md and the schema into `folder`/schema.json."""
    page = folder / "README.md"
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    with atomic_path(page) as temporary:
        temporary.write_text(before + markdown() + rest.split(END)[1], encoding="utf-8")
    with atomic_path(folder / "schema.json") as temporary:
        temporary.write_text(json.dumps(schema(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _block(model: type[BaseModel], name: str) -> type[BaseModel]:
    annotation = model.model_fields[name].annotation
    assert isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return annotation


def _rows(model: type[BaseModel], prefix: str) -> list[Row]:
    properties = model.model_json_schema()["properties"]
    return [
        (
            prefix + key,
            _allowed(properties[key]),
            "required" if field.is_required() else _default(field.get_default(call_default_factory=True)),
            field.description or "",
        )
        for key, field in model.model_fields.items()
    ]


def _default(value: Any) -> str:
    value = [round(v, 4) if isinstance(v, float) else v for v in value] if isinstance(value, tuple) else value
    return "{}" if isinstance(value, BaseModel) else json.dumps(value)


def _allowed(schema: dict[str, Any]) -> str:
    """The values that a JSON schema allows, in words."""
    if "anyOf" in schema:
        return " or ".join(_allowed(option) for option in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(schema["enum"])
    kind = schema.get("type", "object")
    if kind == "array":
        items = schema.get("prefixItems")
        return f"{len(items)} x {_allowed(items[0])}" if items else f"list of {_allowed(schema['items'])}"
    words = {
        "integer": "whole number",
        "number": "number",
        "string": "text",
        "boolean": "true, false",
        "object": "block",
    }
    limits = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    usual = {"integer": MOST, "number": HIGHEST}.get(kind)  # said once, above the tables
    bounds = [f"{sign} {schema[key]:g}" for key, sign in limits.items() if schema.get(key, usual) != usual]
    return " ".join([words.get(kind, kind), ", ".join(bounds)]).strip()


if __name__ == "__main__":
    write()
