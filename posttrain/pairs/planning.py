"""How many pairs each source makes, which candidates are drawn next, and the journal of drawn blocks. Without torch.

Everything follows from the recipe and from how many candidates were kept so far. Any number of processes, and a run
that was killed and resumed, therefore draw the same candidates in the same blocks.
"""

from __future__ import annotations

import bisect
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.pairs.config import PairsConfig
from posttrain.runs.files import append_line, replace_text
from prompts.parse import whole_lines

KEPT = "kept"
"""The fate of a candidate that makes a pair."""
LEAST_RATE = 0.1
"""Plans assume that at least this share of a source's candidates is kept."""


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
    """Plans what is still to be drawn: call `generation` until it is empty, and `take` for each of its blocks."""

    def __init__(self, config: PairsConfig) -> None:
        self.config = config
        shares = [source.share for source in config.sources]
        policy = list(map(config.on_policy, config.sources))
        self.quotas = quotas(config.pairs, shares, policy, config.on_policy_share)
        """Pairs of each source."""
        self.kept, self.made = [0] * len(shares), [0] * len(shares)
        """Pairs and candidates of each source so far."""
        self._blocks = 0

    def generation(self) -> list[Block]:
        """Blocks of as many candidates as the quotas should need, given how many were kept so far."""
        # Too few are asked for at first, since some will be dropped; the next generation makes up for it.
        blocks = []
        for s, (quota, kept, made) in enumerate(zip(self.quotas, self.kept, self.made)):
            # Nothing is known of a source at first, so every candidate is expected to be kept.
            rate = max(kept / made, LEAST_RATE) if made else 1.0
            most = math.ceil(self.config.tries * quota) - made
            count = min(math.ceil((quota - kept) / rate), most)
            for first in range(made, made + count, self.config.block):
                # Sizes take turns by block over all sources, so each source gets all of them.
                height, width = self.config.sizes[self._blocks % len(self.config.sizes)]
                many = min(self.config.block, made + count - first)
                blocks.append(Block(self._blocks, s, first, many, (height, width)))
                self._blocks += 1
        return blocks

    def room(self, block: Block) -> int:
        """Pairs that the block's source still needs."""
        return self.quotas[block.source] - self.kept[block.source]

    def take(self, block: Block, kept: int) -> None:
        self.made[block.source] += block.count
        self.kept[block.source] += kept

    def prompt(self, block: Block, i: int) -> int:
        """The place of a candidate's prompt in the endless order of prompts, in which the sources take turns."""
        return (block.first + i) * len(self.quotas) + block.source


class Journal:
    """candidates.jsonl: one line for each block, in order. It is on disk when `add` returns."""

    def __init__(self, folder: Path, written: int | None = None) -> None:
        """Reads the existing lines. With `written`, the number of pairs in complete files, blocks beyond it are removed
        and will be drawn again, and so will a line that was cut off."""
        self.path = folder / "candidates.jsonl"
        self.entries: list[dict[str, Any]] = list(map(json.loads, whole_lines(self.path)))
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


def quotas(pairs: int, shares: Sequence[float], on_policy: Sequence[bool], least: float) -> list[int]:
    """Pairs of each source by its share, but at least the share `least` of all pairs from on-policy sources.

    They sum to `pairs`. Only if no source is on-policy is `least` not met.
    """
    inside = sum(itertools.compress(shares, on_policy))
    # 1e-9: 0.07 * 100 is a little more than 7, which must not become 8.
    wanted = max(math.ceil(least * pairs - 1e-9), round(pairs * inside / sum(shares))) if inside else 0
    counts = [0] * len(shares)
    for on, total in ((True, wanted), (False, pairs - wanted)):
        sources = [i for i, flag in enumerate(on_policy) if flag == on]
        parts = largest_remainder(total, [shares[i] for i in sources])
        for i, count in zip(sources, parts):
            counts[i] = count
    return counts


def largest_remainder(total: int, shares: Sequence[float]) -> list[int]:
    """`total` divided into whole numbers by the shares, with the largest-remainder method; ties go to the first."""
    whole = sum(shares)
    exact = [total * share / whole for share in shares]
    counts = list(map(math.floor, exact))
    # By what rounding down took from each; sorting is stable.
    order = sorted(range(len(shares)), key=lambda i: counts[i] - exact[i])
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    return counts
