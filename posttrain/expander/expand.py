"""`posttrain expand`: prints several expansions of a prompt.

posttrain expand "a cat" --model runs/nano-expander-sft --n 4
"""

from __future__ import annotations

import json

import torch
from accelerate import PartialState

from posttrain.expander.config import ExpandConfig
from posttrain.expander.model import Expander
from posttrain.log import log


def main(config: ExpandConfig) -> None:
    """Prints `config.n` expansions, one a line or as JSON."""
    device = PartialState().device or "cpu"
    expander = Expander.load(config.model, config.adapter, getattr(torch, config.dtype), device)
    (expansions,) = expander.expand([config.prompt], config.n, config.seed, config.temperature, config.max_tokens)
    texts = [e.text for e in expansions]
    if config.json:
        print(json.dumps({"prompt": config.prompt, "expansions": texts}, ensure_ascii=False))
    else:
        for text in texts:
            print(" ".join(text.split()))  # one line each, whatever the model wrote
    if cut := sum(not e.whole for e in expansions):
        log.warning(f"{cut} of {config.n} were cut at max_tokens ({config.max_tokens})")
