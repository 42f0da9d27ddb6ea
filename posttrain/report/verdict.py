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
        found = paired(np.array(after, float), np.array(before, float))  # None becomes NaN
        if found is None:
            continue
        mean, error = found.difference, found.error
        told = f"{shown(abs(mean))}{'' if error is None else f' ± {shown(error)}'}"
        if not error or found.p >= CLEAR:
            unclear.append(f"{name} {'+' if mean >= 0 else '-'}{told}")
        elif (mean < 0) == (name in lower):
            rose.append((abs(mean) / error, f"{name} {'+' if mean > 0 else '-'}{told}"))
        else:
            fell.append((abs(mean) / error, f"{name} {'fell' if mean < 0 else 'rose'} by {told}"))
    changes = []
    for name, (before, after) in looks.items():
        if before and after is not None and abs(after / before - 1) >= LEAST:
            changes.append(
                f"{name.removeprefix('image/').replace('_', ' ')} {after / before - 1:+.0%}".replace("%", " %")
            )
    ordered = [[text for _, text in sorted(part, reverse=True)] for part in (fell, rose)]
    return Verdict(ordered[0], ordered[1], unclear, changes)


def of_run(samples: Path, summary: Mapping[str, Any], lower: Sequence[str] = ()) -> str | None:
    """The verdict on a run: each reward at its last evaluation against its first, by prompt, and how images look. None
    where a run has not two evaluations with scores."""
    directories = [folder for folder in step_directories(samples) if (folder / SCORES).is_file()]
    if len(directories) < 2:
        return None
    first, last = (json.loads((folder / SCORES).read_text()) for folder in (directories[0], directories[-1]))
    scores = {name: (first[name], last[name]) for name in first if len(first[name]) == len(last.get(name, ()))}
    before, after = (summary.get(side) or {} for side in ("before", "after"))
    looks = {name: (before[name], after.get(name)) for name in before if name in LOOKS}
    return verdict(scores, looks, lower).text


def shown(value: float) -> str:
    """Three decimals without the zero before the point; more for small numbers."""
    text = f"{value:.3f}" if value >= 0.01 else f"{value:.2g}"
    return text.removeprefix("0") if text.startswith("0.") else text
