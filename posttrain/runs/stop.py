"""The one handler of signals: SIGTERM and Ctrl-C let the work in progress end well."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any


class StopSignals:
    """Inside the block SIGTERM and Ctrl-C are noted in `received`; a second Ctrl-C raises KeyboardInterrupt.

    The handlers of before are put back at the end.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
