"""How the settings of two recipes differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def changes(old: Any, new: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """Path of each field that differs, with its old and its new value."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = [*new, *(name for name in old if name not in new)]
        return [c for name in names for c in changes(old.get(name), new.get(name), f"{path}.{name}".lstrip("."))]
    return [] if old == new else [(path, old, new)]


def told(found: Sequence[tuple[str, Any, Any]]) -> str:
    return ", ".join(f"{path} {old} -> {new}" for path, old, new in found)
