"""What a trained judge leaves: its adapter as vLLM loads it, with a model card that says how good it is."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from posttrain.judge.config import JudgeConfig
from posttrain.runs.files import replacing_directory
from prompts.templates import Template
from rewards.vlm import VLM


def write_adapter(vlm: VLM, path: Path, config: JudgeConfig, template: Template, step: int, card: dict) -> None:
    """The PEFT adapter, as vLLM loads it, with its model card and figures; a directory that is there is replaced."""
    with replacing_directory(path) as temporary:
        vlm.model.save_pretrained(str(temporary))
        (temporary / "README.md").write_text(model_card(config, template, step, card), encoding="utf-8")
        figures = json.dumps({**card, "step": step, "template": template.hash}, indent=1)
        (temporary / "figures.json").write_text(figures + "\n")


def model_card(config: JudgeConfig, template: Template, step: int, card: dict[str, Any]) -> str:
    training, heldout = card["records"]
    parts = [
        f"---\nbase_model: {config.model}\nlibrary_name: peft\ntags: [lora, vllm, judge]\n---",
        f"# A judge: {config.mode}",
        f"A LoRA adapter for {config.model}. Asked the question below about an image, it answers yes or no; "
        "P(yes) from the first token's log-probs is the score.",
        f"> {template.text}",
        f"Template `{template.name}`, hash {template.hash}. {step} updates of {config.batch} records from "
        f"{training}; {heldout} records of other prompts are held out. Seed {config.seed}.",
    ]
    if card["figures"] is None:
        parts.append("Training was stopped before the end, and nothing was measured.")
        return "\n\n".join(parts) + "\n"
    after, before = card["figures"], card["before"]
    rows = [(name, before.get(name), value) for name, value in numbers(after).items() if name != "heldout"]
    parts.append("## Held out\n\n| | before | after |\n| --- | --- | --- |\n" + "\n".join(
        f"| {_words(name)} | {_cell(old)} | {_cell(new)} |" for name, old, new in rows))  # fmt: skip
    if config.mode == "preference":
        parts.append("Accuracy by margin (difference of the two scores), in quarters:\n\n" + _table(
            ("mean margin", "accuracy", "pairs"), after["by_margin"]))  # fmt: skip
    what = "that the first is preferred" if config.mode == "preference" else "of a fault"
    parts.append(f"## Calibration\n\nProbability {what}: predicted, and how often it was so.\n\n" + _table(
        ("predicted", "observed", "records"), after["reliability"]))  # fmt: skip
    if after["by_source"]:
        rows = [(name, *values) for name, values in sorted(after["by_source"].items())]
        parts.append("By who drew the images, and who preferred:\n\n" + _table(("source", "accuracy", "records"), rows))
    settings = json.dumps({k: asdict(config)[k] for k in ("lora", "optim", "dtype")})
    parts.append(f"Settings: `{settings}`")
    return "\n\n".join(parts) + "\n"


def _words(name: str) -> str:
    return {
        "auroc": "area under the ROC curve",
        "ece": "expected calibration error",
        "brier": "Brier score",
        "noise_ceiling": "accuracy of one who knew the raters' taste",
        "of_ceiling": "share of that accuracy",
        "threshold": "P(yes) that 1 % of good images exceed",
        "found_at_threshold": "share of faulty images above it",
    }.get(name, name)


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def _table(head: tuple[str, ...], rows: Any) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(map(_cell, row)) + " |" for row in rows])


def numbers(values: dict[str, Any] | None) -> dict[str, float]:
    """Those of some figures that are numbers."""
    return {k: v for k, v in (values or {}).items() if isinstance(v, int | float)}
