"""HPSv3: a Qwen2-VL that reads a question, the prompt and the image, with a head on one token of the question."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import Qwen2VLConfig, Qwen2VLModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from posttrain.errors import UserError, counted
from posttrain.loading import local, quiet, reading
from posttrain.tokenizer import load_tokenizer
from prompts.templates import CONTROL_TOKEN, load_template
from rewards.ready.loaded import SETTINGS, Scorer, build, fill, image_processor, part, read_state

REWARD = "<|Reward|>"
"""The token of the question whose hidden state the head reads."""
PIXELS = 256 * 28 * 28
"""Pixels that every image is resized to, at most: both sides are multiples of 28."""
PLACE = "<|image_pad|>"


class HPSv3(Scorer):
    """Mean of the human preference for an image of a prompt, without bounds; its question asks for 0 to 10. Look at the
    scores of your own images before you set `scale` and `offset`.

    Source: arXiv 2508.03789 and its code, hpsv3 1.0.0 (MIT), which needs another transformers than this project: the
    question is its own (prompts/judges/hpsv3.txt), and positions count from 0 by one, as in its forward, and not along
    the image's rows and columns. Weights: Apache-2.0; 16 GB in bfloat16.
    """

    def __init__(
        self,
        path: str = "MizzenAI/HPSv3",
        file: str = "HPSv3.safetensors",
        batch: int = 8,
        device: str | None = None,
        dtype: str = "bfloat16",
        processor: str = "Qwen/Qwen2-VL-7B-Instruct",
    ):
        """`path` is the file, or a directory or hub id that has it; `processor` is the Qwen2-VL that it began as, of
        which only the settings, the tokenizer and the image processor are read."""
        super().__init__(path, batch, device, dtype)
        self.question = load_template("hpsv3").text
        folder = local(processor, SETTINGS)
        self.tokenizer = load_tokenizer(folder, processor, None)
        self.processor = image_processor(processor, Qwen2VLImageProcessorPil, min_pixels=PIXELS, max_pixels=PIXELS)
        self.tokenizer.add_tokens([REWARD], special_tokens=True)
        self.reward = self.tokenizer.convert_tokens_to_ids(REWARD)
        with quiet(), reading(processor, "a Qwen2-VL's settings"):
            config = Qwen2VLConfig.from_pretrained(str(folder))
        state = read_state(path, file)
        body = {}
        for key, value in state.items():
            if not key.startswith(("rm_head.", "lm_head.")):
                # The release has the names of an earlier transformers.
                body[f"language_{key}" if key.startswith("model.") else key] = value
        rows = len(body.get("language_model.embed_tokens.weight", ()))
        if rows <= self.reward:
            raise UserError(
                f"path: {path}: its embedding has {counted(rows, 'row')}, and {REWARD} is number {self.reward}: give"
                " the file of the release, and as processor the model that it began as"
            )
        text: Any = config.text_config
        text.vocab_size = rows
        self.model = build(Qwen2VLModel, config, body, path, self.device, self.dtype)
        width = text.hidden_size
        head = nn.Sequential(
            nn.Linear(width, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
        )  # mean and deviation
        self.head = fill(head, part(state, "rm_head."), path, self.device)

    def scores(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        inputs = self.inputs(images, prompts)
        length = inputs["input_ids"].shape[1]
        positions = torch.arange(length, device=self.device).expand(3, len(prompts), length)
        hidden = self.model(**inputs, position_ids=positions, use_cache=False).last_hidden_state
        return self.head(hidden[inputs["input_ids"] == self.reward].float())[:, 0]

    def inputs(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, Tensor]:
        """One question for each image, padded on the right, with REWARD once in each."""
        pixels = self.processor(images=list(images), return_tensors="pt")
        turns = []
        for prompt, grid in zip(prompts, pixels["image_grid_thw"], strict=True):
            # A prompt must not hold the tokens that end a turn or give a score.
            prompt = CONTROL_TOKEN.sub(lambda match: match.group() + " ", prompt)
            text = "\n" + self.question.replace("$prompt", prompt) + "\n"
            content = [{"type": "image"}, {"type": "text", "text": text}]
            turn: Any = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
            turns.append(turn.replace(PLACE, PLACE * (int(grid.prod()) // self.processor.merge_size**2), 1))
        tokens = self.tokenizer(
            turns, padding=True, padding_side="right", return_tensors="pt", add_special_tokens=False
        )
        return {
            "input_ids": tokens.input_ids.to(self.device),
            "attention_mask": tokens.attention_mask.to(self.device),
            "pixel_values": pixels["pixel_values"].to(self.device, self.dtype),
            "image_grid_thw": pixels["image_grid_thw"].to(self.device),
        }
