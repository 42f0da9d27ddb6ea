"""Model cards from templates/*.md, with the front matter that the hub reads."""

from __future__ import annotations

from typing import Any

from huggingface_hub import ModelCardData

from posttrain.report.render import ENVIRONMENT


def card(template: str, front: dict[str, Any], /, **data: Any) -> str:
    """The card of this template, as Markdown. `front` are fields of huggingface_hub.ModelCardData."""
    text = ENVIRONMENT.get_template(template).render(front=ModelCardData(**front).to_yaml(), **data)
    return text.strip() + "\n"
