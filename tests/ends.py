"""The least and the greatest numbers that settings accept."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ValidationError


def ends(schema: dict[str, Any]) -> tuple[float, float] | None:
    """The least and the greatest value of a number's JSON schema; None: it is no number with a point."""
    if "anyOf" in schema:
        return next(filter(None, map(ends, schema["anyOf"])), None)
    if schema.get("type") != "number":
        return None
    least = schema["minimum"] if "minimum" in schema else math.nextafter(schema["exclusiveMinimum"], math.inf)
    greatest = schema["maximum"] if "maximum" in schema else math.nextafter(schema["exclusiveMaximum"], -math.inf)
    return float(least), float(greatest)


def extremes(model: type[BaseModel], besides: type[BaseModel] | None = None) -> Iterator[tuple[str, list[Any]]]:
    """Every key of a block that holds numbers with a point, and extreme values of it that the block accepts.

    besides: a block whose keys are left out.
    """
    for key, schema in model.model_json_schema()["properties"].items():
        if besides is not None and key in besides.model_fields:
            continue
        items = schema.get("prefixItems", [schema["items"]] if "items" in schema else [])
        pairs = list(filter(None, map(ends, items or [schema])))
        if not pairs:
            continue
        # A share whose list has an end of its own, such as crop_scale, is refused at the greatest number.
        rows = [[low for low, _ in pairs], [high for _, high in pairs], [min(1.0, high) for _, high in pairs]]
        if len(pairs) == 2:
            rows.append([pairs[0][0], min(1.0, pairs[1][1])])
        values = [tuple(row) if items else row[0] for row in rows]
        yield key, [value for value in dict.fromkeys(values) if accepts(model, key, value)]


def accepts(model: type[BaseModel], key: str, value: Any) -> bool:
    try:
        model(**{key: value})
    except ValidationError as error:
        assert key in str(error)
        return False
    return True
