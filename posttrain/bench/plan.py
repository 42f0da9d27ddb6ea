"""`posttrain bench --plan RECIPE`: an estimate of a run's time and memory from what was measured.

Time: the useful operations of a training step and of an evaluation, by the formulas of flops.py and the recipe's sizes,
batches and rank, at the rate in TFLOP/s that the recipe's method reached (rollout's, for evaluations), by the number of
GPUs and, where gpu_tflops names another GPU, the ratio of matmul rates; and decoding at the measured time a pixel.
Rewards, encoding of text and of pairs, loading, checkpoints and what is lost between GPUs were not measured and are
left out. Prompts are taken to be as long as those of the measurement.

Memory: what the weights took, and the text encoder's; 16 bytes for each parameter of an adapter more or less; and the
rest of the measured peak in proportion to image tokens in one forward. That holds if the recipe keeps as many blocks'
activations as the measurement did (recompute). Fused text is kept in RAM: what an evaluation draws, and of tdm what
source.py's limit allows.
"""

from __future__ import annotations

import json
from pathlib import Path
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
    """In bf16; None of nano, whose size does not matter."""
    if scale == "nano":
        return None
    from transformers import Qwen3VLConfig, Qwen3VLModel

    with torch.device("meta"):
        model = Qwen3VLModel(Qwen3VLConfig(**sizes_of(scale)[1]))
    return 2 * sum(p.numel() for p in model.parameters()) / 2**30


def plan(config: BenchConfig) -> str:
    """The estimate, as text. Raises UserError for a recipe that is none of these or a method that was not measured."""
    assert config.plan is not None
    result = _read(Path(config.measured or Path(config.output) / "bench.json"))
    method, recipe = _recipe(config.plan)
    lora = recipe.lora
    if lora is None:
        raise UserError(f"{config.plan}: lora: is null, and what was measured are adapters; plan with one")
    row, drawn = _row(result, method, config.plan), _row(result, "rollout", config.plan)
    size = _sizes(recipe)[0]
    shape = flops.Shape(**row["shape"])
    cost = _Cost(shape, row["multiple"], result["settings"]["text"], lora.rank)
    scale = config.gpus * (config.gpu_tflops / result["matmul"]["tflops"] if config.gpu_tflops else 1.0)
    decode = drawn["ms"]["decode"] / drawn["images"] / (drawn["size"][0] * drawn["size"][1]) / 1e3

    images, step = _step(recipe, cost)
    step_seconds = step / (row["tflops"] * 1e12 * scale) + (images * decode * size[0] * size[1] / scale)
    pictures, evaluation = _evaluation(recipe, cost)
    evaluation_seconds = evaluation / (drawn["tflops"] * 1e12 * scale) + pictures * decode * size[0] * size[1] / scale
    evaluations = 2 + ((recipe.steps - 1) // recipe.eval.every if recipe.eval.every else 0)
    total = recipe.steps * step_seconds + evaluations * evaluation_seconds

    micro = 2 * recipe.micro_batch if isinstance(recipe, STPOConfig) else _micro_batch(recipe)
    lines = [
        f"Estimate for {config.plan} as a recipe of {method}, from {result['device']} measured on"
        f" {result['environment']['started'][:10]}; nothing here was run.",
        f"GPUs: {config.gpus}; rate of each: {row['tflops'] * scale / config.gpus:.4g} useful TFLOP/s",
        f"Training step: {step / 1e12:.4g} TFLOP, {step_seconds:.3g} s",
        f"Evaluation: {evaluation / 1e12:.4g} TFLOP, {evaluation_seconds:.3g} s, {evaluations} times",
        f"Run: {recipe.steps} steps, {total / 3600:.3g} hours, {total * config.gpus / 3600:.3g} GPU hours",
    ]
    lines.append(_ram(recipe, shape, cost.text))
    if row["peak_gib"] is None:
        return "\n".join([*lines, "Memory: not known, for it was measured on a CPU"])
    adapters = 2 if method == "tdm" else 1
    parameters = adapters * shape.blocks * lora.rank * sum(a + b for a, b in shape.linears().values())
    tokens = micro * max(cost.tokens(size) for size in _sizes(recipe))
    encoder = 0.0 if result["settings"].get("encode") else result["text_encoder_gib"] or 0.0  # else it is in there
    base = row["weights_gib"] + encoder
    changed = 16 * (parameters - row["adapter_parameters"]) / 2**30
    measured_tokens = result["settings"]["batch"] * cost.tokens(row["size"])
    activations = (row["peak_gib"] - row["weights_gib"]) * tokens / measured_tokens
    need, room = base + changed + activations, config.gpu_gib or result["gpu_gib"]
    verdict = "fits" if need <= room else "does not fit: lower micro_batch, or raise model.recompute"
    lines.append(f"Memory: {need:.3g} GiB of {room:.3g} on each GPU, {base:.3g} of it weights; {verdict}")
    if result["settings"]["scale"] != "nano":
        parts, block = parts_of(result["settings"]["scale"]), row.get("block_bytes_a_token") or BLOCK_BYTES
        largest = max(_sizes(recipe), key=lambda size: size[0] * size[1])
        told = "Pictures in one forward, blocks computed again and options with which it would fit:"
        lines += ["", told, tiers(parts, [method], [largest], lora.rank, cost.text, block)]
    return "\n".join(lines)


def _ram(recipe: Recipe, shape: flops.Shape, text: int) -> str:
    """What fused text takes of each process's RAM, in the type that the network has."""
    each = text * shape.width * torch.finfo(getattr(torch, recipe.model.dtype)).bits // 8
    most = recipe.eval.prompts * each + (FUSED_BYTES if isinstance(recipe, TDMConfig) else 0)
    return f"RAM: at most {most / 2**30:.2g} GiB of each process for fused text, {each / 1e6:.2g} MB a prompt"


class _Cost:
    """Operations of a sample of a size, with the measured text length."""

    def __init__(self, shape: flops.Shape, multiple: int, text: int, rank: int):
        self.shape, self.multiple, self.text, self.rank = shape, multiple, text, rank

    def tokens(self, size: list[int]) -> int:
        return (size[0] // self.multiple) * (size[1] // self.multiple)

    def forward(self, size: list[int], rank: int | None = None) -> float:
        return flops.forward(self.shape, self.tokens(size), self.text, self.rank if rank is None else rank)

    def train(self, size: list[int]) -> float:
        return self.forward(size) + flops.backward(self.shape, self.tokens(size), self.text, self.rank)


def _step(recipe: Recipe, cost: _Cost) -> tuple[int, float]:
    """Pictures that a training step decodes, and its operations: a mean over the recipe's sizes."""
    sizes = _sizes(recipe)
    if isinstance(recipe, GRPOConfig):
        images = recipe.groups.prompts_per_step * recipe.groups.group_size
        return images, sum(_grpo(recipe, size, cost) for size in sizes) / len(sizes)
    if isinstance(recipe, STPOConfig):
        return 0, sum(2 * recipe.batch * (cost.forward(s, 0) + cost.train(s)) for s in sizes) / len(sizes)
    return 0, sum(recipe.batch * _tdm(recipe, size, cost) for size in sizes) / len(sizes)


def _grpo(recipe: GRPOConfig, size: list[int], cost: _Cost) -> float:
    """A group draws its steps before the window once, and each of its images the others."""
    s, groups = recipe.sampling, recipe.groups
    starts, stochastic = 0.0, s.window or s.steps - 1
    if s.window is not None:
        places = min((s.steps + 1) // 2, s.steps - s.window)
        starts = s.window_start if isinstance(s.window_start, int) else (places - 1) / 2
    drawn = (starts + groups.group_size * (s.steps - starts)) * cost.forward(size)
    reference = cost.forward(size, 0) if recipe.loss.kl > 0 else 0.0
    trained = groups.group_size * stochastic * recipe.optim.passes * (cost.train(size) + reference)
    return groups.prompts_per_step * (drawn + trained)


def _tdm(recipe: TDMConfig, size: list[int], cost: _Cost) -> float:
    """Of one picture. Its trajectory ends at the last of n points, each anywhere on K steps: E = K - sum (j/K)^n."""
    n, choices = recipe.fake.updates + 1, recipe.student.steps
    walked = sum(k - sum((j / k) ** n for j in range(k)) for k in choices) / len(choices)
    teacher = (2 if recipe.teacher.guidance else 1) * cost.forward(size, 0)
    return (walked + 1) * cost.forward(size) + teacher + n * cost.train(size)


def _evaluation(recipe: Recipe, cost: _Cost) -> tuple[int, float]:
    """Pictures and operations of one evaluation; what methods measure beside them is left out."""
    e, size = recipe.eval, _sizes(recipe)[0]
    pictures = e.prompts + min(e.groups, e.prompts) * e.group_size
    ways = [e.steps * (2 if scale else 1) for scale in e.guidance]
    if isinstance(recipe, TDMConfig):
        ways = list(recipe.student.steps)
    return pictures * len(ways), pictures * sum(ways) * cost.forward(size)


def _sizes(recipe: Recipe) -> list[list[int]]:
    if isinstance(recipe, GRPOConfig):
        return recipe.sampling.sizes
    if isinstance(recipe, TDMConfig):
        return recipe.sizes
    if recipe.pairs.size is None:
        raise UserError("pairs.size: is null, so how large the pictures are is not known; give it with the recipe")
    return [recipe.pairs.size]


def _micro_batch(recipe: GRPOConfig | TDMConfig) -> int:
    return recipe.groups.micro_batch if isinstance(recipe, GRPOConfig) else recipe.micro_batch


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; measure first with posttrain bench, or name a bench.json") from None
    except ValueError as error:
        raise UserError(f"{path}: not a bench.json ({error}); measure again") from None


def _recipe(path: str) -> tuple[str, Recipe]:
    """The first method that takes it; if none does, what grpo says of it."""
    problems = []
    for method in METHODS:
        try:
            return method, load_config(method, ["--config", path])[0]
        except UserError as error:
            problems.append(error)
    told = "; ".join(f"{method}: {error}" for method, error in zip(METHODS, problems))
    raise UserError(f"{path}: no recipe of {', '.join(METHODS)}: {told}")


def _row(result: dict[str, Any], method: str, path: str) -> dict[str, Any]:
    for row in result["rows"]:
        if row["method"] == method and "failed" not in row:
            return row
    raise UserError(f"{path}: its plan needs {method}, which was not measured; add it to methods and measure again")
