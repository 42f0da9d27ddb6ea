"""`posttrain expand`: prints several expansions of a prompt.

posttrain expand "a cat" --model runs/nano-expander-sft --vary 4
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

import numpy as np
import torch
from accelerate import PartialState

from posttrain.errors import UserError, counted
from posttrain.expander.config import ExpandConfig
from posttrain.expander.model import Expander, Expansion
from posttrain.log import log

TIMES = 4
"""Expansions from which one is chosen that differs."""


def main(config: ExpandConfig) -> None:
    """Prints `config.n` expansions, or `config.vary` that differ, one a line or as JSON."""
    device = PartialState().device or "cpu"
    dtype = getattr(torch, config.dtype)
    expander = Expander.load(config.model, config.adapter, dtype, device, config.thinking, config.system)
    if config.vary is not None:
        expansions = varied(expander, config.prompt, config.vary, config.seed, config.temperature, config.max_tokens)
    else:
        (expansions,) = expander.expand([config.prompt], config.n, config.seed, config.temperature, config.max_tokens)
    texts, unexpanded, cut = [], 0, 0
    for expansion in expansions:
        texts.append(expansion.text)
        unexpanded += expansion.unexpanded
        cut += not expansion.whole and not expansion.unexpanded
    if config.json:
        print(json.dumps({"prompt": config.prompt, "expansions": texts}, ensure_ascii=False))
    else:
        for text in texts:
            print(" ".join(text.split()))  # one line each, whatever the model wrote
    if unexpanded:
        log.warning(f"{unexpanded} of {len(texts)} are the prompt itself: no thought ended; raise max_tokens")
    if cut:
        log.warning(f"{cut} of {len(texts)} were cut at max_tokens ({config.max_tokens})")


def varied(
    expander: Expander, prompt: str, n: int, seed: int, temperature: float = 1.0, max_tokens: int = 512
) -> list[Expansion]:
    """n expansions that differ, the first one sampled as ever: each next one is, among TIMES n samples, the farthest in
    words from those before it. Whole expansions go first. Raises UserError if there are not n different ones."""
    (sampled,) = expander.expand([prompt], TIMES * n, seed, temperature, max_tokens)
    different: dict[str, Expansion] = {}
    # Sorting is stable: the whole ones first, otherwise in the order of sampling.
    for expansion in sorted(sampled, key=lambda e: not e.whole):
        different.setdefault(expansion.text, expansion)
    if len(different) < n:
        raise UserError(
            f"vary: among {counted(TIMES * n, 'expansion')} only {len(different)} differ; lower it, or raise"
            f" temperature ({temperature:g})"
        )
    pool = list(different.values())
    return [pool[i] for i in farthest(list(different), n)]


def farthest(texts: Sequence[str], n: int) -> list[int]:
    """Indices of n texts: the first, then each time the one whose nearest chosen text is farthest, by 1 - the share of
    word pairs that both have (Jaccard)."""
    grams = list(map(_grams, texts))
    chosen: list[int] = []
    nearest_N = np.full(len(texts), np.inf)  # distance of each text to the nearest chosen one
    while len(chosen) < min(n, len(texts)):
        latest = int(nearest_N.argmax())  # at first all are infinitely far, so the first text
        chosen.append(latest)
        nearest_N = np.minimum(nearest_N, [_distance(own, grams[latest]) for own in grams])
        nearest_N[latest] = -1.0  # below every distance, so that it is not chosen again
    return chosen


def _grams(text: str) -> set[tuple[str, str]]:
    words = re.findall(r"\w+", text.casefold())
    # The first word is paired with nothing, so that a text of one word has a pair too.
    return set(zip(["", *words], words))


def _distance(a: set[tuple[str, str]], b: set[tuple[str, str]]) -> float:
    return 1 - len(a & b) / len(a | b) if a | b else 0.0
