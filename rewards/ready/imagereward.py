"""ImageReward: BLIP's text encoder reads the prompt with the image in its cross-attention, and a head gives the score.

The release is one file in BLIP's names; here its parts are transformers' own, with sizes as the tensors have them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

# The one that needs no torchvision. It cuts out the middle, as ImageReward does and BLIP's own does not.
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from posttrain.errors import UserError
from rewards.ready.loaded import HIDDEN, Scorer, build, fill, part, read_state, score_head, tokenizer_of

MEAN, DEVIATION = 0.16717362830052426, 1.0333394966054072
"""Mean and deviation of the head's output over ImageReward's data, which normalise its score (ImageReward.py)."""
LENGTH = 35
"""Tokens of a prompt that are read (ImageReward.py)."""
HEAD_WIDTH = 64
"""Width of an attention head, in BLIP's image and text towers alike."""
BLIP = [
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"^norm\.", "post_layernorm."),
]


class ImageReward(Scorer):
    """Human preference for an image of a prompt, normalised to mean 0 and deviation 1 over its authors' data: about
    -2 to 2. `scale: 0.25, offset: 0.5` brings it to [0, 1], near enough. A prompt beyond 35 tokens is cut.

    Source: arXiv 2304.05977 and ImageReward.py of THUDM/ImageReward. Weights and code: Apache-2.0.
    """

    def __init__(
        self,
        path: str = "THUDM/ImageReward",
        file: str = "ImageReward.pt",
        batch: int = 32,
        device: str | None = None,
        dtype: str = "float32",
        tokenizer: str = "google-bert/bert-base-uncased",
    ):
        """`path` is the file, or a directory or hub id that has it; `tokenizer` is BERT's."""
        super().__init__(path, batch, device, dtype)
        self.tokenizer = tokenizer_of(tokenizer)
        state = read_state(path, file)
        image, text = part(state, "blip.visual_encoder."), part(state, "blip.text_encoder.")
        head = part(state, "mlp.layers.")
        if not (image and text and head):
            raise UserError(f"path: {path}: holds no ImageReward (blip.visual_encoder, blip.text_encoder, mlp)")
        for pattern, replacement in BLIP:
            image = {re.sub(pattern, replacement, key): value for key, value in image.items()}
        text.pop("embeddings.position_ids", None)  # a buffer: 0, 1, 2, ...
        shapes = _vision(image), _text(text, image["post_layernorm.weight"].shape[0])
        self.vision = build(BlipVisionModel, shapes[0], image, path, self.device, self.dtype)
        self.text = build(_TextModel, shapes[1], text, path, self.device, self.dtype)
        self.head = fill(score_head(shapes[1].hidden_size, *HIDDEN), head, path, self.device)
        side: Any = shapes[0].image_size
        self.processor = CLIPImageProcessorPil(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        )  # its mean and deviation are CLIP's, as ImageReward's are

    def scores(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        pixels = self.processor(images=list(images), return_tensors="pt")["pixel_values"]
        tokens = self.tokenizer(list(prompts), padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
        patches = self.vision(pixel_values=pixels.to(self.device, self.dtype)).last_hidden_state
        read = self.text(
            input_ids=tokens.input_ids.to(self.device),
            attention_mask=tokens.attention_mask.to(self.device),
            encoder_hidden_states=patches,
            encoder_attention_mask=torch.ones(patches.shape[:2], dtype=torch.long, device=self.device),
        )
        return (self.head(read.last_hidden_state[:, 0].float())[:, 0] - MEAN) / DEVIATION


class _TextModel(BlipTextModel):
    """Without the pooler, which ImageReward's file does not have."""

    def __init__(self, config: Any):
        super().__init__(config, add_pooling_layer=False)


def _layers(state: dict[str, Tensor], stem: str) -> int:
    numbers = [int(match[1]) for key in state if (match := re.match(rf"{re.escape(stem)}(\d+)\.", key))]
    return max(numbers, default=-1) + 1


def _vision(state: dict[str, Tensor]) -> BlipVisionConfig:
    width, _, patch, _ = state["embeddings.patch_embedding.weight"].shape
    patches = state["embeddings.position_embedding"].shape[1] - 1
    return BlipVisionConfig(
        hidden_size=width, intermediate_size=state["encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=_layers(state, "encoder.layers."), num_attention_heads=width // HEAD_WIDTH, patch_size=patch,
        image_size=patch * round(patches**0.5), layer_norm_eps=1e-6,  # BLIP's vit.py; transformers' default is 1e-5
    )  # fmt: skip


def _text(state: dict[str, Tensor], image_width: int) -> BlipTextConfig:
    vocabulary, width = state["embeddings.word_embeddings.weight"].shape
    return BlipTextConfig(
        vocab_size=vocabulary, hidden_size=width, encoder_hidden_size=image_width, is_decoder=True,
        intermediate_size=state["encoder.layer.0.intermediate.dense.weight"].shape[0], projection_dim=width,
        num_hidden_layers=_layers(state, "encoder.layer."), num_attention_heads=width // HEAD_WIDTH,
        max_position_embeddings=state["embeddings.position_embeddings.weight"].shape[0],
        bos_token_id=None, eos_token_id=None, sep_token_id=None, pad_token_id=0,
    )  # fmt: skip
