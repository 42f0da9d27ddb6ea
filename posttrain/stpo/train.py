"""STPO: preference optimisation of K2 on pairs of pictures, without the drift of Diffusion-DPO.

    posttrain stpo --config recipes/nano/stpo_synthetic.yaml
    posttrain stpo --config recipes/nano/stpo_human.yaml      # goes on from the first

The published name stands for a modified DPO term and an auxiliary loss, and no more is public: the loss here is this
project's own, in preference_loss.py; `loss.kind: dpo` is plain Diffusion-DPO. Latents and text are encoded once
(latents.py). Each update draws a batch of pairs, and for each pair one time and one noise, which both pictures share
under policy and reference; there is no guidance. The reference is the model without the adapter.

All draws come from seeds of global indices (run, step, pair), and processes share a batch's pairs, so a resumed run and
one in more processes make the same updates. The exact guard and the shares of the terms need each term's gradient for
the whole batch before any of it is applied; they are kept apart until then, in buffers as large as the adapter. Each
term's gradient with respect to the velocities goes on through a forward of its own, of those images that it depends on.
So no graph of the network is walked backward twice, which compiled blocks refuse (they write into what they kept).

Figures of held-out pairs at each evaluation, with fixed times and noise; those marked * also each step, without
`pairs/`, of its batch:

| pairs/... | what it is |
|---|---|
| winner*, loser* | error of the chosen (rejected) pictures against the reference's: mean change over its mean |
| margin*, accuracy* | mean change of the rejected error less that of the chosen; share of pairs where it is above 0 |
| z*, z10, z50, z90 | margin in nats as the loss sees it: mean, quantiles |
| sigma*, saturated | mean weight s(-z) that a pair still has; share of pairs where it is below 0.05 |
| guard*, guarded* | part of the rejected picture's gradient that is kept: mean; share of pairs where it is not all |
| cosine* | of the two errors |
| drift_winner*, drift_loser* | squared distance of the velocities to the reference's |

Accuracy and margin do not see divergence; winner does. `pairs/winner_t1` ... `_t4` and so on are of four equal parts of
the training times, the least noisy first.

Legend: B pairs of a micro-batch, N image tokens, C channels.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from posttrain.distributed.processes import Processes
from posttrain.errors import UserError
from posttrain.model import flops, parallelize, sampler
from posttrain.model.k2 import K2, Text
from posttrain.preferences.dataset import read_preferences
from posttrain.runs.run import Run
from posttrain.stpo.config import PreferenceLossConfig, STPOConfig
from posttrain.stpo.latent_cache import Batch, EncodedPairs, Job, encode_pairs, noised
from posttrain.stpo.losses import error_change, exact_guard, inner, norm, preference_terms
from posttrain.training import checkpoint
from posttrain.training.checkpoint import Checkpoint
from posttrain.training.evaluate import Evaluation, Evaluator
from posttrain.training.loop import Training, Urls, in_run, resuming
from posttrain.training.oom_retry import Memory
from posttrain.training.policy import POLICY, add_policy, load_model
from posttrain.training.prompt_source import in_turn
from posttrain.training.stepper import Clock, Stepper
from prompts.records import PromptRecord, read_prompts
from rewards.load import load_rewards, record

RELATIVE = {"winner": "winner_error", "loser": "loser_error"}
"""Changes that are reported as a share of the reference's error."""
BINS = 4


def train(config: STPOConfig, resume: bool = False) -> None:
    """Runs a recipe into its run directory. Raises UserError for what the user can mend."""
    procs = Processes(shardable=True)
    if procs.sharded and config.lora is not None and (config.loss.guard == "exact" or config.loss.terms_every):
        raise UserError(
            f"loss: {procs.engine} cannot tell terms apart: set terms_every to 0, and guard to output if it is exact"
        )
    resume = resuming(config, resume, procs)
    preferences = read_preferences(config.pairs.train, config.pairs.columns, config.pairs.max_bad)
    heldout = read_prompts(config.heldout)
    load_rewards(config.rewards, {server.name: ["http://127.0.0.1/"] for server in config.servers})  # before the wait
    saved = checkpoint.load_latest(Path(config.output) / "checkpoints") if resume else None
    k2 = load_model(config.model, procs.device, saved)
    pairs = encode_pairs(k2, preferences, config.pairs, procs)
    if saved is not None and saved.state["pairs"] != pairs.fingerprint:
        raise UserError(f"pairs: not those that {saved.path} was trained on, or encoded differently; restore them")
    with parallelize.sharding(k2, procs):
        add_policy(k2, config.lora, config.seed, reference=True)
    in_run(config, resume, procs, lambda run, urls: _train(config, saved, run, procs, k2, pairs, heldout, urls))


def _train(
    config: STPOConfig,
    saved: Checkpoint | None,
    run: Run,
    procs: Processes,
    k2: K2,
    pairs: EncodedPairs,
    heldout: list[PromptRecord],
    urls: Urls,
) -> signal.Signals | None:
    measured = load_rewards(config.rewards, urls)
    stepper = Stepper(k2.train_role(POLICY), config.optim)
    height, width = config.pairs.size or pairs.size[0].tolist()
    evaluator = Evaluator(
        k2, heldout, measured, config.eval, (height, width), 4 * config.micro_batch, config.pairs.max_tokens, procs
    )
    training = Training("stpo", config, run, procs, k2, stepper, evaluator, saved)
    guidance = {"training": 0.0, "evaluation": config.eval.guidance}
    training.state = lambda: ({}, {"pairs": pairs.fingerprint, "rewards": record(measured), "guidance": guidance})
    training.history.setdefault("pairs", 0)

    def measure(result: Evaluation) -> None:
        before = training.history["before"] or {}
        looks = next(iter(result.measured.values()))
        energy = looks["image/high_energy"]
        reference = before.get("image/high_energy", energy)
        result.figures |= {
            "image/contrast": looks["image/contrast"],
            "image/high_energy": energy,
            "image/high_energy_ratio": energy / reference if reference else None,
        }
        overall, result.details = measure_pairs(k2, config, pairs, procs)
        result.figures |= overall

    training.measure = measure
    training.begin()

    for step, metrics in updates(k2, config, pairs, stepper, training.steps(), procs, run.say):
        training.history["pairs"] += config.batch
        run.log(step, metrics | training.health())
    training.finish()
    return training.stopped


def updates(
    k2: K2,
    config: STPOConfig,
    pairs: EncodedPairs,
    stepper: Stepper,
    steps: Iterable[int],
    procs: Processes,
    say: Callable[[str], None],
    clocks: Callable[[], Clock] = Clock,
) -> Iterator[tuple[int, dict[str, float]]]:
    """Trains one step at a time, and yields its number and metrics: a run's loop, and what `posttrain bench` times."""

    def attempt(step: int, clock: Clock) -> dict[str, float]:
        batches = draw(k2, config, pairs, step, procs)
        clock.lap("prepare")
        metrics = optimise(k2, config, step, batches, stepper, procs)
        clock.lap("update")
        return metrics

    memory = Memory(config, "micro_batch", procs, say)
    for step in steps:
        timed = clocks()
        metrics = memory.fit(stepper, attempt, step, timed)
        yield step, metrics | timed.seconds


# ---- draw -----------------------------------------------------------------------------------------------------


def draw(k2: K2, config: STPOConfig, pairs: EncodedPairs, step: int, procs: Processes) -> list[Batch]:
    """This process's part of a step's pairs."""
    jobs, first, n = [], (step - 1) * config.batch, len(pairs.train)
    rows = [int(pairs.train[in_turn(config.seed, first + i, n)]) for i in range(config.batch)]
    for i in procs.mine_by_cost(flops.of_sizes(k2, pairs.size[rows].tolist())):
        row = rows[i]
        seeds = [sampler.seed_for(config.seed, step, i, j) for j in range(3)]
        dropped = seeds[2] / 2**63 < config.pairs.drop_prompt
        jobs.append(Job(row, float(sampler.noise(seeds[:1], (1,))), seeds[1], dropped))
    return noised(k2, pairs, jobs, config.micro_batch, config.loss.time_mean, config.loss.time_std)


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
    regressed = first_pass and _mean_change(k2, config, batches, references, procs) > 0
    buffers: dict[str, list[Tensor]] = {}
    sums: dict[str, float] = {}
    for batch, reference in zip(batches, references):
        with torch.set_grad_enabled(not apart), k2.role(POLICY):
            v_w, v_l = _velocities(k2, batch)
        if apart:
            v_w, v_l = v_w.detach().requires_grad_(), v_l.detach().requires_grad_()
        terms, metrics = preference_terms(v_w, v_l, *reference, batch.target_w, batch.target_l, batch.label, **settings)
        if not first_pass:
            regressed = bool(metrics["winner"].mean() > 0)  # this is the whole batch; if exact, that is settled below
        if exact:
            terms["hinge"] = error_change(v_w, reference[0], batch.target_w)  # its gradient is what the guard protects
        elif not regressed:
            terms.pop("hinge", None)
        scaled = {name: term.sum() / config.batch for name, term in terms.items()}
        with k2.role(POLICY):
            if apart:
                _add_gradients(k2, batch, scaled, (v_w, v_l), stepper.parameters, buffers)
            else:
                torch.stack(list(scaled.values())).sum().backward()
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0.0) + float(value.double().sum())
    totals: dict[str, float] = {}
    for part in procs.each(sums):
        totals |= {name: totals.get(name, 0.0) + value for name, value in part.items()}
    means = {name: value / config.batch for name, value in totals.items()}
    hinge = settings["hinge"] * max(0.0, means["winner"]) * config.loss.beta / 2
    found: dict[str, float] = {}
    if apart:
        found = _combine(config.loss, settings, buffers, stepper.parameters, means["winner"] > 0, exact, procs)
    else:
        procs.sum_gradients(stepper.parameters)
    found["grad_norm"] = stepper.step()
    found |= stepper.metrics()
    return {**_relative(means), **found, "loss": means["loss"] + hinge, "skipped_updates": stepper.skipped}


def _settings(loss: PreferenceLossConfig) -> dict[str, Any]:
    """What preference_terms takes. The exact guard is not its business."""
    if loss.kind == "dpo":
        return {"beta": loss.beta, "guard": None, "bound": None, "anchor": 0.0, "hinge": 0.0}
    guard = loss.guard_share if loss.guard == "output" else None
    return {"beta": loss.beta, "guard": guard, "bound": loss.bound, "anchor": loss.anchor, "hinge": loss.hinge}


def _velocities(k2: K2, batch: Batch) -> tuple[Tensor, Tensor]:
    x, t = torch.cat([batch.x_w, batch.x_l]), batch.t.repeat(2)
    v_w, v_l = k2.velocity(x, t, batch.text, *batch.size).chunk(2)
    return v_w, v_l


def _velocity(k2: K2, batch: Batch, half: int) -> Tensor:
    """Of the chosen images (0) or of the rejected ones (1)."""
    tokens, mask = batch.text.tokens.chunk(2)[half], batch.text.mask
    text = Text(tokens, None if mask is None else mask.chunk(2)[half])
    return k2.velocity((batch.x_w, batch.x_l)[half], batch.t, text, *batch.size)


@torch.no_grad()
def _reference(k2: K2, batch: Batch) -> tuple[Tensor, Tensor]:
    with k2.role(None):
        return _velocities(k2, batch)


@torch.no_grad()
def _mean_change(
    k2: K2,
    config: STPOConfig,
    batches: Sequence[Batch],
    references: Sequence[tuple[Tensor, Tensor]],
    procs: Processes,
) -> float:
    """Mean change of the chosen pictures' error over the whole batch, without gradients."""
    total = 0.0
    for batch, (reference, _) in zip(batches, references):
        with k2.role(POLICY):
            v = _velocity(k2, batch, 0)
        total += float(error_change(v, reference, batch.target_w).double().sum())
    return sum(procs.each(total)) / config.batch


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
            if pull is None:
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
    """Sums the buffers over processes and puts the step's gradient into the parameters; returns what they were like."""
    for name in ("winner", "loser", "anchor", "hinge"):  # in one order everywhere; a process may have had no pair
        buffers.setdefault(name, [torch.zeros_like(p) for p in parameters])
        procs.sum(buffers[name])
    found: dict[str, float] = {}
    if exact:
        winner_n = inner(buffers["winner"], buffers["hinge"])
        kept = exact_guard(winner_n, -inner(buffers["loser"], buffers["hinge"]), loss.guard_share)
        torch._foreach_mul_(buffers["loser"], kept)
        torch._foreach_mul_(buffers["hinge"], settings["hinge"] * loss.beta / 2 if regressed else 0.0)
        found = {"guard": kept, "guarded": float(kept < 1), "conflict": float(winner_n < 0)}
    for i, parameter in enumerate(parameters):
        parameter.grad = sum((part[i] for part in buffers.values()), torch.zeros_like(parameter))
    norms = {name: norm(part) for name, part in buffers.items()}
    total = sum(norms.values())
    return found | {f"gradient/{name}": value / total if total else 0.0 for name, value in norms.items()}


def _relative(means: dict[str, float]) -> dict[str, float]:
    """Changes of errors as shares of the reference's errors."""
    found = {name: value for name, value in means.items() if name not in RELATIVE.values()}
    return found | {name: means[name] / means[of] for name, of in RELATIVE.items()}


# ---- measure --------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure_pairs(
    k2: K2, config: STPOConfig, pairs: EncodedPairs, procs: Processes
) -> tuple[dict[str, float | None], dict[str, float | None]]:
    """Figures of held-out pairs under the active role, with fixed times and noise; and the same of four parts of the
    times. A pair has one time: the i-th is of part i mod 4 and, in it, anywhere."""
    rows = np.random.default_rng(config.eval.seed).permutation(pairs.heldout)[: config.pairs.measured]
    mine = procs.mine_by_cost(flops.of_sizes(k2, pairs.size[rows].tolist()))
    jobs = []
    for i in mine:
        uniform = (i % BINS + sampler.seed_for(config.eval.seed, i, 0) / 2**63) / BINS
        n = float(torch.special.ndtri(torch.tensor(uniform, dtype=torch.float64)))
        jobs.append(Job(int(rows[i]), n, sampler.seed_for(config.eval.seed, i, 1), False))
    settings = _settings(config.loss) | {"guard": config.loss.guard_share}  # what a guard would keep, in all modes
    found = [dict[str, float]()] * len(mine)
    for batch in noised(k2, pairs, jobs, config.micro_batch, config.loss.time_mean, config.loss.time_std):
        targets = batch.target_w, batch.target_l
        _, metrics = preference_terms(
            *_velocities(k2, batch), *_reference(k2, batch), *targets, batch.label, **settings
        )
        for j, values in zip(batch.jobs, zip(*(value.tolist() for value in metrics.values()))):
            found[j] = dict(zip(metrics, values))
    each = procs.dealt_back(found, mine)
    table = {name: np.array([values[name] for values in each]) for name in each[0]}
    overall = _relative({name: float(values.mean()) for name, values in table.items()})
    for quantile in (10, 50, 90):
        overall[f"z{quantile}"] = float(np.percentile(table["z"], quantile))
    parts: dict[str, float | None] = {}
    for part in range(BINS):
        of_part = {name: float(values[part::BINS].mean()) for name, values in table.items()} if part < len(each) else {}
        parts |= {f"pairs/{name}_t{part + 1}": value for name, value in (_relative(of_part) if of_part else {}).items()}
    return {f"pairs/{name}": value for name, value in overall.items()}, parts
