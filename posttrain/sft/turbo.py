"""Previews on Turbo: what was trained on Raw, drawn in a few steps without guidance with a distilled student beside it.

A student of posttrain tdm is an adapter, and so is a LoRA that was extracted from a Turbo checkpoint. Its factors are
added to those of the policy, as both would be loaded into a pipeline.
"""

from __future__ import annotations

from pathlib import Path

from posttrain.config import metric_names
from posttrain.errors import UserError
from posttrain.model import sampler
from posttrain.model.k2 import K2
from posttrain.model.lora_file import SUFFIX, add_lora, linear_shapes, read_lora
from posttrain.training import checkpoint, policy
from posttrain.training.checkpoint import Checkpoint
from posttrain.training.evaluate import SamplingSettings

TURBO = "turbo"
"""The role of the student, which is active only beside another."""


def student_of(turbo: str | None) -> Checkpoint | None:
    """The student that a recipe names; None for a LoRA's file, and for none. Raises UserError for anything else."""
    if turbo is None or turbo.endswith(SUFFIX):
        return None
    if (Path(turbo) / "model_index.json").is_file():
        raise UserError(
            f"turbo: {turbo} is a whole pipeline, which would take the memory of a second model; give a run of"
            " posttrain tdm or a LoRA (.safetensors)"
        )
    student = checkpoint.load(checkpoint.find(turbo))
    if not policy.is_student(student):
        raise UserError(f"turbo: {student.path} is no student of posttrain tdm; give one, or a LoRA")
    return student


def add_turbo(k2: K2, turbo: str, student: Checkpoint | None, steps: int | None) -> SamplingSettings:
    """Adds the role, and returns how to draw with it. `student` is that of `student_of`. Raises UserError for what is
    not a Turbo of this base."""
    if student is None:
        factors = read_lora(turbo, linear_shapes(k2.base_state_dict()))
        own = sampler.STEPS[True]
    else:
        if policy.base_of(student) not in (None, k2.origin["base"]):
            raise UserError(f"turbo: {student.path} was trained on another model than model.path; give one of it")
        # Earlier runs that this run stands on too are in the model already.
        shared = [entry["sha256"] for entry in k2.origin["merged"]]
        stages = [*policy.earlier_of(student), student]
        own_stages = [stage for stage in stages if policy.digest_of(stage) not in shared]
        try:
            factors = policy.scaled_factors(own_stages)
        except UserError as error:
            raise UserError(f"turbo: {error}, and previews need an adapter; give another student") from None
        own = student.state["student"]["steps"][0]
    add_lora(k2, TURBO, factors, turbo)
    # A student is drawn at Turbo's shift, whatever the resolution, and without guidance, which it has learnt.
    return SamplingSettings(steps or own, 0.0, sampler.TURBO_MU, metric_names.TURBO)
