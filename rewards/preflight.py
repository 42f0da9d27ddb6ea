"""What a run asks of its judges before it relies on them: does an image get the same score whenever it is asked?"""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from rewards.base import Reward
from rewards.endpoints import JudgeError
from rewards.image import JudgeReward

TIMES = 20
LIMIT = 1e-3  # in P(yes); a group's images often differ by little more
NOISE = (
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
    results = []
    for (model, urls), asking in judges.items():
        name = model if models.count(model) == 1 else f"{model} at {urls}"
        function = asking[0][1]
        template, fields = function.question(prompts[0])
        try:
            spread = await function.judge.repeatability(images, template, TIMES, **fields)
            measured = (
                f"{TIMES} scores of one image differ by at most {spread:.2g} in P(yes), which goes from 0 to 1"
                f" ({len(images)} images, half the times alone, half in batches)"
            )
            remedy = NOISE if spread > LIMIT else ""
        except JudgeError as error:
            spread, measured = None, f"its repeatability is unknown, since a question failed: {error}"
            remedy = "see that its server runs and serves this model"
        results.append(Repeated(name, [reward for reward, _ in asking], spread, measured, remedy))
    return results
