"""What each stage of a pipeline changed in the figures that it is for: held out, before and after.

| command | figures | before |
|---|---|---|
| pairs | share of pairs whose order a reward agrees with that had no say in it (heldout_only) | of all candidates |
| stpo | the rewards, and pairs/accuracy of held-out pairs | the accuracy is a coin's: an untrained policy has none |
| grpo | the rewards, and `reward`, the weighted mean of those that are trained on and are no gate | |
| tdm | the rewards, in the student's own steps | the model that it starts from, in these steps |
| expander sft | loss and token accuracy of held-out pairs | |
| expander gdpo | the rewards, and diversity | |
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.pipeline.plan import TRAINING, Stage

ACCURACY = "pairs/accuracy"
COIN = 0.5


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


def gains(stage: Stage) -> list[Gain]:
    """Of a stage that has been measured; what it is trained on first. Empty for one that measures nothing."""
    if stage.command == "pairs":
        return _of_pairs(stage)
    summary = read_json(stage.output / "summary.json")
    before, after = summary.get("before") or {}, summary.get("after") or {}
    found = [Gain(stage.name, name, on, before.get(name), after.get(name)) for name, on in _figures(stage)]
    if stage.command == "stpo":
        found.insert(0, Gain(stage.name, ACCURACY, True, COIN, after.get(ACCURACY)))
    if stage.command == "grpo":
        found.insert(0, Gain(stage.name, "reward", True, *_weighed(stage, before, after)))
    return [gain for gain in found if gain.after is not None]


def _weighed(stage: Stage, *figures: dict[str, Any]) -> list[float | None]:
    """The weighted mean of each of `figures`, over the rewards that all of them have."""
    trained = [spec for spec in stage.config.rewards if not spec.heldout_only and spec.gate == "none"]
    weights = {spec.name: spec.weight for spec in trained if all(f.get(spec.name) is not None for f in figures)}
    total = sum(weights.values())
    return [sum(w * f[name] for name, w in weights.items()) / total if total else None for f in figures]


def _figures(stage: Stage) -> list[tuple[str, bool]]:
    """Names, and whether it is trained on them."""
    if stage.command == "expander sft":
        return [("loss", True), ("mean_token_accuracy", False)]
    if stage.command not in (*TRAINING, "expander gdpo"):
        return []
    learns = stage.command in ("grpo", "expander gdpo")
    rewards = [(spec.name, learns and not spec.heldout_only) for spec in stage.config.rewards]
    if stage.command == "expander gdpo":
        rewards.append(("diversity", True))
    return sorted(rewards, key=lambda item: not item[1])


def _of_pairs(stage: Stage) -> list[Gain]:
    sources = read_json(stage.output / "quality.json").get("sources", {})
    apart = [spec.name for spec in stage.config.rewards if spec.heldout_only]
    return [
        Gain(stage.name, f"{source}: {name} agrees", False, held["share"], held["share_of_kept"])
        for source, found in sources.items()
        for name in apart
        if (held := found["agreement"].get(name)) is not None
    ]


def read_json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.is_file() else {}
