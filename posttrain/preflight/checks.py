"""Runs every check, even if one fails, and prints the table of results."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import psutil
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from posttrain.errors import UserError, counted
from posttrain.log import log

WIDTH = 120
"""Width of the table when stdout is not a terminal."""


@dataclass
class Row:
    check: str
    ok: bool | None
    """None: the check was skipped."""
    measured: str
    remedy: str = ""
    """Shown if the check failed."""


class Skip(Exception):
    """Raised by a check that cannot run, for example because another one failed."""


def run_check(name: str, rows: Callable[[], Iterable[Row]], alone: bool = True) -> list[Row]:
    """The rows of a check. An exception becomes a failed row; for a bug the traceback goes to stderr.

    If other processes take part, a UserError must be raised in all of them. Anything else is raised again, which ends
    all processes.
    """
    results: list[Row] = []
    try:
        phase(name)
        for row in rows():  # one at a time: rows before a failure are kept
            results.append(row)
    except Skip as reason:
        results.append(Row(name, None, str(reason)))
    except UserError as error:
        # A server's log, say, which no cell of a table has room for.
        if error.detail:
            print(error.detail, file=sys.stderr)
        results.append(Row(name, False, " ".join(str(error).split())))
    except Exception as error:
        if not alone:
            raise
        results.append(_failed(name, error))
    return results


def phase(name: str) -> None:
    """Says the name of the check that starts now, with the seconds since the process started."""
    # Importing torch is part of what people wait for, so the clock starts with the process.
    log.info(f"{time.time() - psutil.Process().create_time():6.1f} s: {name}")


def _failed(name: str, error: Exception) -> Row:
    if isinstance(error, torch.OutOfMemoryError):
        return Row(name, False, str(error).splitlines()[0], "lower micro_batch (grpo: groups.micro_batch) or sizes")
    traceback.print_exception(error)
    return Row(name, False, f"{type(error).__name__}: {error}", "the traceback above says where")


def show(rows: Sequence[Row]) -> None:
    """The table on stdout."""
    failed = sum(row.ok is False for row in rows)
    # Without a failure there is no remedy to show.
    columns = ["check", "", "measured", *(["remedy"] if failed else [])]
    title = f"{failed or 'none'} of {counted(len(rows), 'check')} failed"
    table = Table(*columns, title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for row in rows:
        result, style = {True: ("pass", "green"), False: ("FAIL", "bold red"), None: ("skipped", "dim")}[row.ok]
        cells = [Text(row.check), Text(result, style), Text(row.measured), Text("" if row.ok else row.remedy)]
        table.add_row(*cells[: len(columns)])
    Console(width=None if sys.stdout.isatty() else WIDTH).print(table)
