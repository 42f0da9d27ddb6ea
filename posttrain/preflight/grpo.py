"""The preflight of grpo: a step of a few groups, drawn, scored and trained on with the code of grpo/train.py.

The update uses +1 and -1 as advantages, so its results do not depend on the rewards.

Legend: P groups, G images of a group.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from posttrain.config.types import changed
from posttrain.distributed.processes import Processes
from posttrain.errors import counted
from posttrain.grpo import train as grpo
from posttrain.grpo import update
from posttrain.grpo.ahead import roles
from posttrain.grpo.config import GRPOConfig, RolloutConfig
from posttrain.model.k2 import K2
from posttrain.preflight.checks import Row, Skip, phase
from posttrain.preflight.groups import GroupChecks
from posttrain.training.loop import try_rewards
from posttrain.training.policy import add_policy, load_model
from posttrain.training.prompt_source import PromptSource
from posttrain.training.stepper import RATIO_REMEDY
from prompts.records import PromptRecord, read_prompts
from rewards.background import ScoreQueue


def rows(config: GRPOConfig, procs: Processes, folder: Path) -> list[Row]:
    """Raises UserError if nothing can be checked."""
    roles(config, procs)  # refuses numbers that do not go together before anything is loaded
    source, heldout = PromptSource(config, read_prompts(config.prompts.train)), read_prompts(config.prompts.heldout)
    try_rewards(config, heldout, source.records)
    phase("the model is read")
    k2 = load_model(config.model, procs.device)
    add_policy(k2, config.lora, config.seed, reference=config.loss.kl > 0)
    return GRPOChecks(config, procs, k2, source, heldout, folder).run()


class GRPOChecks(GroupChecks):
    alike = "raise sampling.eta if it is tiny; if not, two images have one seed: report it"

    def __init__(
        self, config: GRPOConfig, procs: Processes, k2: K2, source: PromptSource, heldout: list[PromptRecord],
        folder: Path,
    ):  # fmt: skip
        super().__init__(config, procs, k2, source, heldout, folder)
        self.rollout = config.rollout
        # All processes draw and train here, one after the other, so that each part can be timed.
        # Then all ratios are 1, and a config with max_weight is refused.
        self.config = changed(self.config, rollout=RolloutConfig(), loss=changed(config.loss, max_weight=None))

    def draw(self, queue: ScoreQueue) -> list[update.Group]:
        return grpo.sample(self.k2, self.config, 1, self.source, queue, self.procs, self.config.groups.micro_batch)

    def updates(self) -> None:
        self.check("policy gradient", self.policy_gradient)
        self.check("update", self.update, together=True)
        self.check("KL gradient", self.kl_gradient)

    def parts(self) -> tuple[str, ...]:
        """With what `rollout` hides taken off their seconds."""
        parts, gpus, size = super().parts(), self.rollout.gpus, self.procs.size
        if not self.rollout.ahead or not {*parts} <= {*self.seconds}:
            return parts
        sample, score, optimise = (self.seconds[part] for part in parts)
        if gpus:  # fewer processes for each, at the same time; judges are waited for after the longer one
            sample, optimise = sample * size / gpus, optimise * size / (size - gpus)
            score = max(0.0, score - max(0.0, optimise - sample))
            sample = max(0.0, sample - optimise)
        else:
            score = max(0.0, score - sample - optimise)
        self.seconds |= dict(zip(parts, (sample, score, optimise)))
        return parts

    # ---- an update ----------------------------------------------------------------------------------------

    def policy_gradient(self) -> Iterator[Row]:
        yield self._gradient("policy gradient", self.signs(), 0.0)

    def kl_gradient(self) -> Iterator[Row]:
        """Runs after the update: at the reference the gradient is 0."""
        if self.config.loss.kl == 0:
            raise Skip("loss.kl is 0")
        if not self.moved:
            raise Skip("the policy is still the reference, where it is 0")
        yield self._gradient("KL gradient", 0 * self.signs(), self.config.loss.kl)

    def _gradient(self, name: str, advantages_G: Tensor, kl: float) -> Row:
        """The gradient of one term of the loss, over a micro-batch of one step of one group."""
        group = self.sampled()[0]
        # A micro-batch of one step is enough to see whether the term has a gradient.
        few, move = self.config.groups.micro_batch, group.trajectory.transitions[0]
        rows, part = next(move.parts(few))
        group = replace(group, index=0, trajectory=replace(group.trajectory, transitions=[part]))
        config = changed(self.config, loss=changed(self.config.loss, kl=kl))
        update.gradient(self.k2, config, [group], advantages_G[None, rows], self.alone, few)
        norms = [p.grad.norm() for p in self.stepper.parameters if p.grad is not None]
        self.stepper.optimizer.zero_grad(set_to_none=True)  # the update after it starts from no gradient
        norm = float(torch.stack(norms).norm()) if norms else 0.0
        remedy = "raise sampling.eta, or use model.dtype float32" if norm else "this term teaches nothing: report it"
        return Row(name, 0 < norm < math.inf, f"norm {norm:.3g} over {counted(len(part.x_next), 'image')}", remedy)

    def update(self) -> Iterator[Row]:
        """Checks that the training policy equals the sampling policy, and that an update changes only the policy."""
        self.sampled()
        signs_PG = self.signs().expand(self.config.groups.prompts_per_step, -1)
        before = self._velocities()
        began = time.perf_counter()
        metrics = grpo.optimise(
            self.k2, self.config, self.groups, signs_PG, self.stepper, self.procs, self.config.groups.micro_batch
        )
        self.seconds["optimise"] = self.scaled(time.perf_counter() - began)
        error, clip = metrics["ratio_error"], min(self.config.loss.clip_low, self.config.loss.clip_high)
        measured = f"max |ratio - 1| is {error:.2g}; a tenth of the smaller clip is {clip / 10:.2g}"
        yield Row("ratio is 1", error <= clip / 10, measured, RATIO_REMEDY)
        if not self.procs.main:
            return
        yield self.policy_moves(before, self._velocities())

    def _velocities(self) -> dict[str | None, Tensor]:
        """The velocities of an image at a stochastic step."""
        if not self.groups:
            return {}
        group = self.groups[0]
        move = group.trajectory.transitions[0]
        return self.velocities(move.x[:1], move.t, group.text, group.size)
