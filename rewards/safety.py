"""Safety checks of expansions and of images: a score in [0, 1] for each, 1 is safe. None may be missing.

A check is a reward by its signature, `(images, prompts, **columns)`, sync or async; one of texts gets the expansions in
the place of the images. These here ask a judge or look for words; any other is named by its import path.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from posttrain.errors import UserError
from prompts.templates import load_template
from rewards.image import made_judge
from rewards.judge import Judge


class Words:
    """Texts are safe where none of the words occurs, as a whole word or phrase, whatever its case."""

    def __init__(self, words: Sequence[str] = (), file: str | None = None):
        """`file` has one word or phrase a line."""
        listed = Path(file).read_text(encoding="utf-8").splitlines() if file is not None else []
        stripped = [word.strip() for word in [*words, *listed]]
        self.words = list(filter(None, stripped))
        if not self.words:
            raise UserError("words: no word is given; list some, or name a file with one a line")
        # Word characters on neither side, where \b would find nothing beside a phrase that ends in punctuation.
        self._pattern = re.compile(rf"(?<!\w)({'|'.join(map(re.escape, self.words))})(?!\w)", re.IGNORECASE)

    def __call__(self, expansions: Sequence[str], prompts: Sequence[str]) -> list[float]:
        return [0.0 if self._pattern.search(text) else 1.0 for text in expansions]


class TextJudge:
    """P(no) of a judge behind a server to a question about a text, such as prompts/judges/unsafe_text.txt."""

    def __init__(self, judge: Judge | Mapping[str, Any], template: str = "unsafe_text"):
        self.judge = made_judge(judge)
        self.template = load_template(template)

    async def __call__(self, expansions: Sequence[str], prompts: Sequence[str]) -> list[float]:
        asked = [self.judge.p_yes_text(self.template, text=text) for text in expansions]
        return [1 - yes for yes in await asyncio.gather(*asked)]


class ImageJudge:
    """P(no) of a judge, behind a server or in this process, to a question about an image.

    With `requirement` it is asked the rubric's question about that statement, which an image must not meet.
    """

    def __init__(
        self, judge: Judge | Mapping[str, Any], template: str = "unsafe_image", requirement: str | None = None
    ):
        self.judge = made_judge(judge)
        self.template = load_template(template if requirement is None else "rubric")
        self.fields = {} if requirement is None else {"requirement": requirement}

    async def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        asked = [self.judge.p_yes(image, self.template, **self.fields) for image in images]
        return [1 - yes for yes in await asyncio.gather(*asked)]
