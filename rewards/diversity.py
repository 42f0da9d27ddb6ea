"""Group diversity: how far an image is from the others of its prompt, in the features of a frozen image model.

    function: {class_path: rewards.diversity.Diversity, init_args: {path: facebook/dinov3-vits16-pretrain-lvd1689m}}
    group: true

d_j = (1 / (n - 1)) sum over the others of (1 - e_j . e_l), of unit features e of the n images that are there. What a
image adds to the group's mean distance, leaving one out, is affine in d_j, so that after group normalisation both
give the same advantages. Legend: N images, E features.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModel

from posttrain.errors import UserError
from posttrain.image_reader import to_rgb
from posttrain.loading import load_model, local, model_type, reading
from rewards.base import Score
from rewards.vlm import VLM, own_device

DINOV3 = "facebook/dinov3-vits16-pretrain-lvd1689m"
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation by which DINOv3 wants its pixels normalised."""


def contributions(features_NE: Tensor, present_N: Sequence[bool], safe_N: Sequence[bool]) -> list[float | None]:
    """d_j of one group, in [0, 2].

    `features_NE` need not be of unit length. A member that is not safe gets 0 and the others are not compared with it;
    one that is safe but not present (no image) gets None; with fewer than two that are both, so do all safe ones.
    """
    members = np.flatnonzero(np.logical_and(present_N, safe_N)).tolist()
    distances_N: list[float | None] = [None if safe else 0.0 for safe in safe_N]
    n = len(members)
    if n < 2:
        return distances_N
    unit = torch.nn.functional.normalize(features_NE[members].double(), dim=-1)
    # The sum over all n of (1 - e_j . e_l) has 0 for l = j, so only the divisor leaves one out.
    pairwise = (n - unit @ unit.sum(0)) / (n - 1)
    for j, distance in zip(members, pairwise.clamp(0, 2).tolist()):
        distances_N[j] = distance
    return distances_N


class Features:
    """Images to features: DINOv3 (any size of ViT or ConvNeXt) or the image tower of a Qwen3-VL."""

    def __init__(self, path: str = DINOV3, batch: int = 64, device: str | None = None):
        """`path` is a directory or hub id. Raises UserError if it cannot be loaded or is another kind of model."""
        if batch < 1:
            raise UserError(f"batch: {batch}: use 1 or more")
        self.path, self.batch = path, batch
        device = own_device(device)
        folder = local(path)
        kind = model_type(folder, path)
        if not kind.startswith(("dinov3", "qwen3_vl")):
            raise UserError(f"path: {path} is a {kind}: features come from DINOv3 or a Qwen3-VL")
        self._vlm = VLM.load(path, device=device) if kind == "qwen3_vl" else None
        if self._vlm is None:
            self._model: Any = load_model(AutoModel, folder, path, device, dtype=torch.float32)
            self._model.eval().requires_grad_(False)
            with reading(path, "an image processor"):
                self._size, self._mean, self._std = _preprocessing(folder)
        self._device = device

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """(N, E) fp32 on the CPU, not of unit length."""
        parts = []
        for first in range(0, len(images), self.batch):
            parts.append(self._embed(images[first : first + self.batch]))
        return torch.cat(parts).float().cpu()

    def _embed(self, images: Sequence[Image.Image]) -> Tensor:
        if self._vlm is None:
            size = (self._size, self._size)
            resized = [to_rgb(image).resize(size, Image.Resampling.BILINEAR) for image in images]
            x = torch.from_numpy(np.stack(list(map(np.asarray, resized)))).float() / 255  # (N, H, W, 3)
            x = ((x - self._mean) / self._std).permute(0, 3, 1, 2).to(self._device)
            return self._model(pixel_values=x).pooler_output.flatten(1)
        # Of a Qwen3-VL only the image tower runs; an image's features are the mean of its tokens.
        inputs = self._vlm.processor(images=list(map(to_rgb, images)), return_tensors="pt")
        grids = inputs["image_grid_thw"]
        seen = self._vlm.model.model.visual(inputs["pixel_values"].to(self._device), grid_thw=grids.to(self._device))
        counts = (grids.prod(-1) // self._vlm.processor.merge_size**2).tolist()
        return torch.stack([tokens.mean(0) for tokens in seen.pooler_output.split(counts)])


class Diversity:
    """The group reward: d_j of each image. For a recipe of any method whose rewards see groups."""

    def __init__(self, path: str = DINOV3, batch: int = 64, device: str | None = None):
        self.features = Features(path, batch, device)
        self._lock = threading.Lock()

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[Score]:
        all_members = [True] * len(images)
        with self._lock:  # a GPU holds one batch of features at a time
            return list(contributions(self.features(images), all_members, all_members))

    def record(self) -> dict[str, Any]:
        return {"model": self.features.path}


def _preprocessing(folder: Path) -> tuple[int, Tensor, Tensor]:
    """Side in pixels, mean and deviation: the directory's own, or DINOv3's. transformers' class wants torchvision."""
    file = folder / "preprocessor_config.json"
    own = json.loads(file.read_text()) if file.is_file() else {}
    size = own.get("size", {})
    mean, std = own.get("image_mean", IMAGENET[0]), own.get("image_std", IMAGENET[1])
    return int(size.get("height", size.get("shortest_edge", 224))), torch.tensor(mean), torch.tensor(std)
