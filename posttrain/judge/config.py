"""The recipes of `posttrain judge` and `posttrain serve` as data. Never imports torch."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import model_validator

from posttrain.config.optimizer import refuse_average, refuse_muon
from posttrain.config.sections import (
    JUDGE_TARGETS,
    CheckpointConfig,
    LoraConfig,
    OptimConfig,
    Servers,
    TrackConfig,
    require_one_pass,
)
from posttrain.config.types import AtLeast0, AtLeast1, BelowOne, Filled, OpenShare, Text, refusal, settings
from posttrain.preferences.config import ColumnMap


@settings
class JudgeConfig:
    """Train a judge: a LoRA adapter on a Qwen3-VL that vLLM serves as it is."""

    output: Text
    """Run directory, created; the adapter and its model card are in adapter/. One that holds a run needs --resume."""
    model: Text
    """Qwen3-VL to adapt: directory or hub id."""
    data: Text
    """What it learns from. preference: a directory of `posttrain pairs` or `posttrain annotations`, parquet, a dataset
    saved to disk, hf:NAME[:SPLIT]; or a JSONL file with chosen, rejected, and optionally prompt, share, source, chance.
    artifact: a directory of `posttrain annotations`; a JSONL file with image, fault, and optionally prompt, source; or
    a directory of good images, each of which is also shown corrupted. Paths count from the JSONL file's directory."""
    mode: Literal["preference", "artifact"]
    """preference: Bradley-Terry on pairs, yes means better. artifact: yes means that the image has faults."""
    columns: ColumnMap | None = None
    """preference: which columns hold what, for a set of others; null: those of posttrain/preferences/dataset.py."""
    max_bad: BelowOne = 0.01
    """preference: share of the rows of a set that may be bad (an image missing or cut off, two that are the same, no
    prompt) and are left out with a warning; more end the run. A bad line of a JSONL file always does."""
    template: str | None = None
    """Question: a name in prompts/judges or a .txt path; null: aesthetic or artifact, by mode."""
    heldout: OpenShare = 0.1
    """Share of the prompts (of the images, where there are none) never trained on."""
    heldout_sources: list[str] = field(default_factory=list)
    """Generators never trained on, to see whether the taste depends on who drew the image: values of source,
    chosen_policy or rejected_policy."""
    steps: AtLeast1 = 500
    """Updates."""
    batch: AtLeast1 = 32
    """Records (pairs or images) in an update."""
    micro_batch: AtLeast1 = 8
    """Records in one forward, a divisor of batch; sets memory, not the result."""
    workers: AtLeast0 = 0
    """Processes that read images; 0: the training process reads them itself."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the frozen weights; the adapter stays float32."""
    seed: AtLeast0 = 0
    """Seed of the adapter, the split and the order."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The rate falls to zero along half a cosine after warm-up; passes must be 1."""
    checkpoint: CheckpointConfig = field(default_factory=lambda: CheckpointConfig(every=100))
    track: TrackConfig = field(default_factory=TrackConfig)

    @model_validator(mode="after")
    def _fits(self) -> JudgeConfig:
        # The loss of an update is a mean over whole micro-batches.
        if self.batch % self.micro_batch:
            raise refusal("micro_batch", f"is {self.micro_batch}; use a divisor of batch ({self.batch})")
        if self.columns is not None and self.mode == "artifact":
            raise refusal("columns", "are of a set of pairs, which mode artifact does not read; leave them out")
        # vLLM applies adapters to linears of the language model alone.
        wrong = [target for target in self.lora.targets or () if target not in JUDGE_TARGETS]
        if wrong:
            raise refusal(
                "lora.targets", f"names {wrong[0]}; vLLM serves {', '.join(JUDGE_TARGETS)} of the language model"
            )
        require_one_pass(self.optim, "a judge makes one update on each batch")
        if self.optim.cooldown_steps:
            raise refusal("optim.cooldown_steps", "a judge's rate falls along half a cosine from the start; leave it 0")
        refuse_muon(self.optim, "a judge trains the factors of an adapter; use adamw")
        refuse_average(self.optim, "is of runs that train K2; use optim.ema")
        return self


@settings
class ServeConfig:
    """Serve a recipe's judges until Ctrl-C or SIGTERM. Keys of the recipe other than those below are not read."""

    servers: Annotated[Servers, Filled("name at least one server")]
    """Servers to start."""
    logs: str = "runs/servers"
    """Directory for the servers' logs, NAME.log; created."""
    print_for: str | None = None
    """Address of another machine, such as 10.0.0.2: print the shell commands that serve there, and start nothing;
    whoever reaches that address may ask. null: serve here, for this machine only."""

    @model_validator(mode="after")
    def _fits(self) -> ServeConfig:
        if all(server.urls for server in self.servers):
            raise refusal("servers", "all have urls and are up already; there is nothing to start")
        return self
