"""The recipe of `posttrain judge` as data; see config.py. Never imports torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from posttrain.config.sections import CheckpointConfig, LoraConfig, OptimConfig, TrackConfig
from posttrain.preferences.config import ColumnMap


@dataclass
class JudgeConfig:
    """Train a judge: a LoRA adapter on a Qwen3-VL that vLLM serves as it is."""

    output: str
    """Run directory, created; the adapter and its model card are in adapter/. One that holds a run needs --resume."""
    model: str
    """Qwen3-VL to adapt: directory or hub id."""
    data: str
    """What it learns from. preference: a directory of `posttrain pairs` or `posttrain annotations`, parquet, a dataset
    saved to disk, hf:NAME[:SPLIT]; or a JSONL file with chosen, rejected, and optionally prompt, share, source, chance.
    artifact: a directory of `posttrain annotations`; a JSONL file with image, fault, and optionally prompt, source; or
    a directory of good images, each of which is also shown corrupted. Paths count from the JSONL file's directory."""
    mode: Literal["preference", "artifact"]
    """preference: Bradley-Terry on pairs, yes means better. artifact: yes means that the image has faults."""
    columns: ColumnMap | None = None
    """preference: which columns hold what, for a set of others; null: those of posttrain/preferences/dataset.py."""
    max_bad: float = 0.01
    """preference: share of the rows of a set that may be bad (an image missing or cut off, two that are the same, no
    prompt) and are left out with a warning, in [0, 1); more end the run. A bad line of a JSONL file always does."""
    template: str | None = None
    """Question: a name in prompts/judges or a .txt path; null: aesthetic or artifact, by mode."""
    heldout: float = 0.1
    """Share of the prompts (of the images, where there are none) never trained on, between 0 and 1."""
    heldout_sources: list[str] = field(default_factory=list)
    """Generators never trained on, to see whether the taste depends on who drew the image: values of source,
    chosen_policy or rejected_policy."""
    steps: int = 500
    """Updates, >= 1."""
    batch: int = 32
    """Records (pairs or images) in an update, >= 1."""
    micro_batch: int = 8
    """Records in one forward, a divisor of batch; sets memory, not the result."""
    workers: int = 0
    """Processes that read images, >= 0; 0: the training process reads them itself."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the frozen weights; the adapter stays float32."""
    seed: int = 0
    """Seed of the adapter, the split and the order, >= 0."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The rate falls to zero along half a cosine after warm-up; passes must be 1."""
    checkpoint: CheckpointConfig = field(default_factory=lambda: CheckpointConfig(every=100))
    track: TrackConfig = field(default_factory=TrackConfig)
