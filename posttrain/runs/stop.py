"""Signals that end a command well; nothing else in the project installs a handler."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

Handler = Callable[[int, FrameType | None], None]


@contextlib.contextmanager
def handling(handler: Handler, *numbers: signal.Signals) -> Iterator[None]:
    """Inside the block these signals go to `handler`; the handlers of before are put back at the end."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


class StopSignals:
    """Inside the block SIGTERM and Ctrl-C are noted in `received`, for the work in progress to end with its step.

    A second Ctrl-C does not wait: it raises KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._block = contextlib.ExitStack()

    def __enter__(self) -> StopSignals:
        self._block.enter_context(handling(self._note, signal.SIGTERM, signal.SIGINT))
        return self

    def __exit__(self, *_: object) -> None:
        self._block.close()

    def _note(self, number: int, frame: FrameType | None) -> None:
        # Someone who asks twice does not want to wait for the step.
        if self.received is signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)


class _Terminated(Exception):
    pass


@contextlib.contextmanager
def until_terminated() -> Iterator[None]:
    """The block ends at SIGTERM, without an error: a server that was asked to end has done its work."""

    def end(number: int, frame: FrameType | None) -> None:
        raise _Terminated

    # An exception, so that what the block started is ended as after Ctrl-C.
    with contextlib.suppress(_Terminated), handling(end, signal.SIGTERM):
        yield
