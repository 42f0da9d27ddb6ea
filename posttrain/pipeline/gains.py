"""What each stage of a pipeline changed in its main figures, on held-out prompts, before and after.

| command | figures | before |
|---|---|---|
| pairs | share of pairs whose order a heldout_only reward, which did not choose them, agrees with | of all candidates |
| sft, style | heldout/loss and heldout/gain of held-out images, and the rewards | |
| stpo | the rewards, and pairs/accuracy of held-out pairs | |
| grpo, nft | the rewards, and `reward`, the weighted mean of the trained rewards except gates | |
| tdm | the rewards, in the student's number of steps | the starting model in the same number of steps |
| expander sft | loss and token accuracy of held-out pairs | |
| expander gdpo | the rewards, and diversity | |
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain import commands
from posttrain.config import metric_names
from posttrain.pipeline.plan import TRAINING, Stage

ACCURACY = "pairs/accuracy"


@dataclass(frozen=True)
class Gain:
    """One figure of one stage."""

    stage: str
    figure: str
    trained: bool
    """Whether the stage is trained on it; otherwise it is only measured."""
    before: float | None
    after: float | None

    @property
    def change(self) -> float | None:
        return None if self.before is None or self.after is None else self.after - self.before


FINETUNED = ("sft", "style")
"""Commands that measure a loss on held-out images."""


def gains(stage: Stage) -> list[Gain]:
    """The gains of a finished stage, trained figures first; empty for a stage that measures nothing."""
    if stage.command == "pairs":
        return _of_pairs(stage)
    summary = read_json(stage.output / "summary.json")
    before, after = summary.get("before") or {}, summary.get("after") or {}
    result = []
    if stage.command in FINETUNED:
        for name in ("heldout/loss", "heldout/gain"):
            result.append(Gain(stage.name, name, True, before.get(name), after.get(name)))
    if stage.command == "stpo":
        result.append(Gain(stage.name, ACCURACY, True, before.get(ACCURACY), after.get(ACCURACY)))
    if stage.command in TRAINING and _learns(stage):
        result.append(Gain(stage.name, "reward", True, *_weighted_means(stage, before, after)))
    for name, trained in _figures(stage):
        result.append(Gain(stage.name, name, trained, before.get(name), after.get(name)))
    # A figure that the last evaluation lacks, such as a reward's whose judge was away, has no gain to show.
    return [gain for gain in result if gain.after is not None]


def _weighted_means(
    stage: Stage, before: dict[str, Any], after: dict[str, Any]
) -> tuple[float, float] | tuple[None, None]:
    """The weighted mean of the trained rewards before and after."""
    total = sum_before = sum_after = 0.0
    for spec in stage.config.rewards:
        if spec.heldout_only or spec.gate != "none":
            continue
        # a reward that is missing on one side would move the mean by its absence
        if before.get(spec.name) is None or after.get(spec.name) is None:
            continue
        total += spec.weight
        sum_before += spec.weight * before[spec.name]
        sum_after += spec.weight * after[spec.name]
    return (sum_before / total, sum_after / total) if total else (None, None)


def _figures(stage: Stage) -> list[tuple[str, bool]]:
    """(name, whether the stage is trained on it), trained ones first."""
    if stage.command == "expander sft":
        return [("loss", True), ("mean_token_accuracy", False)]
    if stage.command not in (*TRAINING, "expander gdpo"):
        return []
    learns = _learns(stage)  # the others only measure rewards
    # Raw is finetuned to be drawn with guidance, and perhaps only so.
    suffix = metric_names.suffix(stage.config.eval.guidance[0]) if stage.command in FINETUNED else ""
    rewards = [(spec.name + suffix, learns and not spec.heldout_only) for spec in stage.config.rewards]
    if stage.command == "expander gdpo":
        rewards.append(("diversity", True))
    return sorted(rewards, key=lambda item: not item[1])


def _learns(stage: Stage) -> bool:
    """Whether the stage trains on its rewards."""
    command = commands.get(stage.command)
    return command is not None and command.learns


def _of_pairs(stage: Stage) -> list[Gain]:
    sources = read_json(stage.output / "quality.json").get("sources", {})
    result = []
    for source, quality in sources.items():
        for spec in stage.config.rewards:
            agreement = quality["agreement"].get(spec.name)
            # a reward that chose the pairs agrees with itself, which says nothing
            if spec.heldout_only and agreement is not None:
                figure = f"{source}: {spec.name} agrees"
                result.append(Gain(stage.name, figure, False, agreement["share"], agreement["share_of_kept"]))
    return result


def read_json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.is_file() else {}
