"""How many pairs each source makes, which candidates are drawn next, and the journal of those that were. No torch.

All of it follows from the recipe and from how many candidates were kept so far, whoever drew them: so any number of
processes, and a run that was killed and goes on, draw the same candidates in the same blocks.
"""

from __future__ import annotations

import bisect
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from posttrain.pairs.config import DrawConfig, PairsConfig, PairSource
from posttrain.runs.files import append_line, replace_text

KEPT = "kept"
"""The fate of a candidate that makes a pair."""
LEAST_RATE = 0.1
"""A source is planned for as if at least this share of its candidates were kept."""


@dataclass(frozen=True)
class Block:
    """Candidates that are drawn together."""

    index: int
    source: int
    first: int
    """The first candidate, counted within the source."""
    count: int
    size: tuple[int, int]


class Plan:
    """What is still to be drawn: call `generation` until it is empty, and `take` each of its blocks."""

    def __init__(self, config: PairsConfig) -> None:
        self.config = config
        shares = [source.share for source in config.sources]
        policy = [on_policy(config, source) for source in config.sources]
        self.quotas = quotas(config.pairs, shares, policy, config.on_policy_share)
        """Pairs of each source."""
        self.kept, self.made = [0] * len(shares), [0] * len(shares)
        """Pairs and candidates of each source so far."""
        self._blocks = 0

    def generation(self) -> list[Block]:
        """As many candidates as it should take to fill the quotas, given how many were kept so far."""
        blocks = []
        for s, (quota, kept, made) in enumerate(zip(self.quotas, self.kept, self.made)):
            rate = max(kept / made, LEAST_RATE) if made else 1.0
            most = math.ceil(self.config.tries * quota) - made
            count = min(math.ceil((quota - kept) / rate), most)
            for first in range(made, made + count, self.config.block):
                height, width = self.config.sizes[self._blocks % len(self.config.sizes)]
                many = min(self.config.block, made + count - first)
                blocks.append(Block(self._blocks, s, first, many, (height, width)))
                self._blocks += 1
        return blocks

    def room(self, block: Block) -> int:
        """Pairs that its source still wants."""
        return self.quotas[block.source] - self.kept[block.source]

    def take(self, block: Block, kept: int) -> None:
        self.made[block.source] += block.count
        self.kept[block.source] += kept

    def prompt(self, block: Block, i: int) -> int:
        """The place of a candidate's prompt in the endless order of prompts, which the sources take in turns."""
        return (block.first + i) * len(self.quotas) + block.source


class Journal:
    """candidates.jsonl: a line for each block in its order, on disk when `add` returns."""

    def __init__(self, folder: Path, written: int | None = None) -> None:
        """Reads what is there. With `written`, the number of pairs in whole files, what goes beyond it is forgotten,
        and will be drawn again; so will a line that was cut off."""
        self.path = folder / "candidates.jsonl"
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        self.entries: list[dict[str, Any]] = [json.loads(line) for line in lines if line.endswith("\n")]
        if written is None:
            return
        totals = list(itertools.accumulate(map(kept, self.entries)))
        self.entries = self.entries[: bisect.bisect_right(totals, written)]
        replace_text(self.path, "".join(map(_line, self.entries)))

    def add(self, entry: dict[str, Any]) -> None:
        self.entries.append(entry)
        append_line(self.path, _line(entry))


def kept(entry: dict[str, Any]) -> int:
    """Pairs that a block of the journal gave."""
    return entry["fates"].count(KEPT)


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry, ensure_ascii=False, allow_nan=False) + "\n"


def resolved(config: PairsConfig, draw: DrawConfig) -> DrawConfig:
    """The same way to draw with `base`, `policy` and defaults replaced by what they mean; base is the empty name."""
    names = {"policy": config.policy or "", "base": ""}
    checkpoint = names.get(draw.checkpoint, draw.checkpoint)
    return replace(draw, checkpoint=checkpoint, steps=draw.steps or config.steps)


def is_policy(config: PairsConfig, draw: DrawConfig) -> bool:
    """Whether it draws as the policy does: its checkpoint, no guidance, the recipe's steps, nothing degraded."""
    return resolved(config, draw) == resolved(config, DrawConfig())


def draws(source: PairSource) -> list[DrawConfig]:
    """Its ways to draw: stronger and weaker, or the one of the group."""
    if source.delta is not None:
        return [source.delta.stronger, source.delta.weaker]
    assert source.judged is not None
    return [source.judged.draw]


def on_policy(config: PairsConfig, source: PairSource) -> bool:
    """Whether each of its pairs holds a picture of the policy."""
    return any(is_policy(config, draw) for draw in draws(source))


def quotas(pairs: int, shares: Sequence[float], on_policy: Sequence[bool], least: float) -> list[int]:
    """Pairs of each source: by its share, but at least the share `least` of all to those that are on-policy.

    Sums to `pairs`; `least` is not met only if no source is on-policy.
    """
    inside = sum(share for share, on in zip(shares, on_policy) if on)
    wanted = max(math.ceil(least * pairs - 1e-9), round(pairs * inside / sum(shares))) if inside else 0
    parts = {True: wanted, False: pairs - wanted}
    counts = [0] * len(shares)
    for on, total in parts.items():
        rows = [i for i, o in enumerate(on_policy) if o == on]
        for i, count in zip(rows, largest_remainder(total, [shares[i] for i in rows])):
            counts[i] = count
    return counts


def largest_remainder(total: int, shares: Sequence[float]) -> list[int]:
    """`total` in whole numbers as near to the shares as can be; ties go to the first."""
    exact = [total * share / sum(shares) for share in shares]
    counts = [math.floor(number) for number in exact]
    order = sorted(range(len(shares)), key=lambda i: counts[i] - exact[i])
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    return counts
