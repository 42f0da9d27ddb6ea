"""TDM: distils K2 Raw, many steps with guidance, into a student of a few steps without, from prompts alone.

    posttrain tdm --config recipes/nano/tdm.yaml

Trajectory Distribution Matching (arXiv:2503.06674) for rectified flow; losses.py has the formulas. Student and fake
score are adapters on one base and the teacher is that base without them; `lora: null` makes copies of it. Each step
draws one trajectory of an image of each of its prompts without gradient, as the student is used: by ODE on its own few
times. Then the fake score learns, from points of these trajectories that are noised again, what the student's
distribution is; and the student, from other points of the same, follows the difference of what teacher and fake score
see there. The student is the role `policy`, so its checkpoints are sampled, exported and gone on from as any method's.

All draws come from seeds of global indices (run, step, image), and processes share a batch's images, so a resumed
run and one in more processes make the same updates.

A training step of 8 student steps costs an image 5.8 forwards on average for its trajectory, which ends at its last
point, a forward and backward of the fake score, and a forward and backward of the student with three more forwards
beside it, of the fake score and the guided teacher: 10.8 forwards and 2 backward passes.

| each step | what it is |
|---|---|
| fake_loss, generator_loss | the losses; the second follows the distance of the scores and need not fall |
| fake_grad_norm, generator_grad_norm | before clipping |
| fake_clipped_updates, generator_clipped_updates | so far |
| fake_sqrt_v, fake_eps_share; generator_... | size of what Adam divides by, and what optim.eps takes of the rate |
| fake_updates | of the fake score in this step |
| omega, omega_clipped | mean importance weight before clipping; share that was clipped |
| direction, scale | mean absolute f - r, which the student follows, and what it is divided by |

Evaluation draws held-out prompts with the student's average. `image/...` are those of image_metrics.py, and
`to_teacher/...` the ratio of some of them to those of the teacher's images of the same prompts and seeds, which are
drawn once at the start (grids/teacher.png, teacher/... in the metrics). Above 1, saturation and contrast mean colours
that burn, and high energy means added texture; diversity below 1 means images that grow alike. `fake_loss` is that of
held-out prompts.

Legend: B images of a micro-batch, N image tokens, C channels, K student steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from posttrain.config import metric_names
from posttrain.config.types import changed
from posttrain.distributed.processes import Processes
from posttrain.errors import UserError, counted
from posttrain.model import parallelize, sampler
from posttrain.model.k2 import K2, Text
from posttrain.runs.progress import grid_image
from posttrain.tdm import losses
from posttrain.tdm.config import TDMConfig
from posttrain.tdm.rollout import MU, Batch, Points, roll_out
from posttrain.training import checkpoint
from posttrain.training.evaluate import Evaluation, Evaluator, SamplingSettings
from posttrain.training.loop import SHOWN, Training, open_run, resuming, try_rewards
from posttrain.training.oom_retry import MicroBatch
from posttrain.training.policy import POLICY, add_policy, earlier_of, load_model, load_stage
from posttrain.training.prompt_source import FusedTexts, in_turn, warn_of_cut_prompts
from posttrain.training.stepper import Clock, Stepper
from posttrain.training.sums import total
from prompts.records import PromptRecord, read_prompts
from rewards.load import load_rewards

FAKE = "fake"
"""The role of the fake score."""


def train(config: TDMConfig, resume: bool = False) -> None:
    """Runs a recipe into its run directory. Raises UserError for mistakes that the user can correct."""
    procs = Processes(shardable=True)
    resume = resuming(config, resume, procs)
    records, heldout = read_prompts(config.prompts.train), read_prompts(config.prompts.heldout)
    if len(records) < config.batch:
        raise UserError(
            f"prompts.train: {config.prompts.train} holds {counted(len(records), 'prompt')} and a step takes"
            f" {config.batch}; add prompts or lower batch"
        )
    try_rewards(config, heldout)
    saved = checkpoint.load_latest(Path(config.output) / "checkpoints") if resume else None
    _refuse_distilled(config)
    k2 = load_model(config.model, procs.device, saved)
    with parallelize.sharding(k2, procs):
        add_roles(k2, config)
    student, fake = steppers(k2, config)
    micro_batch = MicroBatch(config.micro_batch, "micro_batch", procs)
    max_tokens = config.prompts.max_tokens

    with open_run(config, resume, procs) as run:
        rewards = load_rewards(config.rewards, run.urls)
        settings = []
        for n in config.student.steps:
            settings.append(SamplingSettings(n, 0.0, MU, metric_names.steps_suffix(n, config.student.steps)))
        batch, size = 4 * micro_batch.size, _size(config, 0)  # without gradients four times as many images fit
        evaluator = Evaluator(k2, heldout, rewards, config.eval, size, batch, max_tokens, procs, settings)
        warn_of_cut_prompts(k2, [*records, *heldout], max_tokens)
        facts = {
            "student": {"steps": config.student.steps, "mu": MU, "guidance": 0.0},
            "teacher": {"guidance": config.teacher.guidance},
        }
        trained = {POLICY: student, FAKE: fake}
        training = Training("tdm", config, run, procs, k2, trained, evaluator, saved, facts)
        training.history.setdefault("images", 0)
        texts, null = FusedTexts(k2, max_tokens), k2.text([""])
        if training.begin():
            training.history["teacher"] = draw_teacher(training, config)
            training.record(0, evaluate(training, config, texts, micro_batch.size))

        steps = training.steps()
        for step, metrics in updates(
            k2, config, texts, null, records, student, fake, steps, procs, micro_batch, Clock()
        ):
            training.history["images"] += config.batch
            run.log(step, metrics | training.health())
            if training.evaluation_due(step):
                training.record(step, evaluate(training, config, texts, micro_batch.size))
            if training.save_due(step):
                training.save(step)
        training.finish()


def updates(
    k2: K2,
    config: TDMConfig,
    texts: Callable[[list[str]], list[Tensor]],
    null: Text,
    records: list[PromptRecord],
    student: Stepper,
    fake: Stepper,
    steps: Iterable[int],
    procs: Processes,
    micro_batch: MicroBatch,
    clock: Clock,
) -> Iterator[tuple[int, dict[str, float]]]:
    """Trains one step at a time, and yields its number and metrics: a run's loop, and what `posttrain bench` times.

    `texts` gives the fused text (L, C) of each of some prompts.
    """
    for step in steps:
        clock.start()
        fake.rate = student.rate  # both cool down together
        metrics: dict[str, float] = {"fake_updates": config.fake.updates}
        warming = step <= config.fake.warmup  # the fake score must know the student before the student follows it
        batches: list[Batch] | None = None  # drawn once a step, and once more in smaller micro-batches
        for update in range(config.fake.updates + (not warming)):
            of_student = update == config.fake.updates  # which comes last
            for attempt in micro_batch.attempts(student if of_student else fake):
                batches = None if attempt.again else batches
                with attempt:
                    if batches is None:
                        batches = draw(k2, config, texts, records, step, procs, micro_batch.size)
                        clock.lap("trajectory")
                    if of_student:
                        metrics |= update_student(k2, config, batches, null, student, procs)
                    else:
                        metrics |= update_fake(k2, config, batches, update, fake, procs)
            clock.lap("student" if of_student else "fake")
        metrics["skipped_updates"] = student.skipped + fake.skipped
        yield step, metrics | clock.seconds


def draw(
    k2: K2,
    config: TDMConfig,
    texts: Callable[[list[str]], list[Tensor]],
    records: Sequence[PromptRecord],
    step: int,
    procs: Processes,
    micro_batch: int,
) -> list[Batch]:
    """This process's trajectories of a step, with points for the fake score's updates and, last, the student's."""
    prompts, keys = [], []
    for i in procs.local_indices(config.batch):
        row = in_turn(config.seed, (step - 1) * config.batch + i, len(records))
        prompts.append(records[row].prompt)
        keys.append((config.seed, step, i))
    warming = step <= config.fake.warmup
    updates = config.fake.updates + (not warming)
    return roll_out(k2, config.student, texts(prompts), keys, _size(config, step - 1), micro_batch, updates)


def add_roles(k2: K2, config: TDMConfig) -> None:
    """Student and fake score, both without effect yet; the teacher is the role None."""
    add_policy(k2, config.lora, config.seed, reference=True)
    role = k2.roles[POLICY]
    if role is None:  # all weights
        k2.add_full_copy(FAKE)
    else:
        k2.add_role(FAKE, role.rank, role.alpha, role.targets, sampler.seed_for(config.seed, -1))


def steppers(k2: K2, config: TDMConfig) -> tuple[Stepper, Stepper]:
    """The student's and the fake score's."""
    # The fake score must follow the student of now, so it learns faster and keeps no average.
    optim = changed(config.optim, lr=config.fake.rate * config.optim.lr, ema=0.0, average=None)
    return Stepper(k2.role_named_parameters(POLICY), config.optim), Stepper(k2.role_named_parameters(FAKE), optim)


def _size(config: TDMConfig, index: int) -> tuple[int, int]:
    height, width = config.sizes[index % len(config.sizes)]
    return height, width


def _refuse_distilled(config: TDMConfig) -> None:
    if config.model.start is None:
        return
    first = load_stage(config.model.start, asdict(config.model))
    # Its guidance would be applied to a model that has learnt it already.
    for stage in [first, *earlier_of(first)]:
        if stage.state["method"] == "tdm":
            raise UserError(f"model.start: {stage.path} is distilled already; go on from the run before it")


# ---- updates --------------------------------------------------------------------------------------------------


def update_fake(
    k2: K2, config: TDMConfig, batches: Sequence[Batch], update: int, stepper: Stepper, procs: Processes
) -> dict[str, float]:
    """One update of the fake score with the images of all processes."""
    k2.train_role(FAKE)
    sums: dict[str, float] = {}
    for batch in batches:
        loss_B, metrics = _fake_loss(k2, config, batch, batch.points[update])
        # A mean over the step's batch, whatever its micro-batches and processes.
        (loss_B.sum() / config.batch).backward()
        _add(sums, metrics)
    means = procs.means_of_sums(sums, config.batch)
    procs.sum_gradients(stepper.parameters)
    return means | {"fake_grad_norm": stepper.step()} | stepper.metrics("fake_")


def _fake_loss(k2: K2, config: TDMConfig, batch: Batch, p: Points) -> tuple[Tensor, dict[str, Tensor]]:
    fake = config.fake
    # The student's velocity as it was when the trajectory was drawn: it is updated only after the fake score.
    x0, e = sampler.x0_eps(p.x, p.v, p.t)
    x_tau = losses.renoise(sampler.noised(x0, e, p.m), p.z, p.m, p.tau)
    with k2.role(FAKE):
        v_fake = k2.velocity(x_tau, p.tau, batch.text, *batch.size)
    return losses.fake_loss(v_fake, x0, e, p.z, p.m, p.tau, fake.target, fake.weight, fake.clip)


def update_student(
    k2: K2, config: TDMConfig, batches: Sequence[Batch], null: Text, stepper: Stepper, procs: Processes
) -> dict[str, float]:
    """One update of the student with the images of all processes."""
    k2.train_role(POLICY)
    sums: dict[str, float] = {}
    for batch in batches:
        p = batch.points[-1]  # the fake score's updates take the ones before
        with k2.role(POLICY):
            v = k2.velocity(p.x, p.t, batch.text, *batch.size)  # once more, now with gradient
        x0, e = sampler.x0_eps(p.x, v, p.t)  # the gradient goes through the clean sample x0 alone
        with torch.no_grad():
            x_tau = losses.renoise(sampler.noised(x0, e, p.m), p.z, p.m, p.tau)
            with k2.role(None):
                guidance = config.teacher.guidance
                v_real = k2.guided_velocity(x_tau, p.tau, batch.text, null, guidance, *batch.size)
            with k2.role(FAKE):
                v_fake = k2.velocity(x_tau, p.tau, batch.text, *batch.size)
        loss_B, metrics = losses.generator_loss(x0, x_tau, v_real, v_fake, p.tau, config.student.distance)
        (loss_B.sum() / config.batch).backward()
        _add(sums, metrics)
    means = procs.means_of_sums(sums, config.batch)
    procs.sum_gradients(stepper.parameters)
    return means | {"generator_grad_norm": stepper.step()} | stepper.metrics("generator_")


def _add(sums: dict[str, float], metrics: dict[str, Tensor]) -> None:
    for name, value in metrics.items():
        sums[name] = sums.get(name, 0.0) + total(value)


# ---- evaluate -------------------------------------------------------------------------------------------------


def evaluate(training: Training, config: TDMConfig, texts: FusedTexts, micro_batch: int) -> Evaluation:
    """The student on held-out prompts, in each of its numbers of steps, beside the teacher's images."""
    evaluator, teacher = training.evaluator, training.history["teacher"]
    with training.policy():
        result = evaluator()
    # Without the average, as the fake score follows the student's weights themselves.
    loss = heldout_loss(training.k2, config, texts, evaluator.records, training.procs, micro_batch)
    for settings in evaluator.settings:
        result.metrics |= compared(result, settings.suffix, teacher)
    result.metrics[metric_names.FAKE_LOSS] = loss
    return result


@torch.no_grad()
def heldout_loss(
    k2: K2,
    config: TDMConfig,
    texts: FusedTexts,
    records: Sequence[PromptRecord],
    procs: Processes,
    micro_batch: int,
) -> float:
    """The fake score's loss on held-out prompts, at fixed points and noise of the student's trajectories."""
    indices = procs.local_indices(len(records))
    keys = [(config.eval.seed, 0, i) for i in indices]
    fused = texts([records[i].prompt for i in indices])
    sums: dict[str, float] = {}
    for batch in roll_out(k2, config.student, fused, keys, _size(config, 0), micro_batch, 1):
        _, metrics = _fake_loss(k2, config, batch, batch.points[0])
        _add(sums, metrics)
    return procs.means_of_sums(sums, len(records))["fake_loss"]


def draw_teacher(training: Training, config: TDMConfig) -> dict[str, float | None]:
    """Metrics of the teacher's own images, drawn once in eval.steps with its guidance."""
    evaluator, run = training.evaluator, training.run
    with training.k2.role(None):
        result = evaluator([SamplingSettings(config.eval.steps, config.teacher.guidance)])
    metrics = result.metrics | _detail(result, "")
    run.log(0, {f"teacher/{name}": value for name, value in metrics.items()})
    images = result.images[:SHOWN]
    if run.main:
        (run.path / "grids").mkdir(exist_ok=True)
        grid_image(images, 4, 4).save(run.path / "grids/teacher.png")
    prompts = [record.prompt for record in evaluator.records[:SHOWN]]
    # `teacher` in place of a step: the report shows it beside the student's images.
    run.samples("teacher", images, prompts, evaluator.seeds[:SHOWN], result.per_image_scores[:SHOWN])
    return metrics


def _detail(result: Evaluation, suffix: str) -> dict[str, float | None]:
    """Metrics of contrast and texture, which distillation changes first."""
    measured = result.measured[suffix]
    return {f"{name}{suffix}": measured[name] for name in ("image/contrast", "image/high_energy")}


def compared(result: Evaluation, suffix: str, teacher: dict[str, float | None]) -> dict[str, float | None]:
    """Further metrics of the student as drawn with these settings, most of them ratios to the teacher's."""
    metrics = _detail(result, suffix)
    student = result.metrics | metrics
    for name, compared_name in metric_names.TO_TEACHER.items():
        if compared_name in teacher:
            # The teacher is drawn once, without a suffix.
            value, of_teacher = student[compared_name + suffix], teacher[compared_name]
            ratio = value / of_teacher if value is not None and of_teacher else None
            metrics[f"to_teacher/{name}{suffix}"] = ratio
    return metrics
