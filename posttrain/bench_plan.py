"""`posttrain bench --plan RECIPE`: an estimate of a run's time and memory from what was measured, and no more than that.

Time: the useful operations of a training step and of an evaluation, by the formulas of flops.py and the recipe's sizes,
batches and rank, at the rate in TFLOP/s that the recipe's method reached (rollout's, for evaluations), times GPUs, times
the ratio of matmul rates where gpu_tflops names another GPU; decoding at the milliseconds a pixel that were measured.
What was not measured is left out: rewards, encoding of text and of pairs, loading, checkpoints, and what is lost between
GPUs. Prompts are taken to be as long as those of the measurement.

Memory: what the weights took, and the text encoder's; 16 bytes for each parameter of an adapter more or less; and the
rest of the measured peak in proportion to image tokens in one forward. That holds if the recipe keeps as many blocks'
activations as the measurement did (recompute).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from posttrain import flops
from posttrain.bench_config import BenchConfig
from posttrain.cli import load_config
from posttrain.config import GRPOConfig
from posttrain.load import sizes_of
from posttrain.stpo_config import STPOConfig
from posttrain.tdm_config import TDMConfig
from prompts.errors import UserError

Recipe = GRPOConfig | STPOConfig | TDMConfig
METHODS = ("grpo", "stpo", "tdm")


def text_encoder_gib(scale: str) -> float | None:
    """In bf16; None of nano, whose size does not matter."""
    if scale == "nano":
        return None
    from transformers import Qwen3VLConfig, Qwen3VLModel

    with torch.device("meta"):
        model = Qwen3VLModel(Qwen3VLConfig(**sizes_of(scale)[1]))
    return 2 * sum(p.numel() for p in model.parameters()) / 2**30


def plan(config: BenchConfig) -> str: return ""
