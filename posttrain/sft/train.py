"""Supervised finetuning of K2 on images with captions: the loss that it was pretrained with, on a set of your own.

    posttrain sft --config recipes/nano/sft.yaml

Images are scaled and cropped to buckets (buckets.py), and encoded once with their captions (cache.py). A batch has
images of one bucket (order.py). Each image draws a time, a noise and one of its captions, and sometimes the empty one,
which guidance needs. The times are logit-normal with the shift of the bucket's image tokens, plus `shift`, which is for
training alone: sampling keeps the model's own. images.csv in the run directory says what became of every image.

All draws come from seeds of global indices (run, step, image), and processes share a batch's images, so a resumed run
and one in more processes make the same updates.

| each step | what it is |
|---|---|
| loss | mean squared error of the velocity, over the batch |
| cropped, cropped_area | share of its images that a crop cut something off; mean share of the area that it cut |
| dropped | share of its images that had the empty caption |
| image_tokens | image tokens of the step's bucket |
| seconds/image | time of the step by its images |

Evaluation draws held-out prompts with guidance and, where `turbo` names one, on Turbo (turbo.py), and measures the loss
on held-out images (heldout.py).

Legend: B images of a micro-batch, N image tokens, C channels.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from posttrain.distributed import shards
from posttrain.distributed.processes import Processes
from posttrain.errors import UserError, counted
from posttrain.log import log
from posttrain.model import parallelize, sampler
from posttrain.model.adapters.targets import Lanes
from posttrain.model.k2 import K2
from posttrain.runs.files import replacing
from posttrain.runs.run import Run
from posttrain.sft.batches import Batch, Job, noised
from posttrain.sft.cache import CROPPED, EncodedImages, encode_images
from posttrain.sft.config import SFTConfig
from posttrain.sft.dataset import ImageSet
from posttrain.sft.heldout import HeldOut
from posttrain.sft.losses import flow_loss
from posttrain.sft.order import Order
from posttrain.sft.turbo import TURBO, add_turbo, student_of
from posttrain.training import checkpoint
from posttrain.training.evaluate import Evaluation, Evaluator, SamplingSettings, square_of
from posttrain.training.loop import SHOWN, Training, open_run, resuming, try_rewards
from posttrain.training.oom_retry import MicroBatch
from posttrain.training.policy import POLICY, B, add_policy, load_model
from posttrain.training.stepper import Clock, Stepper
from posttrain.training.sums import total
from prompts.records import PromptRecord, read_prompts
from rewards.load import load_rewards, record

TABLE = ("image", "use", "height", "width", "bucket_height", "bucket_width", "left", "top", "right", "bottom", "cut")
"""Columns of images.csv: pixels, but for use (trained, held out, or why neither) and cut, a share of the image."""


def train(config: SFTConfig, resume: bool = False) -> None:
    """Runs a recipe into its run directory. Raises UserError for mistakes that the user can correct."""
    procs = Processes(shardable=True)
    resume = resuming(config, resume, procs)
    source = ImageSet(config.images)
    heldout = [] if config.heldout is None else read_prompts(config.heldout)
    try_rewards(config, heldout)
    k2, images, turbo, saved = prepare(config, source, procs, resume)
    k2.train_role(POLICY)
    stepper = Stepper(k2.role_named_parameters(POLICY), config.optim)
    micro_batch = MicroBatch(config.micro_batch, "micro_batch", procs)

    with open_run(config, resume, procs) as run:
        rewards = load_rewards(config.rewards, run.urls)
        records = heldout or captions_of(source, images, config.eval.prompts)
        batch = 4 * micro_batch.size  # without gradients four times as many images fit
        max_tokens = config.images.max_tokens
        evaluator = Evaluator(k2, records, rewards, config.eval, preview_size(config), batch, max_tokens, procs)
        # The base of an adapter is the model without it; of all weights, the policy until what was trained is restored.
        with k2.role(None if config.lora is not None else POLICY):
            measure = HeldOut(k2, images, config.images.measured, config.eval.seed, procs, micro_batch.size)
        guidance = {"training": 0.0, "evaluation": config.eval.guidance}
        facts = {"images": images.fingerprint, "rewards": record(rewards), "guidance": guidance}
        training = Training("sft", config, run, procs, k2, {POLICY: stepper}, evaluator, saved, facts)
        training.history.setdefault("images", 0)
        order = order_of(images, config)
        if training.begin():
            write_table(run, source, images)
            say_small(order)
            training.record(0, evaluate(training, measure, turbo, 0))

        steps = training.steps()
        for step, metrics in updates(k2, config, images, order, stepper, steps, procs, micro_batch, Clock()):
            training.history["images"] += config.batch
            run.log(step, metrics | training.health())
            if training.evaluation_due(step):
                training.record(step, evaluate(training, measure, turbo, step))
            if training.save_due(step):
                check_moved(k2, stepper)
                training.save(step)
        training.finish()


def prepare(
    config: SFTConfig, source: ImageSet, procs: Processes, resume: bool, lanes: Lanes = "all"
) -> tuple[K2, EncodedImages, SamplingSettings | None, checkpoint.Checkpoint | None]:
    """The model with its roles, the encoded images, how to draw on a Turbo, and the checkpoint that it resumes.

    Raises UserError for what does not fit together, most of it before the model is read.
    """
    if procs.sharded and config.turbo is not None:
        raise UserError(f"turbo: {procs.engine} does not go with it; leave it out")
    student = student_of(config.turbo)  # refused before the model is read
    saved = checkpoint.load_latest(Path(config.output) / "checkpoints") if resume else None
    k2 = load_model(config.model, procs.device, saved)
    with parallelize.sharding(k2, procs):
        add_policy(k2, config.lora, config.seed, False, lanes)
        turbo = None
        if config.turbo is not None:
            turbo = add_turbo(k2, config.turbo, student, config.turbo_steps)
    # After the roles, which decide whether text can be kept fused.
    images = encode_images(k2, source, config.images, procs)
    if saved is not None and saved.state["images"] != images.fingerprint:
        raise UserError(f"images: not those that {saved.path} was trained on, or encoded differently; restore them")
    return k2, images, turbo, saved


def updates(
    k2: K2,
    config: SFTConfig,
    images: EncodedImages,
    order: Order,
    stepper: Stepper,
    steps: Iterable[int],
    procs: Processes,
    micro_batch: MicroBatch,
    clock: Clock,
) -> Iterator[tuple[int, dict[str, float]]]:
    """Trains one step at a time, and yields its number and metrics: a run's loop, and what `posttrain bench` times."""
    for step in steps:
        clock.start()
        metrics: dict[str, float] = {}
        for attempt in micro_batch.attempts(stepper):
            batches: list[Batch] = []  # lets go of the latents of an attempt that did not fit into memory
            with attempt:
                batches = draw(k2, config, images, order(step), step, procs, micro_batch.size)
                clock.lap("prepare")
                metrics = optimise(k2, config, batches, stepper, procs)
                clock.lap("update")
        clock.seconds["seconds/image"] = sum(clock.seconds.values()) / config.batch
        yield step, metrics | of_batch(k2, images, order(step)) | clock.seconds


# ---- draw -----------------------------------------------------------------------------------------------------


def order_of(images: EncodedImages, config: SFTConfig) -> Order:
    """The order of the entries that are trained on."""
    sizes = {entry: tuple(images.size[entry].tolist()) for entry in images.train.tolist()}
    return Order(sizes, config.batch, config.seed)


def draw(
    k2: K2, config: SFTConfig, images: EncodedImages, entries: Sequence[int], step: int, procs: Processes,
    micro_batch: int,
) -> list[Batch]:  # fmt: skip
    """This process's part of a step's entries."""
    jobs = []
    # Seeds belong to the place in the batch, so it does not matter which process has the image.
    for i in procs.local_indices(len(entries)):
        place = config.seed, step, i
        n = float(sampler.noise([sampler.seed_for(*place, 0)], (1,)))
        dropped = sampler.uniform(*place, 3) < config.images.drop_caption
        jobs.append(Job(entries[i], n, sampler.seed_for(*place, 1), sampler.uniform(*place, 2), dropped))
    return noised(k2, images, jobs, micro_batch, config.time_mean, config.time_std, config.shift)


# ---- optimise -------------------------------------------------------------------------------------------------


def optimise(
    k2: K2, config: SFTConfig, batches: Sequence[Batch], stepper: Stepper, procs: Processes
) -> dict[str, float]:
    """One update with the images of all processes."""
    sums = {"loss": 0.0, "dropped": 0.0}
    for batch in batches:
        with k2.role(POLICY):
            v = batch.velocity(k2)
        loss_B = flow_loss(v, batch.target)
        # A mean over the step's batch, whatever its micro-batches and processes.
        (loss_B.sum() / config.batch).backward()
        sums["loss"] += total(loss_B)
        sums["dropped"] += batch.dropped
    means = procs.means_of_sums(sums, config.batch)
    procs.sum_gradients(stepper.parameters)
    return means | {"grad_norm": stepper.step()} | stepper.metrics() | {"skipped_updates": stepper.skipped}


def of_batch(k2: K2, images: EncodedImages, entries: Sequence[int]) -> dict[str, float]:
    """What the crops of a step's images are like."""
    cuts = np.array(list(map(images.cut, entries)))
    return {
        "cropped": float((cuts > CROPPED).mean()),
        "cropped_area": float(cuts.mean()),
        # A batch is of one bucket.
        "image_tokens": k2.image_tokens(*images.size[entries[0]].tolist()),
    }


def check_moved(k2: K2, stepper: Stepper) -> None:
    """Raises UserError if a layer of the adapter is still without effect after updates: it has no gradient."""
    if stepper.updates == stepper.skipped:
        return
    # B begins at 0, and AdamW's first step moves it by about the rate: a B that is still 0 has had no gradient.
    still = []
    for name, factor in k2.role_named_parameters(POLICY).items():
        own = shards.own(factor).detach()  # where the model is sharded, this process's part, which may be empty
        if name.endswith(B) and own.numel() and not own.any():
            still.append(name.removesuffix(f".{B}"))
    if still:
        raise UserError(
            f"lora.targets: not moved in {counted(stepper.updates, 'update')}: {counted(len(still), 'layer')}, such as"
            f" {still[0]}; leave what does not move out, or raise optim.lr"
        )


# ---- evaluate -------------------------------------------------------------------------------------------------


def evaluate(training: Training, measure: HeldOut, turbo: SamplingSettings | None, step: int) -> Evaluation:
    """The policy on held-out prompts and images, and on Turbo."""
    with training.policy():
        result = training.evaluator()
        overall, parts = measure()
        if turbo is not None:
            with training.k2.role(POLICY, beside=[TURBO]):
                previews = training.evaluator([turbo])
            training.run.grid(step, previews.images[:SHOWN], 4, 4, prefix="turbo-")
            result.metrics |= previews.metrics
    result.metrics |= overall
    result.details |= parts
    return result


def preview_size(config: SFTConfig) -> tuple[int, int]:
    """Of the images that evaluations draw: squares of the first resolution, as image/diversity wants."""
    return square_of(config.images.resolutions[0])


def captions_of(source: ImageSet, images: EncodedImages, count: int) -> list[PromptRecord]:
    """The first captions of held-out images, each once."""
    # By text: an image in several buckets has as many entries, and images may share a caption.
    records: dict[str, PromptRecord] = {}
    for entry in images.heldout.tolist():
        text = source.captions(images.row(entry))[0].text
        records.setdefault(text, PromptRecord(text))
        if len(records) == count:
            break
    return list(records.values())


# ---- what became of the images ----------------------------------------------------------------------------------


def write_table(run: Run, source: ImageSet, images: EncodedImages) -> None:
    """Writes images.csv: a row for each crop of each image, and for each image that is left out."""
    if not run.main:
        return
    rows: list[tuple[int, list[object]]] = []
    heldout = set(images.heldout.tolist())
    # An image has as many rows as crops, in the order of the set whatever was left out.
    for entry, (i, j) in enumerate(images.entries):
        image = images.images[i]
        crop = image.crops[j]
        box = [round(value, 2) for value in crop.box]
        # All crops of an image have one use.
        use = "held out" if entry in heldout else "trained"
        row = [use, *image.size, *crop.size, *box, round(images.cut(entry), 4)]
        rows.append((image.row, [source.name(image.row), *row]))
    for left_out, reason in images.left_out.items():
        rows.append((left_out, [source.name(left_out), reason]))
    rows.sort(key=lambda row: row[0])
    with replacing(run.path / "images.csv") as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(TABLE)
        for _, row in rows:
            writer.writerow(row)
        for bad in images.tally.bad:
            writer.writerow([bad.where, bad.reason])


def say_small(order: Order) -> None:
    """Says which buckets take several epochs to fill a batch."""
    small = order.small()
    if small:
        (height, width), fewest = min(small.items(), key=lambda item: item[1])
        log.warning(
            f"{counted(len(small), 'bucket')} cannot fill a batch ({order.batch}) in one epoch; over several, an image"
            f" comes into it more than once; the smallest, {height}x{width}, has {counted(fewest, 'image')}"
        )
