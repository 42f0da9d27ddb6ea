"""`posttrain bench --plan RECIPE`: an estimate of a run's time and memory from a measurement.

Time: the useful operations of a training step and of an evaluation follow from model/flops.py and the recipe's sizes,
batches and rank. They are divided by the rate in TFLOP/s that the recipe's method reached (evaluations: rollout's),
times the number of GPUs and, where gpu_tflops describes another GPU, the ratio of the matmul rates. Decoding is added
at the measured time a pixel. Not measured and left out: rewards, encoding of text and pairs, loading, checkpoints, and
the loss between GPUs. Prompts are assumed to be as long as those of the measurement.

Memory: the measured weights and the text encoder; 16 bytes for each adapter parameter more or less than measured, and
4 for each in a copy that the recipe keeps; and the rest of the measured peak in proportion to image tokens in one
forward. This assumes that the recipe recomputes as many blocks as the measurement did. Fused text lies in RAM: for an
evaluation all of its prompts, for tdm as much as the limit of training/prompt_source.py allows.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from posttrain.bench.config import BenchConfig
from posttrain.bench.tiers import BLOCK_BYTES, parts_of, tiers
from posttrain.config.load import load_config
from posttrain.errors import UserError
from posttrain.grpo.config import GRPOConfig
from posttrain.model import flops
from posttrain.model.load import sizes_of
from posttrain.stpo.config import STPOConfig
from posttrain.tdm.config import TDMConfig
from posttrain.training.prompt_source import FUSED_BYTES

Recipe = GRPOConfig | STPOConfig | TDMConfig
METHODS = ("grpo", "stpo", "tdm")


def text_encoder_gib(scale: str) -> float | None:
    """Size in bf16; None for nano, where it does not matter."""
    if scale == "nano":
        return None
    from transformers import Qwen3VLConfig, Qwen3VLModel

    with torch.device("meta"):  # counts parameters without allocating them
        model = Qwen3VLModel(Qwen3VLConfig(**sizes_of(scale)[1]))
    return 2 * sum(p.numel() for p in model.parameters()) / 2**30


def plan(config: BenchConfig) -> str:
    """The estimate as text. Raises UserError for another method's recipe, or if its method was not measured."""
    assert config.plan is not None
    result = _read(Path(config.measured or Path(config.output) / "bench.json"))
    method, recipe = _recipe(config.plan)
    lora = recipe.lora
    if lora is None:
        raise UserError(f"{config.plan}: lora: is null, but adapters were measured; plan with an adapter")
    row, rollout = _row(result, method, config.plan), _row(result, "rollout", config.plan)
    size = _sizes(recipe)[0]
    shape = flops.Shape(**row["shape"])
    cost = _Cost(shape, row["multiple"], result["settings"]["text"], lora.rank)
    # how many measured GPUs the planned ones are worth
    scale = config.gpus * (config.gpu_tflops / result["matmul"]["tflops"] if config.gpu_tflops else 1.0)
    rollout_pixels = rollout["size"][0] * rollout["size"][1]
    decode_seconds = rollout["ms"]["decode"] / 1e3 / rollout["images"] / rollout_pixels * size[0] * size[1]

    images, step = _step(recipe, cost)
    step_seconds = step / (row["tflops"] * 1e12 * scale) + images * decode_seconds / scale
    images, evaluation = _evaluation(recipe, cost)
    evaluation_seconds = evaluation / (rollout["tflops"] * 1e12 * scale) + images * decode_seconds / scale
    # one before the first step, one after the last
    evaluations = 2 + ((recipe.steps - 1) // recipe.eval.every if recipe.eval.every else 0)
    total = recipe.steps * step_seconds + evaluations * evaluation_seconds

    lines = [
        f"Estimate for {config.plan} as a recipe of {method}, from {result['device']} measured on"
        f" {result['environment']['started'][:10]}; the recipe itself was not run.",
        f"GPUs: {config.gpus}; rate of each: {row['tflops'] * scale / config.gpus:.4g} useful TFLOP/s",
        f"Training step: {step / 1e12:.4g} TFLOP, {step_seconds:.3g} s",
        f"Evaluation: {evaluation / 1e12:.4g} TFLOP, {evaluation_seconds:.3g} s, {evaluations} times",
        f"Run: {recipe.steps} steps, {total / 3600:.3g} hours, {total * config.gpus / 3600:.3g} GPU hours",
    ]
    if isinstance(recipe, GRPOConfig) and recipe.rollout.gpus:
        lines.append("rollout.gpus: not counted; the estimate assumes that all GPUs both draw and train")
    lines.append(_ram(recipe, shape, cost.text))
    if row["peak_gib"] is None:
        lines.append("Memory: not known, because it was measured on a CPU")
    else:
        lines += _memory(config, result, row, method, recipe, cost)
    return "\n".join(lines)


def _memory(
    config: BenchConfig, result: dict[str, Any], row: dict[str, Any], method: str, recipe: Recipe, cost: _Cost
) -> list[str]:
    settings, sizes = result["settings"], _sizes(recipe)
    weights_a_rank = sum(a + b for a, b in cost.shape.linears().values())
    parameters = recipe.adapters * cost.shape.blocks * cost.rank * weights_a_rank
    # with `encode` the measured weights include the text encoder
    encoder = 0.0 if settings.get("encode") else result["text_encoder_gib"] or 0.0
    base = row["weights_gib"] + encoder
    # fp32 weight, gradient and two moments
    changed = (16 * (parameters - row["adapter_parameters"]) + 4 * recipe.copies() * parameters) / 2**30
    tokens = recipe.images_at_once() * max(map(cost.tokens, sizes))
    measured_tokens = settings["batch"] * cost.tokens(row["size"])
    activations = (row["peak_gib"] - row["weights_gib"]) * tokens / measured_tokens
    need, room = base + changed + activations, config.gpu_gib or result["gpu_gib"]
    verdict = "fits" if need <= room else "does not fit: lower micro_batch, or raise model.recompute"
    lines = [f"Memory: {need:.3g} GiB of {room:.3g} on each GPU, {base:.3g} of it weights; {verdict}"]
    if settings["scale"] != "nano":
        block_bytes = row.get("block_bytes_a_token") or BLOCK_BYTES
        largest = max(sizes, key=lambda size: size[0] * size[1])
        lines += ["", "Images in one forward, recomputed blocks and options with which it would fit:"]
        lines.append(tiers(parts_of(settings["scale"]), [method], [largest], cost.rank, cost.text, block_bytes))
    return lines


def _ram(recipe: Recipe, shape: flops.Shape, text: int) -> str:
    """The RAM that fused text takes of each process, in the dtype of the network."""
    bytes_a_prompt = text * shape.width * torch.finfo(getattr(torch, recipe.model.dtype)).bits // 8
    most = recipe.eval.prompts * bytes_a_prompt + (FUSED_BYTES if isinstance(recipe, TDMConfig) else 0)
    return f"RAM: at most {most / 2**30:.2g} GiB of each process for fused text, {bytes_a_prompt / 1e6:.2g} MB a prompt"


class _Cost:
    """Operations of one sample, with the measured text length."""

    def __init__(self, shape: flops.Shape, multiple: int, text: int, rank: int):
        self.shape, self.multiple, self.text, self.rank = shape, multiple, text, rank

    def tokens(self, size: list[int]) -> int:
        return (size[0] // self.multiple) * (size[1] // self.multiple)

    def forward(self, size: list[int], rank: int | None = None) -> float:
        return flops.forward(self.shape, self.tokens(size), self.text, self.rank if rank is None else rank)

    def train(self, size: list[int]) -> float:
        return self.forward(size) + flops.backward(self.shape, self.tokens(size), self.text, self.rank)


def _step(recipe: Recipe, cost: _Cost) -> tuple[int, float]:
    """(images that a training step decodes, its operations), the mean over the recipe's sizes."""
    images, costs = 0, []
    if isinstance(recipe, GRPOConfig):
        images = recipe.groups.prompts_per_step * recipe.groups.group_size
    for size in _sizes(recipe):
        if isinstance(recipe, GRPOConfig):
            costs.append(_grpo(recipe, size, cost))
        elif isinstance(recipe, STPOConfig):
            # both images of a pair: the reference's forward and the policy's forward and backward
            costs.append(2 * recipe.batch * (cost.forward(size, 0) + cost.train(size)))
        else:
            costs.append(recipe.batch * _tdm(recipe, size, cost))
    return images, fmean(costs)


def _grpo(recipe: GRPOConfig, size: list[int], cost: _Cost) -> float:
    """Operations of a step: a group shares the forwards up to its window's first step, and the backward of that one."""
    s, groups = recipe.sampling, recipe.groups
    shared, stochastic = 0.0, s.window or s.steps - 1  # forwards of the group, and steps that each image trains
    if s.window is not None:
        places = min((s.steps + 1) // 2, s.steps - s.window)
        # a window that slides or is random begins at each place equally often
        before = s.window_start if isinstance(s.window_start, int) else (places - 1) / 2
        shared, stochastic = before + 1, s.window - 1
    drawn = (shared + groups.group_size * (s.steps - shared)) * cost.forward(size)
    reference = cost.forward(size, 0) if recipe.loss.kl > 0 else 0.0
    together = 0 if s.window is None else 1
    trained = (together + groups.group_size * stochastic) * recipe.optim.passes * (cost.train(size) + reference)
    return groups.prompts_per_step * (drawn + trained)


def _tdm(recipe: TDMConfig, size: list[int], cost: _Cost) -> float:
    """Operations of one image. Its trajectory of K steps ends at the last of n uniformly drawn points, so that the
    expected number of steps is K - sum_{j<K} (j/K)^n."""
    n = recipe.fake.updates + 1  # points for the fake score's updates and the student's
    expected_steps = []
    for k in recipe.student.steps:
        expected_steps.append(k - sum((j / k) ** n for j in range(k)))
    walked = fmean(expected_steps)
    # guidance takes a conditional and an unconditional forward
    teacher = (2 if recipe.teacher.guidance else 1) * cost.forward(size, 0)
    return (walked + 1) * cost.forward(size) + teacher + n * cost.train(size)


def _evaluation(recipe: Recipe, cost: _Cost) -> tuple[int, float]:
    """(images, operations) of one evaluation, without what a method measures besides images."""
    e, size = recipe.eval, _sizes(recipe)[0]
    images = e.prompts + min(e.groups, e.prompts) * e.group_size
    # forwards an image, for each guidance or number of steps
    forwards = [e.steps * (2 if scale else 1) for scale in e.guidance]
    if isinstance(recipe, TDMConfig):
        forwards = list(recipe.student.steps)
    return images * len(forwards), images * sum(forwards) * cost.forward(size)


def _sizes(recipe: Recipe) -> list[list[int]]:
    sizes = recipe.image_sizes()
    if not sizes:
        raise UserError("pairs.size: is null, so the size of the images is not known; set it in the recipe")
    return sizes


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; measure first with posttrain bench, or give another bench.json"
        ) from None
    except ValueError as error:
        raise UserError(f"{path}: not a bench.json ({error}); measure again") from None


def _recipe(path: str) -> tuple[str, Recipe]:
    """(method, recipe) for the first method that accepts the file."""
    problems = []
    for method in METHODS:
        try:
            return method, load_config(method, ["--config", path])[0]
        except UserError as error:
            problems.append(f"{method}: {error}")
    raise UserError(f"{path}: not a recipe of {', '.join(METHODS)}: {'; '.join(problems)}")


def _row(result: dict[str, Any], method: str, path: str) -> dict[str, Any]:
    for row in result["rows"]:
        if row["method"] == method and "failed" not in row:
            return row
    raise UserError(f"{path}: the plan needs {method}, which was not measured; add it to methods and measure again")
