"""The preflight of style: a few encoded images, and two updates with references by the code of style/train.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from posttrain.config.types import changed
from posttrain.distributed.processes import Processes
from posttrain.model.k2 import K2
from posttrain.preflight.checks import Row, phase
from posttrain.preflight.few import Few
from posttrain.preflight.sft import SFTChecks
from posttrain.references.shown import of_records
from posttrain.style import train as style
from posttrain.style.batches import StyleBatch, batches_of, jobs_of_step
from posttrain.style.config import StyleConfig
from posttrain.style.dataset import StyleSet, Views
from posttrain.style.views import Box
from posttrain.training.loop import try_rewards
from posttrain.training.policy import load_model
from prompts.records import PromptRecord, read_prompts


class FewStyled(Few):
    """A few rows of a set with styles."""

    whole: StyleSet

    def style_of(self, row: int) -> str | None:
        return self.whole.style_of(self.places[row])

    def subject(self, row: int) -> Box | None:
        return self.whole.subject(self.places[row])


def rows(config: StyleConfig, procs: Processes, folder: Path) -> list[Row]:
    """Raises UserError if nothing can be checked."""
    source = StyleSet(config.images)
    heldout = [] if config.heldout is None else read_prompts(config.heldout, references=True)
    of_records(heldout, config.heldout)
    try_rewards(config, heldout)
    phase("the model is read")
    k2 = load_model(config.model, procs.device)
    return StyleChecks(config, procs, k2, source, heldout, folder).run()


class StyleChecks(SFTChecks):
    config: StyleConfig

    def __init__(
        self, config: StyleConfig, procs: Processes, k2: K2, source: StyleSet, heldout: list[PromptRecord], folder: Path
    ):
        super().__init__(config, procs, k2, source, heldout, folder, config.lanes)
        # A few images have only some of the styles, so none can be held out.
        few: Any = FewStyled(source)
        self.views = Views(few, self.images, changed(config, heldout_styles=[]))

    def _optimise(self, batches: Sequence[Any]) -> dict[str, float]:
        return style.optimise(self.k2, self.config, batches, self.stepper, self.alone)

    @torch.no_grad()
    def _velocities(self, batch: StyleBatch) -> dict[str | None, torch.Tensor]:  # type: ignore[override]
        """With the references of the image: an adapter may act on these alone."""
        shown = batch.shown and replace(batch.shown, latents=tuple(part[:1] for part in batch.shown.latents))
        return self.velocities(batch.x[:1], batch.t[:1], batch.text.first(1), batch.size, shown)

    def _draw(self, step: int) -> Sequence[StyleBatch]:
        config, order = self.config, style.order_of(self.views, self.config)
        jobs = jobs_of_step(self.views, config, order, step, range).own
        return batches_of(
            self.k2, self.views, jobs, config.micro_batch, config.time_mean, config.time_std, config.shift
        )
