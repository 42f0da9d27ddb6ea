"""What keeps a user's code from touching anything but its own: state of the process is put back, and what it raises is
described in one line.
"""

import contextlib
import ctypes
import logging
import os
import random
import sys
import sysconfig
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

CLONE_FS = 0x200
"""Flag of unshare(2) for the working directory, the root and the umask."""
log = logging.getLogger("posttrain")
OURS = tuple(str(Path(__file__).with_name(name)) for name in ("base.py", "load.py", "isolation.py"))


def described(error: BaseException) -> str:
    """Type and message of what a user's code raised, with the last file and line that are neither ours nor a
    library's."""
    message = f"{type(error).__name__}: {' '.join(str(error).split())}"
    ours = (*OURS, sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), "<frozen")
    places = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(ours)]
    if not places or isinstance(error, SyntaxError):  # whose message names them
        return message
    return f"{message} ({os.path.relpath(places[-1].filename)}:{places[-1].lineno})"


class _Kept:
    """State that is read when the first of several overlapping calls begins, and put back when the last one ends."""

    def __init__(self, read: Callable[[], Callable[[], None]]):
        """`read` returns what puts the state back."""
        self._read, self._calls, self._lock = read, 0, threading.Lock()
        self._put_back: Callable[[], object] = read

    def __enter__(self) -> None:
        with self._lock:
            if self._calls == 0:
                self._put_back = self._read()
            self._calls += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._calls -= 1
            if self._calls == 0:
                self._put_back()


class _KeptByThread(threading.local):
    def __init__(self) -> None:
        self.kept = _Kept(_read_thread)


def own_directory() -> None:
    """Gives this thread a working directory and a umask of its own, which it may change while others write files.

    Only Linux can, and some containers forbid it: then they are put back, as all else, after the call.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).unshare(CLONE_FS)


@contextlib.contextmanager
def untouched(reward: str = "") -> Iterator[None]:
    """Puts back at its end what a user's code may have set for all: the working directory, the seeds of `random`,
    NumPy and torch, and torch's grad mode, default type, default device, determinism and number of threads.

    Rewards draw from random numbers of their own, which go on from call to call. Warns, once, of a `reward` that set
    torch's default type, since other threads may have computed with it meanwhile.
    """
    with _process, _thread.kept:
        before = _default_type()
        yield
        if reward and reward not in _warned and _default_type() != before:
            _warned.add(reward)
            log.warning(
                f"reward {reward}: during a call torch's default type became {_default_type()}, and images that are"
                " drawn at the same time may come out otherwise; give its own tensors their type instead"
            )


def _default_type() -> Any:
    torch = sys.modules.get("torch")
    return None if torch is None else torch.get_default_dtype()


def _read_process() -> Callable[[], None]:
    torch, folder = sys.modules.get("torch"), os.getcwd()  # nothing imports torch for the sake of this
    generators: list[tuple[Any, Any]] = [
        (random.getstate, random.setstate),
        (np.random.get_state, np.random.set_state),
    ]
    settings: list[tuple[Any, Any]] = []
    if torch is not None:
        generators.append((torch.get_rng_state, torch.set_rng_state))
        if torch.cuda.is_initialized():
            generators.append((torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all))
        settings.append((torch.get_default_dtype, torch.set_default_dtype))
        settings.append((torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms))
        settings.append((torch.get_num_threads, torch.set_num_threads))
    before = [get() for get, _ in generators]
    values = [get() for get, _ in settings]
    # Rewards go on with a stream of random numbers of their own, so that the run's does not depend on them.
    for get, put in generators:
        if get in _random_states:
            put(_random_states[get])

    def put_back() -> None:
        os.chdir(folder)
        for (get, put), state in zip(generators, before):
            _random_states[get] = get()
            put(state)
        for (get, put), value in zip(settings, values):
            if get() != value:
                put(value)

    return put_back


def _read_thread() -> Callable[[], None]:
    torch = sys.modules.get("torch")
    if torch is None:
        return lambda: None
    grad, device = torch.is_grad_enabled(), torch.get_default_device()

    def put_back() -> None:
        torch.set_grad_enabled(grad)
        if torch.get_default_device() != device:
            # None instead of cpu: every call of torch goes through a default device that is set.
            torch.set_default_device(None if device.type == "cpu" else device)

    return put_back


_warned: set[str] = set()
"""Rewards that a warning has named."""
_random_states: dict[Any, Any] = {}
"""The rewards' own states of the random generators, by the function that reads them."""
_process, _thread = _Kept(_read_process), _KeptByThread()
