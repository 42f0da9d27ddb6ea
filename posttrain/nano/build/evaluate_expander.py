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
    keep every statement of their prompt, and all words to draw; and, over the prompts that leave style and background
    open, how many different ones their n expansions have (evenly drawn: 5.7 of 10 styles, 4.2 of 5 backgrounds)."""
    records = read_prompts(FOLDER / "heldout.jsonl")[:prompts]
    expander = Expander.load(model, adapter, torch.float32)
    valid, kept, texts, whole, lengths = [], [], [], [], []
    different: dict[str, list[int]] = {"style": [], "background": []}
    expansions = expander.expand([r.prompt for r in records], n, seed, max_tokens=64, batch=400)
    for record, group in zip(records, expansions):
        said = [statements(e.text) for e in group]
        valid += [s is not None for s in said]
        kept += [s is not None and s >= set(record.requirements or []) for s in said]
        whole += [e.whole for e in group]
        lengths += [len(expander.tokenizer(e.text).input_ids) for e in group]
        if record.texts:
            texts += [all(f'"{text}"' in e.text for text in record.texts) for e in group]
        for what, counts in different.items():
            if not any(r.startswith(f"the {what} is") for r in record.requirements or []):
                counts.append(len({s for statement in said for s in statement or () if s.startswith(f"the {what} is")}))

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
