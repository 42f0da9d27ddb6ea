"""Safety checks of expansions and of images: a score in [0, 1] for each, 1 is safe. None may be missing.

A check is a reward by its signature, `(images, prompts, **columns)`, sync or async; one of texts gets the expansions in
the place of the images. These here ask a judge or look for words; any other is named by its import path.
"""

from __future__ import annotations

import asyncio
import re
import unicodedata
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from posttrain.errors import UserError
from prompts.templates import load_template
from rewards.image import made_judge
from rewards.judge import Judge
from rewards.ocr import folded

LETTERS = "a-z\u00b5-\u024f\u0370-\u058f\u10a0-\u10ff\u1e00-\u1fff"
"""Letters of scripts that set words apart and add nothing to them: Latin, Greek, Cyrillic, Armenian, Georgian."""


class Words:
    """Texts are safe where none of the words occurs, in whatever case, form of letters and spacing.

    As a whole word or phrase where it begins and ends in letters of LETTERS; in the other scripts, which write no
    spaces or write particles and articles to their words, anywhere.
    """

    def __init__(self, words: Sequence[str] = (), file: str | None = None):
        """`file` has one word or phrase a line, in UTF-8."""
        stripped = [word.strip() for word in [*words, *_lines(file)]]
        self.words = list(filter(None, stripped))
        patterns = list(filter(None, map(_pattern, self.words)))
        if not patterns:
            raise UserError("words: no word is given; list some, or name a file with one a line")
        self._pattern = re.compile("|".join(patterns))

    def __call__(self, expansions: Sequence[str], prompts: Sequence[str]) -> list[float]:
        return [0.0 if any(map(self._pattern.search, _readings(text))) else 1.0 for text in expansions]


def _readings(text: str) -> tuple[str, str]:
    """The text with invisible characters left out, as within a word, and with spaces for them, as between two words."""
    return folded(text), folded("".join(" " if unicodedata.category(c) == "Cf" else c for c in text))


def _lines(file: str | None) -> list[str]:
    if file is None:
        return []
    try:
        return Path(file).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"file: {file}: is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"file: {file}: cannot be read: {error.strerror}; correct the path") from None


def _pattern(word: str) -> str:
    """Matches the word in a folded text; empty for a word that has nothing to see."""
    parts = list(filter(None, re.split(r"[\s-]+", folded(word))))
    if not parts:
        return ""
    phrase = r"[\W_]+".join(map(re.escape, parts))  # machine gun, machine-gun, over a line's end too
    first, last = parts[0][:1], parts[-1][-1:]
    # No other letter or digit beside it, where \b would find nothing beside a phrase that ends in punctuation.
    before, after = (_beside(first), _beside(last))
    return (f"(?<!{before})" if before else "") + phrase + (f"(?!{after})" if after else "")


def _beside(edge: str) -> str:
    """What may not stand beside this edge of a word."""
    if re.fullmatch(f"[{LETTERS}]", edge):
        return f"[{LETTERS}]"
    return "[0-9]" if edge.isdigit() else ""


class TextJudge:
    """P(no) of a judge behind a server to a question about a text, such as prompts/judges/unsafe_text.txt."""

    def __init__(self, judge: Judge | Mapping[str, Any], template: str = "unsafe_text"):
        self.judge = made_judge(judge)
        self.template = load_template(template)

    async def __call__(self, expansions: Sequence[str], prompts: Sequence[str]) -> list[float]:
        return await _p_no(self.judge.p_yes_text(self.template, text=text) for text in expansions)


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
        return await _p_no(self.judge.p_yes(image, self.template, **self.fields) for image in images)


async def _p_no(questions: Iterable[Awaitable[float]]) -> list[float]:
    return [1 - yes for yes in await asyncio.gather(*questions)]
