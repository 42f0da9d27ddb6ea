"""Checkpoints that TRL's trainers write, made whole or not there as checkpoint.py's are.

They hold torch's own format besides safetensors (optimizer.pt, scheduler.pt, rng_state.pth), which the trainers read
with weights_only: tensors and plain values, and no code. training_args.bin, which could hold code, is removed, and
what does not fit its manifest is not read.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from posttrain.checkpoint import problem, seal

ARGUMENTS = "training_args.bin"
LAST = "trainer_state.json"


class Sealed(TrainerCallback):
    """Writes the manifest of each checkpoint that the trainer has saved."""

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        PartialState().wait_for_everyone()  # each process writes the state of its generators
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            (folder / ARGUMENTS).unlink(missing_ok=True)
            seal(folder)


def newest(folder: Path) -> tuple[int, Path] | None:
    """The newest whole checkpoint and its step; says which it passes over."""
    found = [(int(path.name.rpartition("-")[2]), path) for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")]
    for step, path in sorted(found, reverse=True):
        wrong = problem(path, LAST)
        if wrong is None:
            return step, path
        print(f"posttrain: {path}: not a whole checkpoint: {wrong}; trying the one before", file=sys.stderr)
    return None
