"""Numbers and other values as reports print them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, TypeGuard, TypeVar

K = TypeVar("K")


def number(value: float) -> str:
    """At most four significant digits: short enough for a chart or a table."""
    if value == 0:
        return "0"
    if float(value).is_integer() and abs(value) < 1e5:
        return f"{value:,.0f}"
    # Beyond these sizes an exponent is shorter than zeros.
    if abs(value) >= 1e5 or abs(value) < 1e-3:
        return f"{value:.3g}"
    return f"{value:.4g}"


def aligned(value: Any, sign: str = "") -> str:
    """Four decimals, so that the numbers of a column line up, unless the value is large or not a number."""
    if not is_number(value):
        return shown(value)
    return f"{value:{sign}.4f}" if abs(value) < 100 else f"{value:{sign},.0f}"


def change(before: Any, after: Any) -> str:
    """The signed difference of two values, or nothing where one of them is not a number."""
    return aligned(after - before, "+") if is_number(before) and is_number(after) else ""


def shown(value: Any) -> str:
    """Any value of a recipe or a summary on one line."""
    if value is None or value == []:
        return "–"
    if isinstance(value, list):
        return ", ".join(map(shown, value))
    if is_number(value):
        return number(value)
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value)


def all_keys(mappings: Iterable[Iterable[K]]) -> list[K]:
    """The keys of all, once each, in the order of their first appearance."""
    keys: dict[K, None] = {}  # a set that keeps the order
    for mapping in mappings:
        keys |= dict.fromkeys(mapping)
    return list(keys)


def cell(value: Any) -> str:
    """A value in a Markdown table of a model card."""
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def is_number(value: Any) -> TypeGuard[float]:
    # A bool is an int to Python, but a setting rather than a number to a reader.
    return isinstance(value, int | float) and not isinstance(value, bool)
