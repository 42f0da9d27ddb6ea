"""The chat messages that ask for an expansion, from prompts/expander.md; training and servers use the same ones."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from string import Template

import prompts

FILE = Path(prompts.__file__).parent / "expander.md"
HEADING = re.compile(r"^## (\w+)$", re.MULTILINE)


@dataclass(frozen=True)
class ExpanderTemplate:
    system: str
    thinking: str
    """What the system text ends with where a thought is to come before the caption."""
    user: str
    """The user's message, with $prompt in place of the prompt."""
    hash: str
    """First 16 hex digits of the file's SHA-256."""


@cache
def template() -> ExpanderTemplate:
    """The texts under the headings `## system`, `## thinking` and `## user` of the file."""
    text = FILE.read_text(encoding="utf-8")
    # A pattern with a group splits into what is before the first heading, then name, text, name, text, ...
    _, *found = HEADING.split(text)
    parts = {name: part.strip() for name, part in zip(found[::2], found[1::2])}
    return ExpanderTemplate(**parts, hash=hashlib.sha256(text.encode()).hexdigest()[:16])


def system_text(thinking: bool = False) -> str:
    """The system message; with `thinking` it asks for a thought before the caption."""
    parts = template()
    return f"{parts.system}\n\n{parts.thinking}" if thinking else parts.system


def messages(user: str, thinking: bool = False, system: str | None = None) -> list[dict[str, str]]:
    """Chat messages for /v1/chat/completions from a user's prompt. The answer is the expansion, after a thought where
    `thinking` asks for one: see thinking.py. `system` replaces the system text, for a model that was not trained here.
    """
    return [
        {"role": "system", "content": system_text(thinking) if system is None else system},
        {"role": "user", "content": Template(template().user).substitute(prompt=user)},
    ]
