"""The tokenizer of a model, loaded and checked: a damaged one loads without a word, and gives other tokens.

A whole vocabulary, merges that still join letters, special tokens that are one token each, and a text that comes back
as it was.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from posttrain.errors import UserError, counted
from posttrain.loading import check_json, quiet, reading

WHOLE = 0.99
"""Least share of a vocabulary's numbers that have a token."""
PROBE = "Two red stars, café: 3 × 7 = 21 (ready?)"


def load_tokenizer(folder: Path, where: str, rows: int | None) -> Any:
    """The tokenizer in a directory, if `check_tokenizer` finds nothing."""
    from transformers import AutoTokenizer

    if not folder.is_dir():
        raise UserError(f"{where}: no such directory, so it has no tokenizer; copy or download it again")
    check_json(folder)
    with quiet(), reading(where, "a tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
        check_tokenizer(tokenizer, where, rows)
    return tokenizer


def check_tokenizer(tokenizer: Any, where: str, rows: int | None) -> None:
    """Raises UserError unless a tokenizer has its whole vocabulary and gives a text back as it was.

    `rows` are those of the embedding of its model; None: there is no model here.
    """
    if problem := _wrong_with(tokenizer, rows):
        raise UserError(f"{where}: {problem}; copy or download all of its files again")


def _wrong_with(tokenizer: Any, rows: int | None) -> str:
    ids = set(tokenizer.get_vocab().values())
    last = max(ids, default=-1)
    if len(ids) < WHOLE * (last + 1):  # some vocabularies leave a few numbers out
        return f"the tokenizer has {counted(len(ids), 'token')}, and its last one is number {last}"
    # Embeddings are often padded to a round number of rows.
    if rows is not None and not 0.9 * rows <= len(ids) <= rows:
        return f"the tokenizer has {counted(len(ids), 'token')}, and its model's embedding {counted(rows, 'row')}"
    encoded = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    back = tokenizer.decode(encoded, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
    if back != PROBE:
        return f"the tokenizer gives {PROBE!r} back as {back!r}"
    # A token for each byte: no two letters were joined.
    if len(encoded) >= len(PROBE.encode()):
        return "the tokenizer joins no letters to tokens: its merges are lost"
    for token in tokenizer.all_special_tokens:
        if len(tokenizer(token, add_special_tokens=False)["input_ids"]) != 1:
            return f"the tokenizer takes {token!r} for more than one token"
    return ""
