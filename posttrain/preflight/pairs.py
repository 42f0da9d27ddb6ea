"""The preflight of pairs: a few candidates of each source, drawn, scored and selected with the code of
pairs/candidates.py."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from posttrain.config.types import changed
from posttrain.distributed.processes import Processes
from posttrain.errors import counted
from posttrain.model.k2 import to_pil
from posttrain.pairs import planning
from posttrain.pairs.candidates import begin_block
from posttrain.pairs.config import PairsConfig
from posttrain.pairs.draw import Cost, Drawer
from posttrain.pairs.planning import Block, Plan
from posttrain.pairs.select import KEPT
from posttrain.preflight.checks import Row, phase
from posttrain.preflight.common import Checks, memory_row
from posttrain.runs.progress import duration
from posttrain.training.loop import try_rewards
from prompts.records import PromptRecord, read_prompts
from rewards.background import ScoreQueue
from rewards.load import load_rewards

CANDIDATES = 4
"""Most candidates that are drawn of a source."""
STEPS = 8
"""Most steps they are drawn in, where a source uses the recipe's number."""


def rows(config: PairsConfig, procs: Processes, folder: Path) -> list[Row]:
    """Raises UserError if nothing can be checked."""
    records = read_prompts(config.prompts, references=True)
    try_rewards(config, records)
    phase("the model and its checkpoints are read")
    few = changed(config, steps=min(config.steps, STEPS), block=min(config.block, CANDIDATES))
    return PairsChecks(config, few, procs, Drawer(few, procs.device), records, folder).run()


class PairsChecks(Checks):
    def __init__(
        self, config: PairsConfig, few: PairsConfig, procs: Processes, drawer: Drawer, records: list[PromptRecord],
        folder: Path,
    ):  # fmt: skip
        super().__init__(config, procs, folder, "micro_batch")
        self.few, self.drawer, self.records = few, drawer, records
        self.size = (few.sizes[0][0], few.sizes[0][1])
        self.work = Cost()
        self.rates: list[float] = []
        """Share of the candidates that were kept, for each source that was drawn."""

    def run(self) -> list[Row]:
        phase("the network is compiled")
        self.drawer.warm_up()
        with contextlib.ExitStack() as servers:
            self.check("judges", lambda: self.judges(servers))
            specs = self.asked(self.config.rewards)
            self.few = changed(self.few, rewards=specs)
            # Without rewards there is no queue: sources that are not judged need none.
            with contextlib.ExitStack() as stack:
                queue = stack.enter_context(ScoreQueue(load_rewards(specs, self.urls))) if specs else None
                for index, source in enumerate(self.few.sources):
                    self.check(f"source {source.name}", lambda index=index: self.source(index, queue))
        self.check("cost", self.time)
        return self.rows

    def judged_images(self) -> tuple[list[Any], Sequence[PromptRecord]]:
        images: list[Any] = []
        prompts = [record.prompt for record in self.records[:CANDIDATES]]
        self.drawer.begin()
        draw = self.few.sources[0].draws()[0]
        self.drawer.draw(draw, prompts, range(len(prompts)), self.size, lambda _, drawn: images.extend(to_pil(drawn)))
        return images, self.records

    def source(self, index: int, queue: ScoreQueue | None) -> Iterator[Row]:
        """Checks that the images of a candidate differ and, if rewards rank them, that their scores differ."""
        source = self.few.sources[index]
        block = Block(0, index, 0, self.few.block, self.size)
        drawn = begin_block(self.few, Plan(self.few), self.drawer, queue, self.records, block)()
        self.work.add(drawn.cost)
        fates = Counter(drawn.entry["fates"])
        distances = [d for d in drawn.entry["distances"] if d is not None]
        self.rates.append(fates[KEPT] / block.count)
        counts = ", ".join(f"{count} {fate}" for fate, count in fates.most_common())
        measured = f"of {counted(block.count, 'candidate')}: {counts}"
        if distances:
            measured += f"; distance of the two images {np.mean(distances):.3f} on average"
        margins = [margin for margin in drawn.entry["margins"] if margin is not None]
        if margins:
            above = sum(margin > 0 for margin in margins)
            measured += f"; the rewards put the chosen one higher in {above} of {len(margins)}"
        alike = fates["near-duplicate"] + fates["unscored"] == block.count
        # Rewards that give both images the same score cannot rank them.
        blind = source.judged is not None and not any(margins)
        remedy = "its images are alike, or the rewards cannot tell them apart: change how it draws, or the rewards"
        yield Row(f"source {source.name}", not (alike or blind), measured, remedy)

    def time(self) -> Iterator[Row]:
        """The time of the whole set, if the same share of candidates is kept; at least one in ten is assumed."""
        yield memory_row(self.field)
        unit = self.work.unit()
        if len(self.rates) < len(self.few.sources) or "forward" not in unit:
            yield Row("run", None, "how long a source takes is not known")
            return
        seconds, images, plan = 0.0, 0, Plan(self.config)
        for source, quota, rate in zip(self.config.sources, plan.quotas, self.rates):
            # A source stops at `tries` candidates for each pair, however few were kept.
            candidates = math.ceil(min(quota / max(rate, planning.LEAST_RATE), self.config.tries * quota))
            count = candidates * source.group_size
            for draw in source.draws():
                seconds += count * (self.config.forwards(draw) * unit["forward"] + unit["decode"])
                images += count
        device = "GPU" if torch.cuda.is_available() else "CPU"
        measured = f"about {duration(seconds)} on one {device}: {counted(images, 'image')} for"
        measured += f" {counted(self.config.pairs, 'pair')}; a forward of an image takes"
        measured += f" {unit['forward'] * 1000:.3g} ms, its decoding"
        measured += f" {unit['decode'] * 1000:.3g} ms"
        yield Row("run", True, measured)
