"""Which step of a run was the best, and whether to stop.

Both follow from the list of all evaluations and the recipe alone, so a resumed run decides as the uninterrupted
one. An evaluation in which the metric is missing or not finite is left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from posttrain.config.sections import EvalConfig, StopConfig


def best(evaluations: Sequence[Any], metric: str | None) -> tuple[int, float] | None:
    """Step and value of the highest, the earliest of equals. `evaluations` are pairs (step, metrics)."""
    return max(_points(evaluations, metric), key=lambda point: point[1], default=None)


def newest_is_best(evaluations: Sequence[Any], metric: str | None) -> bool:
    top = best(evaluations, metric)
    return top is not None and top[0] == evaluations[-1][0]


def regression(evaluations: Sequence[Any], stop: StopConfig) -> str | None:
    """Why to stop now, or None.

    The reason is that in each of the last `patience` evaluations the metric was beyond `limit` or, without one, further
    from the best before it than the share `drop` of that best's size.
    """
    # With the sign, higher is better for all metrics.
    sign = 1 if stop.better == "higher" else -1
    top: tuple[int, float] | None = None
    beyond = 0
    points = _points(evaluations, stop.metric)
    for step, value in points:
        if top is None or sign * (value - top[1]) > 0:
            top = step, value
        worst = top[1] - sign * stop.drop * abs(top[1]) if stop.limit is None else stop.limit
        beyond = beyond + 1 if sign * (worst - value) > 0 else 0
    # One evaluation beyond the limit may be chance.
    if top is None or beyond < stop.patience:
        return None
    step, value = points[-1]
    if stop.limit is not None:
        side = "below" if sign > 0 else "above"
        return f"eval.stop: {stop.metric} is {value:.4g} (step {step}), {side} the limit {stop.limit:g}"
    verb = "fell" if value < top[1] else "rose"
    return f"eval.stop: {stop.metric} {verb} from {top[1]:.4g} (step {top[0]}) to {value:.4g} (step {step})"


def warning(stop: StopConfig) -> str | None:
    """Said at the start of a run whose stop rule is a weak one."""
    if stop.metric is None or stop.metric.partition("@")[0] != "image/high_frequency":
        return None
    return (
        f"eval.stop watches {stop.metric} alone, which fell on K2-nano while artifacts rose; watch a"
        " held-out judge (a reward with heldout_only: true)"
    )


def handed_on(evaluations: Sequence[Any], decided: dict[str, Any]) -> dict[str, Any]:
    """Metrics of the step that later stages take: the last one, or the best of a run that its stop rule ended."""
    best = decided.get("best")
    if "stopped" in decided and best and best["step"]:  # step 0 is the start, of which there is no checkpoint
        return next(metrics for step, metrics in evaluations if step == best["step"])
    return evaluations[-1][1]


def outcome(evaluations: Sequence[Any], config: EvalConfig) -> tuple[dict[str, Any], list[str]]:
    """The decisions for the summary (`best`, `stopped`; each only where there is one) and as lines to the user."""
    decided: dict[str, Any] = {}
    lines = []
    if reason := regression(evaluations, config.stop):
        decided["stopped"] = reason
        lines.append(f"{reason}; the run has ended")
    if top := best(evaluations, config.best):
        decided["best"] = {"metric": config.best, "step": top[0], "value": top[1]}
        if top[0] == 0:
            lines.append(
                f"eval.best: {config.best} was never above its start ({top[1]:.4g}), so no step is marked best"
            )
        elif "stopped" in decided:
            lines.append(f"hands on its best step {top[0]}, whose {config.best} is {top[1]:.4g}")
    return decided, lines


def _points(evaluations: Sequence[Any], metric: str | None) -> list[tuple[int, float]]:
    points = []
    for step, metrics in evaluations:
        value = metrics.get(metric)
        if value is not None and math.isfinite(value):
            points.append((step, value))
    return points
