"""TDM: distils K2 Raw, many steps with guidance, into a student of a few steps without, from prompts alone.

    posttrain tdm --config recipes/nano/tdm.yaml

Trajectory Distribution Matching (arXiv:2503.06674) for rectified flow; tdm_loss.py has the formulas. Student and fake
score are adapters on one base and the teacher is that base without them; `lora: null` makes copies of it. Each step
draws one trajectory of a picture of each of its prompts without gradient, as the student is used: by ODE on its own few
times. Then the fake score learns, from points of these trajectories that are noised again, what the student's
distribution is; and the student, from other points of the same, follows the difference of what teacher and fake score
see there. The student is the role `policy`, so its checkpoints are sampled, exported and gone on from as any method's.

All draws come from seeds of global indices (run, step, picture), and processes share a batch's pictures, so a resumed
run and one in more processes make the same updates.

A training step of 8 student steps costs a picture 5.8 forwards on average for its trajectory, which ends at its last
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

Evaluation draws held-out prompts with the student's average. `image/...` are figures.py's, and `to_teacher/...` the
ratio of some of them to those of the teacher's pictures of the same prompts and seeds, which are drawn once at the
start (grids/teacher.png, teacher/... in the metrics): above 1, saturation and contrast tell of colours that burn, high
energy of texture, and below 1, diversity of pictures that grow alike. `fake_loss` is that of held-out prompts.

Legend: B pictures of a micro-batch, N image tokens, C channels, K student steps.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain.config.metrics import FAKE_LOSS, TO_TEACHER, steps_suffix
from posttrain.distributed.processes import Processes
from posttrain.errors import UserError
from posttrain.model import parallelize, sampler
from posttrain.model.k2 import K2, Text
from posttrain.runs.progress import grid_image
from posttrain.runs.run import Run
from posttrain.tdm import losses
from posttrain.tdm.config import TDMConfig
from posttrain.tdm.rollout import MU, Batch, Points, roll_out
from posttrain.training import checkpoint
from posttrain.training.checkpoint import Checkpoint
from posttrain.training.evaluate import Evaluation, Evaluator, Way
from posttrain.training.loop import Training, Urls, in_run, resuming
from posttrain.training.oom_retry import Memory
from posttrain.training.policy import POLICY, add_policy, earlier_of, load_model
from posttrain.training.prompt_source import FusedTexts, cut_prompts, in_turn
from posttrain.training.stepper import Clock, Stepper
from prompts.records import PromptRecord, read_prompts
from rewards.load import load_rewards

FAKE = "fake"


def train(config: TDMConfig, resume: bool = False) -> None:
    """Runs a recipe into its run directory. Raises UserError for what the user can mend."""
    procs = Processes(shardable=True)
    resume = resuming(config, resume, procs)
    records, heldout = read_prompts(config.prompts.train), read_prompts(config.prompts.heldout)
    if len(records) < config.batch:
        raise UserError(
            f"prompts.train: {config.prompts.train} holds {len(records)} prompts and a step takes {config.batch}; add"
            " prompts or lower batch"
        )
    load_rewards(config.rewards, {server.name: ["http://127.0.0.1/"] for server in config.servers})  # before the wait
    saved = checkpoint.load_latest(Path(config.output) / "checkpoints") if resume else None
    _refuse_distilled(config)
    k2 = load_model(config.model, procs.device, saved)
    with parallelize.sharding(k2, procs):
        add_roles(k2, config)
    in_run(config, resume, procs, lambda run, urls: _train(config, saved, run, procs, k2, records, heldout, urls))


def _train(
    config: TDMConfig,
    saved: Checkpoint | None,
    run: Run,
    procs: Processes,
    k2: K2,
    records: list[PromptRecord],
    heldout: list[PromptRecord],
    urls: Urls,
) -> signal.Signals | None:
    student, fake = steppers(k2, config)
    batch, max_tokens = 4 * config.micro_batch, config.prompts.max_tokens
    ways = [Way(n, 0.0, MU, steps_suffix(n, config.student.steps)) for n in config.student.steps]
    evaluator = Evaluator(
        k2, heldout, load_rewards(config.rewards, urls), config.eval, _size(config, 0), batch, max_tokens, procs, ways
    )
    for warning in cut_prompts(k2, [*records, *heldout], max_tokens):
        run.say(warning)
    training = Training("tdm", config, run, procs, k2, student, evaluator, saved)
    training.steppers.append(fake)
    if saved is not None:
        k2.load_role_state_dict(FAKE, saved.tensors[FAKE])
        fake.restore(saved.tensors["fake_optimizer"], saved.state[FAKE]["optimizer"])
        fake.restore_counters(saved.state[FAKE]["counters"])

    def state() -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        optimizer, optimizer_state = fake.flattened()
        return {FAKE: k2.role_state_dict(FAKE), "fake_optimizer": optimizer}, {
            FAKE: {"optimizer": optimizer_state, "counters": fake.counters()},
            "student": {"steps": config.student.steps, "mu": MU, "guidance": 0.0},
            "teacher": {"guidance": config.teacher.guidance},
        }

    texts, null, history = FusedTexts(k2, max_tokens), k2.text([""]), training.history

    def measure(result: Evaluation) -> None:
        if "teacher" not in history:
            with k2.role(None):
                history["teacher"] = _draw_teacher(config, run, evaluator)
        for way in ways:
            result.figures |= compared(result, way.suffix, history["teacher"])
        with student.averaged():  # which puts the weights themselves back: it is those that the fake score follows
            result.figures[FAKE_LOSS] = heldout_loss(k2, config, texts, evaluator.records, procs)

    training.state, training.measure = state, measure
    history.setdefault("images", 0)
    training.begin()
    for step, metrics in updates(k2, config, texts, null, records, (student, fake), training.steps(), procs, run.say):
        history["images"] += config.batch
        run.log(step, metrics | training.health())
    training.finish()
    return training.stopped


def updates(
    k2: K2,
    config: TDMConfig,
    texts: Callable[[list[str]], list[Tensor]],
    null: Text,
    records: list[PromptRecord],
    steppers: tuple[Stepper, Stepper],
    steps: Iterable[int],
    procs: Processes,
    say: Callable[[str], None],
    clocks: Callable[[], Clock] = Clock,
) -> Iterator[tuple[int, dict[str, float]]]:
    """Trains one step at a time, and yields its number and metrics: a run's loop, and what `posttrain bench` times.

    `texts` gives the fused text (L, C) of each of some prompts; `steppers` are the student's and the fake score's.
    """
    student, fake = steppers
    drawn: dict[int, list[Batch]] = {}  # of the step, by micro_batch

    def draw(step: int, clock: Clock) -> list[Batch]:
        if config.micro_batch not in drawn:
            drawn.clear()
            mine, warming = procs.mine(config.batch), step <= config.fake.warmup
            rows = [in_turn(config.seed, (step - 1) * config.batch + i, len(records)) for i in mine]
            keys = [(config.seed, step, i) for i in mine]
            fused, updates = texts([records[row].prompt for row in rows]), config.fake.updates + (not warming)
            size = _size(config, step - 1)
            drawn[config.micro_batch] = roll_out(k2, config.student, fused, keys, size, config.micro_batch, updates)
            clock.lap("trajectory")
        return drawn[config.micro_batch]

    def attempt_fake(step: int, clock: Clock, update: int) -> dict[str, float]:
        return update_fake(k2, config, draw(step, clock), update, fake, procs)

    def attempt_student(step: int, clock: Clock) -> dict[str, float]:
        return update_student(k2, config, draw(step, clock), null, student, procs)

    memory = Memory(config, "micro_batch", procs, say)
    for step in steps:
        timed = clocks()
        drawn.clear()
        fake.rate = student.rate
        metrics = {"fake_updates": config.fake.updates}
        for update in range(config.fake.updates):
            metrics |= memory.fit(fake, attempt_fake, step, timed, update)
        timed.lap("fake")
        if step > config.fake.warmup:
            metrics |= memory.fit(student, attempt_student, step, timed)
            timed.lap("student")
        metrics["skipped_updates"] = student.skipped + fake.skipped
        yield step, metrics | timed.seconds


def add_roles(k2: K2, config: TDMConfig) -> None:
    """Student and fake score, both without effect yet; the teacher is the role None."""
    add_policy(k2, config.lora, config.seed, reference=True)
    role = k2.roles[POLICY]
    if role is None:
        k2.add_full_copy(FAKE)
    else:
        k2.add_role(FAKE, role.rank, role.alpha, role.targets, sampler.seed_for(config.seed, -1))


def steppers(k2: K2, config: TDMConfig) -> tuple[Stepper, Stepper]:
    """The student's and the fake score's."""
    optim = replace(config.optim, lr=config.fake.rate * config.optim.lr, ema=0.0)
    return Stepper(k2.role_parameters(POLICY), config.optim), Stepper(k2.role_parameters(FAKE), optim)


def _size(config: TDMConfig, index: int) -> tuple[int, int]:
    height, width = config.sizes[index % len(config.sizes)]
    return height, width


def _refuse_distilled(config: TDMConfig) -> None:
    if config.model.start is None:
        return
    first = checkpoint.load(checkpoint.find(config.model.start))
    for stage in [first, *earlier_of(first)]:
        if stage.state["method"] == "tdm":
            raise UserError(f"model.start: {stage.path} is distilled already; go on from the run before it")


# ---- updates --------------------------------------------------------------------------------------------------


def update_fake(
    k2: K2, config: TDMConfig, batches: Sequence[Batch], update: int, stepper: Stepper, procs: Processes
) -> dict[str, float]:
    """One update of the fake score with the pictures of all processes."""
    k2.train_role(FAKE)
    sums: dict[str, float] = {}
    for batch in batches:
        loss_B, metrics = _fake_loss(k2, config, batch, batch.points[update])
        (loss_B.sum() / config.batch).backward()
        _add(sums, metrics)
    means = _means(sums, config.batch, procs)
    procs.sum_gradients(stepper.parameters)
    return means | {"fake_grad_norm": stepper.step()} | stepper.metrics("fake_")


def _fake_loss(k2: K2, config: TDMConfig, batch: Batch, p: Points) -> tuple[Tensor, dict[str, Tensor]]:
    fake = config.fake
    x0, e = sampler.x0_eps(p.x, p.v, p.t)
    x_tau = losses.renoise(sampler.noised(x0, e, p.m), p.z, p.m, p.tau)
    with k2.role(FAKE):
        v_fake = k2.velocity(x_tau, p.tau, batch.text, *batch.size)
    return losses.fake_loss(v_fake, x0, e, p.z, p.m, p.tau, fake.target, fake.weight, fake.clip)


def update_student(
    k2: K2, config: TDMConfig, batches: Sequence[Batch], null: Text, stepper: Stepper, procs: Processes
) -> dict[str, float]:
    """One update of the student with the pictures of all processes."""
    k2.train_role(POLICY)
    sums: dict[str, float] = {}
    for batch in batches:
        p = batch.points[-1]
        with k2.role(POLICY):
            v = k2.velocity(p.x, p.t, batch.text, *batch.size)
        x0, e = sampler.x0_eps(p.x, v, p.t)
        with torch.no_grad():
            x_tau = losses.renoise(sampler.noised(x0, e, p.m), p.z, p.m, p.tau)
            with k2.role(None):
                scale = config.teacher.guidance
                v_real = k2.guided_velocity(x_tau, p.tau, batch.text, null, scale, *batch.size)
            with k2.role(FAKE):
                v_fake = k2.velocity(x_tau, p.tau, batch.text, *batch.size)
        loss_B, metrics = losses.generator_loss(x0, x_tau, v_real, v_fake, p.tau, config.student.distance)
        (loss_B.sum() / config.batch).backward()
        _add(sums, metrics)
    means = _means(sums, config.batch, procs)
    procs.sum_gradients(stepper.parameters)
    return means | {"generator_grad_norm": stepper.step()} | stepper.metrics("generator_")


def _add(sums: dict[str, float], metrics: dict[str, Tensor]) -> None:
    for name, value in metrics.items():
        sums[name] = sums.get(name, 0.0) + float(value.double().sum())


def _means(sums: dict[str, float], count: int, procs: Processes) -> dict[str, float]:
    """Over the pictures of all processes."""
    totals: dict[str, float] = {}
    for part in procs.each(sums):
        totals |= {name: totals.get(name, 0.0) + value for name, value in part.items()}
    return {name: total / count for name, total in totals.items()}


# ---- measure --------------------------------------------------------------------------------------------------


@torch.no_grad()
def heldout_loss(
    k2: K2, config: TDMConfig, texts: FusedTexts, records: Sequence[PromptRecord], procs: Processes
) -> float:
    """The fake score's loss on held-out prompts, at fixed points and noise of the student's trajectories."""
    mine = procs.mine(len(records))
    keys = [(config.eval.seed, 0, i) for i in mine]
    sums: dict[str, float] = {}
    fused = texts([records[i].prompt for i in mine])
    for batch in roll_out(k2, config.student, fused, keys, _size(config, 0), config.micro_batch, 1):
        _add(sums, _fake_loss(k2, config, batch, batch.points[0])[1])
    return _means(sums, len(records), procs)["fake_loss"]


def _draw_teacher(config: TDMConfig, run: Run, evaluator: Evaluator) -> dict[str, float | None]:
    """Figures of the teacher's own pictures, in eval.steps with its guidance."""
    result = evaluator([Way(config.eval.steps, config.teacher.guidance)])
    found = result.figures | _look_closer(result, "")
    run.log(0, {f"teacher/{name}": value for name, value in found.items()})
    if run.main:
        (run.path / "grids").mkdir(exist_ok=True)
        grid_image(result.images[:16], 4, 4).save(run.path / "grids/teacher.png")
    shown = [r.prompt for r in evaluator.records[:16]]
    run.samples("teacher", result.images[:16], shown, evaluator.seeds[:16], result.said[:16])
    return found


def _look_closer(result: Evaluation, suffix: str) -> dict[str, float | None]:
    measured = result.measured[suffix]
    return {f"{name}{suffix}": measured[name] for name in ("image/contrast", "image/high_energy")}


def compared(result: Evaluation, suffix: str, teacher: dict[str, float | None]) -> dict[str, float | None]:
    """Further figures of a way of drawing the student, most of them ratios to the teacher's."""
    closer = _look_closer(result, suffix)
    own, ratios = result.figures | closer, dict[str, float | None]()
    for name, of in TO_TEACHER.items():
        if of in teacher:
            mine, its = own[of + suffix], teacher[of]
            ratios[f"to_teacher/{name}{suffix}"] = mine / its if mine is not None and its else None
    return closer | ratios
