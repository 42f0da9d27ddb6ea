"""Which metrics of a run tell that it diverges or cheats its reward, and the limits that its recipe sets them.

| metric | held against |
|---|---|
| the figure of eval.stop | its limit, or the share `drop` off its best so far |
| ratio_error | the smaller clip: beyond it the policy that trains is not the one that sampled |
| ratio | the two clips |
| failed, missing_images | the smallest max_failures of a reward |
| grad_norm of any role | clip_factor times the median of those before (of an expander's GDPO, max_grad_norm) |
| to_teacher/... | 1, the teacher |
| image/high_energy_ratio | 1, the start |
| pairs/winner, winner | 0, the reference |
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from posttrain.model import clipping
from posttrain.report.charts import Limit, Point, thin

DRIFT = ("kl", "log_ratio_std", "skipped", "drift_", "repeatability/", "noise_share")
LOOKS = ("eval/image/", "eval/to_teacher/", "eval/diversity", "eval/format", "eval/safe")


def limits(recipe: dict[str, Any], series: dict[str, list[Point]]) -> dict[str, list[Limit]]:
    """By metric, of those that the run has."""
    found: dict[str, list[Limit]] = {}
    loss, optim = recipe.get("loss") or {}, recipe.get("optim") or {}

    def add(name: str, label: str, value: float | None, bad: Any = None) -> None:
        if value is not None and name in series:
            found.setdefault(name, []).append(Limit(label, [(0, value)], bad))

    if "clip_low" in loss and "clip_high" in loss:
        add("ratio_error", "clip", min(loss["clip_low"], loss["clip_high"]), "above")
        add("ratio", "clip_low", 1 - loss["clip_low"])
        add("ratio", "clip_high", 1 + loss["clip_high"])
    allowed = [r["max_failures"] for r in recipe.get("rewards") or [] if r.get("max_failures", 1) < 1]
    add("failed", "max_failures, over a reward's last 256 scores,", min(allowed, default=None), "above")
    add("missing_images", "max_failures, over the last 256 pictures,", _failures(recipe), "above")
    for name in series:
        kind = name.removeprefix("eval/")
        if name.endswith("grad_norm"):
            add(name, "scaled down above", optim.get("max_grad_norm"))
            if optim.get("clip_factor"):
                line = _clip_line(series[name], optim["clip_factor"])
                found.setdefault(name, []).append(Limit("scaled down above", line))
        if kind.startswith("to_teacher/"):
            add(name, "the teacher", 1.0)
        elif kind.startswith("image/high_energy_ratio"):
            add(name, "the start", 1.0)
        elif kind in ("pairs/winner", "winner"):
            add(name, "the reference", 0.0)
    stop = (recipe.get("eval") or {}).get("stop") or {}
    if (watched := f"eval/{stop.get('metric')}") in series:
        found.setdefault(watched, []).append(_stop(stop, series[watched]))
    return found


def watched(names: Iterable[str], held: dict[str, list[Limit]]) -> dict[str, list[str]]:
    """The metrics to show as watches, by what they watch for; those with a limit come first."""
    sections: dict[str, list[str]] = {"divergence": [], "hacking: what drifts while a reward is cheated": []}
    training, looks = sections.values()
    for name in names:
        if name.startswith(LOOKS):
            looks.append(name)
        elif name in held or name.startswith(DRIFT):
            (looks if name.startswith("eval/") else training).append(name)
    return {title: sorted(part, key=lambda name: name not in held) for title, part in sections.items() if part}


def _stop(stop: dict[str, Any], points: list[Point]) -> Limit:
    """The rule of watch.regression as a line."""
    lower = stop.get("better") == "lower"
    bad, label = "above" if lower else "below", f"eval.stop, {stop.get('patience', 1)} times in a row, at"
    if stop.get("limit") is not None:
        return Limit(label, [(0, stop["limit"])], bad)
    line: list[Point] = []
    best: float | None = None
    for step, value in points:
        if value is not None:
            best = value if best is None else (min if lower else max)(best, value)
            line.append((step, best + (1 if lower else -1) * stop["drop"] * abs(best)))
    return Limit(label, line or [(0, None)], bad)


def _clip_line(points: Sequence[Point], factor: float) -> list[Point]:
    """What each norm was held against, as loop.Stepper does, from the norms that were logged."""
    line: list[Point] = []
    norms: list[float] = []
    for step, value in points:
        limit = clipping.limit(norms, factor)
        line.append((step, limit if math.isfinite(limit) else None))
        if value is not None and value > 0:
            norms.append(value)
    return thin(line) or [(0, None)]


def _failures(recipe: dict[str, Any]) -> float | None:
    """Of pictures that an expander's renderer makes."""
    return (recipe.get("renderer") or {}).get("max_failures")
