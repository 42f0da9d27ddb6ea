"""The settings of `posttrain style play` as data. Never imports torch."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import model_validator

from posttrain.config.sections import ModelConfig
from posttrain.config.types import AtLeast0, AtLeast1, NonNegative, Port, Range, Size, is_loopback, refusal, settings


@settings
class PlayConfig:
    """Serve a page where one drags the strengths of references and sees what is drawn, until Ctrl-C or SIGTERM. It is
    reached from this machine alone; from another one, by `ssh -L`."""

    model: ModelConfig
    adapter: str | None = None
    """Run directory or checkpoint of `posttrain style`, or its LoRA as .safetensors; null: the model as it is."""
    references: list[str] = field(default_factory=list)
    """Images to begin with, as IMAGE or IMAGE:STRENGTH; others can be put on the page."""
    prompt: str = ""
    """The prompt to begin with."""
    size: Size = field(default_factory=lambda: [512, 512])
    """[height, width] in pixels."""
    steps: AtLeast1 | None = None
    """Steps from noise to image; null: 28, or 8 for a Turbo checkpoint or a run of tdm."""
    guidance: NonNegative | None = None
    """Guidance in K2's convention, 0 is off; null: 4.5, or 0 for those."""
    strength: Literal["attention", "velocity"] = "attention"
    """How strengths act; see `posttrain sample`."""
    slots: Annotated[int, Range(1, 10)] = 3
    """References that the page has room for."""
    seed: AtLeast0 = 0
    """Seed of the noise."""
    host: str = "127.0.0.1"
    """Address of this machine to listen at."""
    port: Port = 7861
    """Port to listen at; 0: any free one."""

    @model_validator(mode="after")
    def _fits(self) -> PlayConfig:
        self.model.refuse_sequence_parallel("one process draws")
        self.model.refuse_float8()
        if self.model.start is not None:
            raise refusal("model.start", "has no meaning here; name that run as adapter")
        if not is_loopback(self.host):
            raise refusal("host", f"{self.host} is reached from beyond this machine, whose GPU anyone could then use")
        if len(self.references) > self.slots:
            raise refusal("slots", f"is {self.slots}, and references names {len(self.references)}; raise it")
        return self
