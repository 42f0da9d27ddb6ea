"""Steps of mopd for the bench: two teachers, which are random adapters of the student's rank. One has guidance."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import TYPE_CHECKING, Any

import torch

from posttrain.config.sections import PromptsConfig
from posttrain.model.k2 import Text
from posttrain.mopd import train as mopd
from posttrain.mopd.config import MOPDConfig, TeacherConfig
from posttrain.mopd.teachers import Teacher, role_of
from prompts.records import PromptRecord

if TYPE_CHECKING:
    from posttrain.bench.steps import Steps

GUIDANCE = 3.5
STATES = 3


def loop(steps: Steps) -> Iterator[tuple[int, dict[str, Any]]]:
    """A run's loop, whose steps draw `batch` images, half of each teacher."""
    config, k2, lora = recipe(steps), steps.k2, steps.lora
    assert lora is not None  # BenchConfig refuses to train nothing
    teachers = []
    for seed, (name, settings) in enumerate(config.teachers.items()):
        role, images = role_of(name), config.images_of(name)
        k2.add_role(role, lora.rank, lora.alpha, seed=seed + 1)
        for i, (key, parameter) in enumerate(k2.role_named_parameters(role).items()):
            if key.endswith("lora_B.weight"):  # not zero, or the student would have nothing to learn
                noise = torch.Generator(parameter.device).manual_seed(i)
                torch.nn.init.normal_(parameter, std=0.01, generator=noise)
        records = [PromptRecord(f"{name} {i}") for i in range(images)]
        teachers.append(Teacher(name, role, settings.guidance, images, records))

    null = Text(steps.next_text()[None, :6])  # about as long as the empty prompt with K2's template
    return mopd.updates(
        k2, config, teachers, steps.next_texts, null, steps.stepper, count(1), steps.procs,
        steps.micro_batch(config.micro_batch), steps.clock(),
    )  # fmt: skip


def recipe(steps: Steps) -> MOPDConfig:
    """The settings of the steps."""
    names = {"guided": TeacherConfig("", GUIDANCE, ["guided"]), "plain": TeacherConfig("", 0.0, ["plain"])}
    config = steps.empty(MOPDConfig, prompts=PromptsConfig("", ""), teachers=names)
    config.images = max(1, steps.procs.size * steps.config.batch // len(names))
    # A run measures cosines in one step of 50, so the few steps of a bench leave them out.
    config.micro_batch, config.cosines_every, config.loss.reference = steps.config.batch, 0, 0.0
    config.sampling.sizes, config.sampling.steps = [list(steps.size)], steps.config.steps
    config.sampling.states = min(STATES, steps.config.steps)
    return config
