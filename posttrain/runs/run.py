"""The run directory: everything a run leaves behind except its checkpoints.

    recipe.yaml        the resolved recipe; runs again with --config
    environment.json   versions, devices, commit
    metrics.jsonl      one object a training step: step, time (Unix seconds), then the metrics
    tensorboard/       the same for tensorboard
    grids/             step-000025.png: sample grids
    samples/           prompts.json and step-000000/000.png, ...: the same prompts and seeds over the run; scores.json
                       beside the images has each reward's score of each
    prompts.json       with an adaptive pool: the prompts at its ends
    changes.json       settings that were changed when the run was resumed, with the step that was saved then
    wandb_id           with wandb: its id of the run
    summary.json       metrics before and after, seconds, memory

Only the main process writes; on the others every method returns at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import importlib.metadata
import itertools
import json
import math
import os
import platform
import resource
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import psutil
import torch
import yaml
from PIL import Image
from safetensors import SafetensorError

from posttrain.config.diff import as_text, changes
from posttrain.config.sections import TrackConfig
from posttrain.errors import UserError
from posttrain.log import log
from posttrain.runs import startup
from posttrain.runs.changes import record_changes
from posttrain.runs.ending import end_line, stopped_line
from posttrain.runs.files import append_line, replace_text
from posttrain.runs.guard import PROMPTS, check_run, prompt_digests
from posttrain.runs.lock import lock
from posttrain.runs.progress import Progress, grid_image

UNWRITABLE = {getattr(errno, name) for name in "ENOSPC EDQUOT EFBIG EROFS EACCES EPERM ENOTDIR EISDIR EEXIST".split()}
TORCH_UNWRITABLE = ("inline_container", "iostream error", "cannot be opened")
"""In messages of torch.save, which TRL's trainers call."""
PACKAGES = ("posttrain", "torch", "diffusers", "transformers", "peft", "accelerate", "safetensors")


class RunConfig(Protocol):
    """What the settings of any training method have."""

    output: str
    track: TrackConfig


class Run:
    """A run directory being written: make it with `create`, call `start` once, then `log` each step."""

    def __init__(self, path: Path, track: TrackConfig, main: bool, resumable: bool):
        self.path = path
        self.main = main
        self.again = "continue with --resume" if resumable else "remove the directory and start again"
        """The remedy that messages end with."""
        self.urls: dict[str, list[str]] = {}
        """Where each server of the recipe answers."""
        self.stopped: signal.Signals | None = None
        """What ended the training before its last step."""
        self._total: int | None = None
        self._figures: Mapping[str, Any] | None = None
        """Of the summary, once it is written."""
        self.non_finite = 0
        self._track = track
        self._trackers: list[Any] = []
        self._writer: Any = None
        self._progress: Progress | None = None
        self._begun = 0
        """The step that this process began after."""
        self._first: tuple[int, float] | None = None
        """The first step that was logged since, and when."""
        self._startup: dict[str, float] | None = None
        self._lock: IO[str] | None = None

    @classmethod
    def create(cls, config: RunConfig, resume: bool | None = False, main: bool = True) -> Run:
        """Make `config.output` and write recipe and environment; with `resume` an existing run is carried on. None: the
        command cannot do that.

        Raises UserError if the directory holds a run and `resume` is off, if it cannot be written, or if a
        tracker is not installed. Resuming with another recipe says which fields changed; `check_run` refuses some.
        """
        run = cls(Path(config.output), config.track, main, resume is not None)
        if not main:
            return run
        check_run(config, resume)
        recipe = run.path / "recipe.yaml"
        try:
            run.path.mkdir(parents=True, exist_ok=True)
            run._lock = lock(run.path)
            new = _plain(dataclasses.asdict(config))  # type: ignore[call-overload]
            comments = ""
            if recipe.exists():
                changed = changes(yaml.safe_load(recipe.read_text()), new)
                if changed:
                    log.info(f"the recipe has changed since the run began: {as_text(changed)}")
                comments = record_changes(run.path, changed)
            replace_text(recipe, comments + yaml.safe_dump(new, sort_keys=False, allow_unicode=True))
            facts = environment() | {PROMPTS: prompt_digests(config)}
            replace_text(run.path / "environment.json", _json(facts, indent=1))
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"{run.path}: a file is in the way; choose another --output") from None
        except OSError as error:
            raise UserError(f"{run.path}: cannot be written: {error.strerror}; choose another --output") from None
        return run

    @staticmethod
    def restarted(config: RunConfig) -> bool:
        """Whether this process's launch of torchrun began the run, and so restarts it now."""
        written, launch = Path(config.output) / "environment.json", _launch()
        return launch is not None and written.exists() and json.loads(written.read_text()).get("launch") == launch

    def start(self, total: int, step: int = 0) -> None:
        """Begin to train: `total` steps in all, `step` of them done.

        Metrics of later steps are dropped; all of them if no step is done, since the evaluation before the first
        comes again.
        """
        if not self.main:
            return
        self._begun, self._total = step, total
        if step >= total:
            log.info(
                f"{self.path}: is finished: step {total} of {total} is done, and nothing is left; raise steps to go on"
            )
        startup.lap("prepare")
        # Rewritten, so that no step is there twice after resuming.
        metrics = self.path / "metrics.jsonl"
        # A process that was killed may have logged steps after its last checkpoint; they come again.
        lines = _whole_lines(metrics) if step and metrics.exists() else []
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        replace_text(metrics, "".join(kept))
        if self._track.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.path / "tensorboard"), purge_step=step + 1 if step else 0)
        if self._track.trackers:
            from accelerate import PartialState
            from accelerate.tracking import LOGGER_TYPE_TO_CLASS

            PartialState()  # the trackers ask it which process is the main one
            for name in self._track.trackers:
                settings = {"name": self.path.name}
                if name == "wandb":
                    settings |= {"id": self._wandb_id(step), "resume": "allow"}
                tracker = LOGGER_TYPE_TO_CLASS[name]("posttrain", **settings)
                tracker.start()
                self._trackers.append(tracker)
        self._progress = Progress(total, step)

    def _wandb_id(self, step: int) -> str:
        """That of the run as it began, so that a resumed one goes on in the same curves."""
        file = self.path / "wandb_id"
        if step == 0 or not file.exists():
            replace_text(file, secrets.token_hex(8))
        return file.read_text()

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append the metrics of a step: numbers, 0-d tensors, or None for missing.

        NaN and infinities become null, counted in the line as `non_finite` and in all as `run.non_finite`.
        The line is on disk when this returns. `reward` or `accuracy` is shown in the progress bar.
        """
        if not self.main:
            return
        self._time(step)
        values: dict[str, float | None] = {}
        finite: dict[str, float] = {}
        bad = 0
        for name, value in metrics.items():
            values[name] = number = None if value is None else _number(value)
            if number is not None and math.isfinite(number):
                finite[name] = number
            elif number is not None:
                values[name] = None  # JSON has no NaN
                bad += 1
        if bad:
            self.non_finite += bad
            values["non_finite"] = finite["non_finite"] = bad
        line = _json({"step": step, "time": round(time.time(), 3), **values})
        try:
            append_line(self.path / "metrics.jsonl", line + "\n")
        except OSError as error:
            raise UserError(f"{self.path}/metrics.jsonl: cannot be written: {error.strerror}") from error
        if self._writer is not None:
            for name, value in finite.items():
                self._writer.add_scalar(name, value, step)
        for tracker in self._trackers:
            tracker.log(finite, step=step)
        if self._progress is not None:
            self._progress.update(step, finite)

    def grid(
        self, step: int, images: np.ndarray, rows: int, columns: int, captions: Sequence[str] = (), prefix: str = ""
    ) -> Path | None:
        """Write `grids/step-000025.png`: images uint8 (N, H, W, 3), N <= rows * columns, row by row. `prefix` stands
        before that name."""
        if not self.main:
            return None
        path = self.path / "grids" / f"{prefix}step-{step:06d}.png"
        path.parent.mkdir(exist_ok=True)
        grid_image(images, rows, columns, captions).save(path)
        return path

    def samples(
        self,
        step: int | str,
        images: np.ndarray,
        prompts: Sequence[str],
        seeds: Sequence[int],
        scores: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Write `samples/step-000000/000.png`, ... from uint8 (N, H, W, 3), or `samples/NAME/...` for a name.

        Call it with the same prompts and seeds each time: the report compares the first step and the last. `scores`
        goes into scores.json: for each image, by reward, `score` and what else the reward reported. There may be more
        of them than images: the scores alone of all go into all_scores.json, by reward, null where one is missing.
        """
        if not self.main:
            return
        directory = self.path / "samples" / (step if isinstance(step, str) else f"step-{step:06d}")
        directory.mkdir(parents=True, exist_ok=True)
        for i, image in enumerate(images):
            Image.fromarray(image).save(directory / f"{i:03d}.png")
        if scores:
            replace_text(directory / "scores.json", _json(list(scores[: len(images)]), indent=1))
            every: dict[str, list[Any]] = {}
            for name in dict.fromkeys(itertools.chain(*scores)):
                every[name] = [one.get(name, {}).get("score") for one in scores]
            replace_text(directory / "all_scores.json", _json(every))
        table = [{"prompt": prompt, "seed": seed} for prompt, seed in zip(prompts, seeds, strict=True)]
        # Beside the steps, which all have the same prompts.
        replace_text(directory.parent / "prompts.json", _json(table, indent=1))

    def prompts(self, ends: Mapping[str, Sequence[Mapping[str, Any]]] | None) -> None:
        """Write prompts.json: tables of prompts by title, which the report shows; None writes nothing."""
        if self.main and ends is not None:
            replace_text(self.path / "prompts.json", _json(_plain(dict(ends)), indent=1))

    def summary(self, figures: Mapping[str, Any]) -> None:
        """Write summary.json, atomically; anything JSON can hold, non-finite numbers become null.

        The report shows `before` and `after` (both name -> number) side by side, other numbers as they are.
        """
        if self.main:
            self._figures = figures
            took = self._startup or startup.CLOCK.taken(None)  # a run of less than two steps
            replace_text(self.path / "summary.json", _json(_plain({**figures, "startup": took}), indent=1))

    def _time(self, step: int) -> None:
        """Ends a part of the start-up, up to the second step that is logged."""
        if self._startup is not None:
            return
        if step <= self._begun:
            startup.lap("evaluation")
        elif self._first is None:
            startup.lap("first_step")
            self._first = (step, time.time())
        elif step > self._first[0]:  # compiling is what the first step took longer than the second
            self._startup = startup.CLOCK.taken(time.time() - self._first[1])

    def close(self) -> None:
        """End the progress bar and the trackers."""
        if self._progress is not None:
            self._progress.close()
        if self._writer is not None:
            self._writer.close()
        for tracker in self._trackers:
            tracker.finish()
        if self._lock is not None:  # last, when nothing more is written
            self._lock.close()
        self._progress, self._writer, self._trackers, self._lock = None, None, [], None

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.close()
        startup.CLOCK.forget()
        self._say_end(error)
        # Errors that a user can do something about, and that may come from anywhere in the run.
        if isinstance(error, torch.OutOfMemoryError):
            raise UserError(
                f"{self.path}: out of memory ({' '.join(str(error).split())}); lower micro_batch or the size of the"
                f" images, or use more or larger GPUs, then {self.again}"
            ) from error
        if isinstance(error, OSError) and error.errno in UNWRITABLE:
            file = error.filename or self.path
            raise UserError(f"{file}: cannot be written: {error.strerror}; fix that, then {self.again}") from error
        # torch's writer of archives raises no OSError.
        if isinstance(error, RuntimeError) and any(sign in str(error) for sign in TORCH_UNWRITABLE):
            raise UserError(
                f"{self.path}: cannot be written, such as for want of space; fix that, then {self.again}"
            ) from error
        if isinstance(error, SafetensorError):
            raise UserError(f"{self.path}: cannot be written or read: {error}; fix that, then {self.again}") from error

    def _say_end(self, error: BaseException | None) -> None:
        if not self.main:
            return
        done = (self._figures or {}).get("steps")
        is_whole = done is None or self._total is None or done >= self._total
        if isinstance(error, KeyboardInterrupt) or (self.stopped is not None and not is_whole):
            log.info(stopped_line(self.path, self._total, self.again))
        elif error is None and self._figures is not None:
            log.info(end_line(self.path, self._figures))


def peak_memory() -> dict[str, float]:
    """Highest use so far in GiB: `peak_ram_gib` of this process, with CUDA `peak_gpu_gib` of one GPU."""
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage: bytes there, KiB on Linux
    peak = {"peak_ram_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}
    if torch.cuda.is_available():
        devices = range(torch.cuda.device_count())
        peak["peak_gpu_gib"] = max(torch.cuda.max_memory_allocated(i) for i in devices) / 2**30
    return peak


def environment() -> dict[str, Any]:
    """Versions, devices and, in a checkout, the commit: what someone needs to repeat the run."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "gpus": gpus,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "commit": _commit(),
        "launch": _launch(),
    }


def _launch() -> str | None:
    """The launch of torchrun that started this process, the same over restarts; None without torchrun."""
    if "TORCHELASTIC_RESTART_COUNT" not in os.environ:
        return None
    # Its process is the same over restarts; ids are used again, so the time belongs to it.
    agent = psutil.Process(os.getppid())
    return f"{platform.node()} {agent.pid} {agent.create_time():.2f}"


def _commit() -> str | None:
    root = Path(__file__).parents[2]  # an installed package is in no checkout
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None


def _number(value: Any) -> float | int:
    return value if isinstance(value, int | float) else float(value)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic | torch.Tensor):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _json(value: Any, indent: int | None = None) -> str:
    # A NaN that was overlooked is an error here, and not a file that other readers refuse.
    return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)


def _whole_lines(path: Path) -> list[str]:
    """The lines of a JSONL file less a last one that was cut off."""
    lines = path.read_text().splitlines(keepends=True)
    return lines if not lines or lines[-1].endswith("\n") else lines[:-1]
