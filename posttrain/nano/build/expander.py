"""Builds expander-nano from nothing: a small chat model (Qwen3) that has read captions of scenes and pairs of them.

    python -m posttrain.nano.build.expander OUT --minutes 6

It learns to answer a short prompt with a dense caption, in the chat form of prompts/expander.md. Some of the answers
contradict their prompt, so that `posttrain expander sft`, which sees faithful pairs alone, has something to teach. What
a prompt leaves open is drawn evenly, so the answers spread over it. For the first part of the time rows lack the system
text, among whose tokens the prompt's are harder to find. Then all begin with it, and a step reads it once: the rows go
on from its keys and values.

Shapes: B rows of a step, S tokens of the system text, L tokens of a row after it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationConfig, Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

from posttrain.expander.chat_template import messages, template
from posttrain.nano.build import build, evaluate_expander, parts
from posttrain.nano.world import expander_pairs, scenes

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WRONG_PAIRS, WRONG = 0.15, 0.25
"""Share of the pairs with a wrong answer, and the chance there that each thing it says is another than the scene's."""
ASKED = 0.3
"""Weight of a prompt's token in the loss."""
PLAIN = 0.6
"""Share of the time without the system text."""


def make_tokenizer(seed: int = 0) -> Qwen2Tokenizer:
    rng = np.random.default_rng([seed, 1])
    corpus: list[str] = []
    for _ in range(3000):
        corpus += pair(rng, 0.0)
    # Often enough that the system text, which every row begins with, takes few tokens.
    whole = [template().system, "system\n", "user\n", "assistant\n"]
    tokenizer = parts.train_tokenizer(corpus, whole * 1000, 640, SPECIAL)
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = CHAT
    return tokenizer


def make_model(tokenizer: Qwen2Tokenizer) -> Qwen3ForCausalLM:
    end, pad = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])  # type: ignore[misc]
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=32,  # the least that vLLM serves on a CPU
        initializer_range=0.06,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        eos_token_id=end,
        pad_token_id=pad,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=pad, do_sample=True)
    return model


def pair(rng: np.random.Generator, wrong: float) -> tuple[str, str]:
    """A prompt and an answer, which `wrong` of the time is another scene's in some things."""
    while True:
        scene, answer = expander_pairs.caption(rng)
        if rng.random() < wrong:
            answer = scenes.describe(scenes.mutate(scene, rng, WRONG, 0.03), rng, 1.0).prompt
        # Prompts that are dense already must come back unchanged.
        prompt = answer if rng.random() < 0.1 else expander_pairs.short(scene, answer, rng).prompt
        if prompt not in expander_pairs.heldout():
            return prompt, answer


@dataclass
class Rows:
    system: Tensor
    """(1, S): what every row begins with."""
    ids: Tensor
    """(N, L): the rest, filled up with padding."""
    weights: Tensor
    """(N, L): of each token's loss: 1 in an answer, ASKED in a prompt, 0 in padding."""


def rows(tokenizer: Qwen2Tokenizer, pairs: list[tuple[str, str]]) -> Rows:
    template: Any = partial(tokenizer.apply_chat_template, return_dict=False)
    system: list[int] = template(messages("")[:1])
    ids, asked = [], []
    for prompt, answer in pairs:
        said = messages(prompt)[1:]
        # What stands before the answer, with the tokens that begin it.
        asked.append(len(template(said, add_generation_prompt=True)))
        ids.append(template([*said, {"role": "assistant", "content": answer}]))
    lengths = torch.tensor(list(map(len, ids)))
    out = torch.zeros(len(ids), int(lengths.max()), dtype=torch.long)  # 0 is the padding
    for i, row in enumerate(ids):
        out[i, : len(row)] = torch.tensor(row)
    places = torch.arange(out.shape[1])
    weights = torch.where(places < torch.tensor(asked)[:, None], ASKED, 1.0) * (places < lengths[:, None])
    return Rows(torch.tensor([system]), out, weights)


def batches(data: Rows, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Numbers of rows, all in a random order, then all in another, without end."""
    while True:
        yield from torch.randperm(len(data.ids), generator=generator).split(size)


def train(model: Qwen3ForCausalLM, data: Rows, minutes: float, batch: int, lr: float, seed: int, log) -> None:
    """The rate rises over 50 steps and falls along half a cosine over the time given."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    model.train()
    start, seconds = time.time(), 60 * minutes
    for step, chosen in enumerate(batches(data, batch, torch.Generator().manual_seed(seed))):
        if (elapsed := time.time() - start) > seconds:
            break
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, step / 50) * 0.5 * (1 + np.cos(np.pi * elapsed / seconds))
        # Padding beyond the longest row of the batch would cost as much as text.
        length = int((data.weights[chosen] > 0).sum(1).max())
        ids, weights = data.ids[chosen, :length], data.weights[chosen, 1:length]
        cache = None
        # Its keys and values have a gradient, so the layers learn to write them too.
        if elapsed > PLAIN * seconds:
            cache = model.model(input_ids=data.system, use_cache=True).past_key_values
            cache.batch_repeat_interleave(len(ids))  # the same for all rows, so it was computed once
        logits = model(input_ids=ids, past_key_values=cache, use_cache=cache is not None).logits[:, :-1]
        losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(weights.shape)
        loss = (losses * weights).sum() / weights.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            log(step=step, seconds=round(elapsed, 1), loss=round(loss.item(), 4),
                answer=round(losses[weights == 1].mean().item(), 4))  # fmt: skip
    model.eval()


def save(model: Qwen3ForCausalLM, tokenizer: Qwen2Tokenizer, folder: Path) -> None:
    """Writes all that transformers and vLLM need; weights in bfloat16."""
    copy: Any = make_model(tokenizer)
    copy.load_state_dict(model.state_dict())
    copy.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="directory to write expander-nano, figures.json and log.jsonl to")
    parser.add_argument("--pairs", type=int, default=60_000)
    parser.add_argument("--minutes", type=float, default=6.0, help="of training")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    log, _ = build.begin(args.out, "cpu", args.seed)
    tokenizer = make_tokenizer(args.seed)
    model = make_model(tokenizer)
    rng = np.random.default_rng([args.seed, 0])
    data = rows(tokenizer, [pair(rng, WRONG_PAIRS) for _ in range(args.pairs)])
    sizes = {"vocabulary": len(tokenizer), "parameters": model.num_parameters(), "system": data.system.shape[1]}
    log(stage="data", **sizes, rows=[*data.ids.shape])
    train(model, data, args.minutes, args.batch, args.lr, args.seed, log)
    save(model, tokenizer, args.out / "expander-nano")
    figures = evaluate_expander.measure(str(args.out / "expander-nano"))
    (args.out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    log(stage="figures", **figures)


if __name__ == "__main__":
    main()
