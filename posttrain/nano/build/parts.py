"""The parts of K2-nano before they are trained: tokenizer, autoencoder, text encoder, transformer, and the pipeline.

The classes are those of the released checkpoint, at sizes that its original format's rules allow.
"""

from __future__ import annotations

import json
import re
from typing import Any

from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    Krea2Pipeline,
    Krea2Transformer2DModel,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer, Qwen3VLConfig, Qwen3VLModel

from posttrain.model.load import SCHEDULER

PREFIX = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
           "<|video_pad|>"]  # fmt: skip
LANGUAGE = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "head_dim": 32,
}
"""The shape of the language half, of the text encoder as of judge-nano."""


def make_tokenizer(corpus: list[str]) -> Qwen2Tokenizer:
    """K2-nano's tokenizer: the captions' words, and K2's template at its length in tokens."""
    # Special tokens are never split, so no merges are learned from them.
    template = PREFIX + SUFFIX
    for token in SPECIAL:
        template = template.replace(token, "")
    tokenizer = train_tokenizer(corpus, [template] * 1000, 640, SPECIAL)
    # The pipeline drops the first 34 tokens and counts 5 at the end, whatever the tokenizer.
    lengths = len(tokenizer(PREFIX).input_ids), len(tokenizer(SUFFIX).input_ids)
    if lengths != (34, 5):
        raise RuntimeError(f"K2's template must be 34 and 5 tokens, this tokenizer makes it {lengths}")
    return tokenizer


def train_tokenizer(corpus: list[str], whole: list[str], size: int, special: list[str]) -> Qwen2Tokenizer:
    """A byte-level BPE of Qwen's kind. No capital of the corpus is ever merged, so words to draw are spelled letter by
    letter; `whole` is learned as it stands. The first of `special` is the padding."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = Qwen2Tokenizer()._tokenizer.pre_tokenizer
    raw.decoder = decoders.ByteLevel()
    # Tokens of whole words would hide from the network which letters it has to draw.
    lower = [re.sub("[A-Z]", " ", text) for text in corpus]
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=special,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    raw.train_from_iterator(lower + whole, trainer)
    learned = json.loads(raw.to_str())["model"]
    merges = list(map(tuple, learned["merges"]))
    tokenizer = Qwen2Tokenizer(vocab=learned["vocab"], merges=merges)  # type: ignore[arg-type]
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    tokenizer.model_max_length = 4096  # saved with it, where libraries look for the longest text
    return tokenizer


def make_vae() -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage(
        base_dim=16,
        z_dim=16,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, False],
        latents_mean=[0.0] * 16,
        latents_std=[1.0] * 16,
    )


def make_text_encoder(vocab: int, tokenizer: Qwen2Tokenizer) -> Qwen3VLModel:
    """The language half is used; the vision half is as small as the class allows."""
    # The rotary sections fill half of head_dim: 8 + 4 + 4 = 32 / 2.
    config = Qwen3VLConfig(
        text_config={
            **LANGUAGE,
            "vocab_size": vocab,
            "initializer_range": 0.08,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 4, 4]},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 1,
            "out_hidden_size": 96,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [],
        },
        tie_word_embeddings=True,
        **vision_ids(tokenizer),
    )
    return Qwen3VLModel(config)


def vision_ids(tokenizer: Qwen2Tokenizer) -> dict[str, Any]:
    """The ids of the tokens around an image, by their names in a config."""
    ids = {}
    for name in ("image_pad", "video_pad", "vision_start", "vision_end"):
        ids[f"{name.removesuffix('_pad')}_token_id"] = tokenizer.convert_tokens_to_ids(f"<|{name}|>")
    return ids


def swiglu_width(features: int, multiplier: int = 4) -> int:
    """Width of K2's feed-forward layers in the official repository."""
    return -(-int(2 * features / 3) * multiplier // 128) * 128


def make_transformer(layers: int = 7) -> Krea2Transformer2DModel:
    """Shapes by the official repository's rules, so it is a valid K2 in the original format too."""
    head, heads, text = 32, 6, 96
    # Rotary sizes of time, height and width, which add up to those of a head.
    side = 6 * (head // 16)
    return Krea2Transformer2DModel(
        in_channels=64,
        num_layers=layers,
        attention_head_dim=head,
        num_attention_heads=heads,
        num_key_value_heads=3,
        intermediate_size=swiglu_width(head * heads),
        timestep_embed_dim=256,
        text_hidden_dim=text,
        num_text_layers=3,
        text_num_attention_heads=3,
        text_num_key_value_heads=3,
        text_intermediate_size=swiglu_width(text),
        axes_dims_rope=(head - 2 * side, side, side),
    )


def make_pipeline(tokenizer, vae, text_encoder, transformer) -> Krea2Pipeline:
    return Krea2Pipeline(
        FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        vae,
        text_encoder,
        tokenizer,
        transformer,
        text_encoder_select_layers=(1, 2, 4),
        is_distilled=False,
    )
