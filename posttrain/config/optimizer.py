"""The settings of optimisers. Never imports torch. sections.py passes them on with the other sections."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Strict, model_validator

from posttrain.config.types import (
    AtLeast0,
    AtLeast1,
    AtLeast2,
    BelowOne,
    Each,
    Float,
    NonNegative,
    Positive,
    Range,
    Unless,
    refusal,
    settings,
)

Betas = Annotated[tuple[Float, Float], Strict(False), Each(Range(0, below=1))]  # a list in YAML


@settings
class AverageConfig:
    """The mean of the last checkpoints in place of a moving average. It takes no memory while training: its
    checkpoints wait on disk, in checkpoints/average of the run directory."""

    kind: Literal["pma"] = "pma"
    """pma: pre-trained model averaging (arXiv:2505.12082). A moving average is optim.ema."""
    every: AtLeast1 = 10
    """Training steps between the checkpoints that are kept for the mean: an adapter in float32, all weights in
    model.dtype (K2, bfloat16: 26 GB each)."""
    last: AtLeast2 = 5
    """How many of the newest ones are averaged, with equal weights; in a run's first steps those that there are. As
    many steps back as an optim.ema of d when every * last = (1 + d) / (1 - d). The mean of adapters is brought back to
    their rank; the metric average_error is what that leaves out."""


@settings
class OptimConfig:
    """AdamW, or Muon for the matrices of all weights."""

    lr: Positive = 1e-4
    """Learning rate after warm-up."""
    betas: Betas = (0.9, 0.99)
    """Decay of the two moments of AdamW."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay."""
    eps: Positive = 1e-15
    """Added to the root of the second moment. Gradients are means over all latent elements: for K2 that root is
    1e-8 and less, so the usual 1e-8 would set the rate, differently at each resolution and number of images. The
    metric eps_share is what eps takes of the rate."""
    clip_factor: Annotated[Float, Unless(0, 1)] = 3.0
    """Gradients whose global norm is above this many times the median of the last 64 norms are scaled down to that;
    0: never. The first 16 updates are not clipped. The metric clipped_updates counts them."""
    passes: AtLeast1 = 1
    """Optimiser updates on each batch of images; more than two leaves the policy that drew them."""
    warmup_steps: AtLeast0 = 0
    """Updates over which the rate rises linearly from 0."""
    cooldown_steps: AtLeast0 = 0
    """Last training steps over which the rate falls linearly to 0; 0: it stays."""
    ema: BelowOne = 0.0
    """Decay of the moving average of the weights that evaluation and export use; 0: the weights."""
    average: AverageConfig | None = None
    """The mean of checkpoints that evaluation and export use; null: see ema."""
    kind: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    """adamw8bit: keep the two moments in 8 bits, 2 bytes a trained weight instead of 8. It changes results, by what
    `posttrain bench` measures; needs pip install 'posttrain[fp8]'. muon: only with lora: null; the linears of the
    blocks move by their orthogonalised momentum, 4 bytes a weight, at AdamW's rates; all else by AdamW. A run keeps to
    its kind."""

    @model_validator(mode="after")
    def _fits(self) -> OptimConfig:
        if self.average is not None and self.ema:
            raise refusal("average", f"is set, and optim.ema is {self.ema:g}, which averages too; set optim.ema: 0")
        return self


def require_one_pass(optim: OptimConfig, why: str) -> None:
    """For methods that make one update on each batch, in their own check."""
    if optim.passes != 1:
        raise refusal("optim.passes", f"is {optim.passes}; {why}")


def refuse_muon(optim: OptimConfig, why: str) -> None:
    """Where no whole weight matrices are trained, in that command's own check."""
    if optim.kind == "muon":
        raise refusal("optim.kind", f"is muon, which moves whole weight matrices, and {why}")


def refuse_average(optim: OptimConfig, why: str) -> None:
    """For commands without the checkpoints of a K2 run, in their own check."""
    if optim.average is not None:
        raise refusal("optim.average", why)
