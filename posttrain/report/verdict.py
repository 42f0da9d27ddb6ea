"""What an evaluation comes to in one line: what fell before what rose, each with its error."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.config.metric_names import LOOK as LOOKS
from posttrain.report.before_after import step_directories
from posttrain.report.statistics import paired

CLEAR = 0.05
"""p below which a change is called one."""
SCORES = "all_scores.json"
LEAST = 0.05
"""Share by which a look (brightness, saturation, ...) has to change to be told."""


@dataclass(frozen=True)
class Verdict:
    """Phrases, each a change; `fell` first when they are shown."""

    fell: list[str]
    rose: list[str]
    unclear: list[str]
    """Names of figures whose change is within the noise."""
    looks: list[str]

    @property
    def text(self) -> str:
        """One sentence, such as "artifact_free fell by .060 ± .020; rubric +.069 ± .015; brightness +16 %"."""
        unclear = [f"within the noise: {', '.join(self.unclear)}"] if self.unclear else []
        return "; ".join([*self.fell, *self.rose, *self.looks, *unclear]) or "no figure has two evaluations to compare"


def verdict(
    scores: Mapping[str, tuple[Sequence[float | None], Sequence[float | None]]],
    looks: Mapping[str, tuple[float | None, float | None]],
    lower: Sequence[str] = (),
) -> Verdict:
    """`scores`: by reward, each prompt's score before and after, None where there is none. `looks`: means before and
    after. `lower` names rewards of which less is better."""
    fell: list[tuple[float, str]] = []
    rose: list[tuple[float, str]] = []
    unclear = []
    for name, (before, after) in scores.items():
        # An array of floats has NaN for None.
        found = paired(np.array(after, float), np.array(before, float))
        if found is None:
            continue
        mean, error = found.difference, found.error
        told = f"{shown(abs(mean))}{'' if error is None else f' ± {shown(error)}'}"
        # An error of 0 or none (one prompt, or equal differences) tests nothing.
        if not error or found.p >= CLEAR:
            unclear.append(f"{name} {'+' if mean >= 0 else '-'}{told}")
        # `rose` has what got better: where less is better, what fell.
        elif (mean < 0) == (name in lower):
            rose.append((abs(mean) / error, f"{name} {'+' if mean > 0 else '-'}{told}"))
        else:
            fell.append((abs(mean) / error, f"{name} {'fell' if mean < 0 else 'rose'} by {told}"))
    changes = []
    for name, (before, after) in looks.items():
        if before and after is not None and abs(after / before - 1) >= LEAST:
            label = name.removeprefix("image/").replace("_", " ")
            changes.append(f"{label} {100 * (after / before - 1):+.0f} %")
    return Verdict(_clearest_first(fell), _clearest_first(rose), unclear, changes)


def _clearest_first(changes: list[tuple[float, str]]) -> list[str]:
    """The phrases of (change in standard errors, phrase)."""
    return [text for _, text in sorted(changes, reverse=True)]


def of_run(samples: Path, summary: Mapping[str, Any], lower: Sequence[str] = ()) -> str | None:
    """The verdict on a run: each reward at its last evaluation against its first, by prompt, and how images look. None
    where a run has not two evaluations with scores."""
    files = [folder / SCORES for folder in step_directories(samples) if (folder / SCORES).is_file()]
    if len(files) < 2:
        return None
    first, last = json.loads(files[0].read_text()), json.loads(files[-1].read_text())
    scores = {}
    for name in first:
        # Scores are paired by prompt, which other numbers of prompts rule out.
        if len(first[name]) == len(last.get(name, ())):
            scores[name] = first[name], last[name]
    before, after = summary.get("before") or {}, summary.get("after") or {}
    looks = {name: (before[name], after.get(name)) for name in before if name in LOOKS}
    return verdict(scores, looks, lower).text


def shown(value: float) -> str:
    """Three decimals without the zero before the point; more for small numbers."""
    text = f"{value:.3f}" if value >= 0.01 else f"{value:.2g}"
    return text.removeprefix("0") if text.startswith("0.") else text
