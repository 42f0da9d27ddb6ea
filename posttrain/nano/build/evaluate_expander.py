"""Measures an expander on held-out prompts of the nano world.

python -m posttrain.nano.build.evaluate_expander posttrain/nano/weights/expander-nano
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

from posttrain.expander.model import Expander
from posttrain.nano.world.captions import statements
from posttrain.nano.world.prompts import FOLDER
from prompts.records import read_prompts


def measure(model: str, adapter: str | None = None, prompts: int = 200, n: int = 8, seed: int = 0) -> dict[str, Any]:
    """Shares over `prompts` held-out prompts with n expansions each: of expansions that are captions of the world, that
    keep every statement of their prompt, and all words to draw. For prompts that leave style or background open, how
    many different ones their n expansions have (if drawn uniformly, 5.7 of 10 styles and 4.2 of 5 backgrounds)."""
    records = read_prompts(FOLDER / "heldout.jsonl")[:prompts]
    expander = Expander.load(model, adapter, torch.float32)
    valid, kept, texts, whole, lengths = [], [], [], [], []
    different: dict[str, list[int]] = {"style": [], "background": []}
    expansions = expander.expand([r.prompt for r in records], n, seed, max_tokens=64, batch=400)
    for record, group in zip(records, expansions):
        required = set(record.requirements or [])
        stated: set[str] = set()
        for expansion in group:
            found = statements(expansion.text)
            valid.append(found is not None)
            kept.append(found is not None and found >= required)
            whole.append(expansion.whole)
            lengths.append(len(expander.tokenizer(expansion.text).input_ids))
            stated |= found or set()
            # Prompts without a word to draw say nothing of this share.
            if record.texts:
                texts.append(all(f'"{text}"' in expansion.text for text in record.texts))
        # What a prompt fixes cannot vary, so only prompts that leave it open count.
        for what, counts in different.items():
            beginning = f"the {what} is"
            if not any(requirement.startswith(beginning) for requirement in required):
                counts.append(sum(statement.startswith(beginning) for statement in stated))

    def mean(values: list) -> float:
        return round(sum(values) / len(values), 4)

    return {
        "valid": mean(valid),
        "keeps_all": mean(kept),
        "keeps_text": mean(texts),
        "whole": mean(whole),
        "styles_of_8": mean(different["style"]),
        "backgrounds_of_8": mean(different["background"]),
        "tokens": mean(lengths),
        "longest": max(lengths),
        "prompts": len(records),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="chat model, run directory or adapter")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(json.dumps(measure(args.model, prompts=args.prompts, seed=args.seed), indent=1))


if __name__ == "__main__":
    main()
