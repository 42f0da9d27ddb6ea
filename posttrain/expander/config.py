"""The recipes of `expander data`, `expander sft` and `expand` as data. Never imports torch."""

from __future__ import annotations

import re
from dataclasses import field
from typing import Annotated, Literal

from pydantic import model_validator

from posttrain.config.optimizer import refuse_average
from posttrain.config.sections import CheckpointConfig, LoraConfig, OptimConfig, Servers, TrackConfig, require_one_pass
from posttrain.config.types import (
    AtLeast0,
    AtLeast1,
    AtLeast2,
    Filled,
    Float,
    OpenShare,
    Port,
    Positive,
    Range,
    Share,
    Text,
    is_loopback,
    refusal,
    settings,
)


def is_function(captions: str) -> bool:
    """Whether captions are named as package.module:function, and not as a set of them."""
    return re.fullmatch(r"(?!hf:)\w+(\.\w+)*:\w+", captions) is not None


@settings
class WriterConfig:
    """A language model behind an OpenAI-compatible server, such as the judge's."""

    model: Text
    """Name that the server serves it under."""
    base_urls: Annotated[str | list[str], Filled("give a URL or server://NAME")]
    """server://NAME of one of `servers`, a URL such as http://127.0.0.1:8000/v1, or several URLs of equal servers."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the key; null: none is needed."""
    concurrency: AtLeast1 = 32
    """Requests under way at once; the command runs in one process."""
    timeout: Positive = 60.0
    """Seconds for one attempt."""
    answers_as: str | None = None
    """Name of the model in the answers, where model is an alias for it, as Azure's deployments are; null: model."""


@settings
class TagConfig:
    """Captions that are drawn more often in training."""

    statement: Text
    """What the checker must find true of a caption."""
    weight: Annotated[Float, Range(0, 2)]
    """What it adds to the weight of the caption's pairs, which is 1 otherwise and at most 3 with all tags."""
    target: Share | None = None
    """Share of the draws that is aimed at, for the reader: expander_data.json tells it beside the one reached."""


@settings
class PhotographsConfig:
    """A light bias to photographs where a prompt does not say the medium."""

    statement: Text = "the image is a photograph"
    """What the checker must find true of a photograph's caption."""
    weight: Annotated[Float, Range(0, 2)] = 0.25
    """What is added, at most, to the weight of pairs whose prompt names no medium and whose caption is of a photograph;
    such a caption gets its medium named."""
    max_kl: Positive = 0.01
    """Divergence in nats of the share of photographs in the draws from that among the captions; a larger one lowers
    weight."""


@settings
class ExpanderDataConfig:
    """Make pairs of a short prompt, as a user types it, and the long caption that it should be expanded to."""

    output: Text
    """Directory to write, created: train.parquet and heldout.parquet, which `datasets` loads, and candidates.jsonl; one
    that was begun already needs --resume."""
    captions: Text
    """Long captions: a JSONL file, hf:NAME[:SPLIT], or a directory of `datasets`. Or a function that draws captions and
    their prompts, package.module:function, which needs no server."""
    column: Text = "prompt"
    """Column of the caption; not read for a function."""
    count: AtLeast2 | None = None
    """Captions to use, from the top; null: all there are. A function draws as many as it is told."""
    writer: WriterConfig | None = None
    """Who writes the short prompts; null only for a function."""
    checker: WriterConfig | None = None
    """Who says whether the caption holds every fact of a short prompt; null: the writer itself."""
    servers: Servers = field(default_factory=list)
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
    languages: dict[str, Share] = field(default_factory=dict)
    """Share of the captions that are translated and asked for prompts in this language, such as {French: 0.05}; the
    rest keeps its own. Not read for a function."""
    thoughts: bool = False
    """Also write a thought for each pair, which says what is asked, what is open, and what is chosen."""
    direct_share: Share = 0.15
    """Share of the pairs without a thought, so that the expander can also answer at once; captions that are their own
    prompt have none either. Not read without thoughts."""
    tags: dict[str, TagConfig] = field(default_factory=dict)
    """Captions to draw more often, by a name of your choice, such as rich and art. Not read for a function."""
    photographs: PhotographsConfig | None = None
    """Bias to photographs; null: none. Not read for a function."""
    per_caption: AtLeast1 = 2
    """Short prompts to ask for of each caption, each in another length and register."""
    long_share: Share = 0.15
    """Share of the captions that are also a prompt themselves, answered as they are: who writes much
    already should get it back."""
    threshold: OpenShare = 0.5
    """P(yes) that each fact of a short prompt must reach."""
    max_failures: Share = 0.1
    """Share of the captions whose requests may fail, and are left out; more end the command."""
    heldout: OpenShare = 0.05
    """Share of the captions whose pairs go into heldout.parquet."""
    seed: AtLeast0 = 0
    """Seed of everything drawn."""

    @model_validator(mode="after")
    def _fits(self) -> ExpanderDataConfig:
        # A function draws prompts as well as captions, so nobody has to write them.
        if is_function(self.captions):
            if self.count is None:
                raise refusal("count", "is null, and a function draws captions without end; say how many")
            return self
        if self.writer is None:
            raise refusal("writer", "is null: name the model that writes the short prompts, and its server")
        for name in ("lengths", "registers"):
            if not getattr(self, name):
                raise refusal(name, "is empty; name at least one")
        if sum(self.languages.values()) > 1 + 1e-9:  # thirds add up to a little more than 1
            raise refusal("languages", f"add up to {sum(self.languages.values()):g}; lower them to at most 1 together")
        # Each prompt of a caption has a combination of its own.
        if self.per_caption > len(self.lengths) * len(self.registers):
            raise refusal("per_caption", f"is {self.per_caption}, more than there are lengths times registers")
        return self


@settings
class ExpanderSFTConfig:
    """Teach a chat model to expand prompts: supervised, on the completions alone."""

    output: Text
    """Run directory, created; one that holds a run already needs --resume. The adapter is in adapter/, a model that was
    trained whole in model/."""
    model: Text
    """Chat model: directory or hub id. Without `thinking` an instruct model, which answers at once."""
    data: Text
    """Directory of `posttrain expander data`, or of `datasets`; JSONL; or hf:NAME[:SPLIT]. Columns prompt (the user's)
    and completion (the long caption), for `thinking` also thought, and optionally weight."""
    thinking: bool = False
    """Teach it to write the column thought before the caption; rows without a thought are answered at once, under the
    system text without that request."""
    heldout: OpenShare = 0.05
    """Share of the prompts that are held out where data does not say which."""
    measured: AtLeast1 = 256
    """Held-out pairs that the loss is measured on."""
    max_length: AtLeast1 = 1024
    """Longest pair in tokens, template and all. Longer ones are left out, never cut, and counted."""
    max_dropped: Share = 0.02
    """Share of the pairs that may be left out as too long; more end the command."""
    steps: AtLeast1 = 500
    """Updates."""
    batch: AtLeast1 = 32
    """Pairs in an update, over all processes together."""
    micro_batch: AtLeast1 = 8
    """Pairs in one forward, a divisor of batch; sets memory, not the result."""
    eval_every: AtLeast0 = 100
    """Updates between measurements of the held-out loss; 0: only before and after."""
    seed: AtLeast0 = 0
    """Seed of the adapter and the order."""
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

    @model_validator(mode="after")
    def _fits(self) -> ExpanderSFTConfig:
        # The mean of a batch is taken over whole micro-batches.
        if self.batch % self.micro_batch:
            raise refusal("micro_batch", f"is {self.micro_batch}; use a divisor of batch ({self.batch})")
        require_one_pass(self.optim, "each update draws its own pairs; use 1")
        # TRL's trainer makes the optimiser, with a schedule of its own.
        if self.optim.kind != "adamw":
            raise refusal("optim.kind", f"is {self.optim.kind}, and this command has adamw only; leave it out")
        refuse_average(self.optim, "is not for this command, whose rate falls along a cosine; leave it out")
        for name in ("ema", "cooldown_steps"):
            if getattr(self.optim, name):
                raise refusal(f"optim.{name}", "is not for this command, whose rate falls along a cosine; leave it 0")
        return self


@settings
class ExpanderServeConfig:
    """Serve an expander at an OpenAI-compatible /v1/chat/completions, until Ctrl-C or SIGTERM."""

    model: Text
    """Chat model (directory or hub id), or the run directory of `posttrain expander sft` or `gdpo`."""
    adapter: str | None = None
    """Directory of a LoRA adapter made for that model."""
    name: Text = "expander"
    """Name that requests give as their model."""
    thinking: bool | None = None
    """Whether it thinks before the caption; null: as it was trained. The thought is not sent."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the weights."""
    max_tokens: AtLeast1 = 512
    """Longest answer in tokens, and what a request has that does not say."""
    max_n: AtLeast1 = 16
    """Most expansions in a request."""
    host: str = "127.0.0.1"
    """Address to listen at. Beyond this machine (such as 0.0.0.0) it needs api_key_env."""
    port: Port = 8001
    """Port to listen at; 0: any free one."""
    api_key_env: str | None = None
    """Name of the environment variable with the key that requests must bring; null: none."""

    @model_validator(mode="after")
    def _fits(self) -> ExpanderServeConfig:
        # Whoever reaches the server may use its GPU.
        if not is_loopback(self.host) and self.api_key_env is None:
            raise refusal("host", f"{self.host} is reached from beyond this machine; set api_key_env as well")
        return self


@settings
class ExpandConfig:
    """Expand a prompt in several ways: `posttrain expand "a cat" --model DIR --vary 4`."""

    prompt: Text
    """What the user wrote; the first argument."""
    model: Text
    """Chat model (directory or hub id), or the run directory of `posttrain expander sft` or `gdpo`."""
    adapter: str | None = None
    """Directory of a LoRA adapter made for that model."""
    n: AtLeast1 = 4
    """Expansions."""
    temperature: Positive = 1.0
    """Of the sampling: higher is more varied."""
    max_tokens: AtLeast1 = 512
    """Longest expansion in tokens; one that is cut there is said to be."""
    seed: AtLeast0 = 0
    """Seed of the sampling."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the weights."""
    vary: AtLeast1 | None = None
    """Expansions that differ from each other: of four times as many, those that are farthest apart in their words;
    instead of n. null: n as they come."""
    thinking: bool | None = None
    """Whether it thinks before the caption; null: as it was trained. The thought is not printed."""
    system: Text | None = None
    """A text file with the system text to use in place of posttrain's own, for a chat model that was not trained here,
    such as the one that K2's repository gives."""
    json: bool = False
    """Print a JSON object with prompt and expansions instead of one a line."""
