"""The prompts of a training step, in turn or by the adaptive pool, and their fused text."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from posttrain.model import sampler
from posttrain.model.k2 import K2
from posttrain.training.checkpoint import Checkpoint
from posttrain.training.shard_cache import warn_of_cut
from prompts.pool import Kind, Pool, PoolConfig
from prompts.records import PromptRecord
from rewards.base import RewardSpec
from rewards.gates import Gated

FUSED_BYTES = 2**30
"""Fused text that a process keeps in RAM: of K2 about 800 prompts of 105 tokens, at 12 kB a token."""
ENDS = 8
"""Prompts shown of each end of the pool."""


class StepConfig(Protocol):
    """How many prompts a step draws."""

    prompts_per_step: int


class PooledConfig(Protocol):
    """What the settings of a method have that draws groups."""

    seed: int
    pool: PoolConfig

    @property
    def rewards(self) -> list[RewardSpec]: ...

    @property
    def groups(self) -> StepConfig: ...


class PromptSource:
    """`draw` a step's prompts, perhaps `redraw` some, then `update` with the scores of all. Only `draw` works without a
    pool."""

    def __init__(self, config: PooledConfig, records: list[PromptRecord]):
        self.config, self.records = config, records
        self.pool: Pool | None = None
        self._drawn: dict[int, np.ndarray] = {}
        """By step: the pool's rows that were drawn and not updated yet."""
        self._redrawn: list[np.ndarray] = []
        """The pool's rows that the step in progress drew in place of others, by attempt."""
        if config.pool.kind == "adaptive":
            # Gates and held-out rewards make no advantage, so they do not say what a prompt teaches.
            weights: dict[str, float] = {}
            for reward in config.rewards:
                if reward.gate == "none" and not reward.heldout_only:
                    weights[reward.name] = reward.weight
            self.pool = Pool(records, weights, config.pool, config.groups.prompts_per_step, config.seed)

    def draw(self, step: int) -> list[PromptRecord]:
        """The same prompts if the step is drawn again: an attempt that ran out of memory was this step too."""
        n = self.config.groups.prompts_per_step
        if self.pool is not None:
            self._redrawn = []  # of an attempt that ran out of memory
            if step not in self._drawn:  # a draw marks what it takes, so that a second one would be another
                self._drawn[step] = self.pool.draw(step)
            places = self.pool.places[self._drawn[step]]
        else:
            groups = range((step - 1) * n, step * n)  # counted over the whole run
            places = [in_turn(self.config.seed, i, len(self.records)) for i in groups]
        return [self.records[i] for i in places]

    def redraw(self, step: int, count: int) -> list[PromptRecord]:
        """Up to `count` prompts of the pool that the step has not drawn yet; fewer where no more are awake."""
        assert self.pool is not None
        drawn = np.concatenate([self._drawn[step], *self._redrawn])
        rows = self.pool.redraw(step, len(self._redrawn) + 1, drawn, count)
        self._redrawn.append(rows)
        return [self.records[i] for i in self.pool.places[rows]]

    def update(self, step: int, gated: Gated) -> dict[str, float]:
        """Takes in the scores of all of a step's groups, in the order of `draw` and then of `redraw`; returns how many
        prompts are in each class."""
        if self.pool is None:
            return {}
        rows = np.concatenate([self._drawn.pop(step), *self._redrawn])
        self._redrawn = []
        shape = (len(rows), -1, len(gated.names))
        values, valid = gated.values_NK.reshape(shape), gated.valid_NK.reshape(shape)
        self.pool.update(step, rows, values, valid, gated.floor_K)
        return {f"pool/{name}": count for name, count in self.pool.counts().items()}

    def ends(self) -> dict[str, list[dict[str, Any]]] | None:
        """What the report shows of the prompts: the easiest, the hardest and the most informative."""
        if self.pool is None:
            return None
        tables = {}
        for title, rows in self.pool.ends(ENDS).items():
            tables[title] = self._table(self.pool, rows)
        return tables

    def _table(self, pool: Pool, rows: np.ndarray) -> list[dict[str, Any]]:
        scores, informativeness, kinds = pool.score(rows), pool.informativeness(rows), pool.kinds(rows)
        table = []
        for i, row in enumerate(rows):
            table.append(
                {
                    "prompt": self.records[pool.places[row]].prompt,
                    "score": float(scores[i]),
                    "informativeness": float(informativeness[i]),
                    "last drawn": int(pool.drawn[row]),
                    "class": Kind(kinds[i]).name.lower(),
                    "rests until": int(pool.returns[row]) or None,
                }
            )
        return table

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Files and JSON for a checkpoint."""
        if self.pool is None:
            return {}, {}
        arrays, state = self.pool.state()
        saved: dict[str, Any] = {"pool": state}
        if self._drawn:
            # What a later step has drawn already. By key and not by row, as the file may be reordered.
            saved["drawn"] = {str(step): self.pool.keys[rows].tolist() for step, rows in self._drawn.items()}
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return {"pool": tensors}, saved

    def restore(self, saved: Checkpoint) -> None:
        """Puts back what `state` gave; a run that had no pool until now begins with a fresh one."""
        if self.pool is not None and "pool" in saved.state:
            arrays = {name: tensor.numpy() for name, tensor in saved.tensors["pool"].items()}
            self.pool.load_state(arrays, saved.state["pool"])
            row_of = {int(key): row for row, key in enumerate(self.pool.keys)}
            for step, keys in saved.state.get("drawn", {}).items():
                rows = list(map(row_of.get, keys))
                if None not in rows:  # else it is drawn again, from the prompts that are left
                    self._drawn[int(step)] = np.array(rows, np.int64)


class FusedTexts:
    """Fused text of prompts, encoded when they are first asked for.

    Kept in RAM, not on the GPU, up to `limit` bytes; what was not asked for the longest goes first, and is encoded
    again, to the same values, when it is asked for.
    """

    def __init__(self, k2: K2, max_tokens: int, limit: int = FUSED_BYTES):
        self.k2, self.max_tokens, self.limit = k2, max_tokens, limit
        self.bytes = 0
        self._texts: OrderedDict[str, Tensor] = OrderedDict()

    def __call__(self, prompts: Sequence[str]) -> list[Tensor]:
        """(L, C) of each, on the model's device."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]
        # One by one: in a batch it would depend, within rounding, on the prompts beside it, and so on what is kept.
        features = self.k2.encode(new, self.max_tokens, batch=1).features
        for prompt, encoded in zip(new, features):
            self._texts[prompt] = self.k2.text_tokens(encoded).cpu()
            self.bytes += self._texts[prompt].nbytes
        texts = []
        for prompt in prompts:
            self._texts.move_to_end(prompt)
            texts.append(self._texts[prompt].to(self.k2.device))
        while self.bytes > self.limit:  # only now, so that no prompt of this call has gone
            self.bytes -= self._texts.popitem(last=False)[1].nbytes
        return texts


def warn_of_cut_prompts(k2: K2, records: Sequence[PromptRecord], max_tokens: int) -> None:
    """Says how many prompts are longer than that, if any are."""
    # A token is at least one byte, so most prompts need no tokenizer to be known as short enough.
    # Half of max_tokens leaves room for those of the template.
    long = [record.prompt for record in records if len(record.prompt.encode()) > max_tokens // 2]
    _, cuts_of_all = k2.tokenize(long, max_tokens)
    warn_of_cut(list(filter(None, cuts_of_all)), "prompt", "prompts.max_tokens", max_tokens)


def in_turn(seed: int, index: int, n: int) -> int:
    """The prompt of global group `index`: every prompt once in a random order, then once more in another."""
    # The order follows from seed and epoch alone, so a resumed run needs no state of a generator.
    epoch, place = divmod(index, n)
    return int(_order(seed, epoch, n)[place])


@lru_cache(maxsize=2)  # a step may begin in one epoch and end in the next
def _order(seed: int, epoch: int, n: int) -> Tensor:
    generator = torch.Generator().manual_seed(sampler.seed_for(seed, epoch, -2))
    return torch.randperm(n, generator=generator)
