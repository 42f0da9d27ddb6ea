"""A recipe of `posttrain style` for a tiny real K2."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from posttrain.config.sections import ModelConfig
from posttrain.style import train as style
from posttrain.style.config import ReferencesConfig, StyleColumns, StyleConfig, StyleSetConfig
from rewards.base import RewardSpec
from tests.helpers import tiny

STYLES = ("oil", "ink", "chalk")


def image(seed: int, side: int = 32) -> Image.Image:
    pixels = 100 + np.random.default_rng(seed).integers(0, 120, (side // 8, side // 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)


def config(folder: Path, model: Path) -> StyleConfig:
    """Six images an update, of eighteen in three styles, one of which is held out; two prompts with references, and one
    without."""
    place = folder / "styled"
    place.mkdir(parents=True, exist_ok=True)
    for i in range(18):
        image(i).save(place / f"{i:02d}.png")
        caption = tiny.PROMPTS[i % 3]
        row = {"caption": caption, "full": f"{caption}, {STYLES[i % 3]}", "style": STYLES[i % 3], "box": [4, 4, 20, 20]}
        (place / f"{i:02d}.json").write_text(json.dumps(row))
    for name in ("a", "b"):
        image(ord(name)).save(folder / f"{name}.png")
    rows = [
        {"prompt": tiny.PROMPTS[0], "references": ["a.png"]},
        {"prompt": tiny.PROMPTS[1], "references": [{"image": "a.png", "strength": 0.5}, "b.png:0.8"]},
        {"prompt": tiny.PROMPTS[2]},
    ]
    (folder / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = StyleConfig(
        output=str(folder / "run"),
        model=ModelConfig(path=str(model), dtype="float32"),
        images=StyleSetConfig(
            str(place), StyleColumns(full="full", style_of="style", subject="box"), resolutions=[32], multiple=8,
            max_tokens=64, heldout=0.25, measured=5, cache=str(folder / "cache"), max_bad=0.1, drop_caption=0.2,
        ),
        references=ReferencesConfig([32], tile_counts=[2], drop=0.2),
        heldout=str(folder / "heldout.jsonl"),
        heldout_styles=["chalk"],
        rewards=[RewardSpec(name="brightness", function="tests.helpers.runs:brightness")],
        sweep=[0.0, 0.5, 1.0, -1.0],
        steps=2,
        batch=6,
        micro_batch=4,
    )  # fmt: skip
    assert made.lora is not None
    made.lora.rank, made.lora.alpha = 4, 8.0
    made.optim.lr = 3e-3
    made.eval.every, made.eval.prompts, made.eval.steps, made.eval.groups, made.eval.guidance = 0, 3, 2, 0, [1.0]
    made.checkpoint.every = 0
    made.track.tensorboard = False
    return made


def whole_and_in_parts(config: StyleConfig, parts: Path) -> str:
    """Trains four steps at once, and again as two and two into `parts`; returns the first run."""
    config.steps, config.sweep, config.checkpoint.every = 4, [], 2
    style.train(config)
    whole = config.output
    config.output, config.steps = str(parts), 2
    style.train(config)
    config.steps = 4
    style.train(config, resume=True)
    return whole
