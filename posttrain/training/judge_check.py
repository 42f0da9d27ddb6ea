"""Checks of a run's judges: whether they answer, before anything is loaded, and on its own first images whether their
scores can be trusted."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from posttrain.log import log
from posttrain.runs.run import Run
from rewards.base import Reward
from rewards.injection import injection
from rewards.judge import Judge
from rewards.noise import noise_metrics, repeatability

SHOWN = 8
"""Images that a judge is tried on; its answers are asked again for half of them."""


def warn_of_silent_judges(rewards: Sequence[Reward]) -> None:
    """Warns of judges that take no connection: one may still be starting, or its address is wrong.

    Raises UserError for a key or a proxy that no request can be made with.
    """
    told: set[str] = set()  # several rewards often ask one judge
    for reward in rewards:
        judge = getattr(reward.function, "judge", None)
        if not isinstance(judge, Judge) or str(judge.base_urls) in told:
            continue
        told.add(str(judge.base_urls))
        for reason in asyncio.run(judge.silent()):
            log.warning(
                f"reward {reward.spec.name}: {reason}: a question waits up to {judge.deadline:g} s for it; start it, or"
                " correct base_urls"
            )


def check_judges(
    run: Run,
    rewards: Sequence[Reward],
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
) -> dict[str, float | None]:
    """How far judges repeat themselves and obey text, said to the user and logged before the first step.

    For the main process alone. Nothing is asked where no reward asks a judge, or no image is given.
    """
    if not images:
        return {}
    images, prompts = images[:SHOWN], prompts[:SHOWN]
    judges = asyncio.run(repeatability(rewards, images[: SHOWN // 2], prompts))
    # A judge that contradicts itself, or does what text in an image says, is a reward that can be cheated.
    for judge in judges:
        level = logging.WARNING if judge.remedy else logging.INFO
        log.log(level, judge.line.removeprefix("warning: "))
    metrics = {f"repeatability/{judge.judge}": judge.spread for judge in judges} | noise_metrics(judges)
    shown = {name: column[:SHOWN] for name, column in columns.items()}
    for raised in asyncio.run(injection(rewards, images, prompts, shown)):
        if raised.warning:
            log.warning(raised.warning.removeprefix("warning: "))
        metrics |= raised.metrics
    if metrics:
        run.log(0, metrics)
    return metrics
