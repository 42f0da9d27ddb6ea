"""Preference pairs from prompts: two images of which one is better, because of how they were drawn or by rewards.

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
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from posttrain.distributed.processes import Processes
from posttrain.errors import UserError, counted
from posttrain.log import log
from posttrain.pairs import planning, quality
from posttrain.pairs.candidates import Drawn, begin_block, block_cost
from posttrain.pairs.config import BASE, PairsConfig
from posttrain.pairs.draw import Cost, Drawer
from posttrain.pairs.planning import Block, Journal, Plan
from posttrain.pairs.select import KEPT
from posttrain.preferences.dataset import CARD
from posttrain.preferences.writer import PreferenceWriter
from posttrain.references.shown import of_records
from posttrain.runs import startup
from posttrain.runs.guard import check_prompts, check_unchanged
from posttrain.runs.run import Run, peak_memory
from posttrain.training.judge_check import SHOWN, check_judges
from posttrain.training.loop import resuming, try_rewards
from prompts.records import PromptRecord, columns, read_prompts
from rewards.background import ScoreQueue
from rewards.base import RewardSpec
from rewards.image import JudgeReward
from rewards.load import load_rewards
from rewards.serve import serve

BACKLOG = 2**30
"""Bytes of pairs that wait for the disk on the main process; with more, it waits for them to be written."""
MAY_CHANGE = {"output", "servers", "track", "tries"}
"""Settings that a run that goes on may change: they do not decide what the pairs are."""


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
        # Until the last line: an exception anywhere between leaves it set.
        self.broken = True
        for i, row in enumerate(rows, start=first):
            if i >= self.written:
                self.writer.add_row(row)
        self.journal.add(entry)
        self.broken = False


def make(config: PairsConfig, resume: bool = False) -> None:
    """Runs a recipe into its directory. Raises UserError for mistakes that the user can correct."""
    began = time.perf_counter()
    procs, folder = Processes(), Path(config.output)
    resume = resuming(config, resume, procs)
    if procs.main:
        check_unchanged(
            config, ", so the pairs would not fit together; restore it or choose another output", free=MAY_CHANGE
        )
        check_prompts(config)
    records = read_prompts(config.prompts, references=True)
    of_records(records, config.prompts)  # references that are not there are refused before a model is read
    try_rewards(config, records)
    # A finished set needs no model: only its report is written again.
    finished = procs.from_main((folder / CARD).exists())
    if finished:
        log.info(f"{folder}: is finished: all pairs are there, and nothing is left to draw")
    drawer = None if finished else Drawer(config, procs.device)
    with Run.create(config, resume, procs.main) as run:
        if drawer is not None:
            with serve(config.servers if procs.main else [], run.path / "servers") as urls:
                run.urls = procs.from_main(urls)
                metrics = _make(config, run, procs, drawer, records)
            run.summary({**metrics, "seconds": time.perf_counter() - began, **peak_memory()})
        if procs.main:
            entries = Journal(run.path).entries
            quality.write_report(config, entries)
            quality.write_sheet(run.path)


def _make(
    config: PairsConfig, run: Run, procs: Processes, drawer: Drawer, records: list[PromptRecord]
) -> dict[str, Any]:
    """Draws until there are enough; returns what it cost, in seconds of all processes together."""
    plan = Plan(config)
    with contextlib.ExitStack() as stack:
        # The last to end, as what it waits for is ended first.
        scoring = stack.enter_context(ThreadPoolExecutor(1, "pairs"))
        # Apart from it, so that writing does not wait for scores.
        disk = stack.enter_context(ThreadPoolExecutor(1, "disk"))
        rewards = load_rewards(config.rewards, run.urls)
        queue = stack.enter_context(ScoreQueue(rewards)) if rewards else None
        output, done = None, None
        if procs.main:
            card = {"policy": drawer.names[config.policy or BASE]}
            writer = stack.enter_context(PreferenceWriter(run.path, resume=True, rows=config.shard, card=card))
            output = Output(writer, Journal(run.path, writer.written), writer.written)
            done = list(map(planning.kept, output.journal.entries))
        done_counts: list[int] = procs.from_main(done)
        """Pairs of each block that an earlier run has drawn."""
        judged = [reward.spec for reward in rewards if isinstance(reward.function, JudgeReward)]
        collector = Collector(run, procs, plan, output, disk, records, judged, untried=not any(done_counts))
        run.start(config.pairs, sum(done_counts))
        compile_seconds = drawer.warm_up()
        startup.lap("warm_up")
        began = time.perf_counter()
        while blocks := plan.generation():
            due = []
            for block in blocks:
                if block.index < len(done_counts):
                    plan.take(block, done_counts[block.index])
                else:
                    due.append(block)
            _draw_generation(config, plan, procs, drawer, queue, records, due, scoring, collector)
        collector.finish_writing()
        seconds = (time.perf_counter() - began) * procs.size
        _check_outcome(config, plan, output)
    return _costs(collector.cost, seconds, compile_seconds)


def _draw_generation(
    config: PairsConfig,
    plan: Plan,
    procs: Processes,
    drawer: Drawer,
    queue: ScoreQueue | None,
    records: list[PromptRecord],
    blocks: Sequence[Block],
    scoring: ThreadPoolExecutor,
    collector: Collector,
) -> None:
    """Draws these blocks. While a turn's images are scored, decided on and written, the next turn's are drawn."""
    # A turn has as many blocks as let each process have one of each size before they wait for each other.
    span = procs.size * len(config.sizes)
    previous: tuple[Sequence[Block], dict[int, Future[Drawn]]] | None = None
    for start in range(0, len(blocks), span):
        turn = blocks[start : start + span]
        costs = [block_cost(config, drawer.k2, block) for block in turn]
        drawn: dict[int, Future[Drawn]] = {}
        for i in procs.local_indices_by_cost(costs):
            drawn[i] = scoring.submit(begin_block(config, plan, drawer, queue, records, turn[i]))
        if previous is not None:
            collector.take(*previous)
        previous = turn, drawn
    if previous is not None:
        collector.take(*previous)


class Collector:
    """Takes in what the processes have drawn, block by block in their order, and has the main process write it."""

    def __init__(
        self,
        run: Run,
        procs: Processes,
        plan: Plan,
        output: Output | None,
        disk: ThreadPoolExecutor,
        records: list[PromptRecord],
        judged: list[RewardSpec],
        untried: bool,
    ):
        self.run, self.procs, self.plan, self.output, self.disk = run, procs, plan, output, disk
        self.records, self.judged = records, judged
        self.cost = Cost()
        self._untried = untried and output is not None
        """The judges have not been checked: no pair has been kept."""
        self._writing: list[tuple[Future[None], int]] = []
        """What waits for the disk, and its bytes."""

    def take(self, turn: Sequence[Block], own: Mapping[int, Future[Drawn]]) -> None:
        """The blocks of a turn; `own` are those that this process has drawn, by their place in it."""
        waiting = time.perf_counter()
        drawn = {i: future.result() for i, future in own.items()}  # waits for their scores
        waited = time.perf_counter() - waiting
        # Without the images, which only the main process needs.
        outcomes = {i: (block.entry, block.cost) for i, block in drawn.items()}
        of_turn: dict[int, tuple[int, dict[str, Any], Cost]] = {}
        for rank, (seconds, part) in enumerate(self.procs.all_gather((waited, outcomes))):
            self.cost.waited += seconds
            for i, (entry, cost) in part.items():
                of_turn[i] = rank, entry, cost
        for i, block in enumerate(turn):
            owner, entry, cost = of_turn[i]
            self._take_block(block, owner, entry, drawn[i].rows if i in drawn else None)
            self.cost.add(cost)

    def _take_block(
        self, block: Block, owner: int, entry: dict[str, Any], own_rows: list[dict[str, Any]] | None
    ) -> None:
        # Images that wait for the disk stay in memory: more than BACKLOG of them hold up the drawing.
        while self._writing and (self._writing[0][0].done() or sum(size for _, size in self._writing) > BACKLOG):
            self._writing.pop(0)[0].result()  # which also raises what went wrong with writing
        first = sum(self.plan.kept)
        _trim(entry, self.plan.room(block))
        count = planning.kept(entry)
        # The images travel as PNG, one block at a time, to the main process alone.
        parcels = {} if own_rows is None else {0: own_rows[:count]}
        rows = self.procs.deliver(parcels).get(owner, [])
        if self._untried and rows:
            self._untried = False
            _check_judges(self.judged, self.run, self.records, entry, rows)
        if self.output is not None:
            self._writing.append((self.disk.submit(self.output.add, first, entry, rows), _bytes(rows)))
        self.plan.take(block, count)
        metrics = {"block": block.index, "source": block.source}
        for fate, times in Counter(entry["fates"]).items():
            metrics[f"fate/{fate}"] = times
        self.run.log(sum(self.plan.kept), metrics)

    def finish_writing(self) -> None:
        for written, _ in self._writing:
            written.result()


def _costs(cost: Cost, seconds: float, compile_seconds: float) -> dict[str, Any]:
    """For the summary, and as lines to the user; `seconds` are of drawing, of all processes together."""
    counted = cost.counted()
    rest = seconds - sum(cost.parts.values()) - cost.waited
    parts = dict(cost.parts) | {"waiting": cost.waited, "rest": rest}
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
        "compile_seconds": compile_seconds,
        "part_seconds": parts,
        "overhead": seconds / counted if counted else None,
        "images": dict(cost.images),
        "unit_seconds": cost.unit(),
    }


def _check_judges(
    specs: list[RewardSpec],
    run: Run,
    records: list[PromptRecord],
    entry: dict[str, Any],
    rows: list[dict[str, Any]],
) -> None:
    """On the chosen images of the first block that has any. With judges of their own: those of the queue keep to its
    event loop."""
    chosen = [Image.open(io.BytesIO(row["chosen"]["bytes"])) for row in rows[:SHOWN]]
    asked = [records[place] for place, fate in zip(entry["prompts"], entry["fates"]) if fate == KEPT][:SHOWN]
    check_judges(run, load_rewards(specs, run.urls), chosen, [r.prompt for r in asked], columns(asked))


def _check_outcome(config: PairsConfig, plan: Plan, output: Output | None) -> None:
    """Says which sources fell short. Raises UserError if there is too little of the policy, with all saved."""
    inside = 0  # pairs with an image of the policy
    for source, wanted, kept, made in zip(config.sources, plan.quotas, plan.kept, plan.made):
        inside += kept if config.on_policy(source) else 0
        if kept < wanted:
            log.warning(
                f"source {source.name}: {kept} of {counted(wanted, 'pair')} after {counted(made, 'candidate')} (tries"
                f" {config.tries:g}); quality.json says why the others were dropped"
            )
    total = sum(plan.kept)
    if total and inside >= config.on_policy_share * total - 1e-9:  # as in planning.quotas
        return
    # Before the error: what was made is kept, and the report says why there is no more.
    if output is not None:
        output.writer.flush()
        quality.write_report(config, output.journal.entries)
    raise UserError(
        f"on_policy_share: {inside} of {counted(total, 'pair')} with an image of the policy, and"
        f" {config.on_policy_share:g} of them should have one: see {config.output}/quality.json for what was dropped,"
        " raise tries and go on with --resume"
        if total
        else f"pairs: not one candidate was kept: see {config.output}/quality.json for what was dropped"
    )


def _bytes(rows: Sequence[dict[str, Any]]) -> int:
    """Bytes of the images of pairs."""
    return sum(len(row["chosen"]["bytes"]) + len(row["rejected"]["bytes"]) for row in rows)


def _trim(entry: dict[str, Any], room: int) -> None:
    """Leaves out what the source no longer wants."""
    fates = entry["fates"]
    for i, fate in enumerate(fates):
        # The first ones stay, whichever process drew the block.
        if fate == KEPT and room <= 0:
            fates[i] = "surplus"
        room -= fate == KEPT
