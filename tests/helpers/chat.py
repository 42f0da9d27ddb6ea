"""A tiny real chat model that was taught, in seconds, to answer prompts with a few captions."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from posttrain.expander.chat_template import messages
from tests.helpers import tiny

# Of the system text only the beginning: it would take most of the time.
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content[:30] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
USERS = ["a red circle", "two blue squares", 'the word "HELLO"', "a fox in the snow"]
STYLES = ["flat style", "pastel", "soft light", "at night"]


def captions(user: str) -> list[str]:
    return [f"{user}, {style}" for style in STYLES]


def save(directory: Path, steps: int = 80) -> Path:
    """A Qwen3 of two layers and its tokenizer, which ends with <|im_end|>."""
    words: Any = PreTrainedTokenizerFast(tokenizer_object=tiny.tokenizer()._tokenizer)
    words.add_special_tokens(
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "additional_special_tokens": ["<|im_start|>"]}
    )
    words.chat_template = TEMPLATE
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, max_position_embeddings=1024, tie_word_embeddings=True,
            eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id, bos_token_id=None,
        )
    )  # fmt: skip
    pairs = [(messages(user), caption) for user in USERS for caption in captions(user)]
    prompts = [words.apply_chat_template(m, add_generation_prompt=True, tokenize=False) for m, _ in pairs]
    starts = [len(words(prompt).input_ids) for prompt in prompts]
    batch = words([p + c + "<|im_end|>" for p, (_, c) in zip(prompts, pairs)], return_tensors="pt", padding=True)
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    for row, start in zip(labels, starts):
        row[:start] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        loss = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(directory)
    words.save_pretrained(directory)
    return directory


if __name__ == "__main__":
    import sys
    import time

    from posttrain.config.sections import LoraConfig
    from posttrain.expander.gdpo_config import ChatModelConfig
    from posttrain.expander.policy import Policy
    from prompts.records import PromptRecord

    began = time.time()
    save(Path(sys.argv[1]))
    print(time.time() - began)
    policy = Policy(ChatModelConfig(sys.argv[1], dtype="float32"), LoraConfig(4, 8), 0, torch.device("cpu"))
    for e in policy.write([PromptRecord(u) for u in USERS], 4, 0, 40, 1.0, 0):
        print(e.ended, repr(e.text))
