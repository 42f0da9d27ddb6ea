"""The model card of an export: what it was made from and how, how to run it, what was measured, under which licence.

All of it is taken from the checkpoint, its run's recipe and the base's own card. What none of them says is left out;
a licence is never made up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from posttrain.training.checkpoint import Checkpoint
from posttrain.training.policy import earlier_of, is_student

AS_BASE = "as-the-base-model"
LEAST_KEPT = 0.98
"""Of what was trained, by the change of the weights: an export that keeps less is refused unless told otherwise."""
METHODS = {
    "stpo": "preference optimisation on pairs of pictures (STPO)",
    "grpo": "reinforcement learning with groups of images (GRPO), without guidance",
    "tdm": "trajectory distribution matching (TDM): steps and guidance distilled into a few-step student",
}
LEFT_OUT = {"output", "servers", "track", "model", "prompts", "rewards", "checkpoint"}
"""Sections of a recipe that do not go into a card: addresses, environment variables, and what is told elsewhere."""


@dataclass(frozen=True)
class Rounding:
    """What is left of a change of weights, once it is merged into weights of a type."""

    dtype: str
    """float32 or bfloat16"""
    share: float
    """<rounded change, change> / <change, change> over all adapted weights: 1 where nothing is lost."""
    layer: str
    """The one that keeps least."""
    least: float
    """Its share."""
    size: float
    """The change as a share of the weights, by norm."""
    bfloat16: float
    """The share for whoever loads the weights in bfloat16."""

    def __str__(self) -> str:
        told = f"merged in {self.dtype}: {self.share:.3f} of what was trained is kept ({self.least:.3f} in"
        told += f" {self.layer}; the change is {100 * self.size:.2g} % of the weights)"
        return told if self.dtype == "bfloat16" else f"{told}; loaded in bfloat16 it is {self.bfloat16:.3f}"


def model_card(
    saved: Checkpoint, output: Path, format: str, license: str | None, rounding: Rounding | None = None
) -> str:
    """The card as Markdown, with the front matter that the hub reads. `license` overrides the base's; `rounding` is
    what a merge has kept."""
    model, recipe = saved.state["model"], run_recipe(saved)
    front = {
        **({"base_model": model["path"]} if _is_hub_id(model["path"]) else {}),
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["krea-2", "posttrain", *(["lora"] if format.startswith("lora") else []),
                 *(["distilled"] if is_student(saved) else [])],
        **_license(model["path"], license),
    }  # fmt: skip
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {output.stem if format != 'diffusers' else output.name}",
        _made_from(saved, recipe),
        f"## Run it\n\n{_settings(saved, recipe)}\n\n{_snippets(saved, output, format, rounding)}",
        _precision(format, rounding),
        _figures(saved),
        _rewards(recipe, saved.state.get("method")),
        _recipe(recipe),
        f"## Licence\n\n{_license_text(front, model['path'], license)}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def run_recipe(saved: Checkpoint) -> dict[str, Any]:
    """The resolved recipe of the run that a checkpoint lies in; empty if it was moved out of it."""
    file = saved.path.parent.parent / "recipe.yaml"
    return (yaml.safe_load(file.read_text()) or {}) if file.is_file() else {}


def _made_from(saved: Checkpoint, recipe: dict[str, Any]) -> str:
    model = saved.state["model"]
    source = model["path"] if not model["transformer_file"] else f"{model['transformer_file']} ({model['path']})"
    lines = [f"Post-trained from `{source}` with posttrain, in this order:", ""]
    for i, stage in enumerate([*earlier_of(saved), saved], start=1):
        method, lora = stage.state.get("method", "training"), stage.state["lora"]
        what = f"an adapter of rank {lora['rank']}" if lora else "all weights"
        name = METHODS.get(method, method)
        lines.append(f"{i}. {name}: {stage.step} steps of {what} (`{stage.path.parent.parent.name}/{stage.path.name}`)")
    return "\n".join(lines)


def _settings(saved: Checkpoint, recipe: dict[str, Any]) -> str:
    if is_student(saved):
        student = saved.state["student"]
        steps = " or ".join(map(str, student["steps"]))
        return f"{steps} steps, guidance 0, shift mu {student['mu']:g} at every resolution (a shift of" \
            f" {math.exp(student['mu']):.3f} where a tool asks for its exponential). More guidance than 0 is not what" \
            " it was made for."  # fmt: skip
    told = saved.state.get("guidance")
    lines = "28 steps, shift mu by resolution, as the base."
    if told is not None:
        evaluated = ", ".join(f"{value:g}" for value in told["evaluation"])
        steps = recipe.get("eval", {}).get("steps")
        lines += f" Trained with guidance {told['training']:g} and measured with {evaluated}"
        lines += f" in {steps} steps;" if steps else ";"
        lines += " in K2's convention 0 is off. Guidance that suited the base may be too much here."
    return lines


def _snippets(saved: Checkpoint, output: Path, format: str, rounding: Rounding | None) -> str:
    steps, guidance = (saved.state["student"]["steps"][0], 0.0) if is_student(saved) else (28, None)
    if guidance is None:
        guidance = (saved.state.get("guidance") or {"evaluation": [0.0]})["evaluation"][0]
    base, name = saved.state["model"]["path"], output.name
    distilled = ", is_distilled=True" if is_student(saved) else ""
    dtype = "torch.float32" if rounding is not None and rounding.bfloat16 < LEAST_KEPT else "torch.bfloat16"
    load = {
        "diffusers": f'pipe = Krea2Pipeline.from_pretrained("{name}", torch_dtype={dtype})',
        "original": f'transformer = Krea2Transformer2DModel.from_single_file(\n    "{name}", config="{base}",'
        f' subfolder="transformer", torch_dtype={dtype}\n)\npipe = Krea2Pipeline.from_pretrained('
        f'\n    "{base}", transformer=transformer, torch_dtype={dtype}{distilled}\n)',
    }.get(format) or (
        f'pipe = Krea2Pipeline.from_pretrained("{base}", torch_dtype={dtype}{distilled})\n'
        f'pipe.load_lora_weights("{name}")  # strength 1: its scale is in the factors'
    )
    imports = "Krea2Pipeline" + (", Krea2Transformer2DModel" if format == "original" else "")
    code = (
        f"```python\nimport torch\nfrom diffusers import {imports}\n\n{load}\n"
        f'pipe.to("cuda")\nimage = pipe("a fox in the snow", num_inference_steps={steps}, guidance_scale={guidance:g})'
        ".images[0]\n```"
    )
    comfy = {
        "original": "In ComfyUI: put the file into `models/diffusion_models`.",
        "lora-original": "In ComfyUI: put the file into `models/loras` and load it for the model at strength 1.",
    }.get(format)
    return code if comfy is None else f"{code}\n\n{comfy}"


def _precision(format: str, rounding: Rounding | None) -> str:
    if format.startswith("lora"):
        told = "Factors are float32, as they were evaluated. A tool that computes in bfloat16 and rounds a layer's"
        told += " output before it adds theirs, as diffusers does, loses changes below half a last place of it."
        return f"## Precision\n\n{told}"
    return "" if rounding is None else f"## Precision\n\nWeights were {rounding}."


def _figures(saved: Checkpoint) -> str:
    """Before the first step, and as the last evaluation up to this checkpoint found it; of a student, its teacher's."""
    found = [(step, figures) for step, figures in saved.state.get("evaluations", []) if step <= saved.step]
    history = saved.state.get("history", {})
    before, teacher = history.get("before"), history.get("teacher")
    if not found or before is None:
        return ""
    step, after = found[-1]
    columns = [before, after, *([teacher] if teacher else [])]
    rows = [f"| {name} | {' | '.join(_cell(column.get(name)) for column in columns)} |" for name in after]
    head = f"| | before | step {step} |{' teacher |' if teacher else ''}\n|{' --- |' * (1 + len(columns))}"
    note = "" if step == saved.step else f" This checkpoint is of step {saved.step}."
    return f"## Figures\n\nOn held-out prompts with fixed seeds.{note}\n\n{head}\n" + "\n".join(rows)


def _rewards(recipe: dict[str, Any], method: str | None) -> str:
    lines = []
    for reward in recipe.get("rewards", []):
        function = reward["function"] if isinstance(reward["function"], str) else reward["function"].get("class_path")
        trained = method == "grpo" and not reward.get("heldout_only")
        weight = f"weight {reward['weight']:g}" if trained else "measured only"
        lines.append(f"- `{reward['name']}` ({function}): {weight}")
    return "## Rewards\n\n" + "\n".join(lines) if lines else ""


def _recipe(recipe: dict[str, Any]) -> str:
    kept = {name: value for name, value in recipe.items() if name not in LEFT_OUT}
    return f"## Settings of the last stage\n\n```yaml\n{yaml.safe_dump(kept, sort_keys=False)}```" if kept else ""


def _license(base: str, given: str | None) -> dict[str, str]:
    """The fields of the front matter: those given, those of the base's card, or the name that says as much."""
    if given is not None:
        return {"license": given}
    card = Path(base) / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    front = yaml.safe_load(text.split("---")[1]) if text.startswith("---") and text.count("---") > 1 else {}
    fields = {name: str(front[name]) for name in ("license", "license_name", "license_link") if front.get(name)}
    if "license" in fields:
        return fields
    unknown = {"license": "other", "license_name": AS_BASE}
    return unknown | ({"license_link": f"https://huggingface.co/{base}"} if _is_hub_id(base) else {})


def _is_hub_id(path: str) -> bool:
    """A hub refuses cards that name a directory as their base."""
    return path.count("/") == 1 and not Path(path).parent.exists()


def _license_text(front: dict[str, Any], base: str, given: str | None) -> str:
    if given is not None:
        return f"{given}, as whoever exported it says; the base model's own terms hold besides."
    if front.get("license_name") == AS_BASE:
        link = f" ({front['license_link']})" if "license_link" in front else ""
        return f"As the base model, `{base}`{link}: its terms hold for what is made from it."
    name = front.get("license_name", front["license"])
    link = f" ({front['license_link']})" if "license_link" in front else ""
    return f"As the base model, `{base}`: {name}{link}."


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
