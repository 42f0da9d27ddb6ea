"""Stages carried out in their order, each in a process of its own, so that a stage's memory is free for the next.

    posttrain run recipes/nano/pipeline.yaml --dry-run    # checks settings, paths and memory, and tells the plan
    posttrain run recipes/nano/pipeline.yaml
    posttrain run recipes/nano/pipeline.yaml --resume     # goes on where it stopped, inside a stage too

    stages.json   each stage that was begun: its settings, and when it was finished
    index.html    one report: the figures along the stages, and links to their own reports
    NAME/         what stage NAME made

A stage is finished when its command has ended well and all its steps are done, or its own stop rule ended it and left
a best step, which is what later stages take. Ctrl-C and SIGTERM are passed on to the stage that runs, which saves. So
it does when the pipeline is killed, on Linux. A lock that the stage holds too keeps a second pipeline, and one after a
kill while its stage still runs, from writing into the same directory; with --resume it waits a minute for that to end.
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

from posttrain import cli
from posttrain.config.diff import changes, told
from posttrain.errors import UserError
from posttrain.log import log
from posttrain.pipeline.config import PipelineConfig
from posttrain.pipeline.fit import ALONE, absent, check_processes, memory, processes
from posttrain.pipeline.gains import read_json
from posttrain.pipeline.plan import TRAINING, Stage, resolve
from posttrain.pipeline.report import write_index
from posttrain.runs.files import replace_text
from posttrain.runs.lock import lock
from posttrain.runs.stop import handling

STATE = "stages.json"
PATIENCE = 60
"""Seconds that a resumed pipeline waits for a stage that was left behind."""
LEFT = "another posttrain run, or a stage that one has left behind,"
PR_SET_PDEATHSIG = 1


def carry_out(config: PipelineConfig, resume: bool = False, dry_run: bool = False) -> int:
    """Returns the exit code. Raises UserError for what is wrong with the recipe or does not fit what was done."""
    folder = Path(config.output)
    stages, state = resolve(config), read_state(folder)
    if state and not (resume or dry_run):
        raise UserError(f"output: {folder} holds a pipeline already; add --resume or choose another --output")
    check_finished(stages, state)
    count, on_machine = processes(config.launch)
    for stage in stages:
        if stage.command not in ALONE:
            check_processes(stage, count)
    waiting = [stage for stage in stages if not state.get(stage.name, {}).get("finished")]
    missing: dict[str, str] = {}
    for stage in waiting:
        missing |= {text: stage.name for text in absent(stage) if text not in missing}
    if dry_run:
        print(plan(stages, state))
        return _tell_fit(config, stages, missing, on_machine)
    for text, name in missing.items():
        raise UserError(f"stage {name}: {text}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output: {folder} cannot be made: {error.strerror}; choose another") from error
    with _locked(folder, PATIENCE if resume else 0) as lock:
        return Runner(config, stages, state, lock).run()


def check_finished(stages: list[Stage], state: dict[str, Any]) -> None:
    """Raises UserError if what was done is not what the recipe says now: done stages come first, unchanged."""
    names = [stage.name for stage in stages]
    if lost := [name for name, entry in state.items() if entry["finished"] and name not in names]:
        raise UserError(f"stages: {lost[0]} was finished and is not in the recipe any more; restore it")
    before = ""
    for stage in stages:
        entry = state.get(stage.name)
        done = entry is not None and entry["finished"] is not None
        if entry is not None and entry["command"] != stage.command:
            raise UserError(f"stage {stage.name}: was begun as {entry['command']}; restore it or choose another output")
        if done and before:
            raise UserError(f"stage {stage.name}: was finished, and {before} before it was not; choose another output")
        if entry is not None and done and (found := changes(entry["settings"], stage.settings)):
            raise UserError(
                f"stage {stage.name}: has changed since it was finished: {told(found)}; restore that, or choose another"
                " output"
            )
        if done and not stage.output.exists():
            raise UserError(f"stage {stage.name}: was finished, and {stage.output} is gone; put it back")
        before = before if done else before or stage.name


def plan(stages: list[Stage], state: dict[str, Any]) -> str:
    """A line a stage: what it runs, how far it is, where to, and what it reads of others."""
    rows = []
    for i, stage in enumerate(stages, start=1):
        entry = state.get(stage.name)
        how = "to do" if entry is None else "finished" if entry["finished"] else "begun"
        size = next((f"{getattr(stage.config, n)} {n}" for n in ("steps", "pairs") if n in stage.settings), "")
        size = f"{stage.config.pairs} pairs" if stage.command == "pairs" else size
        reads = ", ".join(f"{field} from {name}" for field, name in stage.reads.items())
        rows.append((str(i), stage.name, stage.command, how, size, str(stage.output), reads))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def _tell_fit(config: PipelineConfig, stages: list[Stage], missing: dict[str, str], on_machine: int) -> int:
    """Prints what a dry run has estimated, and what is not on this machine; returns the exit code."""
    found = []
    if config.gpu_gib is not None:
        found = [(stage.name, told) for stage in stages if (told := memory(stage, stages, config.gpu_gib, on_machine))]
        print("\nMemory of each GPU, estimated and not measured (docs/performance.md, What fits):")
    width = max((len(name) for name, _ in found), default=0)
    for name, (told, _) in found:
        print(f"{name:<{width}}  {told}")
    if missing:
        print("\nNot on this machine, and needed where a stage starts its servers:")
    for text, name in missing.items():
        print(f"{name}: {text}")
    return 0 if all(fits for _, (_, fits) in found) else 1


def read_state(folder: Path) -> dict[str, Any]:
    """By name of the stages that were begun: command, settings, finished (a time or null), seconds."""
    file = folder / STATE
    try:
        return json.loads(file.read_text()) if file.is_file() else {}
    except ValueError as error:
        raise UserError(f"{file}: is not JSON; put back what was there, or choose another output") from error


class Runner:
    """The stages being carried out."""

    def __init__(self, config: PipelineConfig, stages: list[Stage], state: dict[str, Any], lock: int):
        self.config, self.stages, self.state, self.lock = config, stages, state, lock
        self.folder = Path(config.output)
        self.stopped: signal.Signals | None = None
        self._child: subprocess.Popen[bytes] | None = None

    def run(self) -> int:
        done = [stage.name for stage in self.stages if self.state.get(stage.name, {}).get("finished")]
        wanted = [s for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) != signal.SIG_IGN]
        with handling(self._stop, *wanted):
            for stage in self.stages:
                if stage.name in done:
                    if len(done) < len(self.stages):
                        log.info(f"stage {stage.name} is finished")
                    continue
                code = 0 if self.stopped else self._carry_out(stage)
                write_index(self.folder, self.stages, self.state)
                if self.stopped is not None and not self.state.get(stage.name, {}).get("finished"):
                    log.info(f"stopped in stage {stage.name}; go on with --resume")
                    if self.stopped is signal.SIGINT:
                        raise KeyboardInterrupt
                    return 0
                if code:
                    return code
        exported = ", ".join(str(stage.output) for stage in self.stages if stage.command == "export")
        told = f"; exported: {exported}" if exported else ""
        log.info(f"all {len(self.stages)} stages are finished; report: {self.folder / 'index.html'}{told}")
        return 0

    def _carry_out(self, stage: Stage) -> int:
        """Runs a stage to its end and notes it; returns 0 or the exit code for what went wrong, which it has told."""
        log.info(f"stage {stage.name}: {stage.command} into {stage.output}")
        entry = self.state.setdefault(stage.name, {"seconds": 0.0})
        # An export has its name only when it is whole: it was made, and this process ended before it could note it.
        made = stage.command == "export" and stage.output.exists() and entry.get("settings") == stage.settings
        entry |= {"command": stage.command, "settings": stage.settings, "finished": None}
        self._save()
        began = time.monotonic()
        code = 0 if made else self._execute(stage)
        entry["seconds"] = round(entry["seconds"] + time.monotonic() - began, 1)
        complete = code == 0 and is_complete(stage)
        if complete and (wrong := nothing_to_hand_on(stage)):
            self._save()
            log.error(
                f"stage {stage.name}: {wrong}. To run it again: mend its settings, remove {stage.output}, and go on"
                " with --resume"
            )
            return 1
        if complete:
            entry["finished"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self._save()
        if entry["finished"] or self.stopped is not None:
            return 0
        how = f"was ended by signal {-code}" if code < 0 else f"failed with exit code {code}"
        if code == 0:
            how = "was stopped before its last step"
        log.error(f"stage {stage.name}: {how}; what it said is above. Go on with --resume")
        return 2 if code == 2 else 1

    def _execute(self, stage: Stage) -> int:
        launch = self.config.launch if stage.command not in ALONE else []
        words = [*(launch or [sys.executable, "-m", "posttrain.cli"]), *stage.command.split(), *stage.arguments]
        if cli.COMMANDS[stage.command].resumable and stage.output.exists():
            words.append("--resume")
        try:
            # A session of its own: Ctrl-C then reaches it once, from here.
            self._child = subprocess.Popen(
                words, start_new_session=True, pass_fds=[self.lock], preexec_fn=_ends_with_its_parent()
            )
        except OSError as error:
            raise UserError(f"launch: {words[0]} cannot be run: {error.strerror}") from error
        if self.stopped is not None:  # it came while the process began
            self._child.send_signal(self.stopped)
        return self._child.wait()

    def _save(self) -> None:
        replace_text(self.folder / STATE, json.dumps(self.state, indent=1) + "\n")

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopped = signal.SIGINT if number == signal.SIGINT else signal.SIGTERM
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(self.stopped)


def is_complete(stage: Stage) -> bool:
    """Whether a stage whose command ended well has nothing left to do: SIGTERM to it alone ends it well too."""
    if not stage.output.exists():
        return False
    if stage.command in ("pairs", *ALONE):
        return True
    summary = read_json(stage.output / "summary.json")
    return summary.get("steps", 0) >= stage.config.steps or "stopped" in summary


def nothing_to_hand_on(stage: Stage) -> str | None:
    """Why a stage that its stop rule ended has no step for those behind it."""
    if stage.command in TRAINING and "stopped" in read_json(stage.output / "summary.json"):
        from posttrain.training import checkpoint  # torch comes with it

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
                file = stack.enter_context(lock(folder, LEFT))
                break
            except UserError:
                if time.monotonic() - began > patience:
                    raise
            time.sleep(0.2)
        yield file.fileno()


def _ends_with_its_parent() -> Callable[[], None] | None:
    """What a stage's process does first: has itself sent SIGTERM, on which it saves, when this process is gone."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl  # looked up here: between fork and exec as little as possible
    return lambda: prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
