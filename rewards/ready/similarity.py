"""Rewards of the CLIP family: an image tower, a text tower, and the cosine of their features.

Legend: B images with their prompts, E features.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, SiglipModel

# The ones that need no torchvision
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from posttrain.errors import UserError
from posttrain.loading import load_model, local, model_type, quiet, reading
from rewards.ready.loaded import (
    HIDDEN,
    SETTINGS,
    Scorer,
    build,
    fill,
    image_processor,
    read_state,
    score_head,
    tokenizer_of,
)

VIT_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
"""What PickScore and HPSv2 were finetuned from (MIT): its settings, tokenizer and image processor are theirs."""


class CLIP(Scorer):
    """Cosine of image and prompt in CLIP's features, in [-1, 1]; 0.2 to 0.35 where they fit.

    CLIPScore (arXiv 2104.08718, eq. 1) is 2.5 times it: `scale: 2.5`. A prompt beyond 77 tokens is cut. Default
    weights: OpenAI's, MIT.
    """

    kind: Any = CLIPModel
    processor_kind: Any = CLIPImageProcessorPil
    padding: Any = True
    released = "openai/clip-vit-large-patch14"
    processor_of: str | None = None  # null: the weights' own

    def __init__(
        self,
        path: str | None = None,
        batch: int = 32,
        device: str | None = None,
        dtype: str = "float32",
        processor: str | None = None,
    ):
        """`path`, null: the released weights, and `processor` are directories or hub ids. The tokenizer and the image
        processor are those of `processor`."""
        super().__init__(path or self.released, batch, device, dtype)
        self.settings = processor or self.processor_of or self.path
        self.tokenizer = tokenizer_of(self.settings)
        self.processor = image_processor(self.settings, self.processor_kind)
        self.model = self.load()
        self.length = self.model.config.text_config.max_position_embeddings

    def load(self) -> Any:
        own_type = model_type(local(self.path, SETTINGS), self.path)
        wanted = self.kind.config_class.model_type
        if own_type != wanted:
            raise UserError(f"path: {self.path} is a {own_type}: {type(self).__name__} reads models of type {wanted}")
        model = load_model(self.kind, local(self.path), self.path, self.device, dtype=self.dtype)
        return model.eval().requires_grad_(False)

    def scores(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        return (self.image_features(images) * self.text_features(prompts)).sum(-1)

    def image_features(self, images: Sequence[Image.Image]) -> Tensor:
        """(B, E) fp32 of unit length."""
        pixels = self.pixels(images).to(self.device, self.dtype)
        return F.normalize(self.model.get_image_features(pixel_values=pixels).pooler_output.float(), dim=-1)

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """(B, E) fp32 of unit length."""
        # Right of the text and without a mask: as SigLIP was trained, and CLIP's tower looks back only.
        tokens = self.tokenizer(
            list(prompts), padding=self.padding, padding_side="right", truncation=True, max_length=self.length,
            return_tensors="pt",
        )  # fmt: skip
        features = self.model.get_text_features(input_ids=tokens.input_ids.to(self.device)).pooler_output
        return F.normalize(features.float(), dim=-1)

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """(B, 3, H, W): the shorter side resized, the middle cut out, normalised."""
        return self.processor(images=list(images), return_tensors="pt")["pixel_values"]


class SigLIP(CLIP):
    """Cosine of image and prompt in SigLIP's features, in [-1, 1]; about 0.1 where they fit.

    The model's own probability, sigmoid(s cosine + b) (arXiv 2303.15343, algorithm 1), rises with it, and is
    close to 0 for most images. A prompt beyond 64 tokens is cut. Default weights: Google's SigLIP 2, Apache-2.0.
    """

    kind = SiglipModel
    processor_kind = SiglipImageProcessorPil
    padding = "max_length"
    released = "google/siglip2-so400m-patch14-384"

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        # Both generations were trained on lower case (big_vision); SigLIP 2's tokenizer does not always see to it.
        return super().text_features([prompt.lower() for prompt in prompts])


class PickScore(CLIP):
    """e^s times the cosine in features finetuned on Pick-a-Pic, e^s = 100: about 15 to 26; `scale: 0.0385` brings it
    to [0, 1], near enough.

    Source: arXiv 2305.01569, section 3, and the README of yuvalkirstain/PickScore. We know of no licence for the
    weights.
    """

    released = "yuvalkirstain/PickScore_v1"
    processor_of = VIT_H

    def scores(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        return self.model.logit_scale.float().exp() * super().scores(images, prompts)


class HPSv2(CLIP):
    """Cosine in features finetuned on HPD v2, in [-1, 1]; about 0.2 to 0.35 (v2.1).

    Source: arXiv 2306.09341 and hpsv2/img_score.py of tgxs002/HPSv2. Weights in open_clip's format: Apache-2.0.
    """

    released = "xswu/HPSv2"
    processor_of = VIT_H

    def __init__(
        self,
        path: str | None = None,
        file: str = "HPS_v2.1_compressed.pt",
        batch: int = 32,
        device: str | None = None,
        dtype: str = "float32",
        processor: str | None = None,
    ):
        """`path` is the file, or a directory or hub id that has it. The model's settings (config.json) are read where
        the tokenizer is."""
        self.file = file
        super().__init__(path, batch, device, dtype, processor)

    def load(self) -> Any:
        with quiet(), reading(self.settings, "a CLIP's settings"):
            config = CLIPConfig.from_pretrained(str(local(self.settings, SETTINGS)))
        state = from_open_clip(read_state(self.path, self.file, "state_dict"))
        return build(CLIPModel, config, state, self.path, self.device, self.dtype)

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """(B, 3, H, H): the longer side resized, the rest black, normalised, as HPSv2's ResizeMaxSize."""
        side = self.model.config.vision_config.image_size
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (self.processor.image_mean, self.processor.image_std))
        return torch.stack([(padded(image, side) - mean) / std for image in images])

    def record(self) -> dict[str, Any]:
        return {"model": self.path, "file": self.file}


def padded(image: Image.Image, side: int) -> Tensor:
    """(3, side, side) in [0, 1]: bicubic with antialiasing, in the middle of black."""
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255
    scale = side / max(pixels.shape[1:])
    if scale == 1:
        height, width = pixels.shape[1:]
    else:
        height, width = (round(length * scale) for length in pixels.shape[1:])
        pixels = F.interpolate(pixels[None], (height, width), mode="bicubic", antialias=True, align_corners=False)[0]
    top, left = (side - height) // 2, (side - width) // 2
    return F.pad(pixels, (left, side - width - left, top, side - height - top))


OPEN_CLIP = [
    (r"^(visual\.)?transformer\.resblocks\.", r"\1encoder.layers."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
    (r"^ln_final\.", "final_layer_norm."),
    (r"^token_embedding\.", "embeddings.token_embedding."),
    (r"^(visual\.)?positional_embedding$", r"\1embeddings.position_embedding.weight"),
    (r"^visual\.class_embedding$", "visual.embeddings.class_embedding"),
    (r"^visual\.conv1\.", "visual.embeddings.patch_embedding."),
    (r"^visual\.ln_pre\.", "visual.pre_layrnorm."),  # transformers spells it so
    (r"^visual\.ln_post\.", "visual.post_layernorm."),
]
PROJECTIONS = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}


def from_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A ViT's weights in open_clip's names, in those of transformers' CLIPModel. Both compute the same."""
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        if key in PROJECTIONS:
            renamed[PROJECTIONS[key]] = value.T  # open_clip computes x @ W, a Linear x @ W.T
        elif key == "logit_scale":
            renamed[key] = value
        elif key != "attn_mask":  # a buffer, which says only that the text tower looks back
            for pattern, replacement in OPEN_CLIP:
                key = re.sub(pattern, replacement, key)
            key = "vision_model." + key.removeprefix("visual.") if key.startswith("visual.") else "text_model." + key
            if match := re.search(r"\.attn\.in_proj_(weight|bias)$", key):
                # open_clip has one matrix for queries, keys and values.
                for name, part in zip("qkv", value.chunk(3)):
                    renamed[f"{key[: match.start()]}.self_attn.{name}_proj.{match[1]}"] = part
            else:
                renamed[key] = value
    return renamed


class AestheticScore(CLIP):
    """Rating of an image without its prompt, about 1 to 10, by a head on CLIP ViT-L/14's unit features.

    `head` is LAION's improved predictor (linear layers of 1024, 128, 64 and 16; christophschuhmann/
    improved-aesthetic-predictor, Apache-2.0) or LAION-AI/aesthetic-predictor's single layer (MIT): a file, or a
    directory or hub id that has `file`. The CLIP is OpenAI's, MIT. `scale: 0.1` brings it to [0, 1].
    """

    def __init__(
        self,
        head: str = "trl-lib/ddpo-aesthetic-predictor",
        file: str = "aesthetic-model.pth",
        path: str | None = None,
        batch: int = 32,
        device: str | None = None,
        dtype: str = "float32",
    ):
        self.head_path = head
        state = {key.removeprefix("layers."): value for key, value in read_state(head, file).items()}
        super().__init__(path, batch, device, dtype)
        width = self.model.config.projection_dim
        layers = torch.nn.Linear(width, 1) if "weight" in state else score_head(width, *HIDDEN)
        self.head = fill(layers, state, f"head: {head}", self.device)

    def scores(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        return self.head(self.image_features(images))[:, 0]

    def record(self) -> dict[str, Any]:
        return {"model": self.path, "head": self.head_path}
