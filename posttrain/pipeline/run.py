"""Runs the stages of a pipeline in order, each in its own process, so that its memory is free for the next stage.

    posttrain run recipes/nano/pipeline.yaml --dry-run    # checks settings, paths and memory; prints the plan and hours
    posttrain run recipes/nano/pipeline.yaml
    posttrain run recipes/nano/pipeline.yaml --resume     # continues where it stopped, even inside a stage

    stages.json   each stage that has started: its settings, and when it finished
    index.html    one report: the figures of all stages, and links to their own reports
    NAME/         the output of stage NAME

A stage is finished when its command succeeded and all steps are done, or when its own stop rule ended it and a best
step exists, which later stages then use. Ctrl-C and SIGTERM are passed on to the running stage, which saves. On Linux
the stage also saves when the pipeline itself is killed. The stage inherits a lock on the directory, so neither a second
pipeline nor one that restarts while an old stage still runs can write there; --resume waits a minute for the lock.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from posttrain import commands
from posttrain.config.diff import as_text, changes
from posttrain.errors import UserError, counted
from posttrain.log import log
from posttrain.pipeline.config import PipelineConfig
from posttrain.pipeline.fit import SINGLE_PROCESS, check_processes, memory, missing_requirements, processes
from posttrain.pipeline.gains import read_json
from posttrain.pipeline.hours import describe
from posttrain.pipeline.plan import TRAINING, Stage, resolve
from posttrain.pipeline.report import write_index
from posttrain.runs.files import replace_text
from posttrain.runs.lock import lock
from posttrain.runs.progress import columns
from posttrain.runs.stop import handling

STATE = "stages.json"
PATIENCE = 60
"""Seconds that a resumed pipeline waits for a stage that outlived its killed pipeline."""
LOCK_HOLDER = "another posttrain run, or a stage that outlived one,"
PR_SET_PDEATHSIG = 1
"""From linux/prctl.h: send this process a signal when its parent dies."""


def carry_out(config: PipelineConfig, resume: bool = False, dry_run: bool = False) -> int:
    """Runs or checks the pipeline; returns the exit code. Raises UserError for a mistake in the recipe."""
    folder = Path(config.output)
    stages, state = resolve(config), read_state(folder)
    if state and not (resume or dry_run):
        raise UserError(f"output: {folder} already contains a pipeline; add --resume or choose another --output")
    check_finished(stages, state)
    count, on_machine = processes(config.launch)
    for stage in stages:
        if stage.command not in SINGLE_PROCESS:
            check_processes(stage, count)
    missing: dict[str, str] = {}  # message -> the first stage that needs it
    for stage in stages:
        if not is_finished(state, stage.name):
            for text in missing_requirements(stage):
                missing.setdefault(text, stage.name)
    if dry_run:
        # a plan may be checked on a laptop, so what this machine lacks is only reported
        print(plan(stages, state))
        print(f"\n{describe(config, stages)}")
        return _print_fit(config, stages, missing, on_machine)
    for text, name in missing.items():
        raise UserError(f"stage {name}: {text}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output: {folder} cannot be created: {error.strerror}; choose another") from error
    with _locked(folder, PATIENCE if resume else 0) as lock:
        return Runner(config, stages, state, lock).run()


def is_finished(state: dict[str, Any], name: str) -> bool:
    return bool(state.get(name, {}).get("finished"))


def check_finished(stages: list[Stage], state: dict[str, Any]) -> None:
    """Raises UserError unless the finished stages come first in the recipe and are unchanged."""
    names = [stage.name for stage in stages]
    if lost := [name for name, entry in state.items() if entry["finished"] and name not in names]:
        raise UserError(f"stages: {lost[0]} is finished but no longer in the recipe; restore it")
    unfinished = ""  # the first stage that still has work to do
    for stage in stages:
        entry = state.get(stage.name)
        done = entry is not None and entry["finished"] is not None
        if entry is not None and entry["command"] != stage.command:
            raise UserError(f"stage {stage.name}: began as {entry['command']}; restore that or choose another output")
        if done and unfinished:
            raise UserError(
                f"stage {stage.name}: is finished, but the earlier {unfinished} is not; choose another output"
            )
        if entry is not None and done and (found := changes(entry["settings"], stage.settings)):
            raise UserError(
                f"stage {stage.name}: its settings have changed since it finished: {as_text(found)}; restore them or"
                " choose another output"
            )
        if done and not stage.output.exists():
            raise UserError(f"stage {stage.name}: is finished, but {stage.output} is missing; put it back")
        if not done:
            unfinished = unfinished or stage.name


def plan(stages: list[Stage], state: dict[str, Any]) -> str:
    """One line for each stage: command, progress, size, output, and the stages that it reads from."""
    rows = []
    for i, stage in enumerate(stages, start=1):
        entry = state.get(stage.name)
        progress = "to do" if entry is None else "finished" if entry["finished"] else "begun"
        size = ""
        if stage.command == "pairs":
            size = counted(stage.config.pairs, "pair")
        elif "steps" in stage.settings:
            size = counted(stage.config.steps, "step")
        reads = ", ".join(f"{field} from {name}" for field, name in stage.reads.items())
        rows.append((str(i), stage.name, stage.command, progress, size, str(stage.output), reads))
    return columns(rows)


def _print_fit(config: PipelineConfig, stages: list[Stage], missing: dict[str, str], on_machine: int) -> int:
    """Prints the memory estimates and what this machine lacks; returns 1 if a stage does not fit."""
    code = 0
    if config.gpu_gib is not None:
        print("\nMemory of each GPU, estimated and not measured (docs/performance.md, What fits):")
        estimates = {}
        for stage in stages:
            estimate = memory(stage, stages, config.gpu_gib, on_machine)
            if estimate is not None:
                estimates[stage.name] = estimate
        width = max(map(len, estimates), default=0)
        for name, (text, fits) in estimates.items():
            print(f"{name:<{width}}  {text}")
            code = code if fits else 1
    if missing:
        print("\nMissing on this machine, and needed wherever a stage starts its servers:")
    for text, name in missing.items():
        print(f"{name}: {text}")
    return code


def read_state(folder: Path) -> dict[str, Any]:
    """Stage name -> command, settings, finished (a time or null) and seconds, for each stage that has started."""
    file = folder / STATE
    try:
        return json.loads(file.read_text()) if file.is_file() else {}
    except ValueError as error:
        raise UserError(f"{file}: is not valid JSON; restore it, or choose another output") from error


class Runner:
    """Runs the stages one after another and records their progress in stages.json."""

    def __init__(self, config: PipelineConfig, stages: list[Stage], state: dict[str, Any], lock: int):
        self.config, self.stages, self.state, self.lock = config, stages, state, lock
        self.folder = Path(config.output)
        self.stopped: signal.Signals | None = None
        self._child: subprocess.Popen[bytes] | None = None

    def run(self) -> int:
        done = [stage.name for stage in self.stages if is_finished(self.state, stage.name)]
        # nohup ignores SIGHUP, and that must stay so
        wanted = [s for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) != signal.SIG_IGN]
        with handling(self._stop, *wanted):
            for stage in self.stages:
                if stage.name in done:
                    if len(done) < len(self.stages):
                        log.info(f"stage {stage.name} is finished")
                    continue
                code = 0 if self.stopped else self._run_stage(stage)
                write_index(self.folder, self.stages, self.state)
                # a signal may arrive as the last step ends: then the stage is finished after all
                if self.stopped is not None and not is_finished(self.state, stage.name):
                    log.info(f"stopped in stage {stage.name}; continue with --resume")
                    if self.stopped is signal.SIGINT:
                        raise KeyboardInterrupt
                    return 0
                if code:
                    return code
        exported = [str(stage.output) for stage in self.stages if stage.command == "export"]
        message = f"finished: {counted(len(self.stages), 'stage')}; report: {self.folder / 'index.html'}"
        log.info(f"{message}; exported: {', '.join(exported)}" if exported else message)
        return 0

    def _run_stage(self, stage: Stage) -> int:
        """Runs a stage to its end and records it. Returns 0, or the exit code of a failure that it has reported."""
        log.info(f"stage {stage.name}: {stage.command} into {stage.output}")
        entry = self.state.setdefault(stage.name, {"seconds": 0.0})
        # Both are renamed into place when complete. If one exists, the pipeline was killed before it recorded that.
        is_renamed = stage.command in ("export", "merge")
        made = is_renamed and stage.output.exists() and entry.get("settings") == stage.settings
        entry |= {"command": stage.command, "settings": stage.settings, "finished": None}
        self._save()
        began = time.monotonic()  # not time.time: the clock may be set while a stage runs
        code = 0 if made else self._execute(stage)
        entry["seconds"] = round(entry["seconds"] + time.monotonic() - began, 1)
        complete = code == 0 and is_complete(stage)
        if complete and (problem := no_usable_checkpoint(stage)):
            self._save()
            log.error(
                f"stage {stage.name}: {problem}. To run it again: correct its settings, remove {stage.output}, and"
                " continue with --resume"
            )
            return 1
        if complete:
            entry["finished"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self._save()
        if entry["finished"] or self.stopped is not None:
            return 0
        # Popen gives the number of a fatal signal as a negative code
        how = f"was ended by signal {-code}" if code < 0 else f"failed with exit code {code}"
        if code == 0:
            how = "was stopped before its last step"
        log.error(f"stage {stage.name}: {how}; its own messages are above. Continue with --resume")
        return 2 if code == 2 else 1

    def _execute(self, stage: Stage) -> int:
        launch = self.config.launch if stage.command not in SINGLE_PROCESS else []
        words = [*(launch or [sys.executable, "-m", "posttrain.cli"]), *stage.command.split(), *stage.arguments]
        if commands.COMMANDS[stage.command].resumable and stage.output.exists():
            words.append("--resume")
        try:
            # In its own session, the stage gets Ctrl-C only once: from _stop, not from the terminal too.
            self._child = subprocess.Popen(
                words, start_new_session=True, pass_fds=[self.lock], preexec_fn=_terminate_with_parent()
            )
        except OSError as error:
            raise UserError(f"launch: {words[0]} cannot be run: {error.strerror}") from error
        if self.stopped is not None:  # the signal came before self._child was set, so _stop could not pass it on
            self._child.send_signal(self.stopped)
        return self._child.wait()

    def _save(self) -> None:
        replace_text(self.folder / STATE, json.dumps(self.state, indent=1) + "\n")

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopped = signal.SIGINT if number == signal.SIGINT else signal.SIGTERM
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(self.stopped)


def is_complete(stage: Stage) -> bool:
    """Whether a stage whose command succeeded has no step left; a SIGTERM to the stage alone also ends with code 0."""
    if not stage.output.exists():
        return False
    if stage.command in ("pairs", *SINGLE_PROCESS):
        return True
    summary = read_json(stage.output / "summary.json")
    return summary.get("steps", 0) >= stage.config.steps or "stopped" in summary


def no_usable_checkpoint(stage: Stage) -> str | None:
    """Why later stages can use no checkpoint of a stage that its stop rule ended; None if they can."""
    if stage.command in TRAINING and "stopped" in read_json(stage.output / "summary.json"):
        from posttrain.training import checkpoint  # here, because it imports torch

        try:
            checkpoint.find(stage.output)
        except UserError as error:
            return str(error)
    return None


@contextlib.contextmanager
def _locked(folder: Path, patience: float) -> Iterator[int]:
    with contextlib.ExitStack() as stack:
        began = time.monotonic()
        while True:
            try:
                file = stack.enter_context(lock(folder, LOCK_HOLDER))
                break
            except UserError:
                if time.monotonic() - began > patience:
                    raise
            time.sleep(0.2)
        yield file.fileno()


def _terminate_with_parent() -> Callable[[], None] | None:
    """A function for the stage's process: the kernel sends it SIGTERM, on which it saves, when the pipeline dies."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl  # looked up here, because little is safe to do between fork and exec
    return lambda: prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
