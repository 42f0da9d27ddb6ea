"""The preflight of tdm: a step of a few images, for the fake score and the student, with the code of tdm/train.py.

At the start student, fake score and teacher (without guidance) are equal. An update of one must not change the others
by a single bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from posttrain.config.types import changed
from posttrain.distributed.processes import Processes
from posttrain.model.k2 import K2
from posttrain.preflight.checks import Row, phase
from posttrain.preflight.common import K2Checks, finite
from posttrain.tdm import train as tdm
from posttrain.tdm.config import TDMConfig
from posttrain.tdm.rollout import MU, Batch, roll_out
from posttrain.training import checkpoint
from posttrain.training.evaluate import SamplingSettings
from posttrain.training.loop import try_rewards
from posttrain.training.policy import POLICY, load_model
from posttrain.training.prompt_source import FusedTexts, in_turn
from prompts.records import PromptRecord, read_prompts

BATCHES = 2
"""Most micro-batches of a step."""


def rows(config: TDMConfig, procs: Processes, folder: Path) -> list[Row]:
    """Raises UserError if nothing can be checked."""
    records, heldout = read_prompts(config.prompts.train), read_prompts(config.prompts.heldout)
    try_rewards(config, heldout)
    phase("the model is read")
    k2 = load_model(config.model, procs.device)
    tdm.add_roles(k2, config)
    return TDMChecks(config, procs, k2, records, heldout, folder).run()


class TDMChecks(K2Checks):
    def __init__(
        self, config: TDMConfig, procs: Processes, k2: K2, records: list[PromptRecord], heldout: list[PromptRecord],
        folder: Path,
    ):  # fmt: skip
        batch, max_tokens = 4 * config.micro_batch, config.prompts.max_tokens
        super().__init__(config, procs, k2, heldout, folder, config.sizes[0], batch, max_tokens, "micro_batch")
        self.whole, self.records = config.batch, records
        self.config = changed(config, batch=min(config.batch, BATCHES * config.micro_batch))
        self.texts, self.null = FusedTexts(k2, max_tokens), k2.text([""])
        self.stepper, self.fake = tdm.steppers(k2, self.config)

    def run(self) -> list[Row]:
        with contextlib.ExitStack() as servers:
            self.check("adapter", self.adapter)
            self.check("judges", lambda: self.judges(servers))
            self.check("evaluation", self.evaluation)
        self.check("step", self.step)
        self.check("cost", lambda: self.cost(("trajectory", "fake", "student"), self.whole))
        self.check("export", lambda: self.export(self.heldout[0].prompt))
        return self.rows

    def ways(self, steps: int) -> list[SamplingSettings] | None:
        return [SamplingSettings(min(n, steps), 0.0, MU) for n in self.config.student.steps[:1]]

    def full_steps(self) -> list[int]:
        return self.config.student.steps

    def step(self) -> Iterator[Row]:
        """One update of fake score and student, then another whose time counts: the first one compiles."""
        batches = self._draw(1)
        start = self._velocities(batches[0])
        teacher, apart = start.get(None), 0.0
        if teacher is not None:
            apart = max(float((start[role] - teacher).norm() / teacher.norm()) for role in (POLICY, tdm.FAKE))
            measured = f"their velocities differ by {apart:.2g} of the teacher's before the first update"
            yield Row("all begin as the teacher", apart <= 1e-3, measured, "use model.dtype float32, or report it")

        # Copies, since an update changes weights in place.
        student = self._state(POLICY)
        fake_metrics = tdm.update_fake(self.k2, self.config, batches, 0, self.fake, self.alone)
        yield finite("fake score", {**fake_metrics}, "fake_loss", "fake_grad_norm")
        kept, fake = self._same(student, POLICY), self._state(tdm.FAKE)
        metrics = tdm.update_student(self.k2, self.config, batches, self.null, self.stepper, self.alone)
        yield finite("student", {**metrics}, "generator_loss", "generator_grad_norm")
        kept_fake = self._same(fake, tdm.FAKE)
        # Both are adapters of one network: a wrong active role would train the other one unseen.
        measured = f"the fake score's update leaves the student {'as it is' if kept else 'CHANGED'}, and the student's"
        measured += f" leaves the fake score {'bit-identical' if kept_fake else 'CHANGED'}"
        yield Row("updates keep apart", kept and kept_fake, measured, "one trains the other's weights: report it")
        yield self.policy_moves(start, self._velocities(batches[0]))

        scale, updates = self.whole / self.config.batch / self.procs.size, self.config.fake.updates
        batches, self.seconds["trajectory"] = self.timed(lambda: self._draw(2))
        _, fake_seconds = self.timed(lambda: tdm.update_fake(self.k2, self.config, batches, 0, self.fake, self.alone))
        self.seconds["fake"] = fake_seconds * updates
        _, self.seconds["student"] = self.timed(
            lambda: tdm.update_student(self.k2, self.config, batches, self.null, self.stepper, self.alone)
        )
        for part in ("trajectory", "fake", "student"):  # to the batch of the recipe
            self.seconds[part] *= scale

    def _draw(self, step: int) -> list[Batch]:
        config = self.config
        first = (step - 1) * config.batch
        places = [in_turn(config.seed, first + i, len(self.records)) for i in range(config.batch)]
        fused = self.texts([self.records[place].prompt for place in places])
        keys = [(config.seed, step, i) for i in range(config.batch)]
        return roll_out(self.k2, config.student, fused, keys, self.size, config.micro_batch, config.fake.updates + 1)

    def _state(self, role: str) -> dict[str, torch.Tensor]:
        return checkpoint.on_host(self.k2.role_state_dict(role))

    def _same(self, before: dict[str, torch.Tensor], role: str) -> bool:
        """Whether the role's weights are as they were, bit for bit."""
        now = self._state(role)
        return all(torch.equal(now[name], value) for name, value in before.items())

    def _velocities(self, batch: Batch) -> dict[str | None, torch.Tensor]:
        """The velocities of an image at the start of its last update's step."""
        points = batch.points[-1]
        return self.velocities(points.x[:1], points.t[:1], batch.text.first(1), batch.size)
