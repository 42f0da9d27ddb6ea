"""What a run says when it ends: before, after, its report; or, if it was stopped, what is saved and how to go on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MOST = 4
"""Figures in the line."""


def newest_checkpoint(run: Path) -> tuple[int, Path] | None:
    """(step, path) of the last checkpoint that was written; whether it is whole is checked where it is loaded."""
    saved = []
    # step-000123 of K2 and of judges, checkpoint-123 of TRL's trainers; what is still written begins with a dot.
    for path in (run / "checkpoints").glob("[!.]*-*"):
        if match := re.search(r"-(\d+)$", path.name):
            saved.append((int(match[1]), path))
    return max(saved, default=None)


def end_line(run: Path, figures: Mapping[str, Any]) -> str:
    """`figures` are those of the summary."""
    before, after = figures.get("before") or {}, figures.get("after") or {}
    moved = []
    for name, new in after.items():
        old = before.get(name)
        # One that was missing at either end has not moved.
        if _is_main(name) and isinstance(old, int | float) and isinstance(new, int | float):
            moved.append(f"{name} {old:.4g} -> {new:.4g}")
    parts = [f"{run}: done"]
    if moved:
        parts.append(", ".join(moved[:MOST]))
    if (run / "report.html").is_file():
        parts.append(f"report: {run / 'report.html'}")
    return "; ".join(parts)


def _is_main(name: str) -> bool:
    """Rewards and accuracies, not the many figures that are only watched."""
    return name == "pairs/accuracy" or not name.startswith(("image/", "pairs/"))


def stopped_line(run: Path, total: int | None, again: str) -> str:
    """`total`: the steps of the whole run, None before training began; `again`: the remedy."""
    if (newest := newest_checkpoint(run)) is not None:
        step, path = newest
        saved = f"step {step} of {total} is saved in {path}" if total is not None else f"step {step} is saved in {path}"
    elif (run / "checkpoints").exists() or total is None:
        saved = "no step is saved yet"
    else:
        saved = "what is written so far is kept"
    return f"{run}: stopped; {saved}; to go on, {again}"
