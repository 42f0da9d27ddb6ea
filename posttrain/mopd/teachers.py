"""Teachers as roles on the student's base, and which prompts are whose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from torch import Tensor

from posttrain.errors import UserError
from posttrain.log import log
from posttrain.model.k2 import K2
from posttrain.model.lora_file import add_lora
from posttrain.mopd.config import ANCHOR, MOPDConfig
from posttrain.training.policy import (
    POLICY,
    add_policy,
    base_of,
    digest_of,
    earlier_of,
    is_file,
    is_student,
    load_stage,
    refuse_on_references,
    scaled_factors,
)
from prompts.records import PromptRecord, read_prompts


@dataclass
class Teacher:
    """One domain: who teaches it and its prompts."""

    name: str
    role: str | None
    """None: the reference."""
    guidance: float
    images: int
    """In a step, over all processes."""
    records: list[PromptRecord] = field(default_factory=list)


# ---- prompts ----------------------------------------------------------------------------------------------


def owner(config: MOPDConfig, record: PromptRecord) -> str:
    """The teacher of a prompt by its tags, or the anchor. Raises UserError if two claim it."""
    own = [name for name, teacher in config.teachers.items() if not set(teacher.tags).isdisjoint(record.tags)]
    if len(own) > 1:
        raise UserError(
            f"teachers: '{record.prompt[:60]}' has tags of {own[0]} and of {own[1]} ({', '.join(record.tags)}); a"
            " prompt has one teacher: give it one of these tags, or the teachers other ones"
        )
    return own[0] if own else ANCHOR


def routed(config: MOPDConfig, records: Sequence[PromptRecord]) -> list[Teacher]:
    """The teachers that have prompts to train on, and last the anchor if it has. Raises UserError for a teacher that
    has none."""
    by_owner: dict[str, list[PromptRecord]] = {}
    for record in records:
        by_owner.setdefault(owner(config, record), []).append(record)
    teachers = []
    for name, settings in config.teachers.items():
        own = by_owner.get(name, [])
        if settings.prompts is not None:
            own = own + read_prompts(settings.prompts)
        if not own:
            raise UserError(
                f"teachers.{name}.tags: no prompt of prompts.train has {settings.tags}; add"
                " prompts with these tags, or name a file in prompts"
            )
        teachers.append(Teacher(name, role_of(name), settings.guidance, config.images_of(name), own))
    if ANCHOR in by_owner and config.anchor:
        teachers.append(Teacher(ANCHOR, None, 0.0, config.images_of(ANCHOR), by_owner[ANCHOR]))
    return teachers


# ---- roles ------------------------------------------------------------------------------------------------


def role_of(name: str) -> str:
    return f"teacher_{name}"


def add_roles(k2: K2, config: MOPDConfig) -> None:
    """The student and a frozen role for each teacher.

    Raises UserError for a teacher that was trained on another base or on earlier runs that the student does not have,
    that trained all weights, or that is distilled.
    """
    add_policy(k2, config.lora, config.seed, reference=True)
    student = k2.roles[POLICY]
    for name, teacher in config.teachers.items():
        field = f"teachers.{name}.run"
        add_lora(k2, role_of(name), factors_of(k2, config, teacher.run, field), f"{field}: {teacher.run}")
        role = k2.roles[role_of(name)]
        assert role is not None and student is not None
        # A change of higher rank than the student's cannot be learnt whole.
        if role.rank > student.rank:
            log.warning(f"lora.rank: is {student.rank}, and teacher {name} has rank {role.rank}; use at least that")


def factors_of(k2: K2, config: MOPDConfig, path: str, setting: str) -> dict[str, Tensor]:
    """A teacher's factors on the student's model as it is (base and earlier runs), with the scale in B."""
    try:
        stage = load_stage(path, asdict(config.model))
    except UserError as error:
        raise UserError(f"{setting}: {error}") from error
    stages = [*earlier_of(stage), stage]
    if any(map(is_student, stages)):
        raise UserError(f"{setting}: {stage.path} is distilled, on another schedule; give the run before it")
    if base_of(stage) not in (None, k2.origin["base"]):
        raise UserError(f"{setting}: {stage.path} was trained on another base than model.path; give a run on this one")
    # What the student starts from is under the teacher too, so only what the teacher has beyond it is its own.
    shared = [entry["sha256"] for entry in k2.origin["merged"]]
    if is_file(stage):
        log.info(f"{setting}: {path} does not say which base it is for; that it fits is all that is known")
        shared = []
    elif list(map(digest_of, stages[:-1]))[: len(shared)] != shared:
        raise UserError(
            f"{setting}: {stage.path} was not trained on top of model.start; leave model.start out, or give a run that"
            " began from it"
        )
    refuse_on_references(stage)
    # What lies between the shared stages and the teacher is a part of it.
    try:
        return scaled_factors(stages[len(shared) :])
    except UserError as error:
        raise UserError(f"{setting}: {error}; give a run with an adapter, or a LoRA extracted from it") from error
