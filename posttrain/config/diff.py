"""How the settings of two recipes differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Change = tuple[str, Any, Any]
"""Path of a field, its old and its new value."""


def changes(old: Any, new: Any, path: str = "") -> list[Change]:
    """The fields that differ."""
    # Lists are compared whole: entries have no names, and one that is left out would shift all others.
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [(path, old, new)]
    found: list[Change] = []
    # New names first, in their own order; a name that is gone counts as null.
    for name in dict.fromkeys([*new, *old]):
        found += changes(old.get(name), new.get(name), f"{path}.{name}".lstrip("."))
    return found


def as_text(found: Sequence[Change]) -> str:
    return ", ".join(f"{path} {old} -> {new}" for path, old, new in found)
