"""Builds expander-nano from nothing: a small chat model (Qwen3) that has read captions of scenes and pairs of them.

    python -m posttrain.nano.build_expander OUT --minutes 6

It learns to answer a short prompt with a dense caption, in chat form: most of the time without the expansion template,
whose system text is two thirds of a row, then with it. A share of the answers contradicts its prompt somewhere, so that
`posttrain expander sft`, which sees faithful pairs alone, has something to teach. What a prompt leaves open is drawn
evenly, so the answers spread over it.

Shapes: B rows of a step, L tokens of a row.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationConfig, Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

from posttrain.expander_template import messages, template
from posttrain.nano import build, evaluate_expander, expander_pairs, scenes

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WRONG = 0.25
"""Chance that each thing the answer's scene shows is another than the prompt's, in a quarter of the pairs."""


def make_tokenizer(seed: int = 0) -> Qwen2Tokenizer:
    rng = np.random.default_rng([seed, 1])
    corpus = [text for _ in range(3000) for text in pair(rng, 0.0)]
    whole = [template().system, "system\n", "user\n", "assistant\n"]
    tokenizer = build.train_tokenizer(corpus, whole * 1000, 640, SPECIAL)
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = CHAT
    return tokenizer


def make_model(tokenizer: Qwen2Tokenizer) -> Qwen3ForCausalLM:
    end, pad = (tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>"))
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=32,
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
        prompt = answer if rng.random() < 0.1 else expander_pairs.short(scene, answer, rng).prompt
        if prompt not in expander_pairs.heldout():
            return prompt, answer


def rows(tokenizer: Qwen2Tokenizer, pairs: list[tuple[str, str]], templated: bool) -> tuple[Tensor, Tensor]:
    """ids and labels (N, L): -100 where there is no token, and in the template's system text."""
    ids: list[list[int]] = []
    for prompt, answer in pairs:
        said = messages(prompt) if templated else [{"role": "user", "content": prompt}]
        said = [*said, {"role": "assistant", "content": answer}]
        ids.append(tokenizer.apply_chat_template(said, return_dict=False))  # type: ignore[arg-type]
    head = len(tokenizer.apply_chat_template(messages("")[:1], return_dict=False)) if templated else 0
    length = max(map(len, ids))
    out = torch.full((len(ids), length), 0)
    labels = torch.full((len(ids), length), -100)
    for i, row in enumerate(ids):
        out[i, : len(row)] = torch.tensor(row)
        labels[i, head : len(row)] = out[i, head : len(row)]
    return out, labels


def train(model: Qwen3ForCausalLM, stages: list[tuple[Tensor, Tensor, float]], batch: int, lr: float, log) -> None:
    """Each stage is ids and labels (N, L) and minutes; the rate rises, then falls along half a cosine over all."""
    total = sum(minutes for *_, minutes in stages) * 60
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    model.train()
    start, step, before = time.time(), 0, 0.0
    for ids, labels, minutes in stages:
        generator = torch.Generator().manual_seed(step)
        before += minutes * 60
        order = torch.randperm(len(ids), generator=generator)
        while (elapsed := time.time() - start) < before:
            if len(order) < batch:
                order = torch.randperm(len(ids), generator=generator)
            chosen, order = order[:batch], order[batch:]
            share = elapsed / total
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1.0, step / 50) * 0.5 * (1 + np.cos(np.pi * share))
            logits = model(input_ids=ids[chosen]).logits
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[chosen][:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if step % 100 == 0:
                log(step=step, seconds=round(elapsed, 1), loss=round(loss.item(), 4))
            step += 1
    model.eval()
    log(step=step, seconds=round(time.time() - start, 1))


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
    parser.add_argument("--minutes", type=float, default=6.0, help="of training; a quarter of it with the template")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    log, _ = build.begin(args.out, "cpu", args.seed)
    tokenizer = make_tokenizer(args.seed)
    model = make_model(tokenizer)
    rng = np.random.default_rng([args.seed, 0])
    pairs = [pair(rng, 0.25) for _ in range(args.pairs)]
    plain = rows(tokenizer, pairs, False)
    templated = rows(tokenizer, pairs[: args.pairs // 4], True)
    size = sum(p.numel() for p in model.parameters())
    log(stage="data", vocabulary=len(tokenizer), parameters=size, lengths=[plain[0].shape[1], templated[0].shape[1]])
    train(model, [(*plain, 0.75 * args.minutes), (*templated, 0.25 * args.minutes)], args.batch, args.lr, log)
    save(model, tokenizer, args.out / "expander-nano")
    figures = evaluate_expander.measure(str(args.out / "expander-nano"))
    (args.out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    log(stage="figures", **figures)


if __name__ == "__main__":
    main()
