"""Preflight: checks what a run relies on, and measures its cost, before it starts.

    posttrain preflight --config recipes/nano/grpo.yaml

It takes the recipe of grpo, nft, mopd, sft, style, stpo, tdm, pairs or expander gdpo, runs a small step of it with the
code of that command, and discards it: no run directory is created or changed. The table on stdout shows what each check
measured and, if it failed, a remedy. All checks run, even if one fails; the exit code is 1 if any failed. stderr shows
the progress, with the seconds since the start.

A step uses as few images as the checks need, and its time is scaled to the size of the recipe. Under `torchrun` the
processes share the step of grpo and nft; the other methods are checked by the main process alone.
"""

from __future__ import annotations

import importlib
import tempfile
from pathlib import Path
from typing import Any

from posttrain import commands
from posttrain.distributed.processes import Processes
from posttrain.errors import UserError
from posttrain.preflight.checks import phase, show

TOGETHER = ("grpo", "nft")
"""Methods whose step all processes share."""


def preflight(config: Any) -> int:
    """Prints the table and returns the exit code. Raises UserError if nothing can be checked."""
    procs = Processes()
    if getattr(config.model, "sequence_parallel", 1) > 1:
        raise UserError("model.sequence_parallel: preflight takes whole samples; check with 1, at a size that fits")
    name, _ = commands.of(config)
    method = name.removeprefix("expander ")
    if not procs.main and method not in TOGETHER:
        return 0
    module = importlib.import_module(f"posttrain.preflight.{method}")
    with tempfile.TemporaryDirectory(prefix="posttrain-preflight-") as folder:
        rows = module.rows(config, procs, Path(folder))
    if not procs.main:
        return 0  # at any other code the launcher would end the main process, which may still be running
    phase("done")
    show(rows)
    return int(any(row.ok is False for row in rows))
