"""What a launcher tells each of its processes, checked before anything is loaded. Never imports torch."""

from __future__ import annotations

import os

from posttrain.errors import UserError

VARIABLES = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def check() -> None:
    """Raises UserError where WORLD_SIZE says that there are several processes, and how they meet is not said."""
    size = _number("WORLD_SIZE", "1")
    if size <= 1:
        return
    absent = [name for name in VARIABLES if not os.environ.get(name)]
    if absent:
        raise UserError(
            f"WORLD_SIZE: is {size}, and {', '.join(absent)} not set: start it with `accelerate launch` or `torchrun`,"
            " which set all of them, or unset WORLD_SIZE for a single process"
        )
    rank = _number("RANK")
    if rank >= size:
        raise UserError(f"RANK: is {rank} of WORLD_SIZE={size}: ranks count from 0")


def _number(name: str, default: str = "") -> int:
    given = os.environ.get(name) or default
    if not given.isdecimal():
        raise UserError(f"{name}: is '{given}', not a number: leave it to `accelerate launch` or `torchrun`")
    return int(given)
