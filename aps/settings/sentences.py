"""Says a failed validation in one sentence: where, key, value, what is allowed."""

from __future__ import annotations

import difflib
import json
import re
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from aps.registry import nearest
from aps.settings.base import NAME_LETTERS
from aps.text import shorten


def sentence(where: str, prefix: str, error: ValidationError, model: type[BaseModel]) -> str:
    """The first error of a validation as one sentence: where, key, value, what is allowed.

    An unknown key comes first, because a misspelt one is often the reason for the others.
    """
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden" and e["loc"][-1:] != ("[key]",))
    path = [str(part) for part in first["loc"] if part != "[key]"]
    key = ".".join(path)
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        return f"{where}: {prefix}unknown key '{key}'; {_nearest_key(path, model)}{more}"
    if first["loc"] and first["loc"][-1] == "[key]":  # in a block whose keys are names, such as resources
        known = re.findall(r"'(\w+)'", str(first["msg"]))
        if first["type"] == "string_pattern_mismatch":  # the user's own names
            return f"{where}: {prefix}{'.'.join(path)}: the name {shown(path[-1])} {_message(first)}{more}"
        return f"{where}: {prefix}unknown key '{key}'; {nearest(path[-1], known)}{more}"
    if first["type"] == "missing":
        return f"{where}: {prefix}'{key}' is missing; add it{more}"
    if first["type"] == "value_error":
        return f"{where}: {prefix}{key + ': ' if key else ''}{str(first['msg']).removeprefix('Value error, ')}{more}"
    return f"{where}: {prefix}{key + ' = ' if key else ''}{shown(first['input'])}: {_message(first)}{more}"


def _message(error: Any) -> str:
    """What pydantic says of a value, in our words."""
    message = str(error["msg"])
    for pydantic, ours in WORDS:
        message = re.sub(pydantic, ours, message)
    return message


WORDS = (
    (r"^(Input|String|Tuple|List) should", "should"),
    (r"valid dictionary or instance of \w+", "block of settings"),
    (r"valid dictionary", "block of settings"),
    (r"valid tuple", "list"),
    (r"a valid string", "text"),
    (r"a valid boolean", "true or false"),
    (r"a valid integer", "a whole number"),
    (
        r"should match pattern '\^\[A-Za-z0-9\].*",
        f"should be at most {NAME_LETTERS} letters, digits, _ . and -, because it becomes a folder",
    ),
    (r" after validation", ""),
    (r"(should have at least \d+ items?), not 0", r"\1; give one"),
    (r"(should have at least \d+ items?), not \d+", r"\1; add what is missing"),
    (r"(should have at most \d+ items?), not \d+", r"\1; remove the rest"),
    (
        r"should match pattern '\^\[\^\{\}~.*",
        "should match a plain path, without spaces, braces, ~ and control characters; choose another",
    ),
    (
        r"should match pattern '\^rand.*",
        "should match pattern rand-mN-mstdX-incN, timm's RandAugment; write for example rand-m9-mstd0.5-inc1",
    ),
)


def shown(value: Any) -> str:
    """A value as YAML on one line, shortened where it is long."""
    try:
        text = json.dumps(value, default=str, ensure_ascii=False)
    except (ValueError, TypeError):  # the value contains itself
        text = repr(value)
    return shorten(text, 60, "...")


def _nearest_key(path: list[str], model: type[BaseModel]) -> str:
    """Advice on an unknown key: the nearest known key of the same block, else the same key in another block."""
    fields = _fields_at(path[:-1], model)
    if close := difflib.get_close_matches(path[-1], fields, n=1, cutoff=0.6):
        return f"did you mean '{'.'.join([*path[:-1], close[0]])}'?"
    for name, block in _blocks(model).items():
        if path[-1] in block.model_fields:
            block_name = "defaults" if name == "experiments" else name  # settings of every experiment go to defaults
            return f"did you mean '{block_name}.{path[-1]}'?"
    return f"known keys: {', '.join(fields)}"


def _fields_at(path: list[str], model: type[BaseModel]) -> list[str]:
    for part in path:
        if part in model.model_fields:
            model = _blocks(model).get(part, model)
    return list(model.model_fields)


def _blocks(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    blocks = {}
    for name, field in model.model_fields.items():
        for candidate in (field.annotation, *get_args(field.annotation)):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                blocks[name] = candidate
    return blocks
