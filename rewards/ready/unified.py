"""UnifiedReward: a Qwen-VL finetuned to rate images, behind vLLM; its weights are those of a server of the recipe.

servers:
  - {name: unified, model: CodeGoat24/UnifiedReward-2.0-qwen-7b, executable: ~/vllm/bin/vllm}
rewards:
  - name: unified
    function: {class_path: rewards.ready.UnifiedReward, init_args: {judge: {model: unified, base_urls: "server://unified"}}}
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from PIL import Image

from posttrain.errors import UserError
from prompts.templates import Template, load_template
from rewards.base import Score, Scored
from rewards.endpoints import JudgeError
from rewards.image import JudgeReward
from rewards.judge import Judge

AXES = ("alignment", "coherence", "style")


class UnifiedReward(JudgeReward):
    """The mean of its ratings of alignment, coherence and style, from 1 to 5, brought to [0, 1]: (r - 1) / 4.

    `axes` are those that count. An answer that lacks one of the three is a failure. Its question is its authors' own
    (arXiv 2503.05236; UnifiedReward-2.0-inference in CodeGoat24/UnifiedReward), but with the prompt as a JSON string.
    Weights: MIT.
    """

    is_probability = False

    def __init__(
        self, judge: Judge | Mapping[str, Any], template: str = "unified", axes: list[str] | tuple[str, ...] = AXES
    ):
        if not axes or not set(axes) <= set(AXES):
            raise UserError(f"axes: {', '.join(axes) or 'none'}: use some of {', '.join(AXES)}")
        super().__init__(judge, template)
        self.axes = tuple(axes)

    async def score(self, image: Image.Image, prompt: str, row: dict[str, Any]) -> Score:
        ratings = read_ratings(await self.judge.answer(image, self.template, prompt=prompt))
        mean = sum(ratings[axis] for axis in self.axes) / len(self.axes)
        return Scored((mean - 1) / 4, {"ratings": ratings})

    def question(self, prompt: str) -> tuple[Template, dict[str, str]]:
        # Its answer is no P(yes), so its server's repeatability is measured by the rubric's question.
        return load_template("rubric"), {"requirement": prompt}


def read_ratings(answer: str) -> dict[str, float]:
    """The three ratings of an answer, by axis. Raises JudgeError for one that is missing or not from 1 to 5."""
    ratings = {}
    for axis in AXES:
        match = re.search(rf"{axis} score\s*(?:\(1-5\))?\s*:\s*([0-9]+(?:\.[0-9]+)?)", answer, re.IGNORECASE)
        if match is None or not 1 <= float(match[1]) <= 5:
            raise JudgeError(f"the answer has no {axis} score from 1 to 5: {' '.join(answer.split())[:200]}")
        ratings[axis] = float(match[1])
    return ratings
