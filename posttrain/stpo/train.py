"""STPO: preference optimisation of K2 on pairs of images, without the drift of Diffusion-DPO.

    posttrain stpo --config recipes/nano/stpo_synthetic.yaml
    posttrain stpo --config recipes/nano/stpo_human.yaml      # continues from the first

The published name stands for a modified DPO term and an auxiliary loss, and no more is public: the loss here is this
project's own, in losses.py; `loss.kind: dpo` is plain Diffusion-DPO. Latents and text are encoded once
(latent_cache.py). Each update draws a batch of pairs, and for each pair one time and one noise, which both images share
under policy and reference; there is no guidance. The reference is the model without the adapter.

All draws come from seeds of global indices (run, step, pair), and processes share a batch's pairs, so a resumed run and
one in more processes make the same updates. The exact guard and the shares of the terms need each term's gradient for
the whole batch before any of it is applied; until then each has a buffer as large as the adapter. Each term's gradient
with respect to the velocities is carried through the network by a forward and backward of its own. So no graph of the
network is walked backward twice, which compiled blocks refuse (they overwrite their saved tensors).

Metrics of held-out pairs at each evaluation, with fixed times and noise; those marked * also each step, without
`pairs/`, of its batch:

| pairs/... | what it is |
|---|---|
| winner*, loser* | error of the chosen (rejected) images against the reference's: mean change over its mean |
| margin*, accuracy* | mean change of the rejected error less that of the chosen; share of pairs where it is above 0 |
| z*, z10, z50, z90 | margin in nats as the loss sees it: mean, quantiles |
| sigma*, saturated | mean weight s(-z) that a pair still has; share of pairs where it is below 0.05 |
| guard*, guarded* | part of the rejected image's gradient that is kept: mean; share of pairs where it is not all |
| cosine* | of the two errors |
| drift_winner*, drift_loser* | squared distance of the velocities to the reference's |

In the accuracy a pair whose margin is 0, as all are before the first step, counts half. Accuracy and margin do not see
divergence; winner does. `pairs/winner_t1` ... `_t4` and so on are of four equal parts of the training times, the least
noisy first.

Legend: B pairs of a micro-batch, N image tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from posttrain.distributed.processes import Processes
from posttrain.errors import UserError
from posttrain.model import flops, parallelize, sampler
from posttrain.model.k2 import K2, Text
from posttrain.model.references import References
from posttrain.preferences.dataset import read_preferences
from posttrain.references.shown import Drawer, of_records
from posttrain.stpo.config import PreferenceLossConfig, STPOConfig
from posttrain.stpo.latent_cache import Batch, EncodedPairs, Job, encode_pairs, noised
from posttrain.stpo.losses import error_change, exact_guard, has_risen, inner, norm, preference_terms
from posttrain.training import checkpoint
from posttrain.training.evaluate import Evaluation, Evaluator
from posttrain.training.loop import Training, open_run, resuming, try_rewards
from posttrain.training.oom_retry import MicroBatch
from posttrain.training.policy import POLICY, add_policy, load_model
from posttrain.training.prompt_source import in_turn
from posttrain.training.stepper import Clock, Stepper
from posttrain.training.sums import total
from prompts.records import read_prompts
from rewards.load import load_rewards, record

RELATIVE = {"winner": "winner_error", "loser": "loser_error"}
"""Changes that are reported as a share of the reference's error."""
BINS = 4


def train(config: STPOConfig, resume: bool = False) -> None:
    """Runs a recipe into its run directory. Raises UserError for mistakes that the user can correct."""
    procs = Processes(shardable=True)
    if procs.sharded and config.lora is not None and (config.loss.guard == "exact" or config.loss.terms_every):
        raise UserError(
            f"loss: {procs.engine} cannot tell terms apart: set terms_every to 0, and guard to output if it is exact"
        )
    resume = resuming(config, resume, procs)
    resized = config.pairs.size is not None
    preferences = read_preferences(config.pairs.train, config.pairs.columns, config.pairs.max_bad, resized)
    heldout = read_prompts(config.heldout, references=True)
    named = of_records(heldout[: config.eval.prompts], config.heldout)
    try_rewards(config, heldout)
    saved = checkpoint.load_latest(Path(config.output) / "checkpoints") if resume else None
    k2 = load_model(config.model, procs.device, saved)
    with parallelize.sharding(k2, procs):
        add_policy(k2, config.lora, config.seed, reference=True)
    # After the policy, which decides whether text can be kept fused.
    pairs = encode_pairs(k2, preferences, config.pairs, procs)
    if saved is not None and saved.state["pairs"] != pairs.fingerprint:
        raise UserError(f"pairs: not those that {saved.path} was trained on, or encoded differently; restore them")
    k2.train_role(POLICY)
    stepper = Stepper(k2.role_named_parameters(POLICY), config.optim)
    micro_batch = MicroBatch(config.micro_batch, "micro_batch", procs)

    with open_run(config, resume, procs) as run:
        rewards = load_rewards(config.rewards, run.urls)
        height, width = config.pairs.size or pairs.size[0].tolist()
        batch = 4 * micro_batch.size  # without gradients four times as many images fit
        draw = Drawer.of(k2, named, (height, width)) if any(named) else None
        evaluator = Evaluator(
            k2, heldout, rewards, config.eval, (height, width), batch, config.pairs.max_tokens, procs, draw=draw
        )
        guidance = {"training": 0.0, "evaluation": config.eval.guidance}
        facts = {"pairs": pairs.fingerprint, "rewards": record(rewards), "guidance": guidance}
        training = Training("stpo", config, run, procs, k2, {POLICY: stepper}, evaluator, saved, facts)
        training.history.setdefault("pairs", 0)
        if training.begin():
            training.record(0, evaluate(training, config, pairs, micro_batch.size))

        steps = training.steps()
        for step, metrics in updates(k2, config, pairs, stepper, steps, procs, micro_batch, Clock()):
            training.history["pairs"] += config.batch
            run.log(step, metrics | training.health())
            if training.evaluation_due(step):
                training.record(step, evaluate(training, config, pairs, micro_batch.size))
            if training.save_due(step):
                training.save(step)
        training.finish()


def updates(
    k2: K2,
    config: STPOConfig,
    pairs: EncodedPairs,
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
                batches = draw(k2, config, pairs, step, procs, micro_batch.size)
                clock.lap("prepare")
                metrics = optimise(k2, config, step, batches, stepper, procs)
                clock.lap("update")
        yield step, metrics | clock.seconds


# ---- draw -----------------------------------------------------------------------------------------------------


def draw(k2: K2, config: STPOConfig, pairs: EncodedPairs, step: int, procs: Processes, micro_batch: int) -> list[Batch]:
    """This process's part of a step's pairs."""
    jobs, first, n = [], (step - 1) * config.batch, len(pairs.train)
    rows = [int(pairs.train[in_turn(config.seed, first + i, n)]) for i in range(config.batch)]
    # Seeds belong to the place in the batch, so it does not matter which process has the pair.
    for i in procs.local_indices_by_cost(flops.of_sizes(k2, pairs.size[rows].tolist())):
        place = config.seed, step, i
        n = float(sampler.noise([sampler.seed_for(*place, 0)], (1,)))
        dropped = sampler.uniform(*place, 2) < config.pairs.drop_prompt
        jobs.append(Job(rows[i], n, sampler.seed_for(*place, 1), dropped))
    return noised(k2, pairs, jobs, micro_batch, config.loss.time_mean, config.loss.time_std)


# ---- optimise -------------------------------------------------------------------------------------------------


def optimise(
    k2: K2, config: STPOConfig, step: int, batches: Sequence[Batch], stepper: Stepper, procs: Processes
) -> dict[str, float]:
    """One update with the pairs of all processes."""
    settings, exact = _settings(config.loss), config.loss.kind == "stpo" and config.loss.guard == "exact"
    every = config.loss.terms_every if config.lora is not None else 0
    apart = exact or bool(every and step % every == 1 % every)
    references = [_reference(k2, batch) for batch in batches]
    # The hinge asks for the mean over the whole batch before any of its gradient is known.
    first_pass = settings["hinge"] > 0 and not exact and (len(batches) > 1 or procs.size > 1)
    regressed = first_pass and _regressed(k2, batches, references, procs)
    buffers: dict[str, list[Tensor]] = {}
    sums: dict[str, float] = {}
    for batch, reference in zip(batches, references):
        with torch.set_grad_enabled(not apart), k2.role(POLICY):
            v_w, v_l = _velocities(k2, batch)
        if apart:  # leaves: the network is gone through again for each term's gradient
            v_w, v_l = v_w.detach().requires_grad_(), v_l.detach().requires_grad_()
        terms, metrics = preference_terms(v_w, v_l, *reference, batch.target_w, batch.target_l, batch.label, **settings)
        if not first_pass:
            # This is the whole batch; if exact, it is settled below.
            regressed = has_risen(float(metrics["winner"].mean()), float(metrics["winner_error"].mean()))
        if exact:
            terms["hinge"] = error_change(v_w, reference[0], batch.target_w)  # its gradient is what the guard protects
        elif not regressed:
            terms.pop("hinge", None)
        # A mean over the step's batch, whatever its micro-batches and processes.
        scaled = {name: term.sum() / config.batch for name, term in terms.items()}
        with k2.role(POLICY):
            if apart:
                _add_gradients(k2, batch, scaled, (v_w, v_l), stepper.parameters, buffers)
            else:
                torch.stack(list(scaled.values())).sum().backward()
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0.0) + total(value)
    means = procs.means_of_sums(sums, config.batch)
    gradients: dict[str, float] = {}
    if apart:
        regressed = has_risen(means["winner"], means["winner_error"])
        gradients = _combine(config.loss, settings, buffers, stepper.parameters, regressed, exact, procs)
    else:
        procs.sum_gradients(stepper.parameters)
    gradients["grad_norm"] = stepper.step()
    gradients |= stepper.metrics()
    # The hinge's value is that of the mean over the batch, so no pair alone has it.
    hinge = settings["hinge"] * max(0.0, means["winner"]) * config.loss.beta / 2
    return {**_relative(means), **gradients, "loss": means["loss"] + hinge, "skipped_updates": stepper.skipped}


def _settings(loss: PreferenceLossConfig) -> dict[str, Any]:
    """What preference_terms takes. The exact guard is not its business."""
    if loss.kind == "dpo":
        return {"beta": loss.beta, "guard": None, "bound": None, "anchor": 0.0, "hinge": 0.0}
    guard = loss.guard_share if loss.guard == "output" else None
    return {"beta": loss.beta, "guard": guard, "bound": loss.bound, "anchor": loss.anchor, "hinge": loss.hinge}


def _velocities(k2: K2, batch: Batch) -> tuple[Tensor, Tensor]:
    # Both halves in one forward: the text and the time are the same for both.
    x, t = torch.cat([batch.x_w, batch.x_l]), batch.t.repeat(2)
    v_w, v_l = k2.velocity(x, t, batch.text, *batch.size, shown=_of_both(batch)).chunk(2)
    return v_w, v_l


def _velocity(k2: K2, batch: Batch, half: int) -> Tensor:
    """Of the chosen images (0) or of the rejected ones (1)."""
    tokens, mask = batch.text.tokens.chunk(2)[half], batch.text.mask
    text = Text(tokens, None if mask is None else mask.chunk(2)[half])
    return k2.velocity((batch.x_w, batch.x_l)[half], batch.t, text, *batch.size, shown=batch.shown)


def _of_both(batch: Batch) -> References | None:
    """The references of the chosen images and of the rejected ones, which are the same."""
    own = batch.shown
    if own is None:
        return None
    strength = None if own.strength is None else own.strength.repeat(2, 1)
    latents = tuple(latents.repeat(2, 1, 1) for latents in own.latents)
    return replace(own, latents=latents, strength=strength)


@torch.no_grad()
def _reference(k2: K2, batch: Batch) -> tuple[Tensor, Tensor]:
    with k2.role(None):
        return _velocities(k2, batch)


@torch.no_grad()
def _regressed(k2: K2, batches: Sequence[Batch], references: Sequence[tuple[Tensor, Tensor]], procs: Processes) -> bool:
    """Whether the chosen images' error has risen over the whole batch, by a forward without gradients."""
    change = error = 0.0
    for batch, (reference, _) in zip(batches, references):
        with k2.role(POLICY):
            v = _velocity(k2, batch, 0)
        change += total(error_change(v, reference, batch.target_w))
        error += total((reference.float() - batch.target_w).square().flatten(1).mean(1))
    sums = procs.means_of_sums({"change": change, "error": error}, 1)
    return has_risen(sums["change"], sums["error"])


def _add_gradients(
    k2: K2,
    batch: Batch,
    terms: dict[str, Tensor],
    velocities: tuple[Tensor, Tensor],
    parameters: Sequence[Tensor],
    buffers: dict[str, list[Tensor]],
) -> None:
    """Adds each term's gradient to its buffer, by way of the velocities that the terms were made of (leaves).

    The graph that is kept is that of the loss alone; the network is gone through anew for each term and half.
    """
    for name, term in terms.items():
        pulls = torch.autograd.grad(term, velocities, retain_graph=True, allow_unused=True)
        for half, pull in enumerate(pulls):
            if pull is None:  # the term does not depend on this half
                continue
            gradients = torch.autograd.grad(_velocity(k2, batch, half), parameters, pull)
            if name in buffers:
                torch._foreach_add_(buffers[name], gradients)
            else:
                buffers[name] = list(gradients)


def _combine(
    loss: PreferenceLossConfig,
    settings: dict[str, Any],
    buffers: dict[str, list[Tensor]],
    parameters: Sequence[Tensor],
    regressed: bool,
    exact: bool,
    procs: Processes,
) -> dict[str, float]:
    """Sums the buffers over processes into the parameters' gradients; returns metrics of the terms."""
    for name in ("winner", "loser", "anchor", "hinge"):  # in one order everywhere; a process may have had no pair
        buffers.setdefault(name, [torch.zeros_like(p) for p in parameters])
        procs.sum(buffers[name])
    metrics: dict[str, float] = {}
    if exact:
        winner_n = inner(buffers["winner"], buffers["hinge"])
        kept = exact_guard(winner_n, -inner(buffers["loser"], buffers["hinge"]), loss.guard_share)
        torch._foreach_mul_(buffers["loser"], kept)
        torch._foreach_mul_(buffers["hinge"], settings["hinge"] * loss.beta / 2 if regressed else 0.0)
        metrics = {"guard": kept, "guarded": float(kept < 1), "conflict": float(winner_n < 0)}
    for i, parameter in enumerate(parameters):
        whole = torch.zeros_like(parameter)
        for part in buffers.values():
            whole += part[i]
        parameter.grad = whole
    norms = {name: norm(part) for name, part in buffers.items()}
    length = sum(norms.values())
    for name, value in norms.items():
        metrics[f"gradient/{name}"] = value / length if length else 0.0
    return metrics


def _relative(means: dict[str, float]) -> dict[str, float]:
    """Changes of errors as shares of the reference's errors."""
    relative = dict(means)
    for name, reference in RELATIVE.items():
        # A ratio of means, not a mean of ratios, which pairs with a small error would lead.
        relative[name] = means[name] / relative.pop(reference)
    return relative


# ---- evaluate -------------------------------------------------------------------------------------------------


def evaluate(training: Training, config: STPOConfig, pairs: EncodedPairs, micro_batch: int) -> Evaluation:
    """The policy on held-out prompts and pairs."""
    with training.policy():
        result = training.evaluator()
        overall, result.details = measure_pairs(training.k2, config, pairs, training.procs, micro_batch)
    looks = next(iter(result.measured.values()))  # of the first guidance
    energy = looks["image/high_energy"]
    before = training.history["before"] or {}  # empty at the evaluation that will be it
    at_start = before.get("image/high_energy", energy)
    result.metrics["image/contrast"] = looks["image/contrast"]
    result.metrics["image/high_energy"] = energy
    result.metrics["image/high_energy_ratio"] = energy / at_start if at_start else None
    result.metrics |= overall
    return result


@torch.no_grad()
def measure_pairs(
    k2: K2, config: STPOConfig, pairs: EncodedPairs, procs: Processes, micro_batch: int
) -> tuple[dict[str, float | None], dict[str, float | None]]:
    """Metrics of held-out pairs under the active role, with fixed times and noise; and the same of four parts of the
    times. A pair has one time: the i-th is of part i mod 4 and, in it, anywhere."""
    rows = np.random.default_rng(config.eval.seed).permutation(pairs.heldout)[: config.pairs.measured]
    own = procs.local_indices_by_cost(flops.of_sizes(k2, pairs.size[rows].tolist()))
    jobs = []
    for i in own:
        n = sampler.stratified_normal(config.eval.seed, i, BINS)
        jobs.append(Job(int(rows[i]), n, sampler.seed_for(config.eval.seed, i, 1), False))
    settings = _settings(config.loss) | {"guard": config.loss.guard_share}  # what a guard would keep, in all modes
    by_job: dict[int, dict[str, float]] = {}
    for batch in noised(k2, pairs, jobs, micro_batch, config.loss.time_mean, config.loss.time_std):
        targets = batch.target_w, batch.target_l
        velocities, reference = _velocities(k2, batch), _reference(k2, batch)
        _, metrics = preference_terms(*velocities, *reference, *targets, batch.label, **settings)
        for place, job in enumerate(batch.jobs):
            by_job[job] = {name: float(value[place]) for name, value in metrics.items()}
    # In the order of the pairs, whatever their sizes and processes.
    of_pairs = procs.gather_in_order([by_job[j] for j in range(len(jobs))], own)
    overall = _means(of_pairs)
    for quantile in (10, 50, 90):
        overall[f"z{quantile}"] = float(np.percentile([values["z"] for values in of_pairs], quantile))
    parts: dict[str, float | None] = {}
    for part in range(min(BINS, len(of_pairs))):
        for name, value in _means(of_pairs[part::BINS]).items():  # the i-th pair's time is in part i mod 4
            parts[f"pairs/{name}_t{part + 1}"] = value
    return {f"pairs/{name}": value for name, value in overall.items()}, parts


def _means(of_pairs: Sequence[dict[str, float]]) -> dict[str, float]:
    means: dict[str, float] = {}
    for name in of_pairs[0]:
        means[name] = float(np.mean([values[name] for values in of_pairs]))
    return _relative(means)
