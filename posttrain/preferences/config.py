"""Which columns of a preference set hold what, as recipes say it. Never imports torch."""

from __future__ import annotations

from typing import Literal

from posttrain.config.types import settings


@settings
class ColumnMap:
    """Which columns of a set of pairs hold what. The images: chosen and rejected; or first, second and label; or
    pair and label."""

    prompt: str = "prompt"
    """Column of the prompt."""
    chosen: str | None = None
    """Column of the preferred image."""
    rejected: str | None = None
    """Column of the other image."""
    first: str | None = None
    """Column of one image; `label` says which is preferred."""
    second: str | None = None
    """Column of the other one."""
    pair: str | None = None
    """Column of a list of both images, instead of first and second."""
    label: str | None = None
    """Column of the share of preference for the first image: 1, 0 or between, or a list such as [1, 0]."""
    label_second: str | None = None
    """Column of the label of the second image, where each has one."""
    share: str | None = None
    """With chosen and rejected: column of the share of votes for chosen, 0.5 to 1; null: all of them."""
    margin: str | None = None
    """Column of how much better the preferred image is, in any unit; null: unknown."""
    source: Literal["human", "synthetic"] = "human"
    """Who preferred them."""
