"""How far a reward's scores of one image differ, and the floor below which a difference between images means nothing.

A judge's repeatability is measured before the first step (preflight.py), in P(yes). The floor of a reward is FACTOR
times what was measured, and at least LEAST of P(yes) for a reward that is a probability: twenty questions about four
images do not meet the worst case, such as another batch on another GPU. Other functions are taken to be repeatable: a
recipe can state their `noise`. Everything here is in units of the calibrated reward (RewardSpec.scale).
"""

from collections.abc import Mapping, Sequence

from rewards.base import Noise, Reward
from rewards.image import JudgeReward
from rewards.preflight import Repeated

FACTOR = 3
LEAST = 0.01
"""In P(yes)."""
PREFIX = "noise/"
"""Of the metrics that say what was measured."""


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
        spread, least = spec.noise, 0.0
        # A P(yes) varies with what else is in a server's batch; a stated noise is taken at its word.
        if spread is None and isinstance(function, JudgeReward) and function.is_probability:
            measured = metrics.get(PREFIX + spec.name)
            spread, least = LEAST / FACTOR if measured is None else measured, LEAST
        spread = spread or 0.0
        unit = abs(spec.scale)  # of a P(yes), in the calibrated reward
        by_name[spec.name] = Noise(unit * spread, unit * max(FACTOR * spread, least))
    return by_name
