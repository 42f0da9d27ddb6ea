"""How far a reward's scores of one image differ, and the floor below which a difference between images means nothing.

A judge's repeatability is measured before the first step, in P(yes): does an image get the same score whenever it is
asked about? The floor of a reward is FACTOR times what was measured, and at least LEAST of P(yes) for a reward that is
a probability: twenty questions about four images do not meet the worst case, such as another batch on another GPU.
Other functions are taken to be repeatable: a recipe can state their `noise`. Everything here is in units of the
calibrated reward (RewardSpec.scale).
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from posttrain.errors import counted
from rewards.base import Noise, Reward
from rewards.endpoints import JudgeError
from rewards.image import JudgeReward
from rewards.judge import spread

FACTOR = 3
LEAST = 0.01
"""Least floor, in P(yes)."""
PREFIX = "noise/"
"""Prefix of the metrics that say what was measured."""
TIMES = 20
LIMIT = 1e-3  # in P(yes); a group's images often differ by little more
TOO_MUCH = (
    f"more than {LIMIT:g} adds noise to rewards: give its server"
    ' env: {VLLM_BATCH_INVARIANT: "1"} (on a GPU) or extra_args: [--dtype, float32]'
)


@dataclass
class Repeated:
    """How far a judge's scores of one image differ."""

    judge: str
    rewards: list[str]
    """Names of those that ask it."""
    spread: float | None
    """In units of P(yes); None where it gave no score."""
    measured: str
    remedy: str
    """Empty where nothing is wrong."""

    @property
    def line(self) -> str:
        line = f"judge {self.judge}: {self.measured}"
        return f"warning: {line}; {self.remedy}" if self.remedy else line


async def repeatability(
    rewards: Sequence[Reward], images: Sequence[Image.Image], prompts: Sequence[str]
) -> list[Repeated]:
    """One for each judge that the rewards ask, asked a question as the first of its rewards asks it."""
    judges: dict[tuple[str, str], list[tuple[str, JudgeReward]]] = {}
    for reward in rewards:
        if isinstance(function := reward.function, JudgeReward):
            key = (function.judge.model, str(function.judge.base_urls))
            judges.setdefault(key, []).append((reward.spec.name, function))
    models = [model for model, _ in judges]  # two servers may serve a model of the same name
    alone: list[list[list[float]] | JudgeError] = []
    calls = []
    for asking in judges.values():
        function = asking[0][1]
        template, fields = function.question(prompts[0])
        calls.append((function.judge, template, fields))
        try:
            alone.append(await function.judge.asked_alone(images, template, TIMES // 2, **fields))
        except JudgeError as error:
            alone.append(error)
    # All judges at once: one that answers otherwise beside another, such as a base beside its adapters, shows here.
    asked = []
    for first, (judge, template, fields) in zip(alone, calls):
        times = 0 if isinstance(first, JudgeError) else TIMES - TIMES // 2
        asked.append(judge.asked_together(images, template, times, **fields))
    together = await asyncio.gather(*asked, return_exceptions=True)
    results = []
    for ((model, urls), asking), first, second in zip(judges.items(), alone, together, strict=True):
        name = model if models.count(model) == 1 else f"{model} at {urls}"
        error = next((part for part in (first, second) if isinstance(part, BaseException)), None)
        if error is not None and not isinstance(error, JudgeError):
            raise error
        if isinstance(first, BaseException) or isinstance(second, BaseException):
            differ, measured = None, f"its repeatability is unknown, since a question failed: {error}"
            remedy = "see that its server runs and serves this model"
        else:
            differ = spread(first, second)
            measured = (
                f"{TIMES} scores of one image differ by at most {differ:.2g} in P(yes), which goes from 0 to 1"
                f" ({counted(len(images), 'image')}, half the times alone, half in batches with all judges)"
            )
            remedy = TOO_MUCH if differ > LIMIT else ""
        results.append(Repeated(name, [reward for reward, _ in asking], differ, measured, remedy))
    return results


def noise_metrics(judges: Sequence[Repeated]) -> dict[str, float]:
    """Metrics: for each reward that asks a judge, the judge's repeatability in P(yes); unknown ones are left out."""
    return {f"{PREFIX}{name}": judge.spread for judge in judges for name in judge.rewards if judge.spread is not None}


def noise_of(rewards: Sequence[Reward], metrics: Mapping[str, float | None]) -> dict[str, Noise]:
    """By name, from what `noise_metrics` gave at the start of the run.

    What could not be measured is unknown and not 0: it is taken to be what the least floor allows for.
    """
    by_name = {}
    for reward in rewards:
        spec, function = reward.spec, reward.function
        own, least = spec.noise, 0.0
        # A P(yes) varies with what else is in a server's batch; a stated noise is taken at its word.
        if own is None and isinstance(function, JudgeReward) and function.is_probability:
            measured = metrics.get(PREFIX + spec.name)
            own, least = LEAST / FACTOR if measured is None else measured, LEAST
        own = own or 0.0
        unit = abs(spec.scale)  # of a P(yes), in the calibrated reward
        by_name[spec.name] = Noise(unit * own, unit * max(FACTOR * own, least))
    return by_name
