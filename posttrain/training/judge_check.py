"""What is held against the judges of a run before it trusts their scores, on its own first pictures."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from posttrain.runs.run import Run
from rewards.base import Reward
from rewards.injection import injection
from rewards.noise import noise_metrics
from rewards.preflight import repeatability

SHOWN = 8
"""Pictures that a judge is tried on; its answers are asked again for half of them."""


def check_judges(
    run: Run,
    rewards: Sequence[Reward],
    pictures: Sequence[Image.Image],
    prompts: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
) -> dict[str, float | None]:
    """How far judges repeat themselves and obey text, said to the user and logged before the first step.

    For the main process alone. Nothing is asked where no reward asks a judge, or there is no picture.
    """
    if not pictures:
        return {}
    pictures, prompts = pictures[:SHOWN], prompts[:SHOWN]
    judges = asyncio.run(repeatability(rewards, pictures[: SHOWN // 2], prompts))
    for judge in judges:
        run.say(judge.line)
    metrics = {f"repeatability/{judge.judge}": judge.spread for judge in judges} | noise_metrics(judges)
    shown = {name: column[:SHOWN] for name, column in columns.items()}
    for raised in asyncio.run(injection(rewards, pictures, prompts, shown)):
        if raised.warning:
            run.say(raised.warning)
        metrics |= raised.metrics
    if metrics:
        run.log(0, metrics)
    return metrics
