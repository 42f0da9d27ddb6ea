"""The preflight of mopd: a step of a few images of each teacher, with the code of mopd/train.py.

Each teacher must differ from the untrained student, and an update must change the student alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from posttrain.config.types import changed
from posttrain.distributed.processes import Processes
from posttrain.model import sampler
from posttrain.model.fingerprint import fingerprint
from posttrain.model.k2 import K2
from posttrain.mopd import train as mopd
from posttrain.mopd.config import ANCHOR, MOPDConfig
from posttrain.mopd.teachers import Teacher, add_roles, role_of, routed
from posttrain.preflight.checks import Row, phase
from posttrain.preflight.common import K2Checks, finite
from posttrain.training.loop import try_rewards
from posttrain.training.oom_retry import MicroBatch
from posttrain.training.policy import POLICY, load_model
from posttrain.training.prompt_source import FusedTexts
from posttrain.training.stepper import Clock
from prompts.records import PromptRecord, read_prompts

IMAGES = 2
"""Most images of each teacher."""


def rows(config: MOPDConfig, procs: Processes, folder: Path) -> list[Row]:
    """Raises UserError if nothing can be checked."""
    teachers, heldout = routed(config, read_prompts(config.prompts.train)), read_prompts(config.prompts.heldout)
    try_rewards(config, heldout)
    phase("the model is read")
    k2 = load_model(config.model, procs.device)
    add_roles(k2, config)
    return MOPDChecks(config, procs, k2, teachers, heldout, folder).run()


class MOPDChecks(K2Checks):
    def __init__(
        self, config: MOPDConfig, procs: Processes, k2: K2, teachers: list[Teacher], heldout: list[PromptRecord],
        folder: Path,
    ):  # fmt: skip
        batch, max_tokens, size = 4 * config.micro_batch, config.prompts.max_tokens, config.sampling.sizes[0]
        super().__init__(config, procs, k2, heldout, folder, size, batch, max_tokens, "micro_batch")
        self.whole = sum(teacher.images for teacher in teachers)
        self.teachers = [replace(teacher, images=min(IMAGES, teacher.images)) for teacher in teachers]
        self.config = changed(config, cosines_every=0)  # measured in few steps of a run, so not in a typical one
        self.texts, self.null = FusedTexts(k2, max_tokens), k2.text([""])

    def run(self) -> list[Row]:
        self.check("prompts", self.prompts)
        with contextlib.ExitStack() as servers:
            self.check("adapter", self.adapter)
            self.check("judges", lambda: self.judges(servers))
            self.check("evaluation", self.evaluation)
        self.check("step", self.step)
        self.check("cost", lambda: self.cost(("step",), self.whole))
        self.check("export", lambda: self.export(self.heldout[0].prompt))
        return self.rows

    def prompts(self) -> Iterator[Row]:
        """How many prompts each teacher has."""
        counts = [f"{teacher.name} {len(teacher.records)}" for teacher in self.teachers]
        unused = "" if self.teachers[-1].name == ANCHOR else "; the anchor has none"
        yield Row("prompts", True, f"{', '.join(counts)}{unused}")

    def step(self) -> Iterator[Row]:
        """One update, then another whose time counts: the first one compiles."""
        # Weights are compared by fingerprints: copies of all teachers would take as much memory again.
        start, prints = self._velocities(), self._prints()
        own = start[POLICY]
        for teacher in self.teachers:
            if teacher.role is None:
                continue
            apart = float((start[teacher.role] - own).norm() / own.norm())
            measured = f"its velocity is {apart:.2g} of the student's away from it before the first update"
            # With guidance it teaches another velocity than this one; `continue` begins with a teacher's weights.
            good = apart > 1e-4 or teacher.guidance > 0 or self.config.model.start_as == "continue"
            yield Row(f"teacher {teacher.name}", good, measured, "give a run that was trained")
        metrics = self._update(1)
        yield finite("loss and gradient", metrics, "loss", "grad_norm")
        after = self._velocities()
        yield self.policy_moves({role: start[role] for role in (POLICY, None)}, after)
        kept = self._prints() == prints
        measured = "an update leaves them bit-identical" if kept else "an update has CHANGED one of them"
        yield Row("teachers stay", kept, measured, "the student's update trains a teacher: report it")
        _, seconds = self.timed(lambda: self._update(2))
        images = sum(teacher.images for teacher in self.teachers)
        self.seconds["step"] = seconds * self.whole / images / self.procs.size

    def _update(self, step: int) -> dict[str, Any]:
        micro_batch = MicroBatch(self.config.micro_batch, "micro_batch", self.alone, halve=False)
        steps = mopd.updates(
            self.k2, self.config, self.teachers, self.texts, self.null, self.stepper, [step], self.alone, micro_batch,
            Clock(),
        )  # fmt: skip
        _, metrics = next(iter(steps))
        return metrics

    def _prints(self) -> dict[str, str]:
        names = [teacher.name for teacher in self.teachers if teacher.role is not None]
        return {name: fingerprint(self.k2.role_state_dict(role_of(name))) for name in names}

    def _velocities(self) -> dict[str | None, torch.Tensor]:
        """The velocities of noise at half the noise level, for a prompt of the first teacher."""
        shape = (self.k2.image_tokens(*self.size), self.k2.latent_channels)
        x = sampler.noise([sampler.seed_for(self.config.seed, -4)], shape).to(self.k2.device)
        return self.velocities(x, 0.5, self.k2.text([self.teachers[0].records[0].prompt], self.max_tokens), self.size)
