"""Images before and after training, of the same prompts and seeds, with what the rewards said of each.

One slider of the page uncovers all images of a grid from the one to the other; without script both stand side by side.
The rewards' answers appear when the pointer is over a card or it has the keyboard's focus.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.report.format import all_keys, is_number
from posttrain.report.render import image
from posttrain.runs.read import read_rows

RUBRIC = ("requirements", "answers")
MOST_PAIRS = 24  # images shown of each side
MOST_OF_TEACHER = 8


@dataclass(frozen=True)
class Sample:
    """An image that a run left in its samples."""

    file: Path
    prompt: str
    seed: Any
    scores: dict[str, Any]
    """By reward: `score`, and the details that it returned."""

    @property
    def key(self) -> tuple[str, Any]:
        """Samples of different steps are compared if this is the same."""
        return self.prompt, self.seed


def read_samples(directory: Path) -> list[Sample]:
    """The samples of one step, in order; empty if the step has none."""
    if not directory.is_dir():
        return []
    rows, scores = read_rows(directory.parent / "prompts.json"), read_rows(directory / "scores.json")
    samples = []
    for i, file in enumerate(sorted(directory.glob("*.png"))):
        row = rows[i] if i < len(rows) else {}
        by_reward = scores[i] if i < len(scores) else {}
        # Anyone may have edited the file; what is not an object is left out.
        details = {name: value for name, value in by_reward.items() if isinstance(value, dict)}
        samples.append(Sample(file, row.get("prompt", file.name), row.get("seed", "?"), details))
    return samples


def step_directories(samples: Path) -> list[Path]:
    """The directories of the steps that have samples, first to last."""
    return sorted(samples.glob("step-*")) if samples.is_dir() else []


def step_of(directory: Path) -> int:
    return int(directory.name.removeprefix("step-"))


def step_name(directory: Path) -> str:
    return f"step {step_of(directory)}"


def by_key(samples: Iterable[Sample]) -> dict[tuple[str, Any], Sample]:
    return {sample.key: sample for sample in samples}


def matched(before: Sequence[Sample], after: Sequence[Sample]) -> list[tuple[Sample, Sample]]:
    """The samples of the same prompt and seed."""
    partners = by_key(after)
    # Some samples have none: the two sides may have drawn other prompts.
    return [(sample, partners[sample.key]) for sample in before if sample.key in partners]


def run_images(samples: Path) -> dict[str, Any] | None:
    """Images of a run at its first and its last step, and its teacher's; None if it has none."""
    directories = step_directories(samples)
    if not directories:
        return None
    first, last = directories[0], directories[-1]
    pairs = matched(read_samples(first), read_samples(last))
    teacher = matched(read_samples(samples / "teacher"), read_samples(last))
    # Pages grow with each image inside them, so only the first ones are shown.
    return {
        "more": f", {MOST_PAIRS} of {len(pairs)} shown" if len(pairs) > MOST_PAIRS else "",
        "only_step": step_name(first) if first == last else None,
        "grid": grid(pairs[:MOST_PAIRS], step_name(first), step_name(last)),
        "teacher": grid(teacher[:MOST_OF_TEACHER], "teacher", step_name(last)),
        "sheets": sheets(samples.parent / "grids"),
    }


def sheets(folder: Path) -> list[dict[str, Any]]:
    """The last grid of each kind that is not the evaluations' own: on Turbo, at several strengths."""
    last: dict[str, Path] = {}
    # Steps have leading zeros, so that the last name of a kind is the last step.
    for file in sorted(folder.glob("*-step-*.png")):
        last[file.name.rpartition("-step-")[0]] = file
    return [{"alt": kind, **image(file, 1024)} for kind, file in last.items()]


def grid(pairs: Sequence[tuple[Sample, Sample]], before: str, after: str, largest: int = 512) -> dict[str, Any] | None:
    """Cards of two images each. Both may be the same image: then there is nothing to compare, and no slider."""
    if not pairs:
        return None
    cards = [_card(old, new, before, after, largest) for old, new in pairs]
    # A run of one evaluation has the same files on both sides.
    has_slider = any(old.file != new.file for old, new in pairs)
    return {"before": before, "after": after, "has_slider": has_slider, "cards": cards}


def _card(old: Sample, new: Sample, before: str, after: str, largest: int) -> dict[str, Any]:
    sides = {before: old} if old.file == new.file else {before: old, after: new}
    names = all_keys([old.scores, new.scores])
    scores = []
    for name in names:
        values = []
        for side in sides.values():
            # A reward that failed on one side alone still has a row.
            value = side.scores.get(name, {}).get("score")
            values.append(f"{value:.2f}" if is_number(value) else "–")
        scores.append({"name": name, "values": values})
    return {
        "images": [{"alt": name, **image(side.file, largest)} for name, side in sides.items()],
        "prompt": new.prompt,
        "seed": new.seed,
        "scores": scores,
        "titles": list(sides) if len(sides) > 1 else [],
        "answers": _answers(list(sides.values()), names),
    }


def _answers(sides: Sequence[Sample], names: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of a table: what each reward said of the images, requirement by requirement where it asked about some."""
    rows = []
    for name in names:
        details = [side.scores.get(name, {}) for side in sides]
        rows.append({"reward": name, "cells": _cells(details, "score")})
        rubrics = list(map(_rubric, details))
        for question in all_keys(rubrics):
            rows.append({"question": question, "cells": _cells(rubrics, question, is_answer=True)})
        for key in all_keys(details):
            # The rubric's two lists have been shown, question by question.
            if key == "score" or (key in RUBRIC and any(rubrics)):
                continue
            rows.append({"question": key, "cells": _cells(details, key)})
    return rows


def _rubric(details: dict[str, Any]) -> dict[str, Any]:
    """The answer to each requirement, if the reward returned some."""
    requirements, answers = map(details.get, RUBRIC)
    if not (isinstance(requirements, list) and isinstance(answers, list)):
        return {}
    return dict(zip(map(str, requirements), answers))


def _cells(sides: Sequence[dict[str, Any]], key: str, is_answer: bool = False) -> list[dict[str, str]]:
    return [_cell(side.get(key), is_answer) for side in sides]


def _cell(value: Any, is_answer: bool = False) -> dict[str, str]:
    """An answer that is more likely no than yes stands out."""
    if is_number(value):
        return {"css": "n no" if is_answer and value < 0.5 else "n", "text": f"{value:.2f}"}
    if isinstance(value, list):
        value = ", ".join(map(str, value))
    return {"css": "", "text": "–" if value in (None, "") else str(value)}
