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


def extremes(model: type[BaseModel], besides: type[BaseModel] | None = None) -> Iterator[tuple[str, Any]]:
    """Keys of a block that hold numbers with a point, each with extreme values that the block accepts.

    besides: a block whose keys are left out.
    """
    for key, schema in model.model_json_schema()["properties"].items():
        if besides is not None and key in besides.model_fields:
            continue
        items = schema.get("prefixItems", [schema["items"]] if "items" in schema else [])
        pairs = list(filter(None, map(ends, items or [schema])))
        if not pairs:
            continue
        least, greatest = [low for low, _ in pairs], [high for _, high in pairs]
        shares = [
            min(1.0, high) for high in greatest
        ]  # the greatest of a list with an end of its own, such as crop_scale
        both = [[least[0], greatest[1]], [least[0], shares[1]]] if len(pairs) == 2 else []
        for rows in ([least], [greatest, shares], both):
            values = [tuple(row) if items else row[0] for row in rows]
            yield from ((key, value) for value in [v for v in values if accepts(model, key, v)][:1])


def accepts(model: type[BaseModel], key: str, value: Any) -> bool:
    try:
        model(**{key: value})
    except ValidationError as error:
        assert key in str(error)
        return False
    return True
