"""What the benchmarks of runs share: their options, processes side by side, figures of runs, and Markdown tables."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import torch
import yaml

T = TypeVar("T")
LAUNCHER = "torch.distributed.run"
POLL = 0.05
"""Seconds between two looks at a run."""


def parser(about: str | None, command: str, recipe: str = "") -> argparse.ArgumentParser:
    """--seeds, --jobs, --output and, after --, options of the posttrain command that the benchmark runs."""
    parser = argparse.ArgumentParser(description=(about or "").splitlines()[0])
    if recipe:
        parser.add_argument("--recipe", default=recipe)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--output", type=Path, required=True, help="directory for the runs, tables and figures")
    parser.add_argument("options", nargs="*", help=f"further options for posttrain {command}, after --")
    return parser


class Jobs:
    """Runs `python -m MODULE ...` with a log each under a folder, some at a time, on all GPUs in turn."""

    def __init__(self, folder: Path, at_once: int = 1) -> None:
        self.folder = folder
        self._slots = threading.Semaphore(at_once)
        self._gpus = itertools.cycle(_gpus()) if torch.cuda.is_available() else None
        self._mutex = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(
        self,
        name: str,
        module: str,
        arguments: Sequence[str],
        cwd: Path | None = None,
        meter: Meter | None = None,
        **variables: str,
    ) -> float:
        """Seconds it took, with these environment variables. Exits with the log's name if it failed."""
        log = self.folder / f"{name}.log"
        with self._slots, log.open("w") as file:
            environment = dict(os.environ)
            # Runs in several threads ask at once, and an iterator is not safe to share.
            with self._mutex:
                if self._gpus is not None:
                    environment["CUDA_VISIBLE_DEVICES"] = next(self._gpus)
            environment |= variables
            # A process of its own for each run: it starts as a user's would, and its memory is free afterwards.
            start = time.time()
            command = [sys.executable, "-m", module, *arguments]
            with subprocess.Popen(command, cwd=cwd, env=environment, stdout=file, stderr=file) as process:
                while meter is not None and process.poll() is None:
                    meter.read(process.pid)
                    time.sleep(POLL)
            if process.returncode:
                raise SystemExit(f"{name}: failed; see {log}")
            return time.time() - start

    def run(self, name: str, words: Sequence[str], module: str = "posttrain.cli") -> Path:
        """The directory of a run, made by these words unless it is finished; one that was begun goes on."""
        output = self.folder / name
        if not finished(output):
            begun = ["--resume"] if (output / "recipe.yaml").is_file() else []
            self(name, module, [*words, *begun, "--output", str(output)])
        return output


class Meter:
    """CPU seconds that a run's processes, with its servers, had used when each line of its metrics was written."""

    def __init__(self, metrics: Path) -> None:
        self.metrics = metrics
        self.seconds: list[float] = []
        """By line."""
        self._bytes = 0

    def read(self, pid: int) -> None:
        """Looks for new lines. `pid` is the run's process, which may have others."""
        size = self.metrics.stat().st_size if self.metrics.exists() else 0
        if size == self._bytes:
            return
        self._bytes = size
        # Several lines may have come since the last look; they get the same time.
        lines = self.metrics.read_text().count("\n")
        self.seconds += [_cpu_seconds(pid)] * (lines - len(self.seconds))


def finished(folder: Path) -> bool:
    """Whether a run has ended by itself. One that was stopped has a summary too, of fewer steps than it was to make."""
    if not (folder / "summary.json").is_file():
        return False
    summary = json.loads((folder / "summary.json").read_text())
    if "steps" not in summary or "stopped" in summary:  # a command without steps, or an end that its recipe asked for
        return True
    return summary["steps"] >= yaml.safe_load((folder / "recipe.yaml").read_text())["steps"]


def _cpu_seconds(pid: int) -> float:
    """Of a process, and of all that it and its descendants started; those that ended count with who waited for them."""
    total = 0.0
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            # It may end between being listed and being asked.
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system + times.children_user + times.children_system
    return total


def side_by_side(function: Callable[..., T], calls: Iterable[Sequence[Any]]) -> list[T]:
    """function(*arguments) of each call, in their order; Jobs limits how many processes there are at a time."""
    calls = list(calls)
    # A thread for each, which waits for its turn in Jobs. What one raises, SystemExit too, is raised here again.
    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(lambda arguments: function(*arguments), calls))


def launched(processes: int, arguments: list[str]) -> tuple[str, list[str]]:
    """The module to run, and its arguments, for a command of posttrain in so many processes."""
    module = "posttrain.cli"
    if processes == 1:
        return module, arguments
    return LAUNCHER, ["--nproc-per-node", str(processes), "-m", module, *arguments]


def step_seconds(row: dict[str, Any]) -> float:
    """Seconds of a step of metrics.jsonl, over all of its parts."""
    return sum(value for name, value in row.items() if name.startswith("seconds/"))


def evaluations(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the rows of a metrics.jsonl those of evaluations: their step, and their figures without `eval/`."""
    # An evaluation has a line of its own, without the figures of its step.
    found = []
    for row in rows:
        figures = {key[5:]: value for key, value in row.items() if key.startswith("eval/")}
        if figures:
            found.append({"step": row["step"], **figures})
    return found


def grouped(rows: Iterable[dict[str, Any]], key: str) -> dict[str, list[dict[str, Any]]]:
    """The rows by their value of a key, in the order of their first appearance."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    return groups


def column(rows: Iterable[Mapping[str, Any]], name: str) -> list[Any]:
    """A figure of each row; None where a row has none."""
    return [row.get(name) for row in rows]


def known(rows: Iterable[Mapping[str, Any]], name: str) -> list[Any]:
    """A figure of the rows that have it."""
    return [value for value in column(rows, name) if value is not None]


def cells(rows: Sequence[Mapping[str, Any]], names: Iterable[str]) -> list[str]:
    """`mean_and_extent` of each of these figures over the rows."""
    return [mean_and_extent(column(rows, name)) for name in names]


def markdown(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = []
    for row in [head, *rows]:
        # An empty cell is one space.
        cells = [f"{cell} |".lstrip() for cell in row]
        lines.append(" ".join(["|", *cells]))
    lines.insert(1, "|---" * len(head) + "|")
    return "\n".join(lines)


def extent(values: Sequence[float], form: str = ".3f") -> str:
    """The least and the greatest."""
    return f"{min(values):{form}} to {max(values):{form}}"


def mean_and_extent(values: Sequence[float | None], form: str = ".3f") -> str:
    """The mean, and of several values the least and the greatest; missing ones do not count."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean = f"{np.mean(known):{form}}"
    return f"{mean} ({extent(known, form)})" if len(known) > 1 else mean


def write(folder: Path, rows: Any, text: str) -> None:
    """table.json, and table.md, which is printed too."""
    (folder / "table.json").write_text(json.dumps(rows, indent=1) + "\n")
    (folder / "table.md").write_text(text + "\n")
    print(text)


def _gpus() -> list[str]:
    """The GPUs that this process may use, by the names that its children know them by."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
