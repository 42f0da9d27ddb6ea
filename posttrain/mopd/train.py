"""MOPD: distils several teachers into one adapter, each on its own prompts, on the student's own trajectories.

    posttrain mopd --config recipes/nano/mopd.yaml

Teachers are adapters on the student's base, each with its own guidance; a prompt goes to the teacher that has one of
its tags, and a prompt of none to the anchor, whose teacher is the reference. In each step the student draws a
trajectory of each of a teacher's prompts, without guidance, and is compared with that teacher at some of its states;
losses.py has the formulas. Teachers take turns within one update, and count alike whatever their shares. K teachers
cost K adapters, not K models.

All draws come from seeds of global indices (run, step, teacher, image), and processes share a teacher's images, so a
resumed run and one in more processes make the same updates.

| each step | what it is |
|---|---|
| distance/NAME, relative/NAME | mean squared distance to this teacher's guided velocity; over its first value |
| distance_t1 to distance_t4 | over one of four parts of the noise levels, lowest first |
| cosine/NAME/NAME | how far two teachers' gradients agree, every `cosines_every` steps |

Evaluations draw held-out prompts with the student, without guidance. `retention/NAME` is what the student keeps of a
teacher's gain on that teacher's prompts (retention.py); the base and the teachers are drawn once, at the start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from posttrain.distributed.processes import Processes
from posttrain.errors import UserError, counted
from posttrain.log import log
from posttrain.model import parallelize
from posttrain.model.fingerprint import fingerprint
from posttrain.model.k2 import K2, Text
from posttrain.mopd import losses
from posttrain.mopd.config import ANCHOR, MOPDConfig
from posttrain.mopd.retention import mean, retention, scores_of
from posttrain.mopd.teachers import Teacher, add_roles, owner, role_of, routed
from posttrain.mopd.update import learn, means_of, put, size_of, taken
from posttrain.training import checkpoint
from posttrain.training.evaluate import Evaluation, Evaluator, SamplingSettings
from posttrain.training.loop import Training, open_run, resuming, try_rewards
from posttrain.training.oom_retry import MicroBatch
from posttrain.training.policy import POLICY, load_model
from posttrain.training.prompt_source import FusedTexts, warn_of_cut_prompts
from posttrain.training.stepper import Clock, Stepper
from prompts.records import PromptRecord, read_prompts
from rewards.load import load_rewards

NOTHING = 1e-8
"""A teacher without guidance that is nearer than this to the untrained student teaches nothing."""


def train(config: MOPDConfig, resume: bool = False) -> None:
    """Runs a recipe into its run directory. Raises UserError for mistakes that the user can correct."""
    procs = Processes(shardable=True)
    resume = resuming(config, resume, procs)
    records, heldout = read_prompts(config.prompts.train), read_prompts(config.prompts.heldout)
    teachers = routed(config, records)
    owners = [owner(config, record) for record in heldout[: config.eval.prompts]]
    try_rewards(config, heldout)
    saved = checkpoint.load_latest(Path(config.output) / "checkpoints") if resume else None
    k2 = load_model(config.model, procs.device, saved)
    with parallelize.sharding(k2, procs):
        add_roles(k2, config)
    # A teacher's run may have been trained further since: a resumed run must learn from the same weights.
    prints = {name: fingerprint(k2.role_state_dict(role_of(name))) for name in config.teachers}
    refuse_changed(prints, saved)
    k2.train_role(POLICY)
    stepper = Stepper(k2.role_named_parameters(POLICY), config.optim)
    micro_batch = MicroBatch(config.micro_batch, "micro_batch", procs)
    max_tokens = config.prompts.max_tokens

    with open_run(config, resume, procs) as run:
        rewards = load_rewards(config.rewards, run.urls)
        batch, size = 4 * micro_batch.size, size_of(config, 1)  # without gradients four times as many images fit
        evaluator = Evaluator(k2, heldout, rewards, config.eval, size, batch, max_tokens, procs)
        own: list[PromptRecord] = []
        for teacher in teachers:
            own += teacher.records
        warn_of_cut_prompts(k2, [*own, *heldout], max_tokens)
        facts = {"teachers": prints, "guidance": {"training": 0.0, "evaluation": config.eval.guidance}}
        training = Training("mopd", config, run, procs, k2, {POLICY: stepper}, evaluator, saved, facts)
        history = training.history
        history.setdefault("images", 0)
        texts, null = FusedTexts(k2, max_tokens), k2.text([""])
        if training.begin():
            warn_of_guidance(config)
            measure_teachers(training, config, owners)
            training.record(0, evaluate(training, config, owners))

        steps = training.steps()
        for step, metrics in updates(k2, config, teachers, texts, null, stepper, steps, procs, micro_batch, Clock()):
            history["images"] += sum(teacher.images for teacher in teachers)
            # Of the run's first step: a resumed run finds it in its history.
            first = history.setdefault("first_distance", {t.name: metrics[f"distance/{t.name}"] for t in teachers})
            refuse_no_teacher(config, step, metrics)
            for name, value in first.items():
                metrics[f"relative/{name}"] = metrics[f"distance/{name}"] / value if value else None
            run.log(step, {**metrics, **training.health(), "images": history["images"]})
            if training.evaluation_due(step):
                training.record(step, evaluate(training, config, owners))
            if training.save_due(step):
                training.save(step)
        training.finish()


def updates(
    k2: K2,
    config: MOPDConfig,
    teachers: Sequence[Teacher],
    texts: Callable[[list[str]], list[Tensor]],
    null: Text,
    stepper: Stepper,
    steps: Iterable[int],
    procs: Processes,
    micro_batch: MicroBatch,
    clock: Clock,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Trains one step at a time, and yields its number and metrics: a run's loop, and what `posttrain bench` times.

    `texts` gives the fused text (L, C) of each of some prompts.
    """
    # Each turn is one update.
    turns = [list(teachers)] if config.update == "cycle" else [[teacher] for teacher in teachers]
    for step in steps:
        clock.start()
        due = config.update == "cycle" and config.cosines_every and step % config.cosines_every == 0
        compare = bool(due) and len(teachers) > 1 and not procs.sharded  # a sharded gradient is not whole anywhere
        metrics: dict[str, Any] = {}
        for turn in turns:
            for attempt in micro_batch.attempts(stepper):
                sums: dict[str, float] = {}
                gradients: dict[str, Tensor] = {}
                with attempt:
                    for teacher in turn:
                        weight = losses.row_weight(teacher.images * config.sampling.states, len(turn))
                        learn(k2, config, teacher, texts, null, step, weight, sums, procs, micro_batch.size)
                        if compare:
                            gradients[teacher.name] = taken(stepper.parameters, procs)
                    metrics |= means_of(sums, turn, config.sampling.states, procs)
                    if compare:  # these are summed over processes already
                        put(stepper.parameters, list(gradients.values()))
                        for pair, cosine in losses.cosines(gradients).items():
                            metrics[f"cosine/{pair}"] = cosine
                    else:
                        procs.sum_gradients(stepper.parameters)
                    metrics |= {"grad_norm": stepper.step()} | stepper.metrics()
        clock.lap("optimise")
        metrics["skipped_updates"] = stepper.skipped
        yield step, metrics | clock.seconds


# ---- evaluate ---------------------------------------------------------------------------------------------


def measure_teachers(training: Training, config: MOPDConfig, owners: Sequence[str]) -> None:
    """Draws the base and each teacher once; keeps in the history the scores of each teacher's own prompts, and all
    metrics of the teachers."""
    evaluator, history = training.evaluator, training.history
    history["gains"], history["teachers"] = {}, {}
    single = config.single_rewards()
    if not single:
        return
    with training.k2.role(None):
        base = evaluator([SamplingSettings(config.eval.steps)])
    for name, teacher in config.teachers.items():
        with training.k2.role(role_of(name)):
            # All held-out prompts, not only its own, whose scores are taken below: the report shows all its metrics.
            result = evaluator([SamplingSettings(config.eval.steps, teacher.guidance)])
        reward = teacher.reward or single[0]
        rows = _rows_of(name, owners)
        scores = {"base": scores_of(base.per_image_scores, rows, reward)}
        scores["teacher"] = scores_of(result.per_image_scores, rows, reward)
        history["gains"][name] = {"reward": reward, **scores}
        history["teachers"][name] = result.metrics
        means = {who: mean(values) for who, values in scores.items()}
        if means["base"] is None or means["teacher"] is None:
            log.warning(
                f"teachers.{name}: no held-out prompt of its own has a score of {reward}, so retention/{name} is"
                " unknown"
            )
        else:
            rise = f"{means['base']:.3f} -> {means['teacher']:.3f}"
            log.info(f"teacher {name}: {reward} {rise} on {counted(len(rows), 'prompt')}")


def evaluate(training: Training, config: MOPDConfig, owners: Sequence[str]) -> Evaluation:
    """The student on held-out prompts, with what it keeps of each teacher's gain and the anchor's scores apart."""
    with training.policy():
        result = training.evaluator()
    # The base and the teachers are the same at every evaluation, so their scores come from the history.
    scores, summary = result.per_image_scores, {}
    for name, gain in training.history["gains"].items():
        rows = _rows_of(name, owners)
        student = scores_of(scores, rows, gain["reward"])
        kept = retention(gain["base"], gain["teacher"], student, config.eval.seed)
        result.metrics[f"retention/{name}"] = kept.value if kept else None
        if kept:
            result.details |= {f"retention/{name}_low": kept.low, f"retention/{name}_high": kept.high}
        summary[name] = {"reward": gain["reward"], "student": mean(student), "base": mean(gain["base"])}
        summary[name] |= {"teacher": mean(gain["teacher"]), "retention": kept and [kept.value, kept.low, kept.high]}
    training.history["retention"] = summary
    anchored = _rows_of(ANCHOR, owners)
    for name in config.single_rewards():
        result.metrics[f"{ANCHOR}/{name}"] = mean(scores_of(scores, anchored, name))
    return result


def _rows_of(name: str, owners: Sequence[str]) -> list[int]:
    """The held-out prompts of a teacher, or of the anchor."""
    return [row for row, owner_of_row in enumerate(owners) if owner_of_row == name]


# ---- guards -----------------------------------------------------------------------------------------------


def refuse_changed(prints: dict[str, str], saved: checkpoint.Checkpoint | None) -> None:
    """Raises UserError if a teacher is not the one that the run began with."""
    for name, before in (saved.state["teachers"] if saved is not None else {}).items():
        if prints.get(name) != before:
            raise UserError(f"teachers.{name}.run: is not the adapter that the run began with; restore it")


def refuse_no_teacher(config: MOPDConfig, step: int, metrics: dict[str, Any]) -> None:
    """Raises UserError if, before any update, a teacher says what the student says."""
    # With start_as: continue the student is trained already, and may well equal a teacher.
    untrained = step == 1 and config.model.start_as == "merge"
    for name, teacher in config.teachers.items():
        if untrained and teacher.guidance == 0 and metrics[f"distance/{name}"] < NOTHING:
            raise UserError(
                f"teachers.{name}.run: {teacher.run} says what the untrained student says (distance"
                f" {metrics[f'distance/{name}']:.2g}), so it teaches nothing; give a trained run"
            )


def warn_of_guidance(config: MOPDConfig) -> None:
    if any(config.eval.guidance) and any(teacher.guidance for teacher in config.teachers.values()):
        log.warning("eval.guidance: teachers with guidance are absorbed, and guidance on top of that adds to it")
