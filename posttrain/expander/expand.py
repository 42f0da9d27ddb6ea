"""`posttrain expand`: prints several expansions of a prompt.

posttrain expand "a cat" --model runs/nano-expander-sft --vary 4
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

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
    expander = Expander.load(config.model, config.adapter, getattr(torch, config.dtype), device, config.thinking)
    if config.vary is not None:
        expansions = varied(expander, config.prompt, config.vary, config.seed, config.temperature, config.max_tokens)
    else:
        (expansions,) = expander.expand([config.prompt], config.n, config.seed, config.temperature, config.max_tokens)
    texts = [e.text for e in expansions]
    if config.json:
        print(json.dumps({"prompt": config.prompt, "expansions": texts}, ensure_ascii=False))
    else:
        for text in texts:
            print(" ".join(text.split()))  # one line each, whatever the model wrote
    unexpanded = sum(e.unexpanded for e in expansions)
    if unexpanded:
        log.warning(f"{unexpanded} of {len(texts)} are the prompt itself: no thought ended; raise max_tokens")
    if cut := sum(not e.whole for e in expansions) - unexpanded:
        log.warning(f"{cut} of {len(texts)} were cut at max_tokens ({config.max_tokens})")


def varied(
    expander: Expander, prompt: str, n: int, seed: int, temperature: float = 1.0, max_tokens: int = 512
) -> list[Expansion]:
    """n expansions that differ, the first one sampled as ever: each next one is, among TIMES n samples, the farthest in
    words from those before it. Whole expansions go first. Raises UserError if there are not n different ones."""
    (sampled,) = expander.expand([prompt], TIMES * n, seed, temperature, max_tokens)
    different: dict[str, Expansion] = {}
    for expansion in sorted(sampled, key=lambda e: not e.whole):
        different.setdefault(expansion.text, expansion)
    pool = list(different.values())
    if len(pool) < n:
        raise UserError(
            f"vary: among {counted(TIMES * n, 'expansion')} only {len(pool)} differ; lower it, or raise temperature"
            f" ({temperature:g})"
        )
    return [pool[i] for i in farthest([e.text for e in pool], n)]


def farthest(texts: Sequence[str], n: int) -> list[int]:
    """Indices of n texts: the first, then each time the one whose nearest chosen text is farthest, by 1 - the share of
    word pairs that both have (Jaccard)."""
    grams = [_grams(text) for text in texts]
    chosen = [0]
    while len(chosen) < min(n, len(texts)):
        distances = [min(_distance(own, grams[i]) for i in chosen) for own in grams]
        rest = [i for i in range(len(texts)) if i not in chosen]
        chosen.append(max(rest, key=lambda i: distances[i]))
    return chosen


def _grams(text: str) -> set[tuple[str, str]]:
    words = re.findall(r"\w+", text.casefold())
    return set(zip(["", *words], words))


def _distance(a: set[tuple[str, str]], b: set[tuple[str, str]]) -> float:
    return 1 - len(a & b) / len(a | b) if a | b else 0.0
