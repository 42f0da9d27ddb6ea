"""Checkpoints that TRL's trainers write, made whole or not there as checkpoint.py's are, of safetensors and JSON alone.

Beside the adapter and trainer_state.json, the trainer's own, a checkpoint has

    state.safetensors, state.json          the optimiser and the schedule of its rate
    rng-<process>.safetensors and .json    each process's generators
    manifest.json                          written last; what does not fit it is not read

The trainers by themselves would keep all but the first two in torch's own format, which is pickled.
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
from posttrain.training.checkpoint import flatten_optimizer, problem, restore_optimizer, restore_rng, rng_state, seal

ARGUMENTS = "training_args.bin"


class PlainState:
    """What a trainer keeps besides weights, in plain files; to stand before its class, whose methods these replace.

    For one process, or several that hold the same (no FSDP, no DeepSpeed).
    """

    args: Any
    optimizer: Any
    lr_scheduler: Any

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.args.should_save:
            tensors, state = flatten_optimizer(self.optimizer.optimizer)
            _write(Path(output_dir), "state", tensors, [state, self.lr_scheduler.state_dict()])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            tensors, (state, schedule) = _read(Path(checkpoint), "state")
            restore_optimizer(self.optimizer.optimizer, tensors, state)
            self.lr_scheduler.load_state_dict(schedule)

    def _save_rng_state(self, output_dir: str) -> None:
        _write(Path(output_dir), self._rng, *rng_state())

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """A process that the saved run did not have keeps its own."""
        if checkpoint is not None and (Path(checkpoint) / f"{self._rng}.json").exists():
            restore_rng(*_read(Path(checkpoint), self._rng))

    @property
    def _rng(self) -> str:
        return f"rng-{self.args.process_index}"


def _write(folder: Path, name: str, tensors: dict[str, Tensor], state: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)  # another process may be before the one that saves the weights
    plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    save_file(plain, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps(state, indent=1) + "\n")


def _read(folder: Path, name: str) -> tuple[dict[str, Tensor], Any]:
    return load_file(folder / f"{name}.safetensors"), json.loads((folder / f"{name}.json").read_text())


class AtomicCheckpointCallback(TrainerCallback):
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
        wrong = problem(path)
        if wrong is None:
            return step, path
        log.info(f"{path}: not a whole checkpoint: {wrong}; trying the one before")
    return None
