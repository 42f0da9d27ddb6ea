"""The pairs of the expander's supervised training: reading, weighting, and their tokens in the chat template."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from posttrain.errors import UserError, counted
from posttrain.expander.chat_template import messages
from posttrain.expander.config import ExpanderSFTConfig
from posttrain.expander.thinking import OPEN, joined
from posttrain.log import log
from posttrain.preferences.heldout import in_share
from prompts.tables import open_table, row_texts

MOST_WEIGHT = 3.0
"""Largest weight of a pair: what is oversampled more is memorised."""


@dataclass(frozen=True)
class Pair:
    prompt: str
    completion: str
    thought: str = ""
    """What is thought before the completion; empty: nothing."""

    @property
    def question(self) -> list[dict[str, str]]:
        return messages(self.prompt, bool(self.thought))

    @property
    def answer(self) -> str:
        return joined(self.thought, self.completion)


def read_pairs(config: ExpanderSFTConfig) -> tuple[list[Pair], list[Pair]]:
    """(training, held out) pairs: the two files of `posttrain expander data`, or a split by the hash of the prompt."""
    root = Path(config.data)
    training_file, heldout_file = root / "train.parquet", root / "heldout.parquet"
    # The files keep all prompts of a caption on one side, which a split by prompt would not.
    if training_file.exists() and heldout_file.exists():
        heldout = [pair for pair, _ in _read(str(heldout_file), config)]
        return _repeated(_read(str(training_file), config), config.seed), heldout
    training, heldout = [], []
    for pair, weight in _read(config.data, config):
        if in_share(f"{config.seed}:{pair.prompt}", config.heldout):
            heldout.append(pair)
        else:
            training.append((pair, weight))
    if not training or not heldout:
        raise UserError(
            f"data: {config.data}: {counted(len(training), 'pair')} to train on and {len(heldout)} held out; give more"
            " prompts or change heldout"
        )
    return _repeated(training, config.seed), heldout


def _read(path: str, config: ExpanderSFTConfig) -> list[tuple[Pair, float]]:
    """The pairs of a table with their sampling weights."""
    source = open_table(path)
    if not len(source):
        raise UserError(f"data: {path} has no rows; give pairs of prompt and completion")
    for column in ("prompt", "completion", *(("thought",) if config.thinking else ())):
        if column not in source.columns:
            raise UserError(f"data: {path} has no column {column}; it has {', '.join(source.columns)}")
    pairs = []
    for i in range(len(source)):
        prompt, completion = row_texts(source, i, "prompt", "completion")
        row = source[i]
        thought = row["thought"] if config.thinking else None
        if not isinstance(thought, str | None):
            raise UserError(f"{source.name(i)}: thought: is not text; write a text, or leave it empty")
        weight = row.get("weight")
        weight = 1.0 if weight is None else weight
        # In Python a bool is an int.
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight <= MOST_WEIGHT:
            raise UserError(f"{source.name(i)}: weight: is {weight!r}; write a number above 0, at most {MOST_WEIGHT:g}")
        pairs.append((Pair(prompt, completion, (thought or "").strip()), float(weight)))
    if config.thinking and not any(pair.thought for pair, _ in pairs):
        raise UserError(f"data: {path}: no row has a thought; make data with thoughts, or set thinking to false")
    return pairs


def _repeated(pairs: list[tuple[Pair, float]], seed: int) -> list[Pair]:
    """Each pair as often as its weight says: 2.3 is twice, and a third time for three pairs of ten."""
    result: list[Pair] = []
    for pair, weight in pairs:
        whole, part = divmod(weight, 1)
        # By a hash of the pair: its number does not change with what else is in the data, or with a resume.
        result += [pair] * (int(whole) + in_share(f"{seed}:{pair.prompt}:{pair.completion}", part))
    return result


def conversations(pairs: list[Pair]) -> datasets.Dataset:
    """The pairs in TRL's conversational format."""
    return datasets.Dataset.from_dict(
        {
            "prompt": [pair.question for pair in pairs],
            "completion": [[{"role": "assistant", "content": pair.answer}] for pair in pairs],
        }
    )


def tokens(pair: Pair, tokenizer: Any) -> tuple[list[int], int]:
    """(tokens of a pair in the chat template, number of tokens before the answer).

    The number is -1 if the template writes the prompt differently once it is answered.
    """
    question = pair.question
    before = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
    answered = [*question, {"role": "assistant", "content": pair.answer}]
    whole = tokenizer.apply_chat_template(answered, return_dict=False)
    return whole, len(before) if whole[: len(before)] == before else -1


def fitting(pairs: list[Pair], tokenizer: Any, config: ExpanderSFTConfig) -> list[Pair]:
    """The pairs of at most max_length tokens.

    Raises UserError if too many are longer, and for a chat template that changes a prompt or an answer: then training
    would not see the tokens of a chat server.
    """
    kept, longest = [], 0
    for pair in pairs:
        ids, prompt_length = tokens(pair, tokenizer)
        if prompt_length <= 0:
            raise UserError(
                f"model: {config.model}: its chat template writes a prompt differently once it is answered, so training"
                " would not see what a server sends; use another model"
            )
        answer = tokenizer.decode(ids[prompt_length:], skip_special_tokens=True).strip()
        # A model that always thinks has the opening tag in its question.
        if pair.answer not in (answer, OPEN + answer):
            raise UserError(
                f"model: {config.model}: its chat template changes an answer to {answer!r}, so a server would return"
                " that; use a model that answers without thinking aloud, such as an Instruct model"
            )
        longest = max(longest, len(ids))
        if len(ids) <= config.max_length:
            kept.append(pair)
    lost = len(pairs) - len(kept)  # a few are expected; many mean that max_length is wrong
    if not kept or lost > config.max_dropped * len(pairs):
        raise UserError(
            f"max_length: {lost} of {counted(len(pairs), 'pair')} would not fit {config.max_length} tokens (up to"
            f" {longest}), more than max_dropped; raise one of them"
        )
    if lost:
        log.warning(
            f"{lost} of {counted(len(pairs), 'pair')} left out, longer than max_length ({config.max_length}); the"
            f" longest has {counted(longest, 'token')}"
        )
    return kept
