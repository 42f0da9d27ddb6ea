"""Which metrics of a run show that it diverges or hacks its reward, and the limits that its recipe sets them.

| metric | limit |
|---|---|
| the metric of eval.stop | its limit, or the share `drop` below its best so far |
| ratio_error | the smaller clip: beyond it the policy that trains is not the one that sampled |
| ratio | the two clips |
| failed, missing_images | the smallest max_failures of a reward |
| grad_norm of any role | clip_factor times the median of those before (of an expander's GDPO, max_grad_norm) |
| any with a `reference` in posttrain/config/metrics.py | that value |
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from posttrain.config import clipping, metrics
from posttrain.errors import counted
from posttrain.report.charts import Limit, thin
from posttrain.runs.read import Point

TITLES = {"divergence": "divergence", "hacking": "hacking: what drifts while a reward is hacked"}


def limits(recipe: dict[str, Any], series: dict[str, list[Point]]) -> dict[str, list[Limit]]:
    """By metric, of those that the run has."""
    found: dict[str, list[Limit]] = {}
    for name, limit in _fixed(recipe):
        if name in series:
            found.setdefault(name, []).append(limit)
    optim = recipe.get("optim") or {}
    for name, points in series.items():
        if name.endswith("grad_norm"):
            for limit in _of_gradients(optim, points):
                found.setdefault(name, []).append(limit)
        metric = metrics.find(name)
        if metric is not None and metric.reference is not None:
            whose, value = metric.reference
            found.setdefault(name, []).append(Limit(whose, [(0, value)]))
    stop = (recipe.get("eval") or {}).get("stop") or {}
    stopping = f"{metrics.EVAL}{stop.get('metric')}"
    if stopping in series:
        found.setdefault(stopping, []).append(_stop(stop, series[stopping]))
    return found


def _fixed(recipe: dict[str, Any]) -> list[tuple[str, Limit]]:
    """Limits that are a number of the recipe."""
    found = []
    loss = recipe.get("loss") or {}
    if "clip_low" in loss and "clip_high" in loss:
        low, high = loss["clip_low"], loss["clip_high"]
        found.append(("ratio_error", Limit("clip", [(0, min(low, high))], "above")))
        found.append(("ratio", Limit("clip_low", [(0, 1 - low)])))
        found.append(("ratio", Limit("clip_high", [(0, 1 + high)])))
    # A reward may fail always if its max_failures is 1.
    allowed = [reward["max_failures"] for reward in recipe.get("rewards") or [] if reward.get("max_failures", 1) < 1]
    if allowed:
        found.append(("failed", Limit("max_failures, over a reward's last 256 scores,", [(0, min(allowed))], "above")))
    failures = (recipe.get("renderer") or {}).get("max_failures")
    if failures is not None:
        found.append(("missing_images", Limit("max_failures, over the last 256 images,", [(0, failures)], "above")))
    return found


def watched(names: Iterable[str], of_limits: dict[str, list[Limit]]) -> dict[str, list[str]]:
    """The metrics to show beside the limits, by what they are a sign of; those with a limit come first."""
    sections: dict[str, list[str]] = {}
    for name in names:
        metric = metrics.find(name)
        # Divergence shows in training, hacking in evaluations, which alone have the same prompts each time.
        place: metrics.Sign = "hacking" if name.startswith(metrics.EVAL) else "divergence"
        if name in of_limits or (metric is not None and metric.sign_of == place):
            sections.setdefault(place, []).append(name)
    ordered = {}
    for sign, title in TITLES.items():
        if sign in sections:
            ordered[title] = sorted(sections[sign], key=lambda name: name not in of_limits)
    return ordered


def _stop(stop: dict[str, Any], points: list[Point]) -> Limit:
    """The rule of early_stopping.regression as a line."""
    lower = stop.get("better") == "lower"
    bad, label = "above" if lower else "below", f"eval.stop, {counted(stop.get('patience', 1), 'time')} in a row, at"
    if stop.get("limit") is not None:
        return Limit(label, [(0, stop["limit"])], bad)
    # A share of the best value's size, so that the rule also works for a figure that is negative.
    sign, better = (1, min) if lower else (-1, max)
    line: list[Point] = []
    best: float | None = None
    for step, value in points:
        if value is not None:
            best = value if best is None else better(best, value)
            line.append((step, best + sign * stop["drop"] * abs(best)))
    return Limit(label, line or [(0, None)], bad)


def _of_gradients(optim: dict[str, Any], points: Sequence[Point]) -> list[Limit]:
    found = []
    if optim.get("max_grad_norm") is not None:
        found.append(Limit("scaled down above", [(0, optim["max_grad_norm"])]))
    if optim.get("clip_factor"):
        found.append(Limit("scaled down above", _clip_line(points, optim["clip_factor"])))
    return found


def _clip_line(points: Sequence[Point], factor: float) -> list[Point]:
    """The limit of each norm, computed as the optimiser's Stepper does, from the norms that were logged."""
    line: list[Point] = []
    norms: list[float] = []
    for step, value in points:
        # The limit of a step comes from the norms before it, its own not included.
        limit = clipping.limit(norms, factor)
        line.append((step, limit if math.isfinite(limit) else None))
        # A batch without any gradient says nothing about the usual norm.
        if value is not None and value > 0:
            norms.append(value)
    return thin(line) or [(0, None)]
