from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prompts.records import PromptRecord


@dataclass(frozen=True)
class Suite:
    kind: str
    records: list[PromptRecord]
    reward: dict | None
    about: str

    def aggregate(self, rows: Sequence[dict]) -> dict[str, float | None]:
        return {}


def read(kind: str, path: str) -> Suite:
    raise NotImplementedError
