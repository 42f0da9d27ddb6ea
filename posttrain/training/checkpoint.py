"""Atomic checkpoints with checksums, of safetensors and JSON only.

    checkpoints/step-000123/   <name>.safetensors ..., state.json, manifest.json (sizes and sha256 sums)
    checkpoints/best           a link to the best step, if one was marked; where there are no links, a file

The manifest is written last, so a directory whose files do not match its manifest is incomplete and is skipped.
"""

from __future__ import annotations

import copy
import errno
import functools
import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from posttrain.distributed import shards
from posttrain.errors import UserError
from posttrain.log import log
from posttrain.runs.files import apply_umask, replacing_directory, sync
from prompts.parse import parse_json

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS}
"""Of a file system without symbolic links, such as exFAT and some network shares."""
STEP = re.compile(r"step-(\d{6,})")


@dataclass
class Checkpoint:
    """A checkpoint as it was saved; tensors are on the CPU."""

    path: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def save(
    directory: str | Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], keep: int
) -> Path:
    """Write `directory/step-000123` and prune to the newest `keep`; the marked best one is never removed.

    `tensors` maps a file's stem to its tensors, `state` is anything JSON can hold. For one process only.
    Raises UserError when it cannot be written; what was written is removed and older checkpoints stay whole.
    """
    directory = Path(directory)
    final = directory / f"step-{step:06d}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for left_over in directory.glob(".tmp-*"):  # of a process that was killed while it saved
            shutil.rmtree(left_over)
        # One that is there is torn, or is this step once more after resuming from an older one.
        with replacing_directory(final) as temporary:
            for name, group in tensors.items():
                plain = {key: value.detach().cpu().contiguous() for key, value in group.items()}
                save_file(plain, temporary / f"{name}.safetensors")
            _write_json(temporary / "state.json", {"step": step, **state})
            seal(temporary)
    except (OSError, SafetensorError) as error:
        if is_full(error):
            raise UserError(
                f"{final}: no space left while saving ({_megabytes(tensors):.0f} MB); free some or lower"
                " checkpoint.keep, then run again with --resume. Older checkpoints are whole."
            ) from error
        raise UserError(f"{final}: cannot be saved: {error}; older checkpoints are whole") from error
    _prune(directory, keep)
    return final


def seal(directory: Path) -> None:
    """Write manifest.json of the files in a directory, when they are on disk."""
    files = sorted(path for path in directory.iterdir() if path.is_file() and path.name != "manifest.json")
    apply_umask(directory)
    for path in files:
        sync(path)
    sums = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files}
    _write_json(directory / "manifest.json", sums)
    sync(directory / "manifest.json")
    sync(directory)


def on_host(
    tensors: Mapping[str, Tensor], keep: bool = True, over: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Copies on the CPU. Sharded tensors are gathered, one after the other, by all processes, of which some may not
    `keep` them. `over` are copies that may be written over."""
    copies = {}
    for key, value in tensors.items():
        whole, old = shards.whole(value).detach(), (over or {}).get(key)
        if keep and old is not None and (old.shape, old.dtype) == (whole.shape, whole.dtype):
            copies[key] = old.copy_(whole)  # fresh memory would cost more time than the copy
        elif keep:
            copies[key] = whole.to("cpu", copy=True)
    return copies


class Writer:
    """Saves in a thread, one checkpoint at a time: training waits for the copy in memory, not for the disk."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        self.copies: dict[str, dict[str, Tensor]] = {}
        """Memory to copy the next checkpoint into, when nothing is pending: see `on_host`."""

    def reserve(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Allocates memory for copies of these in the thread; a later `check` raises UserError if it is too little."""
        # Shapes and types only, as the tensors themselves may be freed before the thread comes to them.
        shapes: dict[str, dict[str, tuple[torch.Size, torch.dtype]]] = {}
        for name, group in tensors.items():
            shapes[name] = {key: (tensor.shape, tensor.dtype) for key, tensor in group.items()}

        def allocate() -> None:
            # Zeros touch each page: fresh memory comes at a few GB/s, and all weights of K2 with moments are 150 GB.
            try:
                for name, group in shapes.items():
                    copies = self.copies[name] = {}
                    for key, (shape, dtype) in group.items():
                        copies[key] = torch.zeros(shape, dtype=dtype)
            except RuntimeError as error:  # torch raises no other where memory is short
                raise UserError(f"checkpoint: no memory for a copy of what it holds: {error}") from error

        self.submit(allocate)

    def save(
        self,
        directory: Path,
        step: int,
        tensors: dict[str, dict[str, Tensor]],
        state: dict[str, Any],
        keep: int,
        best: int | None = None,
    ) -> None:
        """See `save` and, for `best`, `mark_best`. Waits for the save before. The tensors must not change until this is
        done; then the next ones are copied over them."""
        state = copy.deepcopy(state)  # training goes on and changes its history while this is written

        def write() -> None:
            save(directory, step, tensors, state, keep)
            if best is not None:
                mark_best(directory, best)

        self.submit(write)
        self.copies = tensors

    def submit(self, job: Callable[[], None]) -> None:
        """Runs something in the thread, after what runs there now; a later `check` raises its error."""
        self.check(wait=True)
        self._pending = self._thread.submit(job)

    @property
    def done(self) -> bool:
        """Whether nothing is being written."""
        return self._pending is None or self._pending.done()

    def check(self, wait: bool = False) -> None:
        """Raises the error of the last save, once: if it is done, or, with `wait`, when it is."""
        if self._pending is not None and (wait or self.done):
            pending, self._pending = self._pending, None
            pending.result()


def mark_best(directory: str | Path, step: int) -> None:
    """Make `directory/best` a link to a step, which then survives pruning; atomic. No link if it is not saved.

    On a file system without links it is a file that holds the step's name."""
    directory = Path(directory)
    if not (directory / f"step-{step:06d}").is_dir():
        (directory / "best").unlink(missing_ok=True)
        return
    # Made beside and then renamed over, since a link cannot be changed in place.
    link = directory / ".best"
    link.unlink(missing_ok=True)
    try:
        link.symlink_to(f"step-{step:06d}")
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        link.write_text(f"step-{step:06d}\n")
    os.replace(link, directory / "best")
    sync(directory)


def load_latest(directory: str | Path) -> Checkpoint | None:
    """The newest whole checkpoint, or None if nothing was ever saved. Says which incomplete ones it skips.

    Raises UserError if there are checkpoints and none is whole.
    """
    paths = _saved(Path(directory))
    for path in reversed(paths):
        try:
            return load(path)
        except UserError as error:
            log.info(f"{error}; trying the one before")
    if paths:
        raise UserError(f"{directory}: no checkpoint is whole; remove the directory to start afresh")
    return None


def load(path: str | Path) -> Checkpoint:
    """One checkpoint, checked against its manifest. Raises UserError if missing, incomplete or corrupt."""
    path = _followed(Path(path)).resolve()
    if wrong := problem(path):
        raise UserError(f"{path}: not a whole checkpoint: {wrong}")
    state = json.loads((path / "state.json").read_text())
    # The files that the manifest names, whose checksums were compared; what else lies there is not read.
    tensors: dict[str, dict[str, Tensor]] = {}
    for name in sorted(parse_json((path / "manifest.json").read_bytes())):
        if name.endswith(".safetensors"):
            tensors[name.removesuffix(".safetensors")] = load_file(path / name)
    return Checkpoint(path, state.pop("step"), tensors, state)


def find(path: str | Path) -> Path:
    """The checkpoint directory that a path means: a checkpoint, or that of a run directory that later stages take. This
    is the newest whole one; of a run that its stop rule ended it is the best step, and one line on stderr says so.

    Raises UserError where there is none, or it is of a judge and not of K2.
    """
    path = _followed(Path(path))
    if (path / "manifest.json").is_file():
        return _of_k2(path)
    for candidate in reversed(_saved(path / "checkpoints")):
        if not problem(candidate):
            return _handed_on(path, _of_k2(candidate))
    files = sorted(path.glob("*.safetensors"))
    remedy = f"if you mean the adapter in it, name its file, {files[0]}" if files else ""
    raise UserError(f"{path}: holds no whole checkpoint; {remedy or 'give a run directory or one of its checkpoints'}")


def _of_k2(path: Path) -> Path:
    """Raises UserError for a judge's checkpoint; does not check whether it is whole."""
    try:
        method = parse_json((path / "state.json").read_bytes())["method"]
    except (OSError, ValueError, KeyError, TypeError):
        return path
    if method == "judge":
        raise UserError(
            f"{path}: is of posttrain judge, whose adapter/ vLLM serves as it is; give a run that trained K2"
        )
    return path


def _handed_on(run: Path, newest: Path) -> Path:
    """The newest checkpoint, or the best one of a run that its stop rule ended."""
    # Read from the checkpoint: it is there even if the process was killed before it could write a summary.
    state = json.loads((newest / "state.json").read_text())
    if not state.get("stopped"):
        return newest
    ended, best = f"{run}: its stop rule ended it at step {state['step']}", state.get("best")
    remedy = "run it again with a lower optim.lr or other rewards, or name one of its checkpoints"
    if best is None:
        raise UserError(f"{ended}, and eval.best was measured at no step, so there is none to hand on; {remedy}")
    if best["step"] == 0:
        raise UserError(
            f"{ended}, and {best['metric']} was never above its start, so there is no step to hand on; {remedy}"
        )
    chosen = newest.with_name(f"step-{best['step']:06d}")
    if wrong := problem(chosen):
        raise UserError(f"{ended}, and its best step is not whole: {chosen}: {wrong}; {remedy}")
    _say_once(f"{ended}; taking its best step {best['step']} by {best['metric']}")
    return chosen


@functools.cache
def _say_once(text: str) -> None:
    # A command may look for the same run several times, and each of its processes does.
    if os.environ.get("RANK", "0") == "0":  # the logger is not silenced before the processes have met
        log.info(text)


def rng_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State of the global generators of torch (CPU and each GPU), numpy and Python, as tensors and JSON."""
    tensors = {"torch": torch.get_rng_state()}
    for i in range(torch.cuda.device_count()):
        tensors[f"cuda{i}"] = torch.cuda.get_rng_state(i)
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    tensors["numpy"] = torch.from_numpy(np.asarray(keys).astype(np.int64))
    # Words of 32 bits without a sign.
    version, words, next_gauss = random.getstate()
    tensors["python"] = torch.tensor(words, dtype=torch.int64)
    state = {"numpy": [kind, position, has_gauss, gauss], "python": [version, next_gauss]}
    return tensors, state


def restore_rng(tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Put back what `rng_state` gave; the state of a GPU that is not here is left out."""
    torch.set_rng_state(tensors["torch"])
    for i in range(torch.cuda.device_count()):
        if f"cuda{i}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda{i}"], i)
    kind, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, gauss))
    version, next_gauss = state["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), next_gauss))


def _followed(path: Path) -> Path:
    """The step that `checkpoints/best` stands for where it is a file; any other path as it is."""
    if path.name == "best" and path.is_file():
        return path.with_name(path.read_text().strip())
    return path


def steps_in(directory: Path) -> list[int]:
    """The steps of the checkpoints in a directory, whole or not, in order."""
    return [int(path.name.removeprefix("step-")) for path in _saved(directory)]


def _saved(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    paths = [path for path in directory.iterdir() if STEP.fullmatch(path.name)]
    # By number: a step of seven digits comes after all of six.
    return sorted(paths, key=lambda path: int(path.name.removeprefix("step-")))


def problem(path: Path) -> str | None:
    """Why a directory is not a whole checkpoint; None if it is one."""
    if not path.is_dir():
        return "no such directory"
    try:
        manifest = parse_json((path / "manifest.json").read_bytes())
        expected = {name: (facts["bytes"], facts["sha256"]) for name, facts in manifest.items()}
    except FileNotFoundError:
        return "manifest.json is missing"
    except ValueError as error:
        return f"manifest.json: {error}"
    except (OSError, AttributeError, KeyError, TypeError):
        return "manifest.json is damaged"
    if "state.json" not in expected:
        return "manifest.json does not name state.json"
    for name, (size, digest) in expected.items():
        file = path / name
        if not os.path.isfile(file):
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, not {size}"
        if sha256(file) != digest:
            return f"{name} does not match its checksum"
    return None


def _prune(directory: Path, keep: int) -> None:
    # Resolved, as `best` may be a link, a file, or not there.
    best = _followed(directory / "best").resolve()
    for path in _saved(directory)[:-keep]:
        if path.resolve() != best:
            shutil.rmtree(path)


def _write_json(path: Path, data: Any) -> None:
    # Sorted, so that equal checkpoints have equal checksums.
    path.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")


def sha256(path: Path) -> str:
    """Of a file's bytes, in hexadecimal; remembered while the file stays as it is."""
    facts = path.stat()
    return _digest(path, facts.st_ino, facts.st_size, facts.st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _digest(path: Path, *unchanged: int) -> str:
    # Cached, as a checkpoint is first found and then loaded, and a file may have tens of GB.
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_full(error: Exception) -> bool:
    """Whether an error of writing a file means that there is no space left for it."""
    if isinstance(error, OSError):
        return error.errno in FULL
    match = re.search(r"os error (\d+)", str(error))  # safetensors passes the system's error on as text only
    return match is not None and int(match[1]) in FULL


def _megabytes(tensors: dict[str, dict[str, Tensor]]) -> float:
    total = 0
    for group in tensors.values():
        total += sum(tensor.nbytes for tensor in group.values())
    return total / 1e6
