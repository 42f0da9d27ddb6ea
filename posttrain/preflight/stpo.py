"""The preflight of stpo: a few encoded pairs, and two updates with the code of stpo/train.py.

The first update is that of step 1, which measures the gradients of the terms separately if the recipe asks for it. The
second is an ordinary one, whose time counts. At the start policy and reference are equal, so the margin z is 0.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from posttrain.config.types import changed
from posttrain.distributed.processes import Processes
from posttrain.errors import counted
from posttrain.model.k2 import K2
from posttrain.preferences.dataset import Preferences, read_preferences
from posttrain.preflight.checks import Row, phase
from posttrain.preflight.common import K2Checks, finite
from posttrain.preflight.few import Few
from posttrain.runs.progress import duration
from posttrain.stpo import train as stpo
from posttrain.stpo.config import STPOConfig
from posttrain.stpo.latent_cache import Batch, encode_pairs
from posttrain.training.loop import try_rewards
from posttrain.training.policy import add_policy, load_model
from prompts.records import PromptRecord, read_prompts

BATCHES = 2
"""Most micro-batches of an update."""
Z = 0.01
"""Largest margin in nats before the first update: the loss then differs from its value at 0 by less than 1 %."""


def rows(config: STPOConfig, procs: Processes, folder: Path) -> list[Row]:
    """Raises UserError if nothing can be checked."""
    resized = config.pairs.size is not None
    preferences = read_preferences(config.pairs.train, config.pairs.columns, config.pairs.max_bad, resized)
    heldout = read_prompts(config.heldout, references=True)
    try_rewards(config, heldout)
    phase("the model is read")
    k2 = load_model(config.model, procs.device)
    return STPOChecks(config, procs, k2, preferences, heldout, folder).run()


class STPOChecks(K2Checks):
    def __init__(
        self, config: STPOConfig, procs: Processes, k2: K2, preferences: Preferences, heldout: list[PromptRecord],
        folder: Path,
    ):  # fmt: skip
        phase("pairs are encoded")
        self.few, began = Few(preferences), time.perf_counter()
        cached = replace(config.pairs, cache=str(folder / "cache"))
        # Before the pairs: it decides whether their text can be kept fused.
        add_policy(k2, config.lora, config.seed, reference=True)
        self.pairs = encode_pairs(k2, self.few, cached, procs.alone())  # type: ignore[arg-type]
        self.encoding = (time.perf_counter() - began) / len(self.few)
        self.whole, self.total = config.batch, len(preferences)
        # Without a setting pairs keep their own sizes, and evaluations take that of the first.
        size = config.pairs.size or self.pairs.size[0].tolist()
        super().__init__(
            config, procs, k2, heldout, folder, size, 4 * config.micro_batch, config.pairs.max_tokens, "micro_batch"
        )
        self.config = changed(config, batch=min(config.batch, BATCHES * config.micro_batch))

    def run(self) -> list[Row]:
        with contextlib.ExitStack() as servers:
            self.check("adapter", self.adapter)
            self.check("pairs", self.encoded)
            self.check("judges", lambda: self.judges(servers))
            self.check("evaluation", self.evaluation)
        self.check("update", self.update)
        self.check("cost", lambda: self.cost(("update",), self.whole, "pairs"))
        self.check("export", lambda: self.export(self.heldout[0].prompt))
        return self.rows

    def encoded(self) -> Iterator[Row]:
        """Checks that pairs can be read and encoded, and estimates the time for all of them."""
        bad, cut = len(self.pairs.tally.bad), len(self.pairs.cuts)
        count = len(self.pairs.train) + len(self.pairs.heldout)
        each = f"{self.encoding:.2g} s a row, about {duration(self.encoding * self.total)} for all {self.total}"
        measured = f"{count} encoded, {bad} bad, {counted(cut, 'prompt')} cut at pairs.max_tokens; {each}"
        yield Row(
            "pairs",
            count > 0 and self.few.is_sound(bad),
            measured,
            "look at pairs.columns and at the rows that are named on stderr",
        )

    def update(self) -> Iterator[Row]:
        """Checks that the policy starts as the reference, and that an update changes only the policy."""
        batches = stpo.draw(self.k2, self.config, self.pairs, 1, self.alone, self.config.micro_batch)
        # The same latents, times and noise before and after, so that only weights can make a difference.
        before = self._velocities(batches[0])
        first = stpo.optimise(self.k2, self.config, 1, batches, self.stepper, self.alone)
        measured = f"the margin z is {first['z']:.2g} nats before the first update, the loss {first['loss']:.4f}"
        yield Row("policy is the reference", abs(first["z"]) <= Z, measured, "use model.dtype float32, or report it")
        yield finite("loss and gradient", {**first}, "loss", "grad_norm")
        yield self.policy_moves(before, self._velocities(batches[0]))
        batches = stpo.draw(self.k2, self.config, self.pairs, 2, self.alone, self.config.micro_batch)
        # Step 2 runs other code than step 1, so it is compiled by a first call that does not count.
        self.timed(lambda: stpo.optimise(self.k2, self.config, 2, batches, self.stepper, self.alone))
        second, seconds = self.timed(lambda: stpo.optimise(self.k2, self.config, 2, batches, self.stepper, self.alone))
        self.seconds["update"] = seconds * self.whole / self.config.batch / self.procs.size
        yield finite("further updates", {**second}, "loss", "grad_norm")

    @torch.no_grad()
    def _velocities(self, batch: Batch) -> dict[str | None, torch.Tensor]:
        """The velocities of the first image of a pair."""
        return self.velocities(batch.x_w[:1], batch.t[:1], batch.text.first(1), batch.size)
