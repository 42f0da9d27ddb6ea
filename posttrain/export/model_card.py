"""The model card of an export: what it was made from and how, how to run it, what was measured, under which licence.

All of it is taken from the checkpoint, its run's recipe and the base's own card. What none of them says is left out; a
licence is never invented. The text is in posttrain/report/templates/export_card.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from posttrain import commands
from posttrain.errors import counted
from posttrain.loading import is_hub_id, without_revision
from posttrain.model.references import KAPPA
from posttrain.report.front_matter import card
from posttrain.report.public import public
from posttrain.runs.read import read_changes
from posttrain.training.checkpoint import Checkpoint
from posttrain.training.evaluate import square_of
from posttrain.training.policy import earlier_of, is_directory, is_file, is_student

AS_BASE = "as-the-base-model"
STEPS = 28  # of the base model
LEAST_KEPT = 0.98
"""Of what was trained, by the change of the weights: an export that keeps less is refused unless told otherwise."""
LEFT_OUT = {"output", "servers", "track", "model", "prompts", "rewards", "checkpoint"}
"""Sections of a recipe that do not go into a card: addresses, environment variables, and what has its own section."""


@dataclass(frozen=True)
class Rounding:
    """What is left of a change of weights, once it is merged into weights of a type."""

    dtype: str
    """float32 or bfloat16"""
    share: float
    """<rounded change, change> / <change, change> over all adapted weights: 1 where nothing is lost."""
    layer: str
    """The layer that keeps least."""
    least: float
    """Its share."""
    size: float
    """The change as a share of the weights, by norm."""
    bfloat16: float
    """The share for whoever loads the weights in bfloat16."""

    def __str__(self) -> str:
        text = f"merged in {self.dtype}: {self.share:.3f} of what was trained is kept ({self.least:.3f} in"
        text += f" {self.layer}; the change is {100 * self.size:.2g} % of the weights)"
        return text if self.dtype == "bfloat16" else f"{text}; loaded in bfloat16 it is {self.bfloat16:.3f}"


STYLE = "style"
"""The method that references belong to."""


def model_card(
    saved: Checkpoint,
    output: Path,
    format: str,
    license: str | None,
    rounding: Rounding | None = None,
    hub: str | None = None,
) -> str:
    """The card as Markdown, with the front matter that the hub reads. `license` overrides the base's; `rounding` says
    how much a merge kept; `hub` is the id that the export is uploaded under."""
    # Whoever reads the card need not know where the base lies on this machine.
    model, recipe = public(saved.state["model"]), public(run_recipe(saved))
    method = saved.state.get("method")
    stages = [*earlier_of(saved), saved]
    front = _front(saved, format, license)
    student = saved.state["student"] if is_student(saved) else None
    guidance = saved.state.get("guidance")
    settings = {name: value for name, value in recipe.items() if name not in LEFT_OUT}
    # Loaded in bfloat16, weights of which too much is rounded away would not do what was measured.
    needs_float32 = rounding is not None and rounding.bfloat16 < LEAST_KEPT
    return card(
        "export_card.md", front,
        title=output.name if format == "diffusers" else output.stem,
        name=hub if hub is not None and format == "diffusers" else output.name,
        file=output.name,
        hub=hub,
        base_is_on_hub=_on_hub(saved),
        base=model["path"],
        source=_source(model),
        format=format,
        stages=list(map(_stage, stages)),
        student=student and {**student, "shift": math.exp(student["mu"])},
        guidance=guidance and _guidance(guidance),
        eval_steps=recipe.get("eval", {}).get("steps"),
        steps=student["steps"][0] if student else STEPS,
        scale=guidance["evaluation"][0] if guidance and not student else 0.0,
        dtype="torch.float32" if needs_float32 else "torch.bfloat16",
        rounding=rounding,
        step=saved.step,
        kappa=KAPPA if STYLE in [stage.state.get("method") for stage in stages] else None,
        results=_results(saved),
        rewards=[_reward(reward, method) for reward in recipe.get("rewards", [])],
        size=size_of(recipe),
        changes=_changes(saved),
        recipe_text=yaml.safe_dump(settings, sort_keys=False) if settings else "",
        license=_license_text(front, model["path"], license),
    )  # fmt: skip


def _source(model: Mapping[str, Any]) -> str:
    """Where the base comes from, with the file and the 8-bit format of its transformer."""
    if not model["transformer_file"]:
        return model["path"]
    format = model.get("transformer_format")
    return f"{model['transformer_file']}{f' in {format}' if format else ''} ({model['path']})"


def _front(saved: Checkpoint, format: str, license: str | None) -> dict[str, Any]:
    path = saved.state["model"]["path"]
    base = public(path)
    tags = ["krea-2", "posttrain"]
    if format.startswith("lora"):
        tags.append("lora")
    if is_student(saved):
        tags.append("distilled")
    on_hub = _on_hub(saved)
    front = {"library_name": "diffusers", "pipeline_tag": "text-to-image", "tags": tags}
    front |= _license(path, license, on_hub)
    # The hub refuses cards that name a directory as their base.
    return {"base_model": without_revision(base), **front} if on_hub else front


def _on_hub(saved: Checkpoint) -> bool:
    """Whether others find the base on the hub: by its id, or as a download of it that the path names."""
    path = saved.state["model"]["path"]
    # A relative path has the form of an id, also when its directory has been moved since.
    if is_directory(saved) and not Path(path).is_absolute():
        return False
    return is_hub_id(public(path))


def run_recipe(saved: Checkpoint) -> dict[str, Any]:
    """The resolved recipe of the run that a checkpoint lies in; empty if it was moved out of it, or is none."""
    if is_file(saved):
        return {}
    file = saved.path.parent.parent / "recipe.yaml"  # above checkpoints/step-000123
    return (yaml.safe_load(file.read_text()) or {}) if file.is_file() else {}


def heldout_of(recipe: Mapping[str, Any]) -> str | None:
    """The prompts that a run held out; None where the recipe names none."""
    return recipe["prompts"]["heldout"] if "prompts" in recipe else recipe.get("heldout")


def size_of(recipe: Mapping[str, Any]) -> list[int] | None:
    """[height, width] of the run's evaluations; None where the recipe does not say it."""
    sizes = recipe.get("sampling", {}).get("sizes") or recipe.get("sizes") or []
    images = recipe.get("images")
    # sft and style draw squares of the first resolution.
    if isinstance(images, Mapping) and images.get("resolutions"):
        sizes = [list(square_of(images["resolutions"][0]))]
    # A method of one's own has one size; stpo's is that of its pairs, if the recipe sets it.
    return sizes[0] if sizes else recipe.get("size") or (recipe.get("pairs") or {}).get("size")


def _changes(saved: Checkpoint) -> list[str]:
    """Settings that were changed when the run was resumed before this checkpoint."""
    lines = []
    for row in read_changes(saved.path.parent.parent) if not is_file(saved) else ():
        section = row["setting"].split(".")[0]
        if row["after_step"] < saved.step and section not in LEFT_OUT:
            before, now = public(row["before"]), public(row["now"])
            lines.append(f"{row['setting']}: {before} until step {row['after_step']}, then {now}")
    return lines


def _stage(stage: Checkpoint) -> dict[str, Any]:
    method, lora = stage.state.get("method", "training"), stage.state["lora"]
    if is_file(stage):
        kind = f"an adapter of rank {lora['rank']}" if lora else stage.state["kinds"]
        return {"method": "an adapter's file", "steps": "", "weights": kind, "path": stage.path.name}
    row, merge = commands.get(method), stage.state.get("merge")
    title = row.title if row is not None and row.title else method
    if merge is not None:
        parents = [f"{parent['weight']:g} x {public(str(parent['name']))}" for parent in merge["parents"]]
        title = f"{title} ({merge['method']}) of {' and '.join(parents)}"
    return {
        "method": title,
        # A merge was not trained.
        "steps": None if merge is not None else counted(stage.step, "step"),
        "weights": f"an adapter of rank {lora['rank']}" if lora else "all weights",
        "path": f"{stage.path.parent.parent.name}/{stage.path.name}",
    }


def _guidance(guidance: dict[str, Any]) -> dict[str, str]:
    evaluation = [f"{value:g}" for value in guidance["evaluation"]]
    return {"training": f"{guidance['training']:g}", "evaluation": ", ".join(evaluation)}


def _results(saved: Checkpoint) -> dict[str, Any] | None:
    """Before the first step, and of the last evaluation up to this checkpoint; for a student, its teacher's too."""
    evaluations = [(step, metrics) for step, metrics in saved.state.get("evaluations", []) if step <= saved.step]
    history = saved.state.get("history", {})
    before, teacher = history.get("before"), history.get("teacher")
    if not evaluations or before is None:
        return None
    step, after = evaluations[-1]
    columns = {"before": before, f"step {step}": after}
    if teacher:
        columns["teacher"] = teacher
    rows = []
    for name in after:
        # Not all columns have all of them: a teacher is not compared with itself.
        rows.append([name, *(column.get(name) for column in columns.values())])
    return {"step": step, "head": ["", *columns], "rows": rows}


def _reward(reward: dict[str, Any], method: str | None) -> dict[str, str]:
    function = reward["function"]
    if not isinstance(function, str):
        function = function.get("class_path")
    # Some methods train on rewards; the others measure all of them.
    command = commands.get(method) if method else None
    is_trained = command is not None and command.learns and not reward.get("heldout_only")
    weight = f"weight {reward['weight']:g}" if is_trained else "measured only"
    return {"name": reward["name"], "function": public(function), "weight": weight}


def _license(base: str, given: str | None, on_hub: bool) -> dict[str, str]:
    """The fields of the front matter: those given, those of the base's card, or the name that says as much."""
    if given is not None:
        return {"license": given}
    card = Path(base) / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    front = yaml.safe_load(text.split("---")[1]) if text.startswith("---") and text.count("---") > 1 else {}
    fields = {name: str(front[name]) for name in ("license", "license_name", "license_link") if front.get(name)}
    if "license" in fields:
        return fields
    # `other` with a name of its own is how the hub wants a licence that it does not know.
    unknown = {"license": "other", "license_name": AS_BASE}
    if on_hub:
        unknown["license_link"] = f"https://huggingface.co/{without_revision(base)}"
    return unknown


def _license_text(front: dict[str, Any], base: str, given: str | None) -> str:
    if given is not None:
        return f"{given}, as whoever exported it says; the base model's own terms hold besides."
    if front.get("license_name") == AS_BASE:
        link = f" ({front['license_link']})" if "license_link" in front else ""
        return f"As the base model, `{base}`{link}: its terms hold for what is made from it."
    name = front.get("license_name", front["license"])
    link = f" ({front['license_link']})" if "license_link" in front else ""
    return f"As the base model, `{base}`: {name}{link}."
