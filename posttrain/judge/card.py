"""What a trained judge leaves: its adapter as vLLM loads it, with a model card that says how good it is."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from posttrain.judge.config import JudgeConfig
from posttrain.loading import without_revision
from posttrain.report.front_matter import card
from posttrain.report.public import public
from posttrain.runs.files import replacing_directory
from prompts.templates import Template
from rewards.vlm import VLM

TITLES = {
    "auroc": "area under the ROC curve",
    "ece": "expected calibration error",
    "brier": "Brier score",
    "noise_ceiling": "accuracy of one who knew the raters' taste",
    "of_ceiling": "share of that accuracy",
    "threshold": "P(yes) that 1 % of good images exceed",
    "found_at_threshold": "share of faulty images above it",
}


def write_adapter(vlm: VLM, path: Path, config: JudgeConfig, template: Template, step: int, results: dict) -> None:
    """The PEFT adapter, as vLLM loads it, with its model card and metrics; a directory that is there is replaced."""
    with replacing_directory(path) as temporary:
        vlm.model.save_pretrained(str(temporary))
        (temporary / "README.md").write_text(model_card(config, template, step, results), encoding="utf-8")
        measured = json.dumps({**results, "step": step, "template": template.hash}, indent=1)
        (temporary / "figures.json").write_text(measured + "\n")


def model_card(config: JudgeConfig, template: Template, step: int, results: dict[str, Any]) -> str:
    training, heldout = results["records"]
    after, before = results["figures"], results["before"]
    rows = []
    for name, value in numbers(after).items():
        # The number of held-out records stands in the text.
        if name != "heldout":
            rows.append([TITLES.get(name, name), before.get(name), value])
    by_source = sorted((after or {}).get("by_source", {}).items())
    settings = asdict(config)
    return card(
        "judge_card.md",
        {
            "base_model": without_revision(public(config.model)),
            "library_name": "peft",
            "tags": ["lora", "vllm", "judge"],
        },
        config=config,
        base=public(config.model),
        template=template,
        step=step,
        training=training,
        heldout=heldout,
        metrics=after,
        rows=rows,
        by_source=[[public(source), *values] for source, values in by_source],
        settings=json.dumps({name: settings[name] for name in ("lora", "optim", "dtype")}),
    )


def numbers(values: dict[str, Any] | None) -> dict[str, float]:
    """The values that are numbers."""
    return {name: value for name, value in (values or {}).items() if isinstance(value, int | float)}
