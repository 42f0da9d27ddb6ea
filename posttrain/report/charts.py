"""Line charts as inline SVG; colours are the page's CSS variables, so one chart serves light and dark."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from posttrain.runs.read import Point

MOST_POINTS = 400  # more are averaged in equal stretches of the run
MARKED = 30  # up to here each point gets a dot


@dataclass(frozen=True)
class Limit:
    """A line that a metric is to be held against."""

    label: str
    points: list[Point]
    """(step, value from there on); it holds before the first step too."""
    bad: Literal["above", "below"] | None = None
    """The side where something is wrong; None: the line is only there to compare with."""

    def crossed(self, points: Sequence[Point]) -> list[int]:
        """The steps at which a metric is on the bad side."""
        steps = []
        for step, value in points:
            limit = next((held for at, held in reversed(self.points) if at <= step), self.points[0][1])
            if value is None or limit is None or self.bad is None:
                continue
            if (value > limit) if self.bad == "above" else (value < limit):
                steps.append(step)
        return steps


class Frame:
    """The axes of a chart: a box of width x height CSS pixels that shrinks with the page, in which steps and values
    have their places."""

    def __init__(self, steps: Sequence[int], values: Sequence[float], width: int = 360, height: int = 190):
        ticks = nice_ticks(min(values), max(values))
        self.apart = ticks[1] - ticks[0]
        labels = [_tick(tick, self.apart) for tick in ticks]
        self.width, self.height = width, height
        self.left, self.right, self.top, self.bottom = 12 + 6.5 * max(map(len, labels)), 12, 10, 24
        self.low, self.high = min(ticks[0], *values), max(ticks[-1], *values)
        self.first, self.last = min(steps), max(steps)
        parts = []
        for tick, text in zip(ticks, labels, strict=True):
            y = f"{self.y(tick):.1f}"
            parts.append(
                f'<line class="rule" x1="{self.left}" x2="{width - self.right}" y1="{y}" y2="{y}"/>'
                f'<text x="{self.left - 6}" y="{self.y(tick) + 4:.1f}" text-anchor="end">{text}</text>'
            )
        for step in _step_ticks(self.first, self.last):
            inside = self.first < step < self.last or self.first == self.last
            anchor = "middle" if inside else ("start" if step == self.first else "end")
            parts.append(f'<text x="{self.x(step):.1f}" y="{height - 6}" text-anchor="{anchor}">{step}</text>')
        self.parts = parts

    def x(self, step: float) -> float:
        share = (step - self.first) / (self.last - self.first) if self.last > self.first else 0.5
        return self.left + (self.width - self.left - self.right) * share

    def y(self, value: float) -> float:
        return self.top + (self.height - self.top - self.bottom) * (1 - (value - self.low) / (self.high - self.low))

    def line(self, css: str, points: Sequence[Point]) -> None:
        self.parts.append(f'<path class="{css}" d="{_path(points, self.x, self.y)}"/>')

    def area(self, css: str, upper: Sequence[Point], lower: Sequence[Point]) -> None:
        """Filled between two lines over the same steps, which have a value everywhere."""
        outline = _path(upper, self.x, self.y) + _path(lower[::-1], self.x, self.y).replace("M", "L", 1)
        self.parts.append(f'<path class="{css}" d="{outline}Z"/>')

    def svg(self, about: str) -> str:
        about = html.escape(about)
        return (
            f'<svg viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{about}"><title>{about}</title>'
            f"{''.join(self.parts)}</svg>"
        )


def line_chart(
    name: str, points: list[Point], width: int = 360, height: int = 190, limits: Sequence[Limit] = ()
) -> str:
    """One metric over the steps, in a box of width x height CSS pixels that shrinks with the page.

    A long series is drawn faint with its moving mean on top. The last value stands beside the name. Limits are dashed
    lines, named below the chart; one that is so far off that the curve would be flat is only named.
    """
    whole = sorted(points, key=lambda point: point[0])
    points = thin(whole)
    values = [value for _, value in points if value is not None]
    label = html.escape(name)
    if not values:
        return f'<figure class="chart"><figcaption><b>{label}</b> no finite value</figcaption></figure>'
    reach = 2 * (max(values) - min(values) or abs(values[0]) or 1.0)
    near = [limit for limit in limits if all(_near(value, values, reach) for _, value in limit.points)]
    held = [value for limit in near for _, value in limit.points if value is not None]
    frame = Frame([step for step, _ in points], [*values, *held], width, height)
    for limit in near:
        ends = [*(step for step, _ in limit.points[1:]), frame.last]
        frame.line(
            "limit", [p for (at, v), end in zip(limit.points, ends) for p in ((max(at, frame.first), v), (end, v))]
        )
    noisy = len(values) > MARKED
    frame.line("faint" if noisy else "line", points)
    if noisy:
        frame.line("line", smooth(points))
    else:
        dots = ((frame.x(step), frame.y(value)) for step, value in points if value is not None)
        frame.parts += [f'<circle class="dot" cx="{cx:.1f}" cy="{cy:.1f}" r="2.5"/>' for cx, cy in dots]
    last = _tick(values[-1], frame.apart / 10)
    about = f"{name}: from {number(values[0])} to {number(values[-1])}, lowest {number(min(values))}, "
    return (
        f'<figure class="chart"><figcaption><b>{label}</b> <span>{last}</span></figcaption>'
        f"{frame.svg(about + f'highest {number(max(values))}')}"
        f"{''.join(_named(limit, limit in near, whole) for limit in limits)}</figure>"
    )


def _near(value: float | None, values: Sequence[float], reach: float) -> bool:
    return value is None or min(values) - reach <= value <= max(values) + reach


def _named(limit: Limit, drawn: bool, points: Sequence[Point]) -> str:
    last = limit.points[-1][1]
    text = html.escape(limit.label) + (f" {last:.6g}" if last is not None else "")
    text += "" if drawn else ", off the chart"
    if crossed := limit.crossed(points):
        text += f"; <b>{limit.bad} it at {len(crossed)} of {len(points)} points, first at step {crossed[0]}</b>"
    return f'<p class="{"limited" if drawn else "unlimited"}">{text}</p>'


def nice_ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that cover low..high; at least two.

    One value alone has a tenth of it on either side; 0, which is mostly a count, stands at the foot.
    """
    if not high - low > 1e-12 * max(abs(low), abs(high)):
        spread = abs(low) * 0.1
        low, high = low - spread, high + (spread or 1.0)
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    start, end = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) if abs(step) > 1e-9 else i * step for i in range(start, end + 1)]


def number(value: float) -> str:
    """A number short enough for a chart or a table: at most four significant digits."""
    if value == 0:
        return "0"
    if float(value).is_integer() and abs(value) < 1e5:
        return f"{value:,.0f}"
    if abs(value) >= 1e5 or abs(value) < 1e-3:
        return f"{value:.3g}"
    return f"{value:.4g}"


def _tick(value: float, apart: float) -> str:
    """A value with as many decimals as tell it from its neighbour `apart` away."""
    decimals = max(0, -math.floor(math.log10(apart) + 1e-9))
    if abs(value) < 1e-3 and decimals > 4:
        return "0" if abs(value) < apart * 1e-6 else f"{value:.3g}"
    return f"{value:,.{min(decimals, 9)}f}"


def _step_ticks(first: int, last: int) -> list[int]:
    middle = [int(t) for t in nice_ticks(first, last) if t == int(t)]
    room = (last - first) * 0.15
    return [first, *(t for t in middle if first + room < t < last - room), *([last] if last > first else [])]


def thin(points: list[Point], most: int = MOST_POINTS) -> list[Point]:
    size = math.ceil(len(points) / most)
    if size <= 1:
        return points
    thinned: list[Point] = []
    for i in range(0, len(points), size):
        values = [value for _, value in points[i : i + size] if value is not None]
        thinned.append((points[min(i + size, len(points)) - 1][0], sum(values) / len(values) if values else None))
    return thinned


def smooth(points: list[Point]) -> list[Point]:
    """Mean over a centred stretch of about a tenth of the run; cut off at its ends."""
    reach = max(1, len(points) // 20)
    smooth: list[Point] = []
    for i, (step, _) in enumerate(points):
        values = [value for _, value in points[max(0, i - reach) : i + reach + 1] if value is not None]
        smooth.append((step, sum(values) / len(values) if values else None))
    return smooth


def _path(points: Sequence[Point], x, y) -> str:
    parts, pen = [], "M"
    for step, value in points:
        if value is None:
            pen = "M"
            continue
        parts.append(f"{pen}{x(step):.1f} {y(value):.1f}")
        pen = "L"
    return "".join(parts)


# ---- several runs in one figure -----------------------------------------------------------------------------------

COLOURS = ("#c0392b", "#e67e22", "#8e44ad", "#1f6fb2", "#148f77", "#555555")
"""Of the variants, in their order; told apart on white and on dark paper."""


def lines_chart(series: Mapping[str, Mapping[str, list[list[Point]]]], columns: int = 2) -> str:
    """An SVG file of its own: a panel for each metric, in it a colour for each variant and a line for each of its runs.

    The variants are named below all panels.
    """
    width, height, gap = 330, 210, 26
    variants = list(dict.fromkeys(name for metric in series.values() for name in metric))
    rows = math.ceil(len(series) / columns)
    across = max(1, columns * width // (40 + 7 * max(map(len, variants), default=0)))
    legend = rows * (height + gap) + 16
    total = legend + 10 + 18 * ((len(variants) - 1) // across)
    parts = []
    for place, (metric, runs) in enumerate(series.items()):
        left, top = place % columns * width, place // columns * (height + gap) + gap
        parts.append(f'<text x="{left + 8}" y="{top - 8}" class="title">{html.escape(metric)}</text>')
        parts.append(_panel(runs, variants, left, top, width, height))
    for i, name in enumerate(variants):
        x, y = 8 + i % across * columns * width / across, legend + 18 * (i // across)
        parts.append(f'<rect x="{x:.0f}" y="{y - 6}" width="14" height="4" fill="{COLOURS[i % len(COLOURS)]}"/>')
        parts.append(f'<text x="{x + 20:.0f}" y="{y}">{html.escape(name)}</text>')
    style = "text{font:12px sans-serif;fill:#333}.title{font-weight:bold}.rule{stroke:#ddd}path{fill:none}"
    size = f'viewBox="0 0 {columns * width} {total}" width="{columns * width}" height="{total}"'
    paper = f'<rect width="{columns * width}" height="{total}" fill="#fff"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{style}</style>{paper}{"".join(parts)}</svg>\n'


def _panel(
    runs: Mapping[str, list[list[Point]]], variants: Sequence[str], left: float, top: float, width: int, height: int
) -> str:
    points = [point for lines in runs.values() for line in lines for point in line if point[1] is not None]
    if not points:
        return ""
    values = [value for _, value in points if value is not None]
    ticks = nice_ticks(min(values), max(values))
    x0, x1, y0, y1 = left + 52, left + width - 12, top + height - 22, top + 6
    low, high = min(ticks[0], *values), max(ticks[-1], *values)
    first, last = min(step for step, _ in points), max(step for step, _ in points)

    def x(step: float) -> float:
        return x0 + (x1 - x0) * ((step - first) / (last - first) if last > first else 0.5)

    def y(value: float) -> float:
        return y0 + (y1 - y0) * (value - low) / (high - low)

    parts = []
    for tick in ticks:
        parts.append(f'<line class="rule" x1="{x0}" x2="{x1}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        label = _tick(tick, ticks[1] - ticks[0])
        parts.append(f'<text x="{x0 - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{label}</text>')
    for step in _step_ticks(first, last):
        parts.append(f'<text x="{x(step):.1f}" y="{y0 + 16}" text-anchor="middle">{step}</text>')
    for i, name in enumerate(variants):
        for line in runs.get(name, []):
            stroke = f'stroke="{COLOURS[i % len(COLOURS)]}" stroke-width="1.6"'
            parts.append(f'<path {stroke} d="{_path(sorted(line), x, y)}"/>')
    return "".join(parts)
