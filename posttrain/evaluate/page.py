"""The table and the page of an evaluation, from what evaluation.json holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.config import metrics
from posttrain.evaluate.config import EvaluateConfig
from posttrain.evaluate.scoring import Scored
from posttrain.report.format import all_keys
from posttrain.report.public import public
from posttrain.report.render import image, write_page
from posttrain.report.verdict import shown

PAIRED = ["", "against", "figure", "difference", "95 %", "p", "wins", "prompts"]


def table(results: dict[str, Any]) -> str:
    """Markdown: a line a subject, each figure with its standard error; below it each against the first."""
    subjects, names = results["subjects"], _names(results)
    head = ["", *names, "seconds an image"]
    lines = []
    for name, own in subjects.items():
        seconds = own.get("seconds_image")
        lines.append([name, *_figure_cells(own, names), "" if seconds is None else f"{seconds:.2f}"])
    text = _markdown(head, lines)
    figures, rows = suite_rows(results)
    if rows:
        text += "\n" + _markdown([results["suite"]["kind"], *figures], rows)
    if results["paired"]:
        text += "\nPaired by prompt and noise:\n\n" + _markdown(PAIRED, paired_rows(results))
        for name, told in results["verdicts"].items():
            text += f"\n{name}: {told}\n"
    for told in results["failed"]:
        text += f"\nfailed: {told}\n"
    return text


def suite_rows(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Names of a suite's figures, and of each subject its name and these figures; both empty without a suite."""
    suites = {name: own["suite"] for name, own in results["subjects"].items() if "suite" in own}
    figures = all_keys(suites.values())
    rows = []
    for name, own in suites.items():
        cells = [_number(own.get(figure)) for figure in figures]
        rows.append([name, *cells])
    return figures, rows


def paired_rows(results: dict[str, Any]) -> list[list[str]]:
    rows = []
    for name, own in results["paired"].items():
        for figure, found in own["figures"].items():
            if found is None:
                # As many cells as PAIRED has, since Markdown tables have no cells that span columns.
                rows.append([name, own["against"], figure, "no prompt has both", "", "", "", "0"])
                continue
            error = "" if found["error"] is None else f" ± {shown(found['error'])}"
            sign = "-" if found["difference"] < 0 else "+"
            rows.append(
                [
                    name, own["against"], figure, f"{sign}{shown(abs(found['difference']))}{error}",
                    f"{found['low']:+.3f} to {found['high']:+.3f}", f"{found['p']:.2g}", f"{found['win_rate']:.2f}",
                    str(found["prompts"]),
                ]
            )  # fmt: skip
    return rows


def write(path: Path, config: EvaluateConfig, scored: Sequence[Scored], results: dict[str, Any]) -> None:
    names = _names(results)
    rows = []
    for name, own in results["subjects"].items():
        # A place may be a path that names a user.
        drawn = [public(own["place"]), own.get("steps"), own.get("guidance"), own.get("seconds_image")]
        rows.append([name, *_figure_cells(own, names), *drawn])
    figures, of_suite = suite_rows(results)
    write_page(
        path, "evaluate.html", f"evaluation of {', '.join(results['subjects'])}",
        subjects=list(results["subjects"]),
        prompts=results["prompts"], images=results["images"],
        verdicts=list(results["verdicts"].items()),
        failed=results["failed"],
        head=["", *names, "place", "steps", "guidance", "seconds an image"],
        rows=rows,
        suite=results.get("suite"),
        suite_head=["", *figures],
        suite_rows=of_suite,
        paired_head=PAIRED,
        paired=paired_rows(results),
        strips=strips(config, scored, results),
        definitions=metrics.definitions([f"eval/{name}" for name in names]),
    )  # fmt: skip


def strips(config: EvaluateConfig, scored: Sequence[Scored], results: dict[str, Any]) -> list[dict[str, Any]]:
    """Of each subject the prompts whose scores differ most from those that it is compared with, in standard deviations
    of each reward's differences: those that fell most first."""
    by_name = {one.images.subject.name: one for one in scored}
    sections = []
    for subject, own in results["paired"].items():
        first, other = by_name[own["against"]], by_name[subject]
        total = np.zeros(len(first.images.records))  # each prompt's change, in spreads of the rewards' differences
        for name in first.rows:
            differences = other.by_prompt(name) - first.by_prompt(name)
            if np.isnan(differences).all():
                continue  # np.nanstd would warn
            # Rewards have different scales, so each is measured in its own spread before they are added.
            spread = np.nanstd(differences)
            if spread > 0:
                total += np.nan_to_num(differences / spread)
        order = sorted(range(len(total)), key=lambda i: -abs(total[i]))[: config.shown]
        cards = []
        for i in sorted(order, key=lambda i: total[i]):
            sides = [_side(first, i), _side(other, i)]
            cards.append({"prompt": first.images.records[i].prompt, "images": sides})
        sections.append({"name": subject, "against": own["against"], "cards": cards})
    return sections


def _side(scored: Scored, i: int) -> dict[str, Any]:
    """Prompt i's first image of a subject, with the prompt's scores."""
    scores = [f"{name} {_number(scored.by_prompt(name)[i])}" for name in scored.rows]
    shown_image = image(scored.images.paths[i, 0], 256)
    return {"alt": scored.images.subject.name, "scores": ", ".join(scores), **shown_image}


def _names(results: dict[str, Any]) -> list[str]:
    return all_keys(own["figures"] for own in results["subjects"].values())


def _figure_cells(own: dict[str, Any], names: Sequence[str]) -> list[str]:
    return [_with_error(own["figures"].get(name)) for name in names]


def _with_error(figure: dict[str, Any] | None) -> str:
    if figure is None or figure["mean"] is None:
        return "–"
    error = "" if figure["error"] is None else f" ± {shown(figure['error'])}"
    failed = f" ({figure['failed']} failed)" if figure["failed"] else ""
    return f"{figure['mean']:.3f}{error}{failed}"


def _number(value: float | None) -> str:
    # NaN, the only value that differs from itself, is a prompt without a score.
    return "–" if value is None or value != value else f"{value:.3f}"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    text = ""
    for line in (head, ["---"] * len(head), *rows):
        text += f"| {' | '.join(line)} |\n"
    return text
