"""Thoughts for pairs of a short prompt and its caption: a language model writes them, and they are checked.

A thought says, in one sentence each, what the prompt asks for, what it leaves open, the medium, and what is chosen. It
is written by a model that sees prompt and caption, so it must not show that: it names nothing that the caption lacks,
asks for nothing that the prompt does not, does not copy the caption, and never speaks of it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from prompts.templates import Template
from rewards.judge import Judge

LEAST_WORDS, MOST_WORDS = 25, 120
"""About 40 to 150 tokens."""
MOST_COPIED, GRAM = 0.3, 5
"""Share of the caption's runs of five words that a thought may repeat."""
REVEALING = re.compile(r"\b(captions?|targets?)\b", re.IGNORECASE)
SENTENCES = 4
"""Asked, open, medium, chosen."""


@dataclass
class Thinker:
    """Asks the writer for a thought, and the checker whether prompt and caption bear it out."""

    writer: Judge
    checker: Judge
    think: Template
    decompose: Template
    entails: Template
    threshold: float
    """P(yes) that each fact must reach."""

    async def __call__(self, prompt: str, caption: str) -> tuple[str, str | None]:
        """(thought, why it cannot be used or None)."""
        sentences = await self.writer.write("thought", self.think, prompt=prompt, caption=caption)
        thought = " ".join(" ".join(sentences).split())  # one paragraph, whatever white space the writer put in
        if len(sentences) != SENTENCES:
            return thought, f"{len(sentences)} sentences instead of {SENTENCES}"
        reason = problem(thought, prompt, caption)
        if reason is not None:
            return thought, reason
        asked, _, _, chosen = sentences
        # What the prompt asks for is in the caption already: the pair was checked.
        for text, source, fault in ((asked, prompt, "asks for more"), (chosen, caption, "chooses what is not there")):
            if (reason := await self._missing(text, source, fault)) is not None:
                return thought, reason
        return thought, None

    async def _missing(self, text: str, source: str, reason: str) -> str | None:
        """The first fact of a text that its source does not contain, after the reason; None if it contains all."""
        for fact in await self.checker.decompose(self.decompose, text):
            if await self.checker.p_yes(None, self.entails, caption=source, statement=fact) < self.threshold:
                return f"{reason}: {fact}"
        return None


def problem(thought: str, prompt: str, caption: str) -> str | None:
    """Why a thought cannot be used, from its text alone; None if nothing is wrong with it."""
    words = len(thought.split())
    if not LEAST_WORDS <= words <= MOST_WORDS:
        return f"{words} words, not {LEAST_WORDS} to {MOST_WORDS}"
    if REVEALING.search(thought):
        return "speaks of a caption"
    if copied(thought, prompt, caption) > MOST_COPIED:
        return "copies the caption"
    return None


def copied(thought: str, prompt: str, caption: str) -> float:
    """Share of the caption's runs of GRAM words that are in the thought too, in [0, 1]; 0 for a shorter caption. Runs
    that the prompt has do not count, as a thought may repeat what is asked."""
    asked, own = set(_grams(prompt)), set(_grams(thought))
    # A list: a run that the caption repeats counts each time.
    whole = [gram for gram in _grams(caption) if gram not in asked]
    return sum(gram in own for gram in whole) / len(whole) if whole else 0.0


def _grams(text: str) -> list[tuple[str, ...]]:
    words = re.findall(r"\w+", text.casefold())
    return [tuple(words[i : i + GRAM]) for i in range(len(words) - GRAM + 1)]
