"""Starts a command as a user would, waits for it, and notes what it took as a row of the table."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LIMIT = 480
"""Seconds that one test may take."""


@dataclass
class Result:
    """What a command that has ended left behind."""

    code: int
    seconds: float
    began: float
    """Unix time."""
    output: str
    """stdout and stderr together."""
    peak_gib: float | None
    """Highest memory in use on the GPU while it ran, by nvidia-smi; None where there is none."""


class Commands:
    """`run` carries out a command; `row` adds a line to the table's file."""

    def __init__(self, rows: Path):
        self.rows = rows

    def run(self, *words: object, kill_when: Any = None, limit: float = LIMIT, processes: int = 1) -> Result:
        """`posttrain WORDS`. With `kill_when`, SIGKILL as soon as it returns true."""
        launch = (
            ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"] if processes > 1 else []
        )
        command = [sys.executable, "-m", *launch, "posttrain.cli", *map(str, words)]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
        wall, began = time.time(), time.monotonic()
        with _watching_memory() as peak:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=environment,
                start_new_session=True,
            )  # fmt: skip
            killer = threading.Thread(target=_kill, args=(process, kill_when, began + limit), daemon=True)
            killer.start()
            output, _ = process.communicate()
        return Result(process.returncode, time.monotonic() - began, wall, output, max(peak, default=None))

    def ok(self, *words: object, **options: Any) -> Result:
        result = self.run(*words, **options)
        assert result.code == 0, f"exit code {result.code} after {result.seconds:.0f} s: {result.output[-6000:]}"
        return result

    def row(
        self, name: str, recipe: str, result: Result, run: Path | None = None, images: int = 0, **more: Any
    ) -> None:
        """`images` is how many a step takes, for images a second; `run` a run directory with metrics."""
        row: dict[str, Any] = {"command": name, "recipe": recipe, "code": result.code, "seconds": result.seconds,
                               "peak_gib": result.peak_gib, **more}  # fmt: skip
        if run is not None:
            row |= timings(run, result.began, images)
        # Significant digits: AdamW's figures are far below 1.
        row = {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in row.items()}
        with self.rows.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row))


def metrics(run: Path) -> list[dict[str, Any]]:
    """Lines of a run's metrics.jsonl that are of training steps."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["step"] and not any(key.startswith("eval/") for key in line)]


def timings(run: Path, began: float, images: int) -> dict[str, Any]:
    """Seconds to the end of the first step, seconds of a later step (median), images a second, parts of the start.

    Of the steps since `began`: a run that was killed has earlier ones.
    """
    rows = [row for row in metrics(run) if row["time"] >= began]
    found: dict[str, Any] = {"first_step": rows[0]["time"] - began} if rows else {}
    gaps = [after["time"] - before["time"] for before, after in zip(rows, rows[1:])]
    if gaps:
        found["step"] = statistics.median(gaps)
        found["images_s"] = images / found["step"] if images else None
    summary = json.loads((run / "summary.json").read_text()) if (run / "summary.json").is_file() else {}
    found |= {key: value for key, value in summary.items() if key.startswith(("startup", "peak_gpu"))}
    return found


def _kill(process: subprocess.Popen[str], when: Any, deadline: float) -> None:
    while process.poll() is None:
        if (when is not None and when()) or time.monotonic() > deadline:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            return
        time.sleep(0.2)


@contextlib.contextmanager
def _watching_memory() -> Iterator[list[float]]:
    """GiB in use on the first visible GPU, read twice a second while the block runs."""
    readings: list[float] = []
    device = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    query = ["nvidia-smi", f"--id={device}", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-lms", "500"]
    try:
        process = subprocess.Popen(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except FileNotFoundError:
        yield readings
        return

    def read() -> None:
        for line in process.stdout or ():
            with contextlib.suppress(ValueError):
                readings.append(float(line) / 1024)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        yield readings
    finally:
        process.terminate()
        thread.join(5)
