"""A tiny recipe of `posttrain expander gdpo`, and what its rewards and checks are in tests."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from posttrain.config.sections import LoraConfig, TrackConfig
from posttrain.expander.gdpo_config import (
    ChatModelConfig,
    DiversityConfig,
    ExpanderGDPOConfig,
    ExpanderPromptsConfig,
    RendererConfig,
    SafetySpec,
)
from rewards.base import RewardSpec
from tests.helpers import chat

CALLS: list[int] = []
"""How many pictures each call of `brightness` was shown."""


def brightness(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    CALLS.append(len(images))
    return [float(np.asarray(image).mean()) / 255 for image in images]


def redness(images: Sequence[Image.Image], prompts: Sequence[str], expansion: Sequence[str]) -> list[float | None]:
    """None for prompts that name no red."""
    shares = [float(np.asarray(image)[..., 0].mean()) / 255 for image in images]
    return [share if "red" in prompt else None for share, prompt in zip(shares, prompts)]


def safe(images: Sequence[Any], prompts: Sequence[str]) -> list[float]:
    return [1.0] * len(images)


def unreachable(images: Sequence[Any], prompts: Sequence[str]) -> list[float]:
    raise ConnectionError("the safety judge does not answer")


def silent(images: Sequence[Any], prompts: Sequence[str]) -> list[float | None]:
    return [None] * len(images)


def dinov3(directory: Path) -> Path:
    """A tiny DINOv3 ViT with random weights and its preprocessing."""
    torch.manual_seed(0)
    config = DINOv3ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8,
        num_register_tokens=4,
    )  # fmt: skip
    DINOv3ViTModel(config).save_pretrained(directory)
    own = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25], "size": {"height": 32, "width": 32}}
    (directory / "preprocessor_config.json").write_text(json.dumps(own))
    return directory


def parts(folder: Path, model: Path) -> Path:
    """The models of a run: k2, chat and dinov3."""
    chat.save(folder / "chat")
    shutil.copytree(model, folder / "k2")
    dinov3(folder / "dinov3")
    return folder


def config(folder: Path, parts: Path) -> ExpanderGDPOConfig:
    """A recipe whose run goes into folder/run; `parts` holds k2, chat and dinov3. Two groups of four expansions."""
    for name, users in (("train", chat.USERS), ("heldout", chat.USERS[1:3])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": user}) + "\n" for user in users))
    made = ExpanderGDPOConfig(
        output=str(folder / "run"),
        model=ChatModelConfig(str(parts / "chat"), dtype="float32"),
        prompts=ExpanderPromptsConfig(str(folder / "train.jsonl"), str(folder / "heldout.jsonl")),
        renderer=RendererConfig(str(parts / "k2"), size=[32, 32], steps=2, guidance=0.0, dtype="float32"),
        rewards=[
            RewardSpec("brightness", "tests.helpers.expander_runs:brightness"),
            RewardSpec("redness", "tests.helpers.expander_runs:redness", weight=0.5),
        ],
        safety=[
            SafetySpec("words", "text", {"class_path": "rewards.safety.Words", "init_args": {"words": ["gore"]}}),
            SafetySpec("picture", "image", "tests.helpers.expander_runs:safe"),
        ],
        diversity=DiversityConfig(path=str(parts / "dinov3")),
        steps=2,
        lora=LoraConfig(rank=4, alpha=8.0),
        track=TrackConfig(tensorboard=False),
    )
    made.groups.prompts_per_step, made.groups.group_size, made.groups.micro_batch = 2, 4, 4
    made.generation.max_tokens = 24
    made.optim.lr = 1e-3
    made.eval.every, made.eval.prompts, made.eval.group_size, made.eval.shown = 0, 2, 3, 2
    made.checkpoint.every = 1
    return made


def plain_files(checkpoint: Path) -> None:
    """Nothing in it could hold code."""
    assert {path.suffix for path in checkpoint.iterdir()} <= {".safetensors", ".json", ".md", ".jinja", ".txt"}
    assert (checkpoint / "state.safetensors").exists() and (checkpoint / "rng-0.safetensors").exists()
