"""Charts of metrics over the steps: where each line, tick and area lies, in CSS pixels from the top left corner.

templates/charts.html draws them as inline SVG. Colours are the page's CSS variables, so that one chart serves light
and dark.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from posttrain.errors import counted
from posttrain.report.format import all_keys, number
from posttrain.report.render import ENVIRONMENT, colour
from posttrain.runs.read import Point

MOST_POINTS = 400  # of a line; more are averaged in equal stretches of the run
FEWER_POINTS = 150  # of each line where a page has many
MARKED = 30  # up to here each point gets a dot
OPEN_CHARTS = 16  # of a section; one with more is folded
WIDTH, HEIGHT = 360, 190
CHARACTER = 6.5  # pixels of an 11 px digit, to leave room for the labels of the value axis


@dataclass(frozen=True)
class Limit:
    """A line that a metric is compared with."""

    label: str
    points: list[Point]
    """(step, value from there on); the first one holds before the first step too."""
    bad: Literal["above", "below"] | None = None
    """The side where something is wrong; None: the line is only there to compare with."""

    def crossed(self, points: Sequence[Point]) -> list[int]:
        """The steps at which a metric is on the bad side."""
        steps = []
        for step, value in points:
            limit = self._at(step)
            if value is None or limit is None or self.bad is None:
                continue
            if (value > limit) if self.bad == "above" else (value < limit):
                steps.append(step)
        return steps

    def _at(self, step: int) -> float | None:
        limit = self.points[0][1]
        for start, value in self.points:
            if start <= step:
                limit = value
        return limit


@dataclass(frozen=True)
class Note:
    """What stands below a chart about one of its limits."""

    label: str
    drawn: bool
    crossed: str = ""


@dataclass(frozen=True)
class Chart:
    name: str
    frame: Frame | None
    """None where no value is finite."""
    about: str = ""
    """The chart in words, for screen readers."""
    last: str = ""
    legend: list[str] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    definition: str = ""
    """Of the metric, shown when the pointer is over its name."""


@dataclass(frozen=True)
class Section:
    """Charts under one heading."""

    title: str
    charts: list[Chart]
    most_open: int = OPEN_CHARTS

    @property
    def folded(self) -> bool:
        return len(self.charts) > self.most_open


class Frame:
    """The axes of a chart, a box of width x height pixels that shrinks with the page, and what is drawn in it."""

    def __init__(self, steps: Sequence[int], values: Sequence[float], width: int = WIDTH, height: int = HEIGHT):
        ticks = nice_ticks(min(values), max(values))
        self.tick_distance = ticks[1] - ticks[0]
        labels = [_tick_label(tick, self.tick_distance) for tick in ticks]
        longest = max(map(len, labels))
        self.width, self.height = width, height
        self.left, self.right, self.top, self.bottom = 12 + CHARACTER * longest, 12, 10, 24
        self.low, self.high = min(ticks[0], *values), max(ticks[-1], *values)
        self.first, self.last = min(steps), max(steps)
        self.value_ticks: list[dict[str, str]] = []
        # Rounded to a tenth of a pixel, as all coordinates: a page has tens of thousands of them.
        for tick, label in zip(ticks, labels):
            y = self.y(tick)
            # Text is placed by its baseline; 4 px lower its middle is at the line.
            self.value_ticks.append({"label": label, "y": f"{y:.1f}", "text_y": f"{y + 4:.1f}"})
        self.step_ticks = list(map(self._step_tick, _step_ticks(self.first, self.last)))
        self.paths: list[dict[str, str]] = []
        self.dots: list[dict[str, Any]] = []

    def _step_tick(self, step: int) -> dict[str, Any]:
        anchor = "middle"
        # Labels at the ends are aligned inwards, so that they do not leave the box.
        if self.first < self.last and step in (self.first, self.last):
            anchor = "start" if step == self.first else "end"
        return {"step": step, "x": f"{self.x(step):.1f}", "anchor": anchor}

    def x(self, step: float) -> float:
        share = (step - self.first) / (self.last - self.first) if self.last > self.first else 0.5
        return self.left + (self.width - self.left - self.right) * share

    def y(self, value: float) -> float:
        # SVG counts from the top.
        share = 1 - (value - self.low) / (self.high - self.low)
        return self.top + (self.height - self.top - self.bottom) * share

    def add_line(self, css: str, points: Sequence[Point]) -> None:
        self.paths.append({"css": css, "d": _path(points, self.x, self.y)})

    def add_area(self, css: str, upper: Sequence[Point], lower: Sequence[Point]) -> None:
        """Filled between two lines over the same steps, which have a value everywhere."""
        back = _path(lower[::-1], self.x, self.y).replace("M", "L", 1)
        self.paths.append({"css": css, "d": f"{_path(upper, self.x, self.y)}{back}Z"})

    def add_dots(self, css: str, points: Sequence[Point], radius: float) -> None:
        for step, value in points:
            if value is not None:
                self.dots.append({"css": css, "x": f"{self.x(step):.1f}", "y": f"{self.y(value):.1f}", "r": radius})


def line_chart(
    name: str, points: list[Point], width: int = WIDTH, height: int = HEIGHT, limits: Sequence[Limit] = (),
    definition: str = "",
) -> Chart:  # fmt: skip
    """One metric over the steps.

    A long series is drawn faint with its moving mean on top. The last value stands beside the name. Limits are dashed
    lines, named below the chart; one that is so far away that the curve would be flat is only named.
    """
    every_point = sorted(points, key=lambda point: point[0])
    points = thin(every_point)
    values = _values(points)
    if not values:
        return Chart(name, None, definition=definition)
    # Up to twice the curve's own range away; farther limits would flatten it.
    reach = 2 * (max(values) - min(values) or abs(values[0]) or 1.0)
    near = [limit for limit in limits if _is_near(limit, values, reach)]
    span = list(values)
    for limit in near:
        span += _values(limit.points)
    frame = Frame(_steps(points), span, width, height)
    for limit in near:
        frame.add_line("limit", _stairs(limit.points, frame.first, frame.last))
    if len(values) > MARKED:
        frame.add_line("faint", points)
        frame.add_line("line", smooth(points))
    else:
        frame.add_line("line", points)
        frame.add_dots("dot", points, 2.5)
    about = f"{name}: from {number(values[0])} to {number(values[-1])}"
    about += f", lowest {number(min(values))}, highest {number(max(values))}"
    # Counted over every point: the mean of a stretch may hide a step beyond the limit.
    notes = [_note(limit, limit in near, every_point) for limit in limits]
    # One decimal more than on the axis: the last value is what people read off.
    last = _tick_label(values[-1], frame.tick_distance / 10)
    return Chart(name, frame, about, last, notes=notes, definition=definition)


def areas_chart(name: str, series: Mapping[str, list[Point]], width: int = 720, height: int = 240) -> Chart:
    """Series over the same steps on top of each other, the first at the bottom; a missing value counts as 0."""
    by_label = {label: dict(thin(sorted(points))) for label, points in series.items()}
    steps = sorted(all_keys(by_label.values()))
    floor = dict.fromkeys(steps, 0.0)
    layers = []
    for points in by_label.values():
        # Each area stands on the sum of those below it.
        top = {step: floor[step] + (points.get(step) or 0.0) for step in steps}
        layers.append((top, floor))
        floor = top
    # The axis begins at 0, since the heights of areas are compared.
    frame = Frame(steps, [0.0, *floor.values()], width, height)
    for i, (top, bottom) in enumerate(layers):
        frame.add_area(f"fill {colour(i)}", list(top.items()), list(bottom.items()))
    last = steps[-1]
    latest = [f"{label} {number(points[last] or 0)}" for label, points in by_label.items() if last in points]
    return Chart(name, frame, f"{name}; at step {last}: {', '.join(latest)}", legend=list(series))


def runs_chart(
    name: str, lines: Sequence[Sequence[list[Point]]], width: int = WIDTH, height: int = HEIGHT, definition: str = ""
) -> Chart:
    """One metric of several lines, each the mean of its runs with a band from the smallest to the largest of them.

    A line goes as far as all its runs have come. Long series are smoothed, each run by itself. A line without runs that
    have the metric is left out, and its colour stays free.
    """
    smoothed: list[list[list[Point]]] = []
    all_points: list[Point] = []
    for runs in lines:
        smoothed.append(list(map(_smoothed, _at_shared_steps(runs))))
        for points in smoothed[-1]:
            all_points += points
    values = _values(all_points)
    if not values:
        return Chart(name, None, definition=definition)
    frame = Frame(_steps(all_points), values, width, height)
    ends = []
    for i, runs in enumerate(smoothed):
        by_step: dict[int, list[float]] = {}
        for points in runs:
            for step, value in points:
                if value is not None:
                    by_step.setdefault(step, []).append(value)
        if not by_step:
            continue
        mean: list[Point] = []
        upper: list[Point] = []
        lower: list[Point] = []
        for step, of_runs in sorted(by_step.items()):
            mean.append((step, sum(of_runs) / len(of_runs)))
            upper.append((step, max(of_runs)))
            lower.append((step, min(of_runs)))
        # The band first, so that the line is drawn over it.
        if len(runs) > 1:
            frame.add_area(f"band {colour(i)}", upper, lower)
        frame.add_line(f"own {colour(i)}", mean)
        if len(mean) <= MARKED:
            frame.add_dots(f"own {colour(i)}", mean, 2)
        ends.append(number(mean[-1][1] or 0))
    return Chart(name, frame, f"{name}: at the end {', '.join(ends)}", definition=definition)


# ---- a figure of several panels ----------------------------------------------------------------------------------

PAPER_COLOURS = ("#c0392b", "#e67e22", "#8e44ad", "#1f6fb2", "#148f77", "#555555")
"""Of the variants, in their order; they differ on white and on dark paper."""


def panels_svg(series: Mapping[str, Mapping[str, list[list[Point]]]], columns: int = 2) -> str:
    """An SVG file of its own: a panel for each metric, in it a colour for each variant and a line for each of its runs.

    The variants are named below all panels.
    """
    width, height, gap = 330, 210, 26
    variants = all_keys(series.values())
    panels = []
    for place, (metric, runs) in enumerate(series.items()):
        x, y = place % columns * width, place // columns * (height + gap) + gap
        panels.append({"title": metric, "x": x, "y": y, "frame": _panel(runs, variants, width, height)})
    rows = math.ceil(len(series) / columns)
    longest = max(map(len, variants), default=0)
    # An entry of the legend is a key of 40 px and about 7 px a character.
    across = max(1, columns * width // (40 + 7 * longest))
    legend_top = rows * (height + gap) + 16
    legend = []
    for i, name in enumerate(variants):
        x, y = 8 + i % across * columns * width // across, legend_top + 18 * (i // across)
        legend.append({"name": name, "x": x, "y": y})
    total = legend_top + 10 + 18 * ((len(variants) - 1) // across)
    template = ENVIRONMENT.get_template("panels.svg")
    return template.render(
        panels=panels, legend=legend, width=columns * width, height=total, colours=PAPER_COLOURS
    ).lstrip()


def _panel(runs: Mapping[str, list[list[Point]]], variants: Sequence[str], width: int, height: int) -> Frame | None:
    known: list[Point] = []
    for lines in runs.values():
        for points in lines:
            known += [point for point in points if point[1] is not None]
    if not known:
        return None
    frame = Frame(_steps(known), _values(known), width, height)
    for i, name in enumerate(variants):
        for points in runs.get(name, []):
            frame.add_line(colour(i), sorted(points))
    return frame


# ---- parts of charts -----------------------------------------------------------------------------------------------


def _steps(points: Sequence[Point]) -> list[int]:
    return [step for step, _ in points]


def _values(points: Sequence[Point]) -> list[float]:
    return [value for _, value in points if value is not None]


def _is_near(limit: Limit, values: Sequence[float], reach: float) -> bool:
    low, high = min(values) - reach, max(values) + reach
    return all(low <= value <= high for value in _values(limit.points))


def _stairs(points: Sequence[Point], first: int, last: int) -> list[Point]:
    """A limit as a line of horizontal stretches from `first` to `last`."""
    stairs: list[Point] = []
    ends = [*_steps(points[1:]), last]
    for (start, value), end in zip(points, ends):
        stairs += [(max(start, first), value), (end, value)]
    return stairs


def _note(limit: Limit, drawn: bool, points: Sequence[Point]) -> Note:
    last = limit.points[-1][1]
    label = limit.label if last is None else f"{limit.label} {last:.6g}"
    steps = limit.crossed(points)
    crossed = ""
    if steps:
        crossed = f"{limit.bad} it at {len(steps)} of {counted(len(points), 'point')}, first at step {steps[0]}"
    return Note(label, drawn, crossed)


def nice_ticks(low: float, high: float) -> list[float]:
    """About five round numbers (1, 2 or 5 times a power of ten apart) that cover low..high; at least two.

    One value alone gets a tenth of it on either side; 0, which is mostly a count, stands at the bottom.
    """
    # Values that differ by rounding alone would get ticks whose labels are all the same.
    if not high - low > 1e-12 * max(abs(low), abs(high)):
        spread = abs(low) * 0.1
        low, high = low - spread, high + (spread or 1.0)
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    # The small amounts keep an end that is a tick itself from being rounded to the next one.
    start, end = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    # Rounded, since 3 * 0.1 is 0.30000000000000004; steps too small for twelve decimals stay as they are.
    return [round(i * step, 12) if abs(step) > 1e-9 else i * step for i in range(start, end + 1)]


def _tick_label(value: float, distance: float) -> str:
    """A value with as many decimals as distinguish it from its neighbour `distance` away."""
    # log10 of an exact power of ten may come out a little below it.
    decimals = max(0, -math.floor(math.log10(distance) + 1e-9))
    if abs(value) < 1e-3 and decimals > 4:
        return "0" if abs(value) < distance * 1e-6 else f"{value:.3g}"
    return f"{value:,.{min(decimals, 9)}f}"


def _step_ticks(first: int, last: int) -> list[int]:
    """Both ends, and between them whole round numbers that are not too near to an end for their labels."""
    if first == last:
        return [first]
    room = (last - first) * 0.15
    between = []
    for tick in nice_ticks(first, last):
        if tick == int(tick) and first + room < tick < last - room:
            between.append(int(tick))
    return [first, *between, last]


def thin(points: list[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most `most` points: means of equal stretches, each at the stretch's last step."""
    size = math.ceil(len(points) / most)
    if size <= 1:
        return points
    thinned: list[Point] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        thinned.append((stretch[-1][0], _mean(stretch)))
    return thinned


def smooth(points: list[Point]) -> list[Point]:
    """Mean over a centred stretch of about a tenth of the run; it is shorter at both ends."""
    reach = max(1, len(points) // 20)
    smoothed: list[Point] = []
    for i, (step, _) in enumerate(points):
        stretch = points[max(0, i - reach) : i + reach + 1]
        smoothed.append((step, _mean(stretch)))
    return smoothed


def _mean(points: Sequence[Point]) -> float | None:
    values = _values(points)
    return sum(values) / len(values) if values else None


def _at_shared_steps(runs: Sequence[list[Point]]) -> list[list[Point]]:
    """The points of steps that all of the runs have; a mean would jump where one run ends."""
    if not runs:
        return []
    shared = set(_steps(runs[0])).intersection(*map(_steps, runs))
    kept = []
    for points in runs:
        kept.append([point for point in points if point[0] in shared])
    return kept


def _smoothed(points: list[Point]) -> list[Point]:
    # By step alone: values may be None, which has no order.
    points = thin(sorted(points, key=lambda point: point[0]), FEWER_POINTS)
    return smooth(points) if len(points) > MARKED else points


def _path(points: Sequence[Point], x: Callable[[float], float], y: Callable[[float], float]) -> str:
    """An SVG path; a missing value is a gap."""
    parts, pen = [], "M"
    for step, value in points:
        if value is None:
            pen = "M"
            continue
        parts.append(f"{pen}{x(step):.1f} {y(value):.1f}")
        pen = "L"
    return "".join(parts)
