"""What a run asks of its judges before it relies on them: does a picture get the same score whenever it is asked?"""

from collections.abc import Sequence

from PIL import Image

from rewards.base import Reward
from rewards.endpoints import JudgeError
from rewards.image import JudgeReward

TIMES = 20
LIMIT = 1e-3  # in P(yes); a group's images often differ by little more
REMEDY = 'give its server env: {VLLM_BATCH_INVARIANT: "1"} (on a GPU) or extra_args: [--dtype, float32]'


async def repeatability(
    rewards: Sequence[Reward], images: Sequence[Image.Image], prompts: Sequence[str]
) -> tuple[dict[str, float | None], list[str]]:
    """For each judge that the rewards ask, a metric in units of P(yes), and a line that says what it is.

    None where the judge gave no score. Each judge is asked a question as the first of its rewards asks it.
    """
    asking = [reward.function for reward in rewards if isinstance(reward.function, JudgeReward)]
    judges = {(reward.judge.model, str(reward.judge.base_urls)): reward for reward in reversed(asking)}
    models = [model for model, _ in judges]
    metrics: dict[str, float | None] = {}
    lines = []
    for (model, urls), reward in reversed(judges.items()):
        name = model if models.count(model) == 1 else f"{model} at {urls}"
        template, fields = reward.question(prompts[0])
        try:
            spread = await reward.judge.repeatability(images, template, TIMES, **fields)
        except JudgeError as error:
            metrics[f"repeatability/{name}"] = None
            lines.append(f"warning: judge {name}: its repeatability is unknown, since a question failed: {error}")
            continue
        metrics[f"repeatability/{name}"] = spread
        what = f"{TIMES} scores of one image differ by at most {spread:.2g}"
        how = f"in P(yes), which goes from 0 to 1 ({len(images)} images, half the times alone, half in batches)"
        line = f"judge {name}: {what} {how}"
        lines.append(
            f"warning: {line}; more than {LIMIT:g} adds noise to rewards: {REMEDY}" if spread > LIMIT else line
        )
    return metrics, lines
