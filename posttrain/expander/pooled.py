"""The adaptive prompt pool in TRL's trainer: the prompts that a step of `expander gdpo` expands, by earlier scores.

TRL's data loader reads a step ahead, so a sampler would draw before the last step's scores are known. The trainer
therefore asks here for its prompts when it begins to generate, and what its loader read is not used.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.distributed.processes import Processes
from posttrain.expander.chat_template import messages
from posttrain.expander.gdpo_config import ExpanderGDPOConfig
from posttrain.expander.score import Scored
from posttrain.expander.trl_checkpoint import read_part, write_part
from posttrain.training.checkpoint import Checkpoint
from posttrain.training.prompt_source import PromptSource
from prompts.records import PromptRecord
from rewards.gates import Gated, settings_of

PART = "pool"
"""Name of the pool's files in a checkpoint."""


class PooledPrompts:
    """`inputs` before a step and `update` after it, on all processes alike. `saved` is the checkpoint to go on from.

    The pool judges a prompt by the rewards alone: images of a prompt differ nearly always, so diversity would call
    every prompt informative.
    """

    def __init__(
        self,
        config: ExpanderGDPOConfig,
        records: Sequence[PromptRecord],
        procs: Processes,
        thinking: bool,
        saved: Path | None = None,
    ):
        self.config, self.procs, self.thinking = config, procs, thinking
        self.source = PromptSource(config, list(records))
        self._rows = {record.id: row for row, record in enumerate(records)}
        # A run that had no pool until now begins with a fresh one.
        if saved is not None and (saved / f"{PART}.json").is_file():
            tensors, state = read_part(saved, PART)
            # In the form of the other methods' checkpoints; the step is not read.
            self.source.restore(Checkpoint(saved, 0, {PART: tensors}, state))

    def inputs(self, step: int) -> list[dict[str, Any]]:
        """TRL's inputs of this process for a step (1, 2, ...): whole groups, as its own sampler deals them."""
        size = self.config.groups.group_size
        drawn = self.source.draw(step)
        inputs: list[dict[str, Any]] = []
        for g in self.procs.local_indices(len(drawn)):
            row = {"prompt": messages(drawn[g].prompt, self.thinking), "row": self._rows[drawn[g].id]}
            inputs += [row] * size
        return inputs

    def update(self, step: int, scored: Scored) -> dict[str, float]:
        """Takes in a step's scores, `scored` being this process's; returns how many prompts are in each class."""
        names, weights_K, noise_K, floor_K = settings_of(self.config.trained, scored.noise)
        columns = list(map(scored.names.index, names))
        # All processes take in all scores, so that their pools stay equal and draw the same prompts.
        parts = self.procs.all_gather((scored.values_NK[:, columns], scored.valid_NK[:, columns]))
        values, valid = map(np.concatenate, zip(*parts))
        return self.source.update(step, Gated(names, weights_K, values, valid, noise_K, floor_K))

    def save(self, folder: Path) -> None:
        """Writes the pool's state into a checkpoint; for one process."""
        tensors, state = self.source.state()
        write_part(folder, PART, tensors[PART], state)
