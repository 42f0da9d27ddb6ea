"""The settings of `posttrain bench`; see config.py. Never imports torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Method = Literal["rollout", "step", "stpo", "grpo", "tdm", "expander"]
DRAWING = ("rollout", "expander")
"""Methods that train nothing."""


@dataclass
class BenchConfig:
    """Measure the methods at true size with random weights, with stock diffusers beside them; or plan a run."""

    output: str = "runs/bench"
    """Directory for bench.json and bench.md, created; what is in it already is replaced."""
    methods: list[Method] = field(default_factory=lambda: ["rollout", "step", "stpo", "grpo", "tdm", "expander"])
    """What to measure. rollout: drawing pictures, all steps, without guidance. step: forward and backward of one
    stochastic step of grpo, the optimiser apart. stpo, grpo, tdm: whole training steps, whose rewards and
    prompts cost nothing here. expander: the pictures of a group's expansions, by the base without an adapter."""
    scale: Literal["tiny", "nano", "k2"] = "k2"
    """Size of the model: K2's, with random weights; nano: K2-nano as it is; tiny: random, for tests."""
    sizes: list[list[int]] | None = None
    """[height, width] pairs in pixels, multiples of 16, each measured; null: 512 x 512, and 64 x 64 of nano and
    tiny."""
    batch: int = 8
    """Pictures in one forward, >= 2; of stpo half as many pairs; of tdm all pictures of a training step."""
    group: int = 16
    """Pictures of a group of grpo and expander, >= 2; a training step has one group a process."""
    text: int = 105
    """Text tokens of a prompt, about: lengths differ by up to two, as they do in training, and those of expansions by
    up to half; >= 8."""
    rank: int = 64
    """Rank of the adapters, on all linears; 0: drawing with the base, and nothing can be trained."""
    stages: int = 1
    """Stages whose adapters are active, each of rank: the one that is trained and those that it stands on; >= 1. What
    the earlier ones compute is no useful operation of the table."""
    steps: int = 8
    """Steps from noise to picture, 3 to 16."""
    window: int = 2
    """Stochastic steps of grpo, 1 to steps - 1; they begin at each place of the first half in turn."""
    compile: bool | None = None
    """As model.compile of a recipe; null: on a GPU."""
    recompute: int | None = None
    """As model.recompute of a recipe."""
    attention: Literal["native", "cudnn"] = "native"
    """As model.attention of a recipe; stock keeps its own."""
    quantize: Literal["fp8"] | None = None
    """As model.quantize of a recipe; stock keeps the exact weights."""
    optim: Literal["adamw", "adamw8bit"] = "adamw"
    """As optim.kind of a recipe."""
    offload: list[Literal["text_encoder", "vae"]] = field(default_factory=list)
    """As model.offload of a recipe."""
    encode: bool = False
    """Load the text encoder too, and have a step of rollout, grpo and expander encode a prompt."""
    warmup: int = 2
    """Steps before the clock, which compile; what is compiled after the second is a failure; >= 2."""
    repeats: int = 5
    """Steps that are timed, >= 1; medians are reported. grpo takes at least one of each start of the window."""
    stock: bool = True
    """Measure diffusers' own transformer beside it: text padded to 512 tokens and masked, gradient checkpointing."""
    plan: str | None = None
    """A recipe of stpo, grpo or tdm: measure nothing, and estimate its time and memory from measured."""
    measured: str | None = None
    """The bench.json to plan from; null: the one in output."""
    gpus: int = 1
    """Number of GPUs to plan for, >= 1."""
    gpu_gib: float | None = None
    """Memory in GiB of a GPU to plan for, > 0; null: of the measured one."""
    gpu_tflops: float | None = None
    """bf16 matmul rate in TFLOP/s of a GPU to plan for, > 0; null: that of the measured one."""
