"""A tiny real Krea2Pipeline: the classes of the released checkpoint, obeying its original format's rules.

Run `python -m tests.helpers.tiny DIRECTORY` to write one.
"""

import json
import sys
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    Krea2Pipeline,
    Krea2Transformer2DModel,
)
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer, Qwen3VLConfig, Qwen3VLModel

from posttrain.model.load import SCHEDULER
from posttrain.nano.build.parts import PREFIX, SUFFIX, swiglu_width

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Qwen2's own pre-tokenizer, so that training sees the pieces that encoding will.
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
PROMPTS = [
    "a red circle",
    "two blue squares above a small green triangle, flat style",
    "the word HELLO",
    "a fox in the snow at night with a lantern, pastel, soft light, seen from far away",
]


def rotary_axes(head: int) -> tuple[int, int, int]:
    return head - 12 * (head // 16), 6 * (head // 16), 6 * (head // 16)


def tokenizer(vocabulary: int = 700) -> Qwen2Tokenizer:
    """A byte-level BPE trained on the template and the prompts: the prefix has 34 tokens, as in Qwen's."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    text = PREFIX + SUFFIX
    for special in SPECIAL:
        text = text.replace(special, " ")
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIAL,
        show_progress=False,
    )
    # Once more without the spaces that stood for special tokens: 'user' and 'system' follow one directly.
    trained.train_from_iterator([text, *text.split()] * 50 + PROMPTS, trainer)
    model = json.loads(trained.to_str())["model"]
    built = Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(merge) for merge in model["merges"]],
        extra_special_tokens=SPECIAL[1:],
    )
    assert len(built(PREFIX)["input_ids"]) == 34, built.tokenize(PREFIX)
    assert len(built(SUFFIX)["input_ids"]) == 5, built.tokenize(SUFFIX)
    return built


def pipeline(distilled: bool = False, seed: int = 0) -> Krea2Pipeline:
    """Random weights; what a fresh model leaves at zero is randomised, so that nothing is tested on zeros."""
    words = tokenizer()
    torch.manual_seed(seed)
    heads, head, text_dim = 4, 32, 48
    transformer = Krea2Transformer2DModel(
        in_channels=64,
        num_layers=3,
        attention_head_dim=head,
        num_attention_heads=heads,
        num_key_value_heads=2,
        intermediate_size=swiglu_width(heads * head),
        timestep_embed_dim=32,
        text_hidden_dim=text_dim,
        num_text_layers=3,
        text_num_attention_heads=3,
        text_num_key_value_heads=3,
        text_intermediate_size=swiglu_width(text_dim),
        num_layerwise_text_blocks=2,
        num_refiner_text_blocks=2,
        axes_dims_rope=rotary_axes(head),
        rope_theta=1000.0,
    )
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if parameter.ndim == 1 or name.endswith("scale_shift_table"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.mul_(1.5)
    text = {
        "vocab_size": len(words),
        "hidden_size": text_dim,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 2048,
        "initializer_range": 0.1,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [4, 2, 2],
            "mrope_interleaved": True,
        },
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "num_heads": 1,
        "intermediate_size": 16,
        "out_hidden_size": text_dim,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    encoder = Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision))
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=16, dim_mult=[1, 2, 4], num_res_blocks=1, temperal_downsample=[False, False]
    )
    return Krea2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        vae=vae.eval(),
        text_encoder=encoder.eval(),
        tokenizer=words,
        transformer=transformer.eval(),
        text_encoder_select_layers=(1, 2, 3),
        is_distilled=distilled,
    )


def save(directory: str | Path, distilled: bool = False, seed: int = 0) -> Path:
    pipeline(distilled, seed).save_pretrained(directory, safe_serialization=True)
    return Path(directory)


if __name__ == "__main__":
    print(save(sys.argv[1]))
