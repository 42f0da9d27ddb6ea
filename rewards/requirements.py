"""Requirements that a language model finds in prompts: once a prompt, kept in a JSONL file."""

import asyncio
import json
import os
from pathlib import Path

from posttrain.errors import UserError
from prompts.parse import parse_json
from prompts.templates import Template
from rewards.endpoints import JudgeError
from rewards.judge import Judge


class Requirements:
    """Prompt -> requirements. A prompt that the file holds is never asked again, by whichever model."""

    def __init__(self, judge: Judge, template: Template, path: str | None):
        self.judge = judge
        self.template = template
        self.path = Path(path) if path is not None else None
        self._known = _read(self.path) if self.path is not None and self.path.exists() else {}
        self._asking: dict[str, asyncio.Task[list[str]]] = {}

    async def of(self, prompt: str) -> list[str]:
        """The images of a group ask for the same prompt at the same time: one request serves them all."""
        if prompt in self._known:
            return self._known[prompt]
        task = self._asking.get(prompt)
        if task is None:
            task = self._asking[prompt] = asyncio.create_task(self._ask(prompt))
            task.add_done_callback(lambda _: self._asking.pop(prompt))
        # One asker that gives up, by its time-out, must not cancel the request of the others.
        return await asyncio.shield(task)

    async def _ask(self, prompt: str) -> list[str]:
        requirements = list(map(str.strip, await self.judge.decompose(self.template, prompt)))
        if not requirements or not all(requirements):  # an empty list would mean that there is nothing to ask
            raise JudgeError(f"no requirements found in the prompt {prompt!r}")
        self._known[prompt] = requirements
        if self.path is not None:
            asked = {"model": self.judge.model, "template": self.template.hash}
            _append(self.path, {"prompt": prompt, "requirements": requirements, **asked})
        return requirements


def _read(path: Path) -> dict[str, list[str]]:
    known = {}
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; name another file") from None
    for number, line in enumerate(lines, 1):
        try:
            entry = parse_json(line)
            prompt, requirements = entry["prompt"], entry["requirements"]
            if not (isinstance(prompt, str) and isinstance(requirements, list) and requirements):
                raise TypeError
            if not all(isinstance(text, str) and text.strip() for text in requirements):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}: line {number}: not a requirements record: remove that line") from None
        known[prompt] = requirements
    return known


def _append(path: Path, entry: dict[str, object]) -> None:
    """One write to a file opened for appending, so that lines of several processes do not mix."""
    line = (json.dumps(entry, ensure_ascii=False) + "\n").encode()
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(file, line)
    finally:
        os.close(file)
