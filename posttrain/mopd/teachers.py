"""Teachers as roles on the student's base, and which prompts are whose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from posttrain.errors import UserError
from posttrain.log import log
from posttrain.model.k2 import K2
from posttrain.model.lora_file import add_lora, linear_shapes, read_lora
from posttrain.mopd.config import ANCHOR, MOPDConfig
from posttrain.training import checkpoint
from posttrain.training.checkpoint import Checkpoint
from posttrain.training.policy import POLICY, add_policy, earlier_of, is_student
from prompts.records import PromptRecord, read_prompts

B = "lora_B.weight"


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
    own = [name for name, teacher in config.teachers.items() if set(teacher.tags) & set(record.tags)]
    if len(own) > 1:
        raise UserError(
            f"teachers: '{record.prompt[:60]}' has tags of {own[0]} and of {own[1]} ({', '.join(record.tags)}); a"
            " prompt has one teacher: give it one of these tags, or the teachers other ones"
        )
    return own[0] if own else ANCHOR


def routed(config: MOPDConfig, records: Sequence[PromptRecord]) -> list[Teacher]:
    """The teachers that have prompts to train on, and last the anchor if it has. Raises UserError for a teacher that
    has none."""
    by_owner: dict[str, list[PromptRecord]] = {name: [] for name in (*config.teachers, ANCHOR)}
    for record in records:
        by_owner[owner(config, record)].append(record)
    teachers = []
    for name, settings in config.teachers.items():
        own = by_owner[name] + (read_prompts(settings.prompts) if settings.prompts is not None else [])
        if not own:
            raise UserError(
                f"teachers.{name}.tags: none of the {len(records)} prompts of prompts.train has {settings.tags}; add"
                " prompts with these tags, or name a file in prompts"
            )
        teachers.append(Teacher(name, role_of(name), settings.guidance, config.images_of(name), own))
    if by_owner[ANCHOR] and config.anchor:
        teachers.append(Teacher(ANCHOR, None, 0.0, config.images_of(ANCHOR), by_owner[ANCHOR]))
    return teachers


# ---- roles ------------------------------------------------------------------------------------------------


def role_of(name: str) -> str:
    return f"teacher_{name}"


def add_roles(k2: K2, config: MOPDConfig, fresh: bool = True) -> None:
    """The student and a frozen role for each teacher. A `fresh` student begins as the reference or from `start`;
    another one has a checkpoint.

    Raises UserError for a teacher that was trained on another base or on earlier runs that the student does not have,
    that trained all weights, or that is distilled.
    """
    assert config.lora is not None  # MOPDConfig
    add_policy(k2, config.lora, config.seed, reference=True)
    for name, teacher in config.teachers.items():
        field = f"teachers.{name}.run"
        add_lora(k2, role_of(name), factors_of(k2, teacher.run, field), f"{field}: {teacher.run}")
    if fresh and config.start is not None:
        begin_from(k2, factors_of(k2, config.start, "start"), config.start)


def factors_of(k2: K2, path: str, setting: str) -> dict[str, Tensor]:
    """Factors for the student's model as it is (base and earlier runs), with the scale in B."""
    if path.endswith(".safetensors"):
        log.info(f"{setting}: {path} does not say which base it is for; that it fits is all that is known")
        return read_lora(path, linear_shapes(k2.base_state_dict()))
    saved = checkpoint.load(checkpoint.find(path))
    stages = [*earlier_of(saved), saved]
    if any(map(is_student, stages)):
        raise UserError(f"{setting}: {saved.path} is distilled, on another schedule; give the run before it")
    origin = saved.state.get("origin", {"base": None, "merged": []})
    if origin["base"] not in (None, k2.origin["base"]):
        raise UserError(f"{setting}: {saved.path} was trained on another base than model.path; give a run on this one")
    # What the student starts from is under the teacher too, so only what the teacher has beyond it is its own.
    shared = [entry["sha256"] for entry in k2.origin["merged"]]
    if [entry["sha256"] for entry in origin["merged"]][: len(shared)] != shared:
        raise UserError(
            f"{setting}: {saved.path} was not trained on top of model.start; leave model.start out, or give a run that"
            " began from it"
        )
    return _concatenated(stages[len(shared) :], setting)


def _concatenated(stages: Sequence[Checkpoint], setting: str) -> dict[str, Tensor]:
    """Adapters of runs on top of each other as one: ranks side by side add up, [B1 B2] [A1; A2] = B1 A1 + B2 A2."""
    factors: dict[str, list[Tensor]] = {}
    for stage in stages:
        lora = stage.state["lora"]
        if lora is None:
            raise UserError(
                f"{setting}: {stage.path} trained all weights; give a run with an adapter, or a LoRA extracted from it"
            )
        for key, value in stage.tensors["adapter"].items():
            factors.setdefault(key, []).append(value * (lora["alpha"] / lora["rank"]) if key.endswith(B) else value)
    return {key: torch.cat(parts, dim=1 if key.endswith(B) else 0) for key, parts in factors.items()}


@torch.no_grad()
def begin_from(k2: K2, factors: Mapping[str, Tensor], where: str) -> None:
    """The student's adapter becomes these factors exactly. What is left of its rank keeps its own A and a B of 0, so
    that it can learn. Raises UserError if they need more rank or other layers."""
    role, own = k2.roles[POLICY], k2.role_named_parameters(POLICY)
    assert role is not None
    if outside := [key for key in factors if key not in own]:
        raise UserError(f"start: {where} adapts {outside[0].rpartition('.lora')[0]}, which lora.targets leaves out")
    rank = max(len(value) for key, value in factors.items() if not key.endswith(B))
    if rank > role.rank:
        raise UserError(f"start: {where} has rank {rank}, and lora.rank is {role.rank}; raise it to {rank}")
    state = k2.role_state_dict(POLICY)
    for key, value in factors.items():
        new = state[key].clone()
        new[: value.shape[0], : value.shape[1]] = value * (role.rank / role.alpha) if key.endswith(B) else value
        state[key] = new
    k2.load_role_state_dict(POLICY, state)
