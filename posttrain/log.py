"""Messages to the user: one logger, one line a message on stderr, in which `posttrain:` stands first.

    from posttrain.log import log
    log.info("continues after step 3")        # posttrain: continues after step 3
    log.warning("a step did not fit")       # posttrain: warning: a step did not fit

Only the main process of a run speaks: `Processes` calls `silence` in the others. What a command was asked for, such as
a table or a path, is printed to stdout and is no message.
"""

from __future__ import annotations

import logging
from functools import cached_property
from typing import Any

log = logging.getLogger("posttrain")


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        return f"posttrain: {level}{super().format(record)}"


class _Handler(logging.Handler):
    """Hands records to rich's handler, which is imported at the first message: most commands start without one."""

    @cached_property
    def _rich(self) -> logging.Handler:
        from rich.console import Console, ConsoleRenderable
        from rich.logging import RichHandler

        class Plain(RichHandler):
            def render(self, *, message_renderable: ConsoleRenderable, **_: Any) -> ConsoleRenderable:
                return message_renderable  # rich's own is a table, which breaks lines at the terminal's width

        # stderr is looked up at each message, so a progress bar that is shown stays below it.
        console = Console(stderr=True, soft_wrap=True)
        handler = Plain(console=console, markup=False, keywords=[])
        handler.highlighter = None  # type: ignore[assignment]
        handler.setFormatter(_Formatter())
        return handler

    def emit(self, record: logging.LogRecord) -> None:
        self._rich.emit(record)


def silence() -> None:
    """Only errors are said from now on."""
    log.setLevel(logging.ERROR)


if not log.handlers:
    log.addHandler(_Handler())
    log.setLevel(logging.INFO)
    log.propagate = False  # a program that configures the root logger would say everything twice
