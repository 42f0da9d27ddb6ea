"""Preflight: what a run relies on, checked and measured before it costs anything.

    posttrain preflight --config recipes/nano/grpo.yaml

It takes the recipe of grpo, stpo, tdm, pairs or expander gdpo, makes a small step of it with the code of that command,
and throws it away: no run directory is made or touched. One table on stdout says of each check what was measured and,
where it failed, what to do; a check that fails keeps no other from being made. Exit code 1 if any failed. stderr
shows what is being done, with the seconds since the start.

A step is made of as few images as show what is checked, and its time is scaled to the recipe's. Under `torchrun` the
processes share the step of grpo; the other methods are checked by the main process alone.
"""

from __future__ import annotations

import importlib
import tempfile
from pathlib import Path
from typing import Any

from posttrain.distributed.processes import Processes
from posttrain.early import METHODS
from posttrain.preflight.checks import phase, show


def preflight(config: Any) -> int:
    """Prints the table and returns the exit code. Raises UserError where nothing can be checked."""
    procs, method = Processes(), METHODS[type(config).__name__].replace("expander ", "")
    if not procs.main and method != "grpo":
        return 0
    module = importlib.import_module(f"posttrain.preflight.{method}")
    with tempfile.TemporaryDirectory(prefix="posttrain-preflight-") as folder:
        rows = module.rows(config, procs, Path(folder))
    if not procs.main:
        return 0  # a launcher that saw another code would end the main process, which may not be done
    phase("done")
    show(rows)
    return int(any(row.ok is False for row in rows))
