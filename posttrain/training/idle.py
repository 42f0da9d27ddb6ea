"""Steps that teach nothing: counted, told on the terminal, and when there are too many in a row, the end of the run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.errors import UserError, counted
from posttrain.log import log
from rewards.base import Scores

WARN_AFTER = 5
"""Steps in a row."""


def idle_reason(metrics: Mapping[str, float | None], scores: Scores) -> str | None:
    """Why nothing could be learnt from a step, by its metrics `missing` and `flat_groups`; None if something could."""
    if metrics["missing"] == 1:
        failed = []
        for name, failures in scores.failures.items():
            if failures:
                (reason, _), *_ = failures.most_common(1)
                failed.append(f"{name}: {reason}")
        return "; ".join(failed) or "all None, so none applies to these prompts"
    return "the images of each group score alike" if metrics["flat_groups"] == 1 else None


def count_idle(history: dict[str, Any], reason: str | None, unscored: bool) -> None:
    """Counts a step in `history`, which a resumed run finds again: `skipped_steps` without any score, and `idle_steps`
    in a row that taught nothing."""
    history["skipped_steps"] += unscored
    history["idle_steps"] = 0 if reason is None else history["idle_steps"] + 1


def check_idle(history: Mapping[str, Any], reason: str | None, limit: int) -> None:
    """Warns of `idle_steps` in a row. Raises UserError when there are `limit` of them (0: never)."""
    row = history["idle_steps"]
    if limit and row >= limit:
        raise UserError(
            f"idle_steps: nothing could be learnt from {counted(row, 'step')} in a row: {reason}; fix or add a reward,"
            " or raise it"
        )
    if row == WARN_AFTER:  # once, not in each step after it
        ends = f"; after {limit} the run ends (idle_steps)" if limit else ""
        log.warning(f"nothing could be learnt from {row} steps in a row: {reason}{ends}")


def refuse_unscored(history: Mapping[str, Any], steps: int, reason: str | None) -> None:
    """Raises UserError for a run of which no step had any score."""
    if steps and history["skipped_steps"] >= steps:
        raise UserError(
            f"rewards: not one image of {counted(steps, 'step')} could be scored: {reason or 'see metrics'}; fix or add"
            " a reward"
        )
