"""The preflight of nft: a step of a few groups, drawn, scored and trained on with the code of nft/train.py.

The update uses +1 and -1 as advantages, so its results do not depend on the rewards. Before it the old policy and the
policy are the same; after it, the old one must have stayed as it is until it follows.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from posttrain.distributed.processes import Processes
from posttrain.nft import train as nft
from posttrain.nft import update
from posttrain.nft.config import NFTConfig
from posttrain.preflight.checks import Row, phase
from posttrain.preflight.common import finite
from posttrain.preflight.groups import GroupChecks
from posttrain.training import checkpoint
from posttrain.training.loop import try_rewards
from posttrain.training.policy import POLICY, load_model
from posttrain.training.prompt_source import PromptSource
from prompts.records import read_prompts
from rewards.background import ScoreQueue


def rows(config: NFTConfig, procs: Processes, folder: Path) -> list[Row]:
    """Raises UserError if nothing can be checked."""
    source, heldout = PromptSource(config, read_prompts(config.prompts.train)), read_prompts(config.prompts.heldout)
    try_rewards(config, heldout, source.records)
    phase("the model is read")
    k2 = load_model(config.model, procs.device)
    update.add_roles(k2, config)
    return NFTChecks(config, procs, k2, source, heldout, folder).run()


class NFTChecks(GroupChecks):
    def draw(self, queue: ScoreQueue) -> list[update.Group]:
        few = self.config.groups.micro_batch
        return nft.sample(self.k2, self.config, 1, self.stepper, self.source, queue, self.procs, few)

    def full_steps(self) -> list[int]:
        # The second is drawn without guidance alone, so with several settings this is an upper bound.
        return [self.config.eval.steps, self.config.sampling.steps]

    def updates(self) -> None:
        self.check("update", self.update, together=True)

    def update(self) -> Iterator[Row]:
        """Checks that the old policy begins as the policy, and that an update moves the policy alone."""
        groups, config = self.sampled(), self.config
        signs_PG = self.signs().expand(config.groups.prompts_per_step, -1)
        before, old = self._velocities(groups), self._old()
        began = time.perf_counter()
        metrics = update.optimise(
            self.k2, config, 1, groups, signs_PG, torch.ones_like(signs_PG), self.stepper, self.procs,
            config.groups.micro_batch, check=True,
        )  # fmt: skip
        self.seconds["optimise"] = self.scaled(time.perf_counter() - began)
        error = metrics["old_error"]
        measured = f"their velocities differ by {error:.2g} of themselves before the first update"
        remedy = "use model.dtype float32, or report it"
        yield Row("old policy is the policy", error <= update.TOLERANCE / 10, measured, remedy)
        yield finite("loss and gradient", {**metrics}, "loss", "grad_norm")
        if not self.procs.main:
            return
        yield self.policy_moves(before, self._velocities(groups))
        # It moves in `follow`, which a run calls after the optimiser and which is not called here.
        if old:
            kept = all(torch.equal(value, old[name]) for name, value in self._old().items())
            measured = "an update leaves it as it is" if kept else "an update has CHANGED it"
            yield Row("old policy waits", kept, measured, "the policy's update trains the old one: report it")

    def _old(self) -> dict[str, Tensor]:
        """Copies of the old policy's weights; none if it is always the policy."""
        return checkpoint.on_host(self.k2.role_state_dict(update.OLD)) if update.OLD in self.k2.roles else {}

    def _velocities(self, groups: list[update.Group]) -> dict[str | None, Tensor]:
        """The velocities of an image at half the noise."""
        if not groups:
            return {}
        group = groups[0]
        found = self.velocities(group.latents[:1], 0.5, group.text, group.size)
        return {role: v for role, v in found.items() if role in (POLICY, None)}
