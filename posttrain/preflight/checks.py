"""Checks that are all made, whatever becomes of one, and the table of what they found."""

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

from posttrain.errors import UserError
from posttrain.log import log

WIDTH = 120
"""Columns of the table where stdout is no terminal."""


@dataclass
class Row:
    check: str
    ok: bool | None
    """None: it could not be made."""
    measured: str
    remedy: str = ""
    """Shown where it failed."""


class Skip(Exception):
    """Raised by a check that cannot be made, such as for another one's failure."""


def made(name: str, rows: Callable[[], Iterable[Row]], alone: bool = True) -> list[Row]:
    """The rows of a check. What it raises is one more, a bug's with the traceback on stderr.

    If other processes take part, a UserError has to be raised in all of them; anything else is passed on, to end them.
    """
    found: list[Row] = []
    try:
        phase(name)
        for row in rows():  # one by one: those before a failure stay
            found.append(row)
    except Skip as reason:
        found.append(Row(name, None, str(reason)))
    except UserError as error:
        if error.detail:
            print(error.detail, file=sys.stderr)
        found.append(Row(name, False, " ".join(str(error).split())))
    except Exception as error:
        if not alone:
            raise
        found.append(_broken(name, error))
    return found


def phase(name: str) -> None:
    """Says the name of the check that begins now, with the seconds since the process began."""
    log.info(f"{time.time() - psutil.Process().create_time():6.1f} s: {name}")


def _broken(name: str, error: Exception) -> Row:
    if isinstance(error, torch.OutOfMemoryError):
        return Row(name, False, str(error).splitlines()[0], "lower micro_batch (grpo: groups.micro_batch) or sizes")
    traceback.print_exception(error)
    return Row(name, False, f"{type(error).__name__}: {error}", "the traceback above says where")


def show(rows: Sequence[Row]) -> None:
    """The table on stdout."""
    failed = sum(row.ok is False for row in rows)
    columns = ["check", "", "measured", *(["remedy"] if failed else [])]
    title = f"{failed or 'none'} of {len(rows)} checks failed"
    table = Table(*columns, title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for row in rows:
        result, style = {True: ("pass", "green"), False: ("FAIL", "bold red"), None: ("skipped", "dim")}[row.ok]
        cells = [Text(row.check), Text(result, style), Text(row.measured), Text("" if row.ok else row.remedy)]
        table.add_row(*cells[: len(columns)])
    Console(width=None if sys.stdout.isatty() else WIDTH).print(table)
