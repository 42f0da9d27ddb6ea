"""The chat messages that ask for an expansion, from prompts/expander.md; training and servers use the same ones."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from string import Template

import prompts

FILE = Path(prompts.__file__).parent / "expander.md"


@dataclass(frozen=True)
class ExpanderTemplate:
    system: str
    user: str
    """The user's message, with $prompt in place of the prompt."""
    hash: str
    """First 16 hex digits of the file's SHA-256."""


@cache
def template() -> ExpanderTemplate:
    """The texts under the headings `## system` and `## user` of the file."""
    text = FILE.read_text(encoding="utf-8")
    _, system, user = (part.strip() for part in text.replace("## user", "## system").split("## system"))
    return ExpanderTemplate(system, user, hashlib.sha256(text.encode()).hexdigest()[:16])


def messages(user: str) -> list[dict[str, str]]:
    """Chat messages for /v1/chat/completions from a user's prompt. The answer is the expansion."""
    parts = template()
    return [
        {"role": "system", "content": parts.system},
        {"role": "user", "content": Template(parts.user).substitute(prompt=user)},
    ]
