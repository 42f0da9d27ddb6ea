"""A tiny random Qwen3-VL with a byte-level tokenizer, and random LoRA adapters on it, as directories.

Channel 0 of the residual stream is a constant that the output rows of 'yes' and 'no' read, so that the first
token is one of them; which one depends on the other channels: on picture, question and adapter.
"""

import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
SPECIAL += ["<|image_pad|>", "<|video_pad|>"]
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}"
    "{% else %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    merges = [("y", "e"), ("ye", "s"), ("n", "o")]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT
    )


def build_model(directory: Path) -> Qwen3VLForConditionalGeneration:
    tokenizer = build_tokenizer()
    ids = tokenizer.get_vocab()
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
            "max_position_embeddings": 4096, "tie_word_embeddings": False,
            "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"],
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e4,
                "mrope_section": [6, 5, 5], "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": 64,
            "patch_size": 16, "num_position_embeddings": 64, "deepstack_visual_indexes": [0],
        },
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
        embedding = model.get_input_embeddings()
        assert isinstance(embedding, torch.nn.Embedding)
        embedding.weight[:, 0] = 10
        model.lm_head.weight.mul_(0.1)
        direction = torch.randn(64) * 0.15
        direction[0] = 0
        for word, sign in (("yes", 1), ("no", -1)):
            model.lm_head.weight[ids[word]].copy_(sign * direction)
            model.lm_head.weight[ids[word]][0].fill_(2)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    pixels = {
        "size": {"shortest_edge": 32 * 32, "longest_edge": 256 * 256},
        "patch_size": 16,
        "merge_size": 2,
    }
    pixels |= {"temporal_patch_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    for name, kind in {
        "preprocessor_config.json": {"image_processor_type": "Qwen2VLImageProcessor"},
        "video_preprocessor_config.json": {"video_processor_type": "Qwen3VLVideoProcessor"},
    }.items():
        (directory / name).write_text(json.dumps(pixels | kind | {"processor_class": "Qwen3VLProcessor"}))
    return model


def build_adapter(base: Path, directory: Path, seed: int) -> None:
    torch.manual_seed(seed)
    targets = r".*language_model.*\.(q_proj|v_proj|o_proj|up_proj|down_proj)"
    model = Qwen3VLForConditionalGeneration.from_pretrained(base)
    lora = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False))
    lora.save_pretrained(str(directory))
