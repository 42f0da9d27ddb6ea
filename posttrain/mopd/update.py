"""The gradient of one teacher: trajectories of the student, and its distance to the teacher at some of their states.

Legend: B images of a micro-batch, N image tokens, C channels, K steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from posttrain.distributed.processes import Processes
from posttrain.model import sampler
from posttrain.model.k2 import K2, Text
from posttrain.mopd import losses
from posttrain.mopd.config import MOPDConfig
from posttrain.mopd.teachers import Teacher
from posttrain.training.policy import POLICY
from posttrain.training.prompt_source import in_turn
from posttrain.training.sums import total

BINS = 4
"""Parts of the noise levels, for which distances are told apart."""


def learn(
    k2: K2,
    config: MOPDConfig,
    teacher: Teacher,
    texts: Callable[[list[str]], list[Tensor]],
    null: Text,
    step: int,
    weight: float,
    sums: dict[str, float],
    procs: Processes,
    micro_batch: int,
) -> None:
    """Adds the gradient of this process's part of a teacher's images, and their metrics to `sums`.

    The forward of the trajectory is the one that has the gradient, so a state costs no second forward of the student.
    """
    # By the teacher's name, not its place: adding a teacher to a recipe leaves what the others draw as it was.
    seed = sampler.seed_for(*teacher.name.encode())
    key = (config.seed, step, seed)
    size, indices = size_of(config, step), procs.local_indices(teacher.images)
    prompts = []
    for i in indices:
        turn = (step - 1) * teacher.images + i
        prompts.append(teacher.records[in_turn(seed + config.seed, turn, len(teacher.records))].prompt)
    fused = texts(prompts)
    times = sampler.schedule(config.sampling.steps, k2.mu(*size))
    weights_K, chosen = losses.weights(times, config.loss.weight, config.loss.eta), states(config, key)
    shape = (k2.image_tokens(*size), k2.latent_channels)
    for first in range(0, len(indices), micro_batch):
        part, text = indices[first : first + micro_batch], Text.of(fused[first : first + micro_batch])
        x = sampler.noise([sampler.seed_for(*key, i, 0) for i in part], shape).to(k2.device)
        for k, (t, t_next) in enumerate(itertools.pairwise(times[: max(chosen) + 2])):  # no further than the last state
            with k2.role(POLICY), torch.set_grad_enabled(k in chosen):
                v = k2.velocity(x, t, text, *size)
            if k in chosen:
                distance_B, loss_B = compared(k2, config, teacher, v, x, t, text, null, size, float(weights_K[k]), sums)
                with k2.role(POLICY):
                    (loss_B.sum() * weight).backward()
                level = min(BINS - 1, int(BINS * float(t))) + 1  # t = 1 belongs to the last part
                distance = total(distance_B)
                _add(sums, f"distance/{teacher.name}", distance)
                _add(sums, f"distance_t{level}", distance)
                _add(sums, f"rows_t{level}", len(distance_B))
                _add(sums, "loss", total(loss_B) * weight)
            noise = [sampler.seed_for(*key, i, 1 + k) for i in part] if config.loss.weight == "kl" else None
            # Detached: the states are where the student is compared, and no gradient goes through how it came there.
            x = _step(x, v.detach(), t, t_next, times[1], config.loss.eta, noise)


def compared(
    k2: K2,
    config: MOPDConfig,
    teacher: Teacher,
    v: Tensor,
    x: Tensor,
    t: Tensor,
    text: Text,
    null: Text,
    size: tuple[int, int],
    weight: float,
    sums: dict[str, float],
) -> tuple[Tensor, Tensor]:
    """(B,) distances to the teacher at a state, and losses; adds the distance to the reference to `sums`."""
    with torch.no_grad(), k2.role(teacher.role):
        target = k2.guided_velocity(x, t, text, null, teacher.guidance, *size)
    distance_B = losses.distance(v, target)
    loss_B = weight * distance_B
    if config.loss.reference > 0:
        reference = target  # the anchor's teacher is the reference
        if teacher.role is not None:
            with torch.no_grad(), k2.role(None):
                reference = k2.velocity(x, t, text, *size)
        kl_B = losses.distance(v, reference)
        loss_B = loss_B + config.loss.reference * kl_B
        _add(sums, "kl", total(kl_B))
    return distance_B.detach(), loss_B


def _step(
    x: Tensor, v: Tensor, t: Tensor, t_next: Tensor, t_first: Tensor, eta: float, seeds: Sequence[int] | None
) -> Tensor:
    """To the next state: by the ODE, or with noise of these seeds. The last step has no noise."""
    if seeds is None or float(t_next) == 0:
        return sampler.ode_step(x, v, t, t_next)
    mean, std = sampler.sde_moments(x, v, t, t_next, "flow", eta, t_first)
    return mean + std * sampler.noise(seeds, x.shape[1:]).to(x.device)


def states(config: MOPDConfig, key: tuple[int, ...]) -> set[int]:
    """The steps of a teacher's trajectories from which it is asked, the same for all its images of a training step."""
    # Of stochastic steps the last has no noise, so its weight would be 0; see losses.weights.
    steps = config.sampling.steps - (config.loss.weight == "kl")
    generator = torch.Generator().manual_seed(sampler.seed_for(*key, -1))
    return set(torch.randperm(steps, generator=generator)[: config.sampling.states].tolist())


def size_of(config: MOPDConfig, step: int) -> tuple[int, int]:
    height, width = config.sampling.sizes[(step - 1) % len(config.sampling.sizes)]
    return height, width


# ---- sums and gradients -----------------------------------------------------------------------------------


def _add(sums: dict[str, float], name: str, value: float) -> None:
    sums[name] = sums.get(name, 0.0) + value


def means_of(sums: dict[str, float], turn: Sequence[Teacher], states: int, procs: Processes) -> dict[str, float]:
    """Metrics over the images of all processes."""
    totals = procs.means_of_sums(sums, 1)
    metrics = {"loss": totals["loss"]}
    rows = 0
    for teacher in turn:
        own = teacher.images * states
        metrics[f"distance/{teacher.name}"] = totals[f"distance/{teacher.name}"] / own
        rows += own
    for part in range(1, BINS + 1):
        if f"rows_t{part}" in totals:
            metrics[f"distance_t{part}"] = totals[f"distance_t{part}"] / totals[f"rows_t{part}"]
    if "kl" in totals:
        metrics["kl"] = totals["kl"] / rows
    return metrics


def taken(parameters: Sequence[Tensor], procs: Processes) -> Tensor:
    """The flat gradient over all processes, which is then cleared."""
    parts = []
    for parameter in parameters:
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parts.append(gradient.flatten())
        parameter.grad = None
    flat = torch.cat(parts)
    procs.sum([flat])
    return flat


def put(parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """Makes the sum of some flat gradients the parameters'."""
    whole = torch.stack(list(gradients)).sum(0)
    start = 0
    for parameter in parameters:
        parameter.grad = whole[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
