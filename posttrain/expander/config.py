"""The recipes of `posttrain expander data`, `expander sft` and `expand` as data; see config.py. Never imports torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from posttrain.config.sections import CheckpointConfig, LoraConfig, OptimConfig, TrackConfig
from rewards.serve import ServerSpec


def is_function(captions: str) -> bool:
    """Whether captions are named as package.module:function, and not as a set of them."""
    return re.fullmatch(r"(?!hf:)\w+(\.\w+)*:\w+", captions) is not None


@dataclass
class WriterConfig:
    """A language model behind an OpenAI-compatible server, such as the judge's."""

    model: str
    """Name that the server serves it under."""
    base_urls: str | list[str]
    """server://NAME of one of `servers`, a URL such as http://127.0.0.1:8000/v1, or several URLs of equal servers."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the key; null: none is needed."""
    concurrency: int = 32
    """Requests under way at once, >= 1; the command runs in one process."""
    timeout: float = 60.0
    """Seconds for one attempt, > 0."""


@dataclass
class ExpanderDataConfig:
    """Make pairs of a short prompt, as a user types it, and the long caption that it should be expanded to."""

    output: str
    """Directory to write, created: train.parquet and heldout.parquet, which `datasets` loads, and candidates.jsonl; one
    that was begun already needs --resume."""
    captions: str
    """Long captions: a JSONL file, hf:NAME[:SPLIT], or a directory of `datasets`. Or a function that draws captions and
    their prompts, package.module:function, which needs no server."""
    column: str = "prompt"
    """Column of the caption; not read for a function."""
    count: int | None = None
    """Captions to use, from the top, >= 1; null: all there are. A function draws as many as it is told."""
    writer: WriterConfig | None = None
    """Who writes the short prompts; null only for a function."""
    checker: WriterConfig | None = None
    """Who says whether the caption holds every fact of a short prompt; null: the writer itself."""
    servers: list[ServerSpec] = field(default_factory=list)
    """Servers to start for this."""
    lengths: list[str] = field(default_factory=lambda: ["one to four words", "one short sentence", "two sentences"])
    """Lengths to ask the writer for; not read for a function."""
    registers: list[str] = field(
        default_factory=lambda: [
            "bare keywords",
            "a plain description",
            "a casual request in lower case",
            "a careful brief to an artist",
        ]
    )
    """Manners of writing to ask for; not read for a function."""
    per_caption: int = 2
    """Short prompts to ask for of each caption, each in another length and register, >= 1."""
    long_share: float = 0.15
    """Share of the captions that are also a prompt themselves, answered as they are, in [0, 1]: who writes much
    already should get it back."""
    threshold: float = 0.5
    """P(yes) that each fact of a short prompt must reach, between 0 and 1."""
    max_failures: float = 0.1
    """Share of the captions whose requests may fail, and are left out, in [0, 1]; more end the command."""
    heldout: float = 0.05
    """Share of the captions whose pairs go into heldout.parquet, between 0 and 1."""
    seed: int = 0
    """Seed of everything drawn, >= 0."""


@dataclass
class ExpanderSFTConfig:
    """Teach a chat model to expand prompts: supervised, on the completions alone."""

    output: str
    """Run directory, created; one that holds a run already needs --resume. The adapter is in adapter/, a model that was
    trained whole in model/."""
    model: str
    """Chat model, an instruct model that answers at once, without thinking aloud: directory or hub id."""
    data: str
    """Directory of `posttrain expander data`, or of `datasets`; JSONL; or hf:NAME[:SPLIT]. Columns prompt (the user's)
    and completion (the long caption)."""
    heldout: float = 0.05
    """Share of the prompts that are held out where data does not say which, between 0 and 1."""
    measured: int = 256
    """Held-out pairs that the loss is measured on, >= 1."""
    max_length: int = 1024
    """Longest pair in tokens, template and all, >= 1. Longer ones are left out, never cut, and counted."""
    max_dropped: float = 0.02
    """Share of the pairs that may be left out as too long, in [0, 1]; more end the command."""
    steps: int = 500
    """Updates, >= 1."""
    batch: int = 32
    """Pairs in an update, over all processes together, >= 1."""
    micro_batch: int = 8
    """Pairs in one forward, a divisor of batch; sets memory, not the result."""
    eval_every: int = 100
    """Updates between measurements of the held-out loss, >= 0; 0: only before and after."""
    seed: int = 0
    """Seed of the adapter and the order, >= 0."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the weights and of the arithmetic; an adapter stays float32."""
    lora: LoraConfig | None = field(default_factory=LoraConfig)
    """The adapter to train; targets null: the attention and feed-forward projections. null: train all weights."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The rate falls to zero along half a cosine after warm-up; passes must be 1, ema and cooldown_steps 0. Of
    its metrics grad_norm alone is logged."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """minutes is not read."""
    track: TrackConfig = field(default_factory=TrackConfig)


@dataclass
class ExpandConfig:
    """Expand a prompt in several ways: `posttrain expand "a cat" --model DIR`."""

    prompt: str
    """What the user wrote; the first argument."""
    model: str
    """Chat model (directory or hub id), or the run directory of `posttrain expander sft` or `gdpo`."""
    adapter: str | None = None
    """Directory of a LoRA adapter made for that model."""
    n: int = 4
    """Expansions, >= 1."""
    temperature: float = 1.0
    """Of the sampling, > 0: higher is more varied."""
    max_tokens: int = 512
    """Longest expansion in tokens, >= 1; one that is cut there is said to be."""
    seed: int = 0
    """Seed of the sampling, >= 0."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the weights."""
    json: bool = False
    """Print a JSON object with prompt and expansions instead of one a line."""
