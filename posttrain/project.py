"""`posttrain init DIR` writes a project that runs from anywhere, and `posttrain demo` runs the pipeline of K2-nano."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Literal

from posttrain.config.types import settings
from posttrain.errors import UserError
from posttrain.resources import ROOT

REWARD = '''"""A reward of your own: a recipe names it as my_rewards:warmth."""

import numpy as np
from PIL import Image


def warmth(images: list[Image.Image], prompts: list[str], **columns) -> list[float | None]:
    """Red over blue; None, so missing and never zero, for prompts that ask for blue."""
    pixels = [np.asarray(image.convert("RGB"), dtype=float).mean((0, 1)) for image in images]
    scores = [red / (red + blue + 1) for red, _, blue in pixels]
    return [None if "blue" in prompt else score for score, prompt in zip(scores, prompts)]
'''
RECIPE = """# Trains K2-nano on a reward of your own. Give it after recipes/nano/demo.yaml, which sets the rest.
output: runs/warm
rewards:
  - name: warmth
    function: my_rewards:warmth
  - name: oracle              # what must not suffer: measured, and not trained on
    function: posttrain.nano.world.oracles:rubric
    heldout_only: true
"""
README = """# A project of posttrain

    posttrain sample --config recipes/nano/sample.yaml --prompt "two red stars" --output out/stars
    posttrain preflight --config recipes/nano/demo.yaml --config warm.yaml    # one step, checked and thrown away
    posttrain grpo --config recipes/nano/demo.yaml --config warm.yaml         # then open runs/warm/report.html
    posttrain export --source runs/warm --output out/warm

my_rewards.py is your reward, warm.yaml the recipe that trains on it. recipes/ and prompts/ are copies that are yours to
change: recipes/nano trains K2-nano on a laptop, recipes/k2 the released model on GPUs. make_vllm_env.sh installs vLLM,
for judges, in an environment of its own. `posttrain --help` lists the commands.
"""


@settings
class InitConfig:
    """Write a project: recipes, prompts, a reward of your own and a README."""

    directory: str
    """Directory to write into; created, and empty if it exists."""


@settings
class DemoConfig:
    """Carry out recipes/nano/pipeline.yaml, the whole of post-training on K2-nano, on the CPU: a quarter of an hour on
    two cores. A demo that was stopped carries on."""

    output: str = "runs/demo"
    """Directory of the pipeline, created."""
    processes: Literal[1, 2, 4] = 2
    """Processes of one thread each that share the work of a stage; each batch of the demo divides by them."""


def init(config: InitConfig) -> None:
    """Raises UserError if the directory holds anything already or cannot be written."""
    folder = Path(config.directory)
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"directory: {folder} is not empty; choose another name")
    # prompts/ also holds code, which stays the package's.
    unwanted = shutil.ignore_patterns("*.py", "*.pyc", "__pycache__", "*.md")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("recipes", "prompts"):
            shutil.copytree(ROOT / name, folder / name, ignore=unwanted)
        shutil.copy(ROOT / "rewards/make_vllm_env.sh", folder)
        for name, text in {"my_rewards.py": REWARD, "warm.yaml": RECIPE, "README.md": README}.items():
            (folder / name).write_text(text)
    except OSError as error:
        raise UserError(f"directory: {folder} cannot be written: {error.strerror}; choose another name") from error
    print(f"posttrain: wrote a project into {folder}; its README.md says how to begin")


def demo(config: DemoConfig) -> int:
    """Runs the pipeline in this process, its stages by torchrun. Returns the exit code."""
    from posttrain.cli import main  # which imports this module for its settings

    # Processes of one thread each take three quarters of the time of one process with two threads, on two cores.
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(config.processes)]
    # As JSON, which a list on the command line is.
    options = ["--output", config.output, "--resume", "--launch", json.dumps([*launch, "-m", "posttrain.cli"])]
    return main(["run", "recipes/nano/pipeline.yaml", *options])
