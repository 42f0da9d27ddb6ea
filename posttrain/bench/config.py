"""The settings of `posttrain bench` as data. Never imports torch."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal, get_args

from pydantic import model_validator

from posttrain.config.sections import MOST_STEPS, OptimConfig, RuntimeConfig
from posttrain.config.types import AtLeast0, AtLeast1, AtLeast2, Filled, Positive, Range, Sizes, refusal, settings

Method = Literal["rollout", "step", "sft", "stpo", "grpo", "nft", "tdm", "mopd", "expander"]
DRAWING = ("rollout", "expander")
"""Methods that train nothing."""


@settings
class BenchConfig:
    """Measure the methods at true size with random weights, with stock diffusers beside them; or plan a run."""

    output: str = "runs/bench"
    """Directory for bench.json and bench.md, created; what is in it already is replaced."""
    methods: Annotated[list[Method], Filled()] = field(default_factory=lambda: list(get_args(Method)))
    """What to measure. rollout: drawing images, all steps, without guidance. step: forward and backward of one
    stochastic step of grpo, the optimiser apart. sft, stpo, grpo, nft, tdm, mopd: whole training steps, whose
    rewards and prompts cost nothing here. expander: the images of a group's expansions, by the base without an
    adapter."""
    scale: Literal["tiny", "nano", "k2"] = "k2"
    """Size of the model: K2's, with random weights; nano: K2-nano as it is; tiny: random, for tests."""
    sizes: Sizes | None = None
    """[height, width] pairs in pixels, each measured; null: 512 x 512, and 64 x 64 of nano and
    tiny."""
    batch: AtLeast2 = 8
    """Images in one forward; of stpo half as many pairs; of sft, tdm and mopd (of two teachers) all images of a
    training step."""
    group: AtLeast2 = 16
    """Images of a group of grpo, nft and expander; a training step has one group a process."""
    text: Annotated[int, Range(8)] = 105
    """Text tokens of a prompt, about: lengths differ by up to two, as they do in training, and those of expansions by
    up to half."""
    rank: AtLeast0 | None = 64
    """Rank of the adapters, on all linears; 0: drawing with the base, and nothing can be trained. null: the method step
    of all weights, without the optimiser (K2: 103 GB of weights and gradients), also with model.float8."""
    stages: AtLeast1 = 1
    """Stages whose adapters are active, each of rank: the one that is trained and those that it stands on. What
    the earlier ones compute is no useful operation of the table."""
    steps: Annotated[int, Range(3, MOST_STEPS)] = 8
    """Steps from noise to image."""
    window: AtLeast1 = 2
    """Stochastic steps of grpo, 1 to steps - 1; they begin at each place of the first half in turn."""
    times: AtLeast1 = 4
    """Noise levels of an image of nft, 1 to steps."""
    rollout_quantize: Literal["fp8"] | None = None
    """rollout.quantize of grpo and nft."""
    model: RuntimeConfig = field(default_factory=RuntimeConfig)
    """As in a recipe; stock keeps torch's attention and the exact weights."""
    optim: OptimConfig | None = None
    """As in a recipe of the method; null: the method's own."""
    encode: bool = False
    """Load the text encoder too, and have a step of rollout, grpo, nft and expander encode a prompt."""
    warmup: AtLeast2 = 2
    """Steps before the clock, which compile; what is compiled after the second is a failure."""
    repeats: AtLeast1 = 5
    """Steps that are timed; medians are reported. grpo takes at least one of each start of the window."""
    stock: bool = True
    """Measure diffusers' own transformer beside it: text padded to 512 tokens and masked, gradient checkpointing."""
    plan: str | None = None
    """A recipe of sft, stpo, grpo, nft, tdm or mopd: measure nothing, and estimate its time and memory from
    measured."""
    measured: str | None = None
    """What to plan from: a bench.json, or the name of a card whose measurements ship with the package (h200); null: the
    bench.json in output, or h200 where there is none."""
    gpus: AtLeast1 = 1
    """Number of GPUs to plan for."""
    gpu_gib: Positive | None = None
    """Memory in GiB of a GPU to plan for; null: of the measured one."""
    gpu_tflops: Positive | None = None
    """bf16 matmul rate in TFLOP/s of a GPU to plan for; null: that of the measured one."""

    @model_validator(mode="after")
    def _fits(self) -> BenchConfig:
        if self.rank is None and self.methods != ["step"]:
            raise refusal("rank", "is null, and all weights are measured by methods [step] alone; set methods or rank")
        if self.rank is not None and (self.model.float8 or (self.optim and self.optim.kind == "muon")):
            raise refusal("rank", f"is {self.rank}, and model.float8 and muon are for all weights; set rank: null")
        if self.model.float8 == "auto":
            raise refusal("model.float8", "is auto; write tensorwise or rowwise, which is to be measured")
        if self.rank == 0 and not set(self.methods) <= set(DRAWING):
            raise refusal("rank", "is 0, so there is nothing to train; use 1 or more, or methods [rollout]")
        # Earlier stages are adapters too.
        if self.stages > 1 and not self.rank:
            raise refusal("stages", f"is {self.stages} and rank is {self.rank}; use a rank of 1 or more")
        # A part that is not loaded cannot be moved.
        if "text_encoder" in self.model.offload and not self.encode:
            raise refusal("model.offload", "names text_encoder, which is loaded only with encode; set encode: true")
        if "nft" in self.methods and self.times > self.steps:
            raise refusal("times", f"is {self.times}; use 1 to steps ({self.steps})")
        if self.window >= self.steps:
            raise refusal("window", f"is {self.window}; use 1 to steps - 1 ({self.steps - 1})")
        return self
