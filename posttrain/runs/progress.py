"""What people see of a run: progress bars, the grid of samples, and numbers and tables as text."""

from __future__ import annotations

import textwrap
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.progress import BarColumn, TextColumn, track
from rich.progress import Progress as Bar

T = TypeVar("T")
SHOWN = ("reward", "accuracy")
QUIET_SECONDS = 10.0  # without a terminal: one line in so many seconds


class Progress:
    """Reward or accuracy, seconds a step, time left: a bar on a terminal, otherwise a line about every ten seconds."""

    def __init__(self, total: int, step: int = 0, console: Console | None = None):
        self.total = total
        self.console = console or Console(stderr=True)
        # 21 times are the ends of the last 20 steps.
        self.times = deque([(time.monotonic(), step)], maxlen=21)
        self.last_line, self.last_step = 0.0, -1
        self.bar: Bar | None = None
        if self.console.is_terminal:
            description = TextColumn("{task.completed}/{task.total}  {task.description}")
            self.bar = Bar(BarColumn(), description, console=self.console)
            self.task = self.bar.add_task("", total=total, completed=step)
            self.bar.start()

    def update(self, step: int, figures: Mapping[str, float]) -> None:
        """Show that `step` steps are done, and the first of SHOWN. Speed is the mean of the last 20 steps."""
        now = time.monotonic()
        shown = next((f"{name} {figures[name]:.4f}  " for name in SHOWN if name in figures), "")
        if len(self.times) == 1 and step == self.times[0][1]:
            self.times[0] = now, step  # the evaluation before the first step takes no step's time
            text = shown.rstrip()
        else:
            self.times.append((now, step))
            began, first = self.times[0]
            seconds = (now - began) / max(1, step - first)
            text = f"{shown}{seconds:.2f} s/step  {duration(seconds * (self.total - step))} left"
        if self.bar is not None:
            self.bar.update(self.task, completed=step, description=text)
        # What is logged later of the same step, such as its evaluation, is no progress.
        elif step != self.last_step and (step >= self.total or now - self.last_line >= QUIET_SECONDS):
            self.last_line, self.last_step = now, step
            self.console.print(f"step {step}/{self.total}  {text}".rstrip(), highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self.bar is not None:
            self.bar.stop()


def grid_image(images: np.ndarray, rows: int, columns: int, captions: Sequence[str] = ()) -> Image.Image:
    """Images uint8 (N, H, W, 3) row by row in one image, each with its caption below in at most two lines.

    Small images are enlarged by a whole factor to about 128 pixels. Raises ValueError if they do not fit.
    """
    count, height, width, _ = images.shape
    if count > rows * columns:
        raise ValueError(f"{count} images do not fit in {rows} x {columns}")
    if captions and len(captions) != count:
        raise ValueError(f"{len(captions)} captions for {count} images")
    # By a whole factor, so that the pixels of small images stay sharp.
    scale = max(1, 128 // max(height, width))
    width, height, gap = width * scale, height * scale, 6
    font = ImageFont.load_default(size=11)
    line = 14
    below = 2 * line if captions else 0
    size = (columns * (width + gap) + gap, rows * (height + below + gap) + gap)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for i in range(count):
        x, y = gap + (i % columns) * (width + gap), gap + (i // columns) * (height + below + gap)
        canvas.paste(Image.fromarray(images[i]).resize((width, height), Image.Resampling.NEAREST), (x, y))
        if captions:
            fit = max(4, int(width / font.getlength("e")))
            text = textwrap.wrap(captions[i], fit, max_lines=2, placeholder=" …")
            for k, part in enumerate(text):
                draw.text((x, y + height + k * line), part, fill="black", font=font)
    return canvas


def reading(parts: Iterable[T], what: str, total: int | None = None) -> Iterable[T]:
    """The parts themselves. On a terminal a bar shows how many of them are read, and is gone at the end."""
    console = Console(stderr=True)
    return track(
        parts, f"reading {what}", total=total, console=console, transient=True, disable=not console.is_terminal
    )


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of as many cells as text: each column is as wide as its longest cell."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = map(str.ljust, row, widths)
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def duration(seconds: float) -> str:
    """Minutes and seconds, as in 3:05, and hours where there are any."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
