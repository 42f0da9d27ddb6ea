"""Style references: K2 learns to draw what the text asks in the style of images that it is shown.

    posttrain style --config recipes/nano/style.yaml

It is finetuning on images with captions (posttrain/sft), where each image has references beside it: parts of the same
image in another order, or another image of the same style, with a caption that does not name the style. What the
caption says is drawn from the text, and what it leaves out from the references: the style.
model/references.py is the network, draw.py has strengths and guidance.

All draws come from seeds of global indices (run, step, image), as those of sft do.

| each step | what it is |
|---|---|
| loss | mean squared error of the velocity, over the batch |
| references | mean number of references of an image |
| reference_size | side of the step's references in pixels |
| dropped | share of its images that had the empty caption |
| image_tokens | image tokens of the step's bucket |
| seconds/image | time of the step by its images |

Evaluation draws held-out prompts, each with the references that its line names, and measures the loss on held-out
images shown in tiles. At the end the first prompts are drawn at each strength of `sweep`, which the report shows.

Legend: B images of a micro-batch, N image tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from posttrain.distributed.processes import Processes
from posttrain.errors import UserError
from posttrain.log import log
from posttrain.model.k2 import K2
from posttrain.references import shown
from posttrain.references.shown import Drawer
from posttrain.sft.batches import Batch
from posttrain.sft.cache import EncodedImages
from posttrain.sft.heldout import HeldOut
from posttrain.sft.losses import flow_loss
from posttrain.sft.order import Order
from posttrain.sft.train import check_moved, evaluate, prepare, preview_size, say_small, write_table
from posttrain.style.batches import Ahead, StepJobs, StyleBatch, StyleJob, batches_of, jobs_of_step
from posttrain.style.config import StyleConfig
from posttrain.style.dataset import StyleSet, Views, square, whole
from posttrain.style.views import tiles
from posttrain.training.evaluate import Evaluator
from posttrain.training.loop import Training, open_run, resuming, try_rewards
from posttrain.training.oom_retry import MicroBatch
from posttrain.training.policy import POLICY
from posttrain.training.stepper import Clock, Stepper
from posttrain.training.sums import total
from prompts.records import PromptRecord, read_prompts
from rewards.load import load_rewards, record

SWEPT = 8
"""Prompts that are drawn at each strength."""


def train(config: StyleConfig, resume: bool = False) -> None:
    """Runs a recipe into its run directory. Raises UserError for mistakes that the user can correct."""
    procs = Processes(shardable=True)
    resume = resuming(config, resume, procs)
    source = StyleSet(config.images)
    heldout = [] if config.heldout is None else read_prompts(config.heldout, references=True)
    # Checked before the model is read.
    named = shown.of_records(heldout[: config.eval.prompts], config.heldout)
    if heldout and not any(named):
        raise UserError(f"heldout: {config.heldout} names no references; add references: [IMAGE] to its lines")
    try_rewards(config, heldout)
    if config.lanes == "references" and procs.sharded:
        raise UserError(f"lanes: references does not go with {procs.engine}; use all")
    k2, images, turbo, saved = prepare(config, source, procs, resume, config.lanes)
    views = Views(source, images, config)
    k2.train_role(POLICY)
    stepper = Stepper(k2.role_named_parameters(POLICY), config.optim)
    micro_batch = MicroBatch(config.micro_batch, "micro_batch", procs)

    with open_run(config, resume, procs) as run:
        rewards = load_rewards(config.rewards, run.urls)
        size = preview_size(config)
        if heldout:
            draw = Drawer.of(k2, named, size, max(config.references.sizes))
        else:
            heldout, draw = of_heldout_images(k2, source, images, config, size)
        batch = 4 * micro_batch.size  # without gradients four times as many images fit
        evaluator = Evaluator(
            k2, heldout, rewards, config.eval, size, batch, config.images.max_tokens, procs, draw=draw
        )
        # The base of an adapter is the model without it; of all weights, the policy until what was trained is restored.
        with k2.role(None if config.lora is not None else POLICY):
            measure = HeldOutInTiles(k2, views, config, procs, micro_batch.size)
        guidance = {"training": 0.0, "evaluation": config.eval.guidance}
        facts = {"images": images.fingerprint, "rewards": record(rewards), "guidance": guidance}
        training = Training("style", config, run, procs, k2, {POLICY: stepper}, evaluator, saved, facts)
        training.history.setdefault("images", 0)
        order = order_of(views, config)
        if training.begin():
            write_table(run, source, images)
            say_small(order)
            training.record(0, evaluate(training, measure, turbo, 0))

        steps = training.steps()
        for step, metrics in updates(k2, config, views, order, stepper, steps, procs, micro_batch, Clock()):
            training.history["images"] += config.batch
            run.log(step, metrics | training.health())
            if training.evaluation_due(step):
                training.record(step, evaluate(training, measure, turbo, step))
            if training.save_due(step):
                check_moved(k2, stepper)
                training.save(step)
        if config.sweep:
            sweep(training, config, draw)
        training.finish()


def order_of(views: Views, config: StyleConfig) -> Order:
    """The order of the entries that are trained on."""
    sizes = {entry: tuple(views.images.size[entry].tolist()) for entry in views.train}
    return Order(sizes, config.batch, config.seed)


def updates(
    k2: K2,
    config: StyleConfig,
    views: Views,
    order: Order,
    stepper: Stepper,
    steps: Iterable[int],
    procs: Processes,
    micro_batch: MicroBatch,
    clock: Clock,
) -> Iterator[tuple[int, dict[str, float]]]:
    """Trains one step at a time, and yields its number and metrics."""

    def make(step: int) -> StepJobs:
        return jobs_of_step(views, config, order, step, procs.local_indices)

    with Ahead(make, config.steps) as ahead:
        for step in steps:
            clock.start()
            jobs = ahead(step)
            metrics: dict[str, float] = {}
            for attempt in micro_batch.attempts(stepper):
                batches: list[StyleBatch] = []  # lets go of the latents of an attempt that did not fit into memory
                with attempt:
                    # Tiles and crops are drawn anew, so references are encoded in each step; images are cached.
                    batches = batches_of(
                        k2, views, jobs.own, micro_batch.size, config.time_mean, config.time_std, config.shift
                    )
                    clock.lap("prepare")
                    metrics = optimise(k2, config, batches, stepper, procs)
                    clock.lap("update")
            clock.seconds["seconds/image"] = sum(clock.seconds.values()) / config.batch
            tokens = k2.image_tokens(*views.images.size[jobs.entries[0]].tolist())
            yield step, metrics | {"reference_size": jobs.side, "image_tokens": tokens} | clock.seconds


def optimise(
    k2: K2, config: StyleConfig, batches: Sequence[StyleBatch], stepper: Stepper, procs: Processes
) -> dict[str, float]:
    """One update with the images of all processes."""
    sums = {"loss": 0.0, "dropped": 0.0, "references": 0.0}
    for batch in batches:
        with k2.role(POLICY):
            v = batch.velocity(k2)
        loss_B = flow_loss(v, batch.target)
        # A mean over the step's batch, whatever its micro-batches and processes.
        (loss_B.sum() / config.batch).backward()
        sums["loss"] += total(loss_B)
        sums["dropped"] += batch.dropped
        sums["references"] += len(loss_B) * (len(batch.shown.latents) if batch.shown else 0)
    means = procs.means_of_sums(sums, config.batch)
    procs.sum_gradients(stepper.parameters)
    return means | {"grad_norm": stepper.step()} | stepper.metrics() | {"skipped_updates": stepper.skipped}


# ---- evaluate -------------------------------------------------------------------------------------------------


class HeldOutInTiles(HeldOut):
    """The loss on held-out images, each shown in tiles: always the same ones, drawn once."""

    def __init__(self, k2: K2, own: Views, config: StyleConfig, procs: Processes, micro_batch: int):
        # Set before the base class's __init__, which asks for batches already.
        self._views, self._side = own, min(config.references.sizes)
        self._count = min(config.references.tile_counts)
        self._tiles: dict[int, np.ndarray] = {}
        super().__init__(k2, own.images, config.images.measured, config.eval.seed, procs, micro_batch)

    def _batches(self) -> list[Batch]:
        jobs = [StyleJob(job, [self._in_tiles(job.entry)]) for job in self._jobs]
        return [*batches_of(self.k2, self._views, jobs, self.micro_batch, 0.0, 1.0, 0.0)]

    def _in_tiles(self, entry: int) -> np.ndarray:
        if entry not in self._tiles:
            image = square(self._views.source[self._views.row(entry)].image, self._side)
            # From the entry's number: the order of its tiles is the same whichever process measures it.
            drawn = tiles(image, np.random.default_rng(entry), self._count)
            self._tiles[entry] = whole(drawn, self._side)
        return self._tiles[entry]


def of_heldout_images(
    k2: K2, source: StyleSet, images: EncodedImages, config: StyleConfig, size: tuple[int, int]
) -> tuple[list[PromptRecord], Drawer]:
    """Captions of held-out images, each once, with the next held-out image as its reference."""
    # An image has an entry for each resolution. Beside its own image a caption would be drawn by copying that.
    rows = list(dict.fromkeys(map(images.row, images.heldout.tolist())))
    others: dict[str, int] = {}
    for place, row in enumerate(rows):
        others.setdefault(source.captions(row)[0].text, rows[(place + 1) % len(rows)])
        if len(others) == config.eval.prompts:
            break
    references = []
    for other in others.values():
        references.append(shown.encoded(k2, [square(source[other].image, min(size))]))
    log.info("heldout is null: evaluations draw captions of held-out images, each in the style of another one")
    return list(map(PromptRecord, others)), Drawer(k2, references, [(1.0,)] * len(others), size)


def sweep(training: Training, config: StyleConfig, draw: Drawer) -> None:
    """Writes grids/sweep-step-N.png: the references of the first held-out prompts, and below them a row of images for
    each strength."""
    evaluator, (height, width) = training.evaluator, preview_size(config)
    count = min(SWEPT, len(evaluator.records))
    rows = [np.stack([draw.preview(row, height, width) for row in range(count)])]
    with training.policy():
        # From the seeds of evaluations, so that only the strength differs along a column.
        for strength in config.sweep:
            rows.append(evaluator.first(count, draw.at(strength)))
    captions = [""] * count
    for strength in config.sweep:
        captions += [f"{strength:g}"] * count
    training.run.grid(config.steps, np.concatenate(rows), len(rows), count, captions, prefix="sweep-")
