"""Pictures before and after in one grid, with one slider that wipes all of them from the one to the other.

Where there is no script both stand side by side. What the rewards said of a picture comes up when the pointer is over
it or it has the keyboard's focus.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.report.html import picture, text
from posttrain.runs.read import read_rows

RUBRIC = ("requirements", "answers")
MOST_PAIRS = 24  # pictures shown of each side


@dataclass(frozen=True)
class Sample:
    """A picture that a run left in its samples."""

    file: Path
    prompt: str
    seed: Any
    said: dict[str, Any]
    """By reward: `score`, and what else it told."""


def read_samples(directory: Path) -> list[Sample]:
    """Of one step, in order; empty where it drew none."""
    if not directory.is_dir():
        return []
    rows, said = read_rows(directory.parent / "prompts.json"), read_rows(directory / "scores.json")
    samples = []
    for i, file in enumerate(sorted(directory.glob("*.png"))):
        row = rows[i] if i < len(rows) else {}
        told = {name: one for name, one in (said[i] if i < len(said) else {}).items() if isinstance(one, dict)}
        samples.append(Sample(file, row.get("prompt", file.name), row.get("seed", "?"), told))
    return samples


def steps(samples: Path) -> list[Path]:
    """The directories of the steps that drew, first to last."""
    return sorted(samples.glob("step-*")) if samples.is_dir() else []


def step_of(directory: Path) -> int:
    return int(directory.name.removeprefix("step-"))


def step_name(directory: Path) -> str:
    return f"step {step_of(directory)}"


def matched(before: Sequence[Sample], after: Sequence[Sample]) -> list[tuple[Sample, Sample]]:
    """The pictures of the same prompt and seed."""
    then = {(sample.prompt, sample.seed): sample for sample in after}
    return [(sample, then[key]) for sample in before if (key := (sample.prompt, sample.seed)) in then]


def pictures(samples: Path) -> str:
    """The section of a run's pictures at its first and its last step; empty where it drew none."""
    found = steps(samples)
    if not found:
        return ""
    first, last = found[0], found[-1]
    pairs = matched(read_samples(first), read_samples(last))
    parts = [f"<h2>Images</h2><p>The same prompts and seeds at the first and the last step{_more(pairs)}.</p>"]
    if first == last:
        parts[0] = f"<h2>Images</h2><p>At {step_name(first)}{_more(pairs)}.</p>"
    parts.append(wipe_grid(pairs[:MOST_PAIRS], step_name(first), step_name(last)))
    if teacher := matched(read_samples(samples / "teacher"), read_samples(last)):
        parts.append(f"<h3>The teacher and the student</h3>{wipe_grid(teacher[:8], 'teacher', step_name(last))}")
    return "".join(parts)


def _more(pairs: Sequence[Any]) -> str:
    return f", {MOST_PAIRS} of {len(pairs)} shown" if len(pairs) > MOST_PAIRS else ""


def wipe_grid(pairs: Sequence[tuple[Sample, Sample]], before: str, after: str, largest: int = 512) -> str:
    """Cards of two pictures each, which may be the same one: then there is nothing to wipe."""
    if not pairs:
        return ""
    cards = [_card(old, new, before, after, largest) for old, new in pairs]
    if all(old.file == new.file for old, new in pairs):
        return f'<div class="wipe"><div class="pairs">{"".join(cards)}</div></div>'
    return wiped(before, after, f'<div class="pairs">{"".join(cards)}</div>')


def wiped(before: str, after: str, grid: str) -> str:
    """A grid whose elements of the class `pair` have an `old` and a `new` side, under the slider that wipes them."""
    name = f"from {before} to {after}"
    return (
        f'<div class="wipe"><label class="wiper"><span>{text(before)}</span>'
        f'<input type="range" min="0" max="100" value="50" aria-label="{text(name)}" data-after="{text(after)}">'
        f"<span>{text(after)}</span></label>{grid}</div>"
    )


def both(old: str, new: str, before: str, after: str) -> str:
    """The two sides of a `pair`, each with its name for readers without script."""
    sides = ((css, html, name) for css, html, name in (("old", old, before), ("new", new, after)))
    cells = "".join(f'<div class="{css}">{html}<div class="step">{text(name)}</div></div>' for css, html, name in sides)
    return f'<div class="pair">{cells}</div>'


def _card(old: Sample, new: Sample, before: str, after: str, largest: int) -> str:
    if old.file == new.file:
        shown = f"<div>{picture(old.file, before, largest)}</div>"
    else:
        shown = both(picture(old.file, before, largest), picture(new.file, after, largest), before, after)
    names = list(dict.fromkeys([*old.said, *new.said]))
    sides = [old] if old.file == new.file else [old, new]
    told = [f"<li>{text(n)} <b>{' → '.join(_score(side, n) for side in sides)}</b></li>" for n in names]
    scores = f'<ul class="said">{"".join(told)}</ul>{_answers(sides, names, [before, after] if sides[1:] else [])}'
    said = f'<div class="told">{scores}</div>' if names else ""
    caption = f"<figcaption>{text(new.prompt)} <span>seed {text(new.seed)}</span></figcaption>"
    focus = ' tabindex="0"' if names else ""
    return f'<figure class="card"{focus}>{shown}{caption}{said}</figure>'


def _answers(sides: Sequence[Sample], names: Sequence[str], titles: Sequence[str]) -> str:
    """What each reward said of the pictures, requirement by requirement where it asked about some."""
    rows = []
    for name in names:
        said = [side.said.get(name, {}) for side in sides]
        rows.append(f"<tr><th>{text(name)}</th>{''.join(_answer(one.get('score')) for one in said)}</tr>")
        asked = [_asked(one) for one in said]
        for question in dict.fromkeys(question for answers in asked for question in answers):
            answers = "".join(_answer(one.get(question), asked=True) for one in asked)
            rows.append(f"<tr><td>{text(question)}</td>{answers}</tr>")
        others = dict.fromkeys(
            key for one in said for key in one if key != "score" and not (key in RUBRIC and _asked(one))
        )
        rows += [f"<tr><td>{text(key)}</td>{''.join(_answer(one.get(key)) for one in said)}</tr>" for key in others]
    head = f"<tr><td></td>{''.join(f'<td>{text(title)}</td>' for title in titles)}</tr>" if titles else ""
    return f'<div class="answers" role="tooltip"><table>{head}{"".join(rows)}</table></div>'


def _asked(said: dict[str, Any]) -> dict[str, Any]:
    """The answer to each requirement, if the reward told of some."""
    requirements, answers = (said.get(key) for key in RUBRIC)
    if not (isinstance(requirements, list) and isinstance(answers, list)):
        return {}
    return {str(question): answer for question, answer in zip(requirements, answers)}


def _answer(value: Any, asked: bool = False) -> str:
    """A cell; what is more likely a no stands out."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f'<td class="n{" no" if asked and value < 0.5 else ""}">{value:.2f}</td>'
    if isinstance(value, list):
        value = ", ".join(map(str, value))
    return f"<td>{'–' if value in (None, '') else text(value)}</td>"


def _score(sample: Sample, name: str) -> str:
    score = sample.said.get(name, {}).get("score")
    return f"{score:.2f}" if isinstance(score, int | float) else "–"
