"""Makes the checkpoints of TRL's trainers atomic, and keeps them in safetensors and JSON, not pickle.

A checkpoint has the trainer's own adapter and trainer_state.json, and

    state.safetensors, state.json          optimiser and learning-rate schedule
    rng-<process>.safetensors and .json    random generators of each process
    pool.safetensors, pool.json            the adaptive prompt pool, if there is one
    manifest.json                          written last; a checkpoint that does not match it is ignored

Without this the trainers would pickle everything but the first two.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from posttrain.log import log
from posttrain.training.checkpoint import problem, restore_rng, rng_state, seal
from posttrain.training.optim import flatten_optimizer, restore_optimizer

ARGUMENTS = "training_args.bin"


class PlainState:
    """Mixin before a trainer class: saves optimiser, schedule and generators as safetensors and JSON.

    For one process, or several with equal weights (no FSDP, no DeepSpeed).
    """

    args: Any
    optimizer: Any
    lr_scheduler: Any

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.args.should_save:
            tensors, state = flatten_optimizer(self.optimizer.optimizer)  # inside accelerate's wrapper
            write_part(Path(output_dir), "state", tensors, [state, self.lr_scheduler.state_dict()])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            tensors, (state, schedule) = read_part(Path(checkpoint), "state")
            restore_optimizer(self.optimizer.optimizer, tensors, state)
            self.lr_scheduler.load_state_dict(schedule)

    def _save_rng_state(self, output_dir: str) -> None:
        # Each process's own, as they draw different numbers.
        write_part(Path(output_dir), self._rng, *rng_state())

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Restores this process's generators; a process that the saved run did not have keeps its own."""
        if checkpoint is not None and (Path(checkpoint) / f"{self._rng}.json").exists():
            restore_rng(*read_part(Path(checkpoint), self._rng))

    @property
    def _rng(self) -> str:
        return f"rng-{self.args.process_index}"


def write_part(folder: Path, name: str, tensors: dict[str, Tensor], state: Any) -> None:
    """Writes NAME.safetensors and NAME.json into a checkpoint that is being saved."""
    folder.mkdir(parents=True, exist_ok=True)  # another process may arrive before the one that saves the weights
    plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    save_file(plain, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps(state, indent=1) + "\n")


def read_part(folder: Path, name: str) -> tuple[dict[str, Tensor], Any]:
    """What `write_part` wrote."""
    return load_file(folder / f"{name}.safetensors"), json.loads((folder / f"{name}.json").read_text())


class AtomicCheckpointCallback(TrainerCallback):
    """Writes the manifest of each checkpoint that the trainer saves, which makes it valid."""

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        PartialState().wait_for_everyone()  # every process must have written its generators
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            (folder / ARGUMENTS).unlink(missing_ok=True)  # pickled; the recipe has the same settings
            seal(folder)


def newest(folder: Path) -> tuple[int, Path] | None:
    """(step, path) of the newest valid checkpoint; reports those that it skips."""
    checkpoints = [(int(path.name.rpartition("-")[2]), path) for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")]
    for step, path in sorted(checkpoints, reverse=True):
        reason = problem(path)
        if reason is None:
            return step, path
        log.info(f"{path}: not a whole checkpoint: {reason}; trying the one before")
    return None
