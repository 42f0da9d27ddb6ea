"""The messages that ask a chat model for an expansion, from prompts/expander.md: what training and any server see."""

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
    """The user's message, with $prompt where the prompt stands."""
    hash: str
    """First 16 hex digits of the file's SHA-256."""


@cache
def template() -> ExpanderTemplate:
    """What is under the headings `## system` and `## user` of the file."""
    text = FILE.read_text(encoding="utf-8")
    _, system, user = (part.strip() for part in text.replace("## user", "## system").split("## system"))
    return ExpanderTemplate(system, user, hashlib.sha256(text.encode()).hexdigest()[:16])


def messages(user: str) -> list[dict[str, str]]:
    """Chat messages, as /v1/chat/completions takes them, for a user's prompt. The answer is the expansion."""
    said = template()
    return [
        {"role": "system", "content": said.system},
        {"role": "user", "content": Template(said.user).substitute(prompt=user)},
    ]
