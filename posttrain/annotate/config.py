"""The settings of `posttrain annotate` and `annotations` as data. Never imports torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import model_validator

from posttrain.config.types import AtLeast0, Float, Port, Range, Share, is_loopback, refusal, settings


@settings
class AnnotateConfig:
    """Serve a page where people choose between the two images of each pair, or mark single images that have faults,
    until Ctrl-C or SIGTERM."""

    store: str
    """JSONL file that each answer is appended to; made if it is not there, continued if it is."""
    mode: Literal["preference", "artifact"] = "preference"
    """preference: which image of a pair is better; needs pairs. artifact: whether an image has faults; needs images."""
    pairs: str | None = None
    """Preference set to choose from: a directory of pairs; or JSONL, parquet or hf:NAME[:SPLIT] with columns prompt,
    chosen and rejected."""
    images: str | None = None
    """Images to mark: a run directory (its samples/), an output of `posttrain sample`, or a directory of images."""
    host: str = "127.0.0.1"
    """Address to listen at. Beyond this machine (such as 0.0.0.0) it needs password_env."""
    port: Port = 7860
    """Port to listen at; 0: any free one."""
    root_path: str = ""
    """Path under which a proxy shows the page, such as /annotate, whether it takes that away or not; "": none."""
    password_env: str | None = None
    """Name of the environment variable with the password that everyone who chooses logs in with, under a name of
    their own; 8 characters or more. null: none."""
    repeats: Annotated[Float, Range(0, 0.5)] = 0.1
    """Share of the pairs or images that each annotator sees a second time, pairs with sides swapped, to measure
    consistency."""
    seed: AtLeast0 = 0
    """Seed of the order and of the sides; each annotator has an order of their own."""
    max_bad: Share = 0.01
    """Share of the rows of pairs that may be bad (an image missing or cut off, ...); they are left out and
    named."""

    @model_validator(mode="after")
    def _fits(self) -> AnnotateConfig:
        # A store holds answers of one mode, so the items of the other would never be asked about.
        needed, other = ("pairs", "images") if self.mode == "preference" else ("images", "pairs")
        if getattr(self, needed) is None:
            raise refusal(needed, f"missing; mode {self.mode} asks about {needed}")
        if getattr(self, other) is not None:
            raise refusal(other, f"is not read in mode {self.mode}; leave it out or change mode")
        if self.root_path and (not self.root_path.startswith("/") or self.root_path.endswith("/")):
            raise refusal("root_path", f"is '{self.root_path}'; write it as /annotate, with a slash before it alone")
        # Whoever reaches the page can answer under any name.
        if not is_loopback(self.host) and self.password_env is None:
            raise refusal("host", f"{self.host} is reached from beyond this machine; set password_env as well")
        return self


@settings
class AnnotationsConfig:
    """Say how far people agree with each other and with the judges; with an output, write what they answered."""

    store: str
    """What annotate wrote; it may still be running."""
    pairs: str | None = None
    """Preference set that they chose from, as for annotate; give this or images."""
    images: str | None = None
    """Images that they marked, as for annotate; give this or pairs."""
    output: str | None = None
    """Directory to write; must not exist or be empty. Of pairs it is the preference record, source: human; of images
    artifacts.jsonl with the images, for `posttrain judge --mode artifact`. null: only the report."""
    max_bad: Share = 0.01
    """As for annotate."""

    @model_validator(mode="after")
    def _fits(self) -> AnnotationsConfig:
        if (self.pairs is None) == (self.images is None):
            raise refusal("pairs", "give either pairs or images: what the store is about")
        return self
