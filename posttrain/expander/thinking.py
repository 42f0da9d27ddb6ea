"""Thoughts before a caption: their form in a chat answer, and what is measured of them.

An answer with a thought is

    <think>
    what is asked for, what is open, the medium, what is chosen
    </think>

    the caption

Only the caption is drawn and judged. An answer without a thought is the caption alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

OPEN, CLOSE = "<think>\n", "\n</think>\n\n"
END = "</think>"
LONGEST = 200
"""Tokens of a thought beyond which it fails the format."""
BLOCK = re.compile(r"<think>\n(?P<thought>.*?)\n?</think>\n\n(?P<caption>.*)", re.DOTALL)
TAG = re.compile(r"</?think>", re.IGNORECASE)
SETTLED = 50
"""Steps before which a run may still be learning the form."""
LEAST_FORMAT, MOST_EMPTY, MOST_LONGER = 0.95, 0.5, 2.0


@dataclass(frozen=True)
class Answer:
    """An answer in its parts."""

    caption: str
    thought: str | None = None
    """None: there is none. Empty: the block is there, with nothing in it."""
    well_formed: bool = True
    """At most one block, at the start, in the form above. Of another one the caption is what follows its last end."""


def joined(thought: str, caption: str) -> str:
    """The answer with this thought; the caption alone if it is empty."""
    return f"{OPEN}{thought}{CLOSE}{caption}" if thought else caption


def split(answer: str, opened: bool = False) -> Answer:
    """The parts of an answer. `opened`: the chat template has written the opening tag already, as for models that
    always think. An answer whose thought does not end has an empty caption."""
    answer = (OPEN + answer if opened else answer).strip()
    if TAG.search(answer) is None:
        return Answer(answer)
    block = BLOCK.fullmatch(answer)
    if block is not None and not TAG.search(block["thought"] + block["caption"]):
        return Answer(block["caption"].strip(), block["thought"].strip())
    # After the last end, so that nothing of a thought is drawn.
    before, ended, caption = answer.rpartition(END)
    return Answer(caption.strip(), before, False) if ended else Answer("", answer, False)


def is_opened(prompt: str) -> bool:
    """Whether a rendered chat prompt ends within a thought."""
    return prompt.endswith(OPEN)


def figures(thoughts: Sequence[str | None], lengths: Sequence[int]) -> dict[str, float | None]:
    """Share of answers without a thought, and mean tokens of the others."""
    written = [length for thought, length in zip(thoughts, lengths) if thought]
    return {
        "thought/empty": 1 - len(written) / len(thoughts) if thoughts else None,
        "thought/tokens": sum(written) / len(written) if written else None,
    }


def drift(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Why a run should end whose evaluation was `before` and is `now`; None if nothing speaks for it."""
    if now["format"] < LEAST_FORMAT:
        return f"{1 - now['format']:.0%} of the expansions fail the format (most: {1 - LEAST_FORMAT:.0%})"
    if now["thought/empty"] > MOST_EMPTY:
        return f"{now['thought/empty']:.0%} of the answers have no thought (most: {MOST_EMPTY:.0%})"
    length, first = now["thought/tokens"], before["thought/tokens"]
    if length is not None and first is not None and length > MOST_LONGER * first:
        return f"the length of thoughts is {length:.0f}, over {MOST_LONGER:g} times the {first:.0f} at the start"
    return None


@torch.no_grad()
def part_losses(
    model: Any, rows: Sequence[tuple[list[int], int]], decode: Callable[[list[int]], str], batch: int = 16
) -> dict[str, float]:
    """Mean loss of a token of the thoughts, tags included, and of the captions after them.

    `rows`: (tokens of question and answer, number of tokens of the question) of answers with a thought. Raises
    ValueError for an answer without one. Restores the model's mode.
    """
    training = model.training
    model.eval()
    # In float64, as sums over many tokens lose digits in float32.
    sums, counts = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for first in range(0, len(rows), batch):
        part = rows[first : first + batch]
        longest = max(len(ids) for ids, _ in part)
        ids_BL = torch.zeros(len(part), longest, dtype=torch.long)
        kinds_BL = torch.full((len(part), longest), -1)  # 0: of the thought, 1: of the caption
        for i, (ids, start) in enumerate(part):
            ids_BL[i, : len(ids)] = torch.tensor(ids)
            end = thought_end(ids, start, decode)
            kinds_BL[i, start:end], kinds_BL[i, end : len(ids)] = 0, 1
        # Padding is on the right, where a causal model sees it from no token that counts. The last position predicts
        # nothing, and the first token is predicted by none.
        logits = model(input_ids=ids_BL.to(model.device)).logits[:, :-1].float().cpu()
        losses = F.cross_entropy(logits.flatten(0, 1), ids_BL[:, 1:].flatten(), reduction="none")
        kinds = kinds_BL[:, 1:].flatten()
        for kind in (0, 1):
            sums[kind] += losses[kinds == kind].double().sum()
            counts[kind] += (kinds == kind).sum()
    model.train(training)
    return {"loss_thought": float(sums[0] / counts[0]), "loss_caption": float(sums[1] / counts[1])}


def thought_end(ids: Sequence[int], start: int, decode: Callable[[list[int]], str]) -> int:
    """Index of the first token after the thought of an answer that begins at `start`. Raises ValueError without one."""
    # The tag may be one token or several, and begin within one, so the text is decoded from the start of the answer.
    for end in range(start, len(ids)):
        if END in decode(list(ids[start : end + 1])):
            # The empty line after the tag may be tokens of its own.
            while end + 1 < len(ids) and not decode([ids[end + 1]]).strip():
                end += 1
            return end + 1
    raise ValueError("the answer has no thought")
