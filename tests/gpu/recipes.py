"""Shipped recipes, with only steps, prompts, servers and paths cut: judges answer in the command's own process."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

ROOT = Path(__file__).parents[2]
SCALE = os.environ.get("POSTTRAIN_GPU_SCALE", "k2")
EVALUATION = {"every": 100, "prompts": 2, "groups": 1, "group_size": 2}
WORDS = {"class_path": "rewards.safety.Words", "init_args": {"words": ["gore"]}}

REHEARSAL = {"sizes": [[64, 64]], "size": [64, 64], "resolutions": [64], "multiple": 16}
WARMTH = {"name": "warmth", "function": "tests.gpu.recipes:warmth"}
"""A reward that tells images apart, beside judges that may not: they are untrained."""


def warmth(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    """Red less blue, from 0 to 1."""
    means = [np.asarray(image, float).mean((0, 1)) / 255 for image in images]
    return [float(1 + red - blue) / 2 for red, _, blue in means]


class SlowWarmth:
    """The same from a judge that takes `seconds` for an image, one after another, on no core of ours."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._free = asyncio.Lock()

    async def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        async with self._free:
            await asyncio.sleep(self.seconds * len(images))
        return warmth(images, prompts)


def cut(name: str, parts: Path, folder: Path, **changes: Any) -> Path:
    """recipes/NAME.yaml as a file in `folder`; `changes` are laid over it, a section key by key."""
    data = local(yaml.safe_load((ROOT / f"recipes/{name}.yaml").read_text()), parts)
    for key, value in changes.items():
        section = data.get(key)
        data[key] = section | value if isinstance(value, dict) and isinstance(section, dict) else value
    if "rewards" in data:
        data["rewards"].append(WARMTH)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{Path(name).name}.yaml"
    path.write_text(json.dumps(data, indent=1))  # JSON is YAML
    return path


def local(value: Any, parts: Path) -> Any:
    """Judges behind servers become the one in `parts`, models of the hub those in `parts`, and no server is left."""
    if isinstance(value, list):
        return [local(entry, parts) for entry in value]
    if not isinstance(value, dict):
        return {"krea/Krea-2-Raw": str(parts / "k2"), "krea/Krea-2-Turbo": str(parts / "turbo")}.get(value, value)
    if "base_urls" in value:
        # A held-out judge must be another function than those that are trained on.
        tokens = 9 if value.get("model") == "heldout" else 8
        return {"path": str(parts / "judge"), "min_mass": 0.0, "max_text_tokens": tokens}
    if value.get("class_path") == "rewards.safety.TextJudge":  # it needs a server
        return WORDS
    changed = {key: entry if key == "writer" else local(entry, parts) for key, entry in value.items()}
    if SCALE == "tiny":  # a rehearsal on a CPU
        changed |= {key: REHEARSAL[key] for key in changed if key in REHEARSAL}
    if "servers" in changed:
        changed["servers"] = []
    if "OCR" in str(changed.get("function")):  # an untrained judge never ends what it reads
        changed["max_failures"] = 1.0
    if "gate" in changed:  # an untrained judge finds everything faulty
        changed["threshold"] = 0.001
    return changed
