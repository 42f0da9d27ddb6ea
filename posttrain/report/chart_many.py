"""Charts of several things at once: areas that add up, and lines of several runs with their spread."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from posttrain.report.charts import MARKED, Frame, Point, number, smooth, thin
from posttrain.report.html import colour, legend

FEWER_POINTS = 150  # of each line where a page has many


def areas_chart(name: str, series: Mapping[str, list[Point]], width: int = 720, height: int = 240) -> str:
    """Series over the same steps on top of each other, the first at the bottom; a missing value counts as 0."""
    held = {label: dict(thin(sorted(points))) for label, points in series.items()}
    steps = sorted({step for points in held.values() for step in points})
    floor = dict.fromkeys(steps, 0.0)
    layers = []
    for points in held.values():
        top = {step: floor[step] + (points.get(step) or 0.0) for step in steps}
        layers.append((top, floor))
        floor = top
    frame = Frame(steps, [0.0, *floor.values()], width, height)
    for i, (top, below) in enumerate(layers):
        frame.area(f"fill {colour(i)}", [*top.items()], [*below.items()])
    last = ", ".join(
        f"{label} {number(points[steps[-1]] or 0)}" for label, points in held.items() if steps[-1] in points
    )
    return (
        f'<figure class="chart"><figcaption><b>{html.escape(name)}</b></figcaption>{legend(list(series))}'
        f"{frame.svg(f'{name}; at step {steps[-1]}: {last}')}</figure>"
    )


def runs_chart(name: str, lines: Sequence[Sequence[list[Point]]], width: int = 360, height: int = 190) -> str:
    """One metric of several lines, each the mean of its runs with a band from the least to the greatest of them.

    A line goes as far as all its runs have come. Long series are smoothed, each run by itself. A line without runs that
    have the metric is left out, and its colour stays free.
    """
    smoothed = [[_smoothed(points) for points in _shared(runs)] for runs in lines]
    values = [v for runs in smoothed for points in runs for _, v in points if v is not None]
    label = html.escape(name)
    if not values:
        return f'<figure class="chart"><figcaption><b>{label}</b> no finite value</figcaption></figure>'
    frame = Frame([step for runs in smoothed for points in runs for step, _ in points], values, width, height)
    told = []
    for i, runs in enumerate(smoothed):
        steps: dict[int, list[float]] = {}
        for step, value in (point for points in runs for point in points):
            if value is not None:
                steps.setdefault(step, []).append(value)
        if not steps:
            continue
        mean: list[Point] = [(step, sum(held) / len(held)) for step, held in sorted(steps.items())]
        if len(runs) > 1:
            ends = [[(step, end(held)) for step, held in sorted(steps.items())] for end in (max, min)]
            frame.area(f"band {colour(i)}", *ends)
        frame.line(f"own {colour(i)}", mean)
        if len(mean) <= MARKED:
            dots = ((frame.x(step), frame.y(value)) for step, value in mean if value is not None)
            frame.parts += [f'<circle class="own {colour(i)}" cx="{x:.1f}" cy="{y:.1f}" r="2"/>' for x, y in dots]
        told.append(number(mean[-1][1] or 0))
    about = f"{name}: at the end {', '.join(told)}"
    return f'<figure class="chart"><figcaption><b>{label}</b></figcaption>{frame.svg(about)}</figure>'


def _shared(runs: Sequence[list[Point]]) -> list[list[Point]]:
    """The points of steps that all of the runs have."""
    steps = set.intersection(*({step for step, _ in points} for points in runs)) if runs else set()
    return [[point for point in points if point[0] in steps] for points in runs]


def _smoothed(points: list[Point]) -> list[Point]:
    points = thin(sorted(points, key=lambda point: point[0]), FEWER_POINTS)
    return smooth(points) if len(points) > MARKED else points
