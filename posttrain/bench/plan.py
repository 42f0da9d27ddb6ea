"""`posttrain bench --plan RECIPE`: an estimate of a run's time and memory from a measurement of another.

Time is estimate.py's, memory is by the formulas of tiers.py. Prompts are assumed to be as long as those of the
measurement. Fused text lies in RAM: for an evaluation all of its prompts, for tdm as much as the limit of
training/prompt_source.py allows.
"""

from __future__ import annotations

from pathlib import Path

import torch

from posttrain.bench import counts, measurement
from posttrain.bench.config import BenchConfig
from posttrain.bench.counts import Cost, Recipe
from posttrain.bench.estimate import GPUs, cost_of, method_of, of_training
from posttrain.bench.measurement import Measurement
from posttrain.bench.tiers import BLOCK_BYTES, parts_of, tiers, training_need
from posttrain.config.load import load_config
from posttrain.errors import UserError, counted
from posttrain.grpo.config import GRPOConfig
from posttrain.model.blocks import RESERVE
from posttrain.tdm.config import TDMConfig
from posttrain.training.prompt_source import FUSED_BYTES

METHODS = ("grpo", "nft", "mopd", "sft", "style", "stpo", "tdm")


def text_encoder_gib(scale: str) -> float | None:
    """Size in bf16; None for nano, where it does not matter."""
    return None if scale == "nano" else 2 * parts_of(scale).text_encoder / 2**30


def plan(config: BenchConfig) -> str:
    """The estimate as text. Raises UserError for another method's recipe, or if its method was not measured."""
    assert config.plan is not None
    own = Path(config.output) / "bench.json"
    found = measurement.load(config.measured or (str(own) if own.exists() else measurement.DEFAULT))
    recipe, gpus = _recipe(config.plan), GPUs(config.gpus, config.gpu_tflops, config.gpu_gib)
    method = method_of(recipe)
    try:
        time = of_training(recipe, found, gpus)
    except UserError as error:
        raise UserError(f"{config.plan}: {error}") from error
    hours = time.seconds / 3600
    lines = [
        f"Estimate for {config.plan} as a recipe of {method}, from {found.card} measured on {found.date}"
        f" ({found.path}); the recipe itself was not run.",
        f"GPUs: {config.gpus}; {time.step_flop / time.step / 1e12:.4g} TFLOP/s of each in a step",
        f"Start: {time.start:.3g} s, with compiling",
        f"Training step: {time.step_flop / 1e12:.4g} TFLOP on each GPU, {time.step:.3g} s",
        f"Evaluation: {time.evaluation_flop / 1e12:.4g} TFLOP on each GPU, {time.evaluation:.3g} s,"
        f" {counted(time.evaluations, 'time')}",
        f"Run: {counted(recipe.steps, 'step')}, {hours:.3g} hours, {hours * config.gpus:.3g} GPU hours",
        "Not in it: judges and the start of their servers",
    ]
    if isinstance(recipe, GRPOConfig) and recipe.rollout.gpus:
        lines.append("rollout.gpus: not counted; the estimate assumes that all GPUs both draw and train")
    for note in time.notes:
        lines.append(f"Note: {note}")
    assert recipe.lora is not None  # of_training has refused it
    cost = cost_of(found, method, recipe.lora.rank)
    lines.append(_ram(recipe, cost))
    return "\n".join([*lines, *_memory(found, recipe, cost, gpus)])


def _memory(found: Measurement, recipe: Recipe, cost: Cost, gpus: GPUs) -> list[str]:
    room, scale = gpus.gib or found.result["gpu_gib"], found.result["settings"]["scale"]
    if room is None or scale == "nano":
        return ["Memory: not known, because it was measured on a CPU"]
    # The peak is that of the largest images; smaller ones need less.
    largest, parts = max(counts.sizes(recipe), key=cost.tokens), parts_of(scale)
    gib, recomputed = training_need(parts, recipe, largest, cost.text, (1 - RESERVE) * room)
    verdict = "fits" if gib <= (1 - RESERVE) * room else "does not fit: lower micro_batch, or use another option below"
    row = found.row(method_of(recipe)) or {}
    table = tiers(
        parts, [method_of(recipe)], [largest], cost.rank, cost.text, row.get("block_bytes_a_token") or BLOCK_BYTES
    )
    return [
        f"Memory: {gib:.3g} GiB of {room:.3g} on each GPU, a tenth of which stays free, with {recomputed} of"
        f" {parts.blocks} blocks recomputed; {verdict}",
        "",
        "Images in one forward, recomputed blocks and options with which it would fit:",
        table,
    ]


def _ram(recipe: Recipe, cost: Cost) -> str:
    """The RAM that fused text takes of each process, in the dtype of the network."""
    bytes_a_prompt = cost.text * cost.shape.width * torch.finfo(getattr(torch, recipe.model.dtype)).bits // 8
    most = recipe.eval.prompts * bytes_a_prompt + (FUSED_BYTES if isinstance(recipe, TDMConfig) else 0)
    return f"RAM: at most {most / 2**30:.2g} GiB of each process for fused text, {bytes_a_prompt / 1e6:.2g} MB a prompt"


def _recipe(path: str) -> Recipe:
    """By the first method that accepts the file."""
    # A recipe does not name its method, but has fields that others refuse.
    problems = []
    for method in METHODS:
        try:
            return load_config(method, ["--config", path])[0]
        except UserError as error:
            problems.append(f"{method}: {error}")
    raise UserError(f"{path}: not a recipe of {', '.join(METHODS)}: {'; '.join(problems)}")
