"""A tiny recipe of `posttrain pairs`."""

import dataclasses
import json
from pathlib import Path

from posttrain.config.sections import ModelConfig
from posttrain.pairs.config import DeltaConfig, DrawConfig, JudgedConfig, PairsConfig, PairSource
from rewards.base import RewardSpec
from tests.helpers import tiny

GUIDED = DeltaConfig(DrawConfig(guidance=2.0), DrawConfig())


def recipe(folder: Path, model: Path, **changes) -> PairsConfig:
    """Twelve pairs of 32 x 32 or 16 x 48 pixels in shards of five, half by guidance and half by brightness."""
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in tiny.PROMPTS))
    made = PairsConfig(
        output=str(folder / "run"),
        model=ModelConfig(path=str(model), dtype="float32"),
        prompts=str(folder / "prompts.jsonl"),
        sources=[
            PairSource("guidance", delta=dataclasses.replace(GUIDED, screen=False)),
            PairSource("judged", judged=JudgedConfig(group_size=3)),
        ],
        rewards=[RewardSpec("brightness", "tests.helpers.runs:brightness")],
        pairs=12,
        min_margin=0.001,
        min_distance=0.001,
        sizes=[[32, 32], [16, 48]],
        steps=2,
        max_tokens=64,
        block=3,
        micro_batch=4,
        shard=5,
    )
    return dataclasses.replace(made, **changes)
