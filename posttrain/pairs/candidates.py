"""A block of candidates: drawn, scored as they come, and decided on; the same whichever process does it, and when."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent import futures
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from posttrain.image_reader import read_image
from posttrain.model import flops, sampler
from posttrain.model.k2 import K2, to_pil
from posttrain.pairs.config import DrawConfig, PairsConfig, PairSource
from posttrain.pairs.draw import Cost, Drawer
from posttrain.pairs.planning import Block, Plan
from posttrain.pairs.select import KEPT, Decision, Rules, decide_groups, decide_pairs
from posttrain.preferences.dataset import Preference, Reference
from posttrain.preferences.writer import row_of
from posttrain.references.shown import of_records
from posttrain.training.prompt_source import in_turn
from prompts.records import PromptRecord, columns
from rewards.background import ScoreQueue
from rewards.base import Scores

MEASURED = 7
"""Blocks for each one that measures what a forward and a decode cost, when its scores are there; the sizes take turns
with the blocks, so it is not a multiple of their usual number."""


@dataclass
class Drawn:
    """A block's outcome."""

    entry: dict[str, Any]
    """Its line of the journal, with the fate of each candidate."""
    rows: list[dict[str, Any]]
    """The kept candidates as rows of a set; images are PNG."""
    cost: Cost


def begin_block(
    config: PairsConfig, plan: Plan, drawer: Drawer, queue: ScoreQueue | None, records: list[PromptRecord], block: Block
) -> Callable[[], Drawn]:
    """Draws a block's candidates and has them scored as they come; what it returns waits for the scores and decides,
    and may be called in another thread. The same whoever calls it, and when."""
    source = config.sources[block.source]
    draws, group = source.draws(), source.group_size
    # Of each candidate: the place of its prompt and its seed. Of each of its images: the record and the seed of noise.
    places: list[int] = []
    seeds: list[int] = []
    rows: list[PromptRecord] = []
    noises: list[int] = []
    for i in range(block.count):
        place = in_turn(config.seed, plan.prompt(block, i), len(records))
        seed = sampler.seed_for(config.seed, block.source, block.first + i)
        places.append(place)
        seeds.append(seed)
        rows += [records[place]] * group
        # The images of a pair share their noise, so that little else differs; those of a group must differ.
        noises += [sampler.seed_for(seed, -1, j) for j in range(group)] if source.judged else [seed]
    prompts = [row.prompt for row in rows]
    named = of_records(rows, config.prompts)
    images = np.empty((len(draws) * len(rows), *block.size, 3), np.uint8)
    submitted: list[int] = []
    drawer.begin()
    # Images lie draw by draw; within a draw in the order of rows.
    for d, draw in enumerate(draws):

        def show(part: list[int], decoded: Tensor, first: int = d * len(rows)) -> None:
            at = np.add(first, part)
            images[at] = decoded.cpu().numpy()
            submitted.extend(at.tolist())
            if queue is not None:
                shown = [rows[i] for i in part]
                queue.submit(to_pil(decoded), [prompts[i] for i in part], columns(shown))

        drawer.draw(draw, prompts, noises, block.size, show, named)
    jobs = queue.hand_over() if queue is not None else []
    measure = block.index % MEASURED == 0
    began = time.perf_counter()
    if measure:  # when nothing else runs: judges may share the device
        futures.wait(jobs)
    waited = time.perf_counter() - began
    cost, cut = drawer.end(measure)
    cost.waited = waited

    def finish() -> Drawn:
        # Images were submitted as they were decoded; their scores go back into the order of `images`.
        scores = queue.gather(jobs).take(np.argsort(submitted).tolist()) if queue is not None else None
        decision = _decide(config, source, images, scores, group)
        pairs = _kept_pairs(config, drawer, draws, rows[::group], seeds, images, decision)
        entry = {"block": block.index, "source": source.name, "prompts": places, "cut": cut, **decision.entry()}
        return Drawn(entry, list(map(row_of, pairs)), cost)

    return finish


def _decide(config: PairsConfig, source: PairSource, images: np.ndarray, scores: Scores | None, group: int) -> Decision:
    rules = Rules(config.min_margin, config.tolerance, config.min_distance)
    if source.judged is not None:
        assert scores is not None
        return decide_groups(images, scores, config.rewards, rules, group)
    screen = source.delta is not None and source.delta.screen
    return decide_pairs(images, scores, config.rewards, rules, screen)


def _kept_pairs(
    config: PairsConfig, drawer: Drawer, draws: Sequence[DrawConfig], records: list[PromptRecord], seeds: list[int],
    images: np.ndarray, decision: Decision,
) -> list[Preference]:  # fmt: skip
    best, other = draws[0], draws[-1]  # the same where a group is drawn in one way
    kept = []
    for i, (fate, pair, margin) in enumerate(zip(decision.fates, decision.pairs, decision.margins)):
        if fate != KEPT or pair is None:
            continue
        chosen, rejected = pair
        (named,) = of_records(records[i : i + 1], config.prompts)
        kept.append(
            Preference(
                records[i].prompt,
                Image.fromarray(images[chosen]),
                Image.fromarray(images[rejected]),
                source="synthetic",
                chosen_policy=drawer.describe(best),
                rejected_policy=drawer.describe(other),
                chosen_on_policy=config.is_policy(best),
                rejected_on_policy=config.is_policy(other),
                margin=margin,
                seed=seeds[i],
                references=[Reference(read_image(one.path), one.strength) for one in named],
            )
        )
    return kept


def block_cost(config: PairsConfig, k2: K2, block: Block) -> float:
    """Operations of its forwards."""
    source = config.sources[block.source]
    forwards = sum(map(config.forwards, source.draws()))
    return block.count * source.group_size * forwards * flops.of_sizes(k2, [block.size])[0]
