"""Preference pairs from prompts: two pictures of which one is better, because of how they were drawn or by rewards.

A source of pairs draws each prompt in two ways of which one is known to be better (delta learning, arXiv:2507.06187:
only the difference must be reliable), or draws a group and takes the best and the worst by the rewards. Pairs of which
the rewards are not sure are dropped, and more are drawn until each source has its share.

    posttrain pairs --config recipes/nano/pairs.yaml

The directory it leaves is a preference set (`preferences.py`) and has beside it quality.json, which says how good the
pairs should be, pairs.png, which shows some, and candidates.jsonl, a journal of every candidate, from which a run that
was killed goes on. Candidates are drawn in blocks; a block holds the same candidates, batched alike, whichever process
draws it, so any number of processes, and a run that goes on, make the same set.
"""

from __future__ import annotations

import contextlib
import io
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from posttrain.distributed.processes import Processes
from posttrain.errors import UserError
from posttrain.log import log
from posttrain.model import flops, sampler
from posttrain.model.k2 import K2, to_pil
from posttrain.pairs import planning, quality
from posttrain.pairs.config import DrawConfig, PairsConfig, PairSource
from posttrain.pairs.draw import Cost, Drawer
from posttrain.pairs.planning import Block, Journal, Plan
from posttrain.pairs.select import KEPT, Decision, Rules, decide_groups, decide_pairs
from posttrain.preferences.dataset import CARD, Preference, PreferenceWriter, row_of
from posttrain.runs import startup
from posttrain.runs.guard import check_unchanged
from posttrain.runs.run import Run, peak_memory
from posttrain.training.judge_check import SHOWN, check_judges
from posttrain.training.loop import resuming, try_rewards
from posttrain.training.prompt_source import in_turn
from prompts.records import PromptRecord, columns, read_prompts
from rewards.background import ScoreQueue
from rewards.base import RewardSpec, Scores
from rewards.image import JudgeReward
from rewards.load import load_rewards
from rewards.serve import serve

MEASURED = 7
"""Blocks for each one that measures what a forward and a decode cost, when its scores are there; the sizes take turns
with the blocks, so it is no multiple of their usual number."""
BACKLOG = 2**30
"""Bytes of pairs that wait for the disk on the main process; with more, it waits for them to be written."""
MAY_CHANGE = {"output", "servers", "track", "tries"}
"""Settings that a run that goes on may change: they do not decide what the pairs are."""


@dataclass
class Drawn:
    """A block's outcome."""

    entry: dict[str, Any]
    """Its line of the journal, with the fate of each candidate."""
    rows: list[dict[str, Any]]
    """Of the candidates that were kept, as a set's rows; images are PNG."""
    cost: Cost


@dataclass
class Output:
    """The set and the journal, as the main process writes them."""

    writer: PreferenceWriter
    journal: Journal
    written: int
    """Pairs that an earlier run wrote."""
    broken: bool = False
    """A block could not be written whole."""

    def add(self, first: int, entry: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        """A block's line of the journal and its pairs as rows, the first of which is number `first` of all.

        Blocks are known by the places of their lines, so none is written after one that could not be.
        """
        if self.broken:
            return
        self.broken = True
        for i, row in enumerate(rows, start=first):
            if i >= self.written:
                self.writer.add_row(row)
        self.journal.add(entry)
        self.broken = False


def make(config: PairsConfig, resume: bool = False) -> None:
    """Runs a recipe into its directory. Raises UserError for what the user can mend."""
    began = time.perf_counter()
    procs, output = Processes(), Path(config.output)
    resume = resuming(config, resume, procs)
    if procs.main:
        check_unchanged(
            config,
            ", so the pairs would not fit together; restore it or choose another output",
            free=MAY_CHANGE,
        )
    records = read_prompts(config.prompts)
    try_rewards(config)
    finished = procs.from_main((output / CARD).exists())
    drawer = None if finished else Drawer(config, procs.device)
    with Run.create(config, resume, procs.main) as run:
        if drawer is not None:
            with serve(config.servers if procs.main else [], run.path / "servers") as urls:
                figures = _make(config, run, procs, drawer, records, procs.from_main(urls))
            run.summary({**figures, "seconds": time.perf_counter() - began, **peak_memory()})
        if procs.main:
            entries = Journal(run.path).entries
            quality.write_report(config, entries)
            quality.write_sheet(run.path)


def _make(
    config: PairsConfig,
    run: Run,
    procs: Processes,
    drawer: Drawer,
    records: list[PromptRecord],
    urls: dict[str, list[str]],
) -> dict[str, Any]:
    """Draws until there are enough; returns what it cost, in seconds of all processes together."""
    plan, cost = Plan(config), Cost()
    with contextlib.ExitStack() as stack:
        aside = stack.enter_context(ThreadPoolExecutor(1, "pairs"))  # the last to end: what it waits for is ended first
        disk = stack.enter_context(ThreadPoolExecutor(1, "disk"))  # apart: what is written does not wait for scores
        rewards = load_rewards(config.rewards, urls)
        queue = stack.enter_context(ScoreQueue(rewards)) if rewards else None
        judged = [reward.spec for reward in rewards if isinstance(reward.function, JudgeReward)]
        output = None
        if procs.main:
            card = {"policy": drawer.names[config.policy or ""]}
            writer = stack.enter_context(PreferenceWriter(run.path, resume=True, rows=config.shard, card=card))
            output = Output(writer, Journal(run.path, writer.written), writer.written)
        before: list[int] = procs.from_main(output and [planning.kept(entry) for entry in output.journal.entries])
        untried = output is not None and not any(before)
        run.start(config.pairs, sum(before))
        compiling = drawer.warm_up()
        startup.lap("warm_up")
        writing: list[tuple[Future[None], int]] = []  # and the bytes of each
        began = time.perf_counter()

        def settle(turn: Sequence[Block], mine: Mapping[int, Future[Drawn]]) -> None:
            """Takes in what has become of the blocks that the processes have drawn."""
            nonlocal untried
            waiting = time.perf_counter()
            own = {i: drawn.result() for i, drawn in mine.items()}
            waited = time.perf_counter() - waiting
            by_rank = procs.all_gather((waited, {i: (drawn.entry, drawn.cost) for i, drawn in own.items()}))
            cost.waited += sum(seconds for seconds, _ in by_rank)
            parts = [part for _, part in by_rank]
            owners = {i: rank for rank, part in enumerate(parts) for i in part}
            for i, block in enumerate(turn):
                while writing and (writing[0][0].done() or sum(size for _, size in writing) > BACKLOG):
                    writing.pop(0)[0].result()
                entry, spent = parts[owners[i]][i]
                first = sum(plan.kept)
                _trim(entry, plan.room(block))
                count = planning.kept(entry)
                # The images travel as PNG, one block at a time, to the main process alone.
                rows = procs.deliver({0: own[i].rows[:count]} if i in own else {}).get(owners[i], [])
                if untried and rows:
                    untried = False
                    _check_judges(judged, run, urls, records, entry, rows)
                if output is not None:
                    writing.append((disk.submit(output.add, first, entry, rows), _bytes(rows)))
                plan.take(block, count)
                cost.add(spent)
                fates = {f"fate/{name}": n for name, n in Counter(entry["fates"]).items()}
                run.log(sum(plan.kept), {"block": block.index, "source": block.source, **fates})

        while blocks := plan.generation():
            for block in blocks:
                if block.index < len(before):  # an earlier run has drawn it
                    plan.take(block, before[block.index])
            blocks = [block for block in blocks if block.index >= len(before)]
            before_it = None
            # As many as let each process have a block of each size before they wait for each other.
            span = procs.size * len(config.sizes)
            for turn in (blocks[i : i + span] for i in range(0, len(blocks), span)):
                drawn: dict[int, Future[Drawn]] = {}
                for i in procs.local_indices_by_cost([block_cost(config, drawer.k2, block) for block in turn]):
                    drawn[i] = aside.submit(begin_block(config, plan, drawer, queue, records, turn[i]))
                # While this turn's images are scored, decided on and written, the next turn's are drawn.
                if before_it is not None:
                    settle(*before_it)
                before_it = turn, drawn
            if before_it is not None:
                settle(*before_it)
        for written, _ in writing:
            written.result()
        seconds = (time.perf_counter() - began) * procs.size
        _check_outcome(config, run, plan, output)
    counted = cost.counted()
    parts = dict(cost.parts) | {"waiting": cost.waited, "rest": seconds - sum(cost.parts.values()) - cost.waited}
    if counted:
        log.info(
            f"{seconds:.0f} s of drawing, {seconds / counted:.2f} times the {counted:.0f} s of its"
            f" {cost.images['forward']} forwards and {cost.images['decode']} decodes; {cost.waited:.0f} s of it waiting"
            " for scores"
        )
        log.info("of it " + ", ".join(f"{name} {part:.1f} s" for name, part in parts.items()))
    return {
        "drawing_seconds": seconds,
        "counted_seconds": counted,
        "waited_seconds": cost.waited,
        "compile_seconds": compiling,
        "part_seconds": parts,
        "overhead": seconds / counted if counted else None,
        "images": dict(cost.images),
        "unit_seconds": cost.unit(),
    }


def _check_judges(
    specs: list[RewardSpec],
    run: Run,
    urls: dict[str, list[str]],
    records: list[PromptRecord],
    entry: dict[str, Any],
    rows: list[dict[str, Any]],
) -> None:
    """On the chosen images of the first block that has any. With judges of their own: those of the queue keep to its
    event loop."""
    chosen = [Image.open(io.BytesIO(row["chosen"]["bytes"])) for row in rows[:SHOWN]]
    asked = [records[place] for place, fate in zip(entry["prompts"], entry["fates"]) if fate == KEPT][:SHOWN]
    check_judges(run, load_rewards(specs, urls), chosen, [r.prompt for r in asked], columns(asked))


def _check_outcome(config: PairsConfig, run: Run, plan: Plan, output: Output | None) -> None:
    """Says which sources fell short. Raises UserError if there is too little of the policy, with all saved."""
    for source, wanted, kept, made in zip(config.sources, plan.quotas, plan.kept, plan.made):
        if kept < wanted:
            log.warning(
                f"source {source.name}: {kept} of {wanted} pairs after {made} candidates (tries"
                f" {config.tries:g}); quality.json says why the others were dropped"
            )
    total = sum(plan.kept)
    inside = sum(k for k, source in zip(plan.kept, config.sources) if planning.on_policy(config, source))
    if total and inside >= config.on_policy_share * total - 1e-9:
        return
    if output is not None:
        output.writer.flush()
        quality.write_report(config, output.journal.entries)
    raise UserError(
        f"on_policy_share: {inside} of {total} pairs hold a picture of the policy, and {config.on_policy_share:g} of"
        f" them should: see {config.output}/quality.json for what was dropped, raise tries and go on with --resume"
        if total
        else f"pairs: not one candidate was kept: see {config.output}/quality.json for what was dropped"
    )


# ---- a block ----------------------------------------------------------------------------------------------


def begin_block(
    config: PairsConfig, plan: Plan, drawer: Drawer, queue: ScoreQueue | None, records: list[PromptRecord], block: Block
) -> Callable[[], Drawn]:
    """Draws a block's candidates and has them scored as they come; what it returns waits for the scores and decides,
    and may be called in another thread. The same whoever calls it, and when."""
    source = config.sources[block.source]
    draws, group = planning.draws(source), source.judged.group_size if source.judged else 1
    places = [in_turn(config.seed, plan.prompt(block, i), len(records)) for i in range(block.count)]
    seeds = [sampler.seed_for(config.seed, block.source, block.first + i) for i in range(block.count)]
    rows = [records[place] for place in places for _ in range(group)]
    noises = [sampler.seed_for(seed, -1, j) if source.judged else seed for seed in seeds for j in range(group)]
    images = np.empty((len(draws) * len(rows), *block.size, 3), np.uint8)
    submitted: list[int] = []
    drawer.begin()
    for d, draw in enumerate(draws):

        def show(part: list[int], pictures: Tensor, first: int = d * len(rows)) -> None:
            images[[first + i for i in part]] = pictures.cpu().numpy()
            submitted.extend(first + i for i in part)
            if queue is not None:
                shown = [rows[i] for i in part]
                queue.submit(to_pil(pictures), [r.prompt for r in shown], columns(shown))

        drawer.draw(draw, [r.prompt for r in rows], noises, block.size, show)
    jobs, measure = queue.hand_over() if queue is not None else [], block.index % MEASURED == 0
    began = time.perf_counter()
    if measure:  # when nothing else runs: judges may share the device
        futures.wait(jobs)
    waited = time.perf_counter() - began
    cost, cut = drawer.end(measure)
    cost.waited = waited

    def finish() -> Drawn:
        scores = queue.gather(jobs).take(np.argsort(submitted).tolist()) if queue is not None else None
        decision = _decide(config, source, images, scores, group)
        pairs = _kept_pairs(config, drawer, draws, [records[place].prompt for place in places], seeds, images, decision)
        entry = {"block": block.index, "source": source.name, "prompts": places, "cut": cut, **decision.entry()}
        return Drawn(entry, [row_of(pair) for pair in pairs], cost)

    return finish


def _decide(config: PairsConfig, source: PairSource, images: np.ndarray, scores: Scores | None, group: int) -> Decision:
    rules = Rules(config.min_margin, config.tolerance, config.min_distance)
    if source.judged is not None:
        assert scores is not None
        return decide_groups(images, scores, config.rewards, rules, group)
    screen = source.delta is not None and source.delta.screen
    return decide_pairs(images, scores, config.rewards, rules, screen)


def _kept_pairs(
    config: PairsConfig, drawer: Drawer, draws: Sequence[DrawConfig], prompts: list[str], seeds: list[int],
    images: np.ndarray, decision: Decision,
) -> list[Preference]:  # fmt: skip
    best, other = draws[0], draws[-1]
    return [
        Preference(
            prompts[i],
            *(Image.fromarray(images[j]) for j in pair),
            source="synthetic",
            chosen_policy=drawer.describe(best),
            rejected_policy=drawer.describe(other),
            chosen_on_policy=planning.is_policy(config, best),
            rejected_on_policy=planning.is_policy(config, other),
            margin=margin,
            seed=seeds[i],
        )
        for i, (fate, pair, margin) in enumerate(zip(decision.fates, decision.pairs, decision.margins))
        if fate == KEPT and pair is not None
    ]


def block_cost(config: PairsConfig, k2: K2, block: Block) -> float:
    """Operations of its forwards."""
    source = config.sources[block.source]
    images = block.count * (source.judged.group_size if source.judged else 1)
    ways = [planning.resolved(config, draw) for draw in planning.draws(source)]
    forwards = sum((way.steps or 0) * (2 if way.guidance else 1) for way in ways)
    return images * forwards * flops.of_sizes(k2, [block.size])[0]


def _bytes(rows: Sequence[dict[str, Any]]) -> int:
    """Of the images of pairs."""
    return sum(len(row[name]["bytes"]) for row in rows for name in ("chosen", "rejected"))


def _trim(entry: dict[str, Any], room: int) -> None:
    """Leaves out what the source no longer wants."""
    fates = entry["fates"]
    for i in [i for i, fate in enumerate(fates) if fate == KEPT][room:]:
        fates[i] = "surplus"
