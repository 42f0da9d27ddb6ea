"""How long a recipe takes, from a measurement of another run.

The operations of steps and evaluations (counts.py) are divided by the rate in TFLOP/s that the recipe's method reached
(evaluations and pairs: rollout's) at the nearest measured size. Blocks that recompute their activations count: as many
as the memory of the GPU asks for, by the formulas of tiers.py. Decoding is added at the measured time a pixel.
`commands` of a shipped measurement adds the parts of a start and the delay of a checkpoint, and for pairs how much
longer drawing takes than its counted forwards. The rows add the time of compiling.

Not in it: judges and other rewards, the start of their servers, encoding of text and of pairs beyond a start's, and the
loss between GPUs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from posttrain.bench import counts
from posttrain.bench.counts import Cost, Recipe, Size, Work
from posttrain.bench.measurement import Measurement
from posttrain.bench.tiers import parts_of, training_need
from posttrain.errors import UserError, counted
from posttrain.grpo.config import GRPOConfig
from posttrain.model import flops
from posttrain.model.blocks import RESERVE
from posttrain.mopd.config import MOPDConfig
from posttrain.nft.config import NFTConfig
from posttrain.pairs.config import PairsConfig
from posttrain.pairs.planning import quotas
from posttrain.sft.config import SFTConfig
from posttrain.stpo.config import STPOConfig


@dataclass(frozen=True)
class GPUs:
    """Those of the plan."""

    count: int = 1
    """That draw and train."""
    tflops: float | None = None
    """bf16 matmul rate of each; None: as the measured one."""
    gib: float | None = None
    """Memory of each; None: as the measured one."""


@dataclass
class Estimate:
    """Seconds of one run."""

    start: float = 0.0
    """To the first evaluation, and what compiling adds later."""
    step: float = 0.0
    steps: int = 0
    evaluation: float = 0.0
    evaluations: int = 0
    other: float = 0.0
    """Checkpoints, and images of tdm's teacher."""
    step_flop: float = 0.0
    """Useful operations of a step on one GPU."""
    evaluation_flop: float = 0.0
    notes: list[str] = field(default_factory=list)
    """What was scaled from another size, or is not in it because it was not measured."""

    @property
    def seconds(self) -> float:
        return self.start + self.steps * self.step + self.evaluations * self.evaluation + self.other


def method_of(recipe: Recipe) -> str:
    if isinstance(recipe, GRPOConfig):
        return "grpo"
    if isinstance(recipe, SFTConfig):
        return "sft"
    if isinstance(recipe, NFTConfig):
        return "nft"
    if isinstance(recipe, MOPDConfig):
        return "mopd"
    return "stpo" if isinstance(recipe, STPOConfig) else "tdm"


def of_training(recipe: Recipe, measurement: Measurement, gpus: GPUs, stack: int = 0) -> Estimate:
    """`stack` is the sum of the ranks of earlier stages' adapters. Raises UserError for what cannot be planned."""
    if recipe.lora is None:
        raise UserError("lora: is null, but adapters were measured; plan with an adapter")
    if recipe.model.sequence_parallel > 1:
        raise UserError("model.sequence_parallel: was not measured; plan with 1")
    method = method_of(recipe)
    clock = _Clock(measurement, gpus)
    cost = cost_of(measurement, method, recipe.lora.rank, stack, recomputed_blocks(recipe, measurement, gpus, stack))
    sizes, found = counts.sizes(recipe), Estimate(steps=recipe.steps, evaluations=counts.evaluations(recipe))
    # A mean over sizes, as if each came up equally often.
    works = [counts.step(recipe, cost, gpus.count, size) for size in sizes]
    found.step = fmean(map(clock.seconds, [method] * len(sizes), sizes, works))
    found.step_flop = fmean(work.flop for work in works)
    work = counts.evaluation(recipe, cost, gpus.count)
    found.evaluation, found.evaluation_flop = clock.seconds("rollout", sizes[0], work), work.flop
    # Evaluations draw, so they compile rollout's forward as well.
    found.start = clock.start(method) + clock.compiling(method) + clock.compiling("rollout")
    found.other = clock.seconds("rollout", sizes[0], counts.teacher_images(recipe, cost, gpus.count))
    # Training waits only while weights are copied to host memory; they are written beside the next steps.
    if recipe.checkpoint.every:
        found.other += recipe.steps // recipe.checkpoint.every * measurement.command("checkpoint").get("seconds", 0.0)
    found.notes = clock.notes
    return found


def of_pairs(config: PairsConfig, measurement: Measurement, gpus: GPUs, stack: int = 0) -> Estimate:
    """One step is one GPU's part of all pairs. Every candidate is assumed to be kept: dropped ones come on top."""
    clock = _Clock(measurement, gpus)
    cost = cost_of(measurement, "rollout", 0, stack)
    policy = [config.on_policy(source) for source in config.sources]
    shares = [source.share for source in config.sources]
    forwards = images = 0
    for source, quota in zip(config.sources, quotas(config.pairs, shares, policy, config.on_policy_share)):
        for draw in source.draws():
            forwards += quota * source.group_size * config.forwards(draw)
            images += quota * source.group_size
    # The time of drawing over that of its counted forwards, as `posttrain pairs` reports it.
    overhead = measurement.command("pairs").get("overhead")
    found = Estimate(steps=1, start=clock.start("pairs"))
    works = [Work(forwards / gpus.count * cost.forward(size), images / gpus.count) for size in config.sizes]
    found.step = fmean(map(clock.seconds, ["rollout"] * len(works), config.sizes, works))
    found.step *= overhead or 1.0
    found.step_flop = fmean(work.flop for work in works)
    if overhead is None:
        clock.note("what drawing takes beyond its forwards was not measured")
    clock.note("pairs that are dropped come on top")
    found.notes = clock.notes
    return found


def of_command(name: str, samples: float, steps: int, measurement: Measurement) -> Estimate | None:
    """A command that was only measured whole, in proportion to the samples of a step on one GPU; None: it was not."""
    measured = measurement.command(name)
    if not measured:
        return None
    seconds, own = measured["step_seconds"], math.ceil(samples)
    whole = f"scaled from whole steps of {counted(measured['samples'], 'sample')}"
    note = f"{whole}, judge on the same GPU; evaluations are not in it"
    if name == "expander sft":
        note = f"{whole} of a model of 3.6 B; evaluations are not in it"
    # What the first step took beyond a usual one is the start, compiling included.
    start = measured["first_step_seconds"] - seconds
    return Estimate(start=start, step=seconds * own / measured["samples"], steps=steps, notes=[note])


def cost_of(
    measurement: Measurement, method: str, rank: int, stack: int = 0, recomputed: Callable[[Size], int] | None = None
) -> Cost:
    """Raises UserError if the method was not measured."""
    row, text = _row(measurement, method), measurement.result["settings"]["text"]
    return Cost(flops.Shape(**row["shape"]), row["multiple"], text, rank, stack, recomputed or (lambda size: 0))


def recomputed_blocks(recipe: Recipe, measurement: Measurement, gpus: GPUs, stack: int = 0) -> Callable[[Size], int]:
    """How many blocks a recipe that trains an adapter recomputes for images of a size; 0 where no memory is known."""
    gib, result = gpus.gib or measurement.result["gpu_gib"], measurement.result
    if gib is None:
        return lambda size: 0
    parts, room = parts_of(result["settings"]["scale"]), (1 - RESERVE) * gib
    text = result["settings"]["text"]
    return lambda size: training_need(parts, recipe, size, text, room, stack)[1]


def _row(measurement: Measurement, method: str, size: Size | None = None) -> dict[str, Any]:
    row = measurement.row(method, size)
    if row is None:
        raise UserError(
            f"the plan needs {method}, which was not measured on {measurement.card} ({measurement.path}); add it to"
            " methods and measure again"
        )
    return row


class _Clock:
    """Seconds of work on the GPUs of a plan, and notes on what they were scaled from."""

    def __init__(self, measurement: Measurement, gpus: GPUs):
        self.measurement, self.gpus = measurement, gpus
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def seconds(self, method: str, size: Size, work: Work) -> float:
        """Of one GPU's work with images of this size."""
        row = _row(self.measurement, method, size)
        pixels = size[0] * size[1]
        if work.flop and abs(row["size"][0] * row["size"][1] / pixels - 1) > 0.1:  # not sides that differ alone
            self.note(
                f"{method} at {size[0]} x {size[1]} scaled from {row['size'][0]} x {row['size'][1]} by operations"
            )
        seconds = work.flop / rate(row, self.gpus)
        # Decoding is not among the counted operations: by pixels, at the rate that rollout's images were decoded at.
        drawn = _row(self.measurement, "rollout", size)
        decode = drawn["ms"]["decode"] / 1e3 / drawn["images"] / (drawn["size"][0] * drawn["size"][1])
        # A faster GPU is taken to decode faster in proportion to its matmul rate.
        speed = self.gpus.tflops / self.measurement.result["matmul"]["tflops"] if self.gpus.tflops else 1.0
        return seconds + work.images * pixels * decode / speed

    def start(self, command: str) -> float:
        parts = self.measurement.command(command).get("startup", {})
        if not parts:
            self.note("the start was not measured")
        return sum(parts.values())

    def compiling(self, method: str) -> float:
        return _row(self.measurement, method)["first_seconds"]


def rate(row: dict[str, Any], gpus: GPUs) -> float:
    """Operations a second, recomputed ones included: the row's, or of another GPU the same share of its matmul rate."""
    # A row's TFLOP/s are of useful operations, and a plan's work includes the recomputed ones.
    again = (row.get("share_recomputed") or row["share"]) / row["share"]
    return 1e12 * again * (row["share"] * gpus.tflops if gpus.tflops else row["tflops"])
