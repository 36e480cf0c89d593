"""Numbers that people give, on the command line and from Python: within their range, or one sentence."""

from __future__ import annotations

import argparse
import operator
import sys
from collections.abc import Callable
from numbers import Real
from typing import Any

from aps.errors import UserError
from aps.text import shorten

# --------------------------------------------------------------------------------------------------
# From Python.


def whole(value: Any, name: str, least: int | None = 1) -> int:
    """`value` as an int, where it is a whole number from `least`. Raises UserError for anything else."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or (least is not None and number < least):
        allowed = "a whole number" if least is None else f"a whole number from {least}"
        raise UserError(f"{name} is {_repr(value)}; give {allowed}")
    return min(number, sys.maxsize)  # iterators count no farther


def share(value: Any, name: str) -> float:
    """`value` as a float, where it is a number from 0 to 1. Raises UserError for anything else."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) <= 1:  # NaN is not
        raise UserError(f"{name} is {_repr(value)}; give a number from 0 to 1")
    return float(value)


def _repr(value: Any) -> str:
    return shorten(" ".join(repr(value).split()), 60, "...")


# --------------------------------------------------------------------------------------------------
# Types of options.


def whole_number(least: int, most: int) -> Callable[[str], int]:
    """The type of an option that is a whole number in a range."""

    def read(text: str) -> int:
        try:
            if least <= (value := int(text)) <= most:
                return value
        except ValueError:
            pass
        raise _refused(text, f"is not a whole number from {least} to {most}")

    return read


def number(least: float, most: float) -> Callable[[str], float]:
    """The type of an option that is a number in a range."""

    def read(text: str) -> float:
        try:
            if least <= (value := float(text)) <= most:  # NaN is not
                return value
        except ValueError:
            pass
        raise _refused(text, f"is not a number from {least:g} to {most:g}")

    return read


def up_to_one(zero: bool) -> Callable[[str], float]:
    """The type of an option that is a number from 0, or above 0, to 1."""

    def read(text: str) -> float:
        try:
            value = float(text)
            if 0 < value <= 1 or (zero and value == 0):
                return value
        except ValueError:
            pass
        raise _refused(text, "is not a number from 0 to 1" if zero else "is not a number above 0, up to 1")

    return read


def _refused(text: str, problem: str) -> argparse.ArgumentTypeError:
    from aps.settings.sentences import shown

    return argparse.ArgumentTypeError(f"{shown(text)} {problem}; give one")
