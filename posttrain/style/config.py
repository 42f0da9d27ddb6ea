"""The recipe of `posttrain style` as data. Never imports torch."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated

from pydantic import model_validator

from posttrain.config.types import (
    AtLeast1,
    Each,
    Filled,
    Float,
    NonNegative,
    OpenShare,
    Range,
    Share,
    Text,
    keyword_settings,
    refusal,
    settings,
)
from posttrain.model.adapters.targets import Lanes
from posttrain.sft.config import ImageColumns, ImageSetConfig, SFTConfig


@settings
class StyleColumns(ImageColumns):
    """Which columns of a set of images hold what. `captions` are those without a word about the style."""

    full: Text | None = None
    """Column of the caption that also names the style. It is trained where no reference is shown, so that style words
    keep working. null: the first of `captions` is."""
    style_of: Text | None = None
    """Column that says which images share a style: a cluster, an artist, a moodboard. null: unknown, and no other image
    of the same style is ever a reference."""
    subject: Text | None = None
    """Column of the subject's box, [left, top, right, bottom] in pixels, which crops avoid. null: they take what is
    most varied."""


@settings
class StyleSetConfig(ImageSetConfig):
    """Images, their captions without style, and what is known of their styles."""

    columns: StyleColumns = field(default_factory=StyleColumns)  # type: ignore[assignment]


@settings
class ReferencesConfig:
    """What is shown of an image, or of another in its style, while it is trained on; drawn anew each time."""

    sizes: Annotated[list[AtLeast1], Filled("give at least one, such as [512]")] = field(
        default_factory=lambda: [256, 384, 512]
    )
    """Sides in pixels of the square references; those of a step have one of them, drawn evenly."""
    tiles: NonNegative = 0.6
    """How often a reference is the image in tiles in random order, relative to crop and other."""
    crop: NonNegative = 0.2
    """How often it is a part of the image, with its mirror image in turns."""
    other: NonNegative = 0.2
    """How often it is another image in the same style. Without columns.style_of these are tiles."""
    tile_counts: Annotated[list[AtLeast1], Filled("give at least one, such as [4, 8]")] = field(
        default_factory=lambda: [4, 5, 6, 7, 8]
    )
    """Tiles along a side, drawn evenly."""
    crop_least: OpenShare = 0.25
    crop_most: OpenShare = 0.5
    """Shortest and longest side of a crop, as a share of the reference's side."""
    two: Share = 0.25
    """Share of the images that are shown two references; the others get one."""
    drop: Share = 0.1
    """Share that is shown none, with the full caption."""
    drop_both: Share = 0.05
    """Share that is shown none and has the empty caption; images.drop_caption is the share that has the empty caption
    and references."""

    @model_validator(mode="after")
    def _fits(self) -> ReferencesConfig:
        if not self.tiles + self.crop + self.other:
            raise refusal("tiles", "is 0, and so are crop and other; one of the three must be above 0")
        if self.crop_least > self.crop_most:
            raise refusal("crop_least", f"is {self.crop_least:g}, above crop_most ({self.crop_most:g}); lower it")
        # A tile has one pixel at least.
        if min(self.sizes) < max(self.tile_counts):
            raise refusal("sizes", f"{min(self.sizes)} pixels have no {max(self.tile_counts)} tiles; raise it")
        return self


@keyword_settings
class StyleConfig(SFTConfig):
    """Training of K2 to draw in the style of reference images, without their content."""

    images: StyleSetConfig  # type: ignore[assignment]
    references: ReferencesConfig = field(default_factory=ReferencesConfig)
    lanes: Lanes = "all"
    """What the adapter acts on. all: text, image and references, as other tools have it. references: the references
    alone, so that strength 0 is the model without it bit for bit and other adapters stay as they are. That learns far
    slower, keeps all activations of the references, whatever model.recompute is, only posttrain draws it, and nothing
    can be trained on top of it."""
    heldout_styles: list[str] = field(default_factory=list)
    """Values of images.columns.style_of that are never trained on."""
    sweep: Annotated[list[Float], Each(Range(-4, 4))] = field(default_factory=lambda: [0.1, 0.25, 0.5, 1.0])
    """Strengths at which the first held-out prompts are drawn at the end, as a grid. Those in 0 to 1 act by attention,
    others on the velocity."""

    @model_validator(mode="after")
    def _styled(self) -> StyleConfig:
        self.model.refuse_sequence_parallel("references are not divided over processes")
        # What is left learns to take the content from the caption and the style from the references.
        dropped = self.references.drop + self.references.drop_both + self.images.drop_caption
        if dropped > 0.9:
            raise refusal("references.drop", f"leaves {1 - dropped:.2g} of the images with references and caption")
        if self.lanes == "references":
            if self.lora is None:
                raise refusal("lanes", "references wants an adapter, and lora is null; use all, or set lora")
            # What has no reference is drawn without the adapter, and teaches it nothing.
            if self.references.drop or self.references.drop_both:
                raise refusal("references.drop", "teaches nothing where lanes is references; set it and drop_both to 0")
            if self.model.start is not None and self.model.start_as == "continue":
                raise refusal("lanes", "references cannot continue another adapter; set model.start_as to merge")
        if self.heldout_styles and self.images.columns.style_of is None:
            raise refusal("heldout_styles", "needs images.columns.style_of, which says what style an image has")
        return self
