"""The preflight of sft: a few encoded images, and two updates with the code of sft/train.py."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from posttrain.config.types import changed
from posttrain.distributed.processes import Processes
from posttrain.errors import counted
from posttrain.model.adapters.targets import Lanes
from posttrain.model.k2 import K2
from posttrain.preflight.checks import Row, phase
from posttrain.preflight.common import K2Checks, finite
from posttrain.preflight.few import Few
from posttrain.runs.progress import duration
from posttrain.sft import train as sft
from posttrain.sft.batches import Batch
from posttrain.sft.cache import encode_images
from posttrain.sft.config import SFTConfig
from posttrain.sft.dataset import ImageSet
from posttrain.sft.turbo import add_turbo, student_of
from posttrain.training.loop import try_rewards
from posttrain.training.policy import add_policy, load_model
from prompts.records import PromptRecord, read_prompts

BATCHES = 2
"""Most micro-batches of an update."""


def rows(config: SFTConfig, procs: Processes, folder: Path) -> list[Row]:
    """Raises UserError if nothing can be checked."""
    source = ImageSet(config.images)
    heldout = [] if config.heldout is None else read_prompts(config.heldout)
    try_rewards(config, heldout)
    phase("the model is read")
    k2 = load_model(config.model, procs.device)
    return SFTChecks(config, procs, k2, source, heldout, folder).run()


class SFTChecks(K2Checks):
    def __init__(
        self, config: SFTConfig, procs: Processes, k2: K2, source: ImageSet, heldout: list[PromptRecord], folder: Path,
        lanes: Lanes = "all",
    ):  # fmt: skip
        phase("images are encoded")
        self.few, began = Few(source), time.perf_counter()
        cached = replace(config.images, cache=str(folder / "cache"))
        # Before the images: it decides whether their captions can be kept fused.
        add_policy(k2, config.lora, config.seed, False, lanes)
        self.images = encode_images(k2, self.few, cached, procs.alone())  # type: ignore[arg-type]
        self.encoding = (time.perf_counter() - began) / len(self.few)
        self.whole, self.total = config.batch, len(source)
        if config.turbo is not None:  # which raises what is wrong with it
            add_turbo(k2, config.turbo, student_of(config.turbo), config.turbo_steps)
        # Without prompts of their own evaluations draw the captions, as in a run.
        heldout = heldout or sft.captions_of(self.few, self.images, config.eval.prompts)  # type: ignore[arg-type]
        size = sft.preview_size(config)
        super().__init__(
            config, procs, k2, heldout, folder, size, 4 * config.micro_batch, config.images.max_tokens, "micro_batch"
        )
        self.config = changed(config, batch=min(config.batch, BATCHES * config.micro_batch))

    def run(self) -> list[Row]:
        with contextlib.ExitStack() as servers:
            self.check("adapter", self.adapter)
            self.check("images", self.encoded)
            self.check("judges", lambda: self.judges(servers))
            self.check("evaluation", self.evaluation)
        self.check("update", self.update)
        self.check("cost", lambda: self.cost(("update",), self.whole))
        self.check("export", lambda: self.export(self.heldout[0].prompt))
        return self.rows

    def encoded(self) -> Iterator[Row]:
        """Checks that images can be read and encoded, and estimates the time for all of them."""
        images = self.images
        bad, left_out, cut = len(images.tally.bad), len(images.left_out), len(images.cuts)
        each = f"{self.encoding:.2g} s a row, about {duration(self.encoding * self.total)} for all {self.total}"
        cuts = f"{counted(cut, 'caption')} cut at images.max_tokens"
        measured = f"{len(images.images)} encoded, {bad} bad, {left_out} left out, {cuts}; {each}"
        yield Row(
            "images",
            self.few.is_sound(bad),
            measured,
            "look at images.columns and at the rows that are named on stderr",
        )

    def update(self) -> Iterator[Row]:
        """Checks that the loss is finite, and that an update changes only the policy."""
        batches = self._draw(1)
        # The same latents, times and noise before and after, so that only weights can make a difference.
        before = self._velocities(batches[0])
        first = self._optimise(batches)
        yield finite("loss and gradient", {**first}, "loss", "grad_norm")
        yield self.policy_moves(before, self._velocities(batches[0]))
        batches = self._draw(2)
        second, seconds = self.timed(lambda: self._optimise(batches))
        self.seconds["update"] = seconds * self.whole / self.config.batch / self.procs.size
        yield finite("further updates", {**second}, "loss", "grad_norm")

    def _optimise(self, batches: Sequence[Any]) -> dict[str, float]:
        return sft.optimise(self.k2, self.config, batches, self.stepper, self.alone)

    def _draw(self, step: int) -> Sequence[Batch]:
        order = sft.order_of(self.images, self.config)
        return sft.draw(self.k2, self.config, self.images, order(step), step, self.alone, self.config.micro_batch)

    @torch.no_grad()
    def _velocities(self, batch: Batch) -> dict[str | None, torch.Tensor]:
        """The velocities of an image, under every role."""
        return self.velocities(batch.x[:1], batch.t[:1], batch.text.first(1), batch.size)
