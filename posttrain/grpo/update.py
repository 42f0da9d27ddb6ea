"""The update of GRPO: the gradient of the clipped objective over the stochastic steps of a step's groups.

Legend: P groups, G images of a group, B images that share a forward.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.distributed.processes import Processes
from posttrain.grpo import losses
from posttrain.grpo.config import GRPOConfig
from posttrain.grpo.rollout import Trajectory, Transition, root_mean_square
from posttrain.model import sampler
from posttrain.model.k2 import K2
from posttrain.training.groups import Prompted
from posttrain.training.policy import POLICY
from posttrain.training.stepper import Stepper
from posttrain.training.sums import total_of

References = dict[tuple[int, int, int], Tensor]
"""Velocities of the reference, by group, step of the schedule and first image of a part."""


@dataclass
class Group(Prompted):
    """One prompt's images of one step."""

    trajectory: Trajectory


def optimise(
    k2: K2,
    config: GRPOConfig,
    groups: list[Group],
    advantages_PG: Tensor,
    stepper: Stepper,
    procs: Processes,
    micro_batch: int,
) -> dict[str, float]:
    """One or more updates on the groups of all processes; the reference is the weights that training began with."""
    metrics: dict[str, float] = {}
    first_error = 0.0
    references: References = {}
    for i in range(config.optim.passes):
        metrics = gradient(k2, config, groups, advantages_PG, procs, micro_batch, i == 0, references)
        if i == 0:  # before the first update the policy is the one that drew the images, so every ratio is 1
            first_error = metrics["ratio_error"]
        procs.sum_gradients(stepper.parameters)
        metrics["grad_norm"] = stepper.step()
        metrics |= stepper.metrics()
    return {**metrics, "ratio_error": first_error, "skipped_updates": stepper.skipped}


def gradient(
    k2: K2,
    config: GRPOConfig,
    groups: list[Group],
    advantages_PG: Tensor,
    procs: Processes,
    micro_batch: int,
    first: bool = True,
    references: References | None = None,
) -> dict[str, float]:
    """Adds the loss's gradient over these groups to the policy's, and returns metrics over the groups of all processes.

    `first`: the policy has not been updated since it drew the groups. `references` has the reference's velocities after
    the first pass, since they stay the same.

    The loss is a mean over the groups, images and stochastic steps of a whole step, whatever is in `groups`; the other
    metrics are means over what is.
    """
    s = config.sampling
    stochastic = s.steps - 1 if s.window is None else s.window
    count = config.groups.prompts_per_step * stochastic * config.groups.group_size
    objective = losses.objective(config.loss.clip_low, config.loss.clip_high, config.loss.max_weight)
    collected: dict[str, list[Tensor]] = {}
    for group in groups:
        times = sampler.schedule(s.steps, k2.mu(*group.size))
        guard = sampler.guard_weights(times, s.dynamics, s.eta) if config.loss.ratio == "guard" else None
        advantages_G = advantages_PG[group.index]
        for move in group.trajectory.transitions:  # the stochastic steps alone have a likelihood
            weight = 1.0 if guard is None else float(guard[move.index])
            for rows, part in move.parts(micro_batch):
                # Backward after each part, so that one graph is in memory at a time.
                v, log_ratio, parts = _likelihood(k2, config, group, part, times, first)
                loss_B, ratios = objective(log_ratio, advantages_G[rows])
                parts |= ratios
                if config.loss.kl > 0:
                    place = group.index, move.index, rows.start
                    reference = references.get(place) if references is not None else None
                    if reference is None:
                        with torch.no_grad(), k2.role(None):  # one forward where images share x, as above
                            reference = k2.velocity(part.x, part.t, group.text, *group.size)
                    if references is not None and config.optim.passes > 1:
                        references[place] = reference
                    kl_B = losses.velocity_kl(v, reference).expand_as(loss_B)
                    loss_B = loss_B + config.loss.kl * kl_B
                    parts["kl"] = kl_B.detach().sum()
                loss_B = weight * loss_B  # the KL's term too, so that loss.kl means the same at every step
                parts["loss"] = loss_B.detach().sum()
                parts["images"] = torch.tensor(float(len(loss_B)))
                with k2.role(POLICY):
                    # Of images that share x this is one backward, with the sum of their weights.
                    (loss_B.sum() / count).backward()
                for name, value in parts.items():  # not added up here, which would wait for the device each time
                    collected.setdefault(name, []).append(value)
    worst = collected.pop("worst", [])
    totals = {name: total_of(values) for name, values in collected.items()}
    if worst:
        totals["worst"] = float(torch.stack(worst).max())
    return _over_processes(totals, count, procs)


def _likelihood(
    k2: K2, config: GRPOConfig, group: Group, part: Transition, times: Tensor, first: bool
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The policy's velocity of these images at this step, their (B,) log-ratios to the policy that drew them, and
    metrics as sums over them."""
    s, metrics = config.sampling, {}
    if first and part.velocities:  # the same forward was made as the step was drawn
        (v,) = part.velocities
    else:
        with k2.role(POLICY):
            v = k2.velocity(part.x, part.t, group.text, *group.size)
    mean, std = sampler.sde_moments(part.x, v, part.t, part.t_next, s.dynamics, s.eta, times[1])
    if first and config.rollout.quantize:
        # The images were drawn in fp8. The ratio is to the exact policy at the same state instead: otherwise fp8's
        # rounding would be taken for a change of the policy.
        of_mean = sampler.kl_coefficient(part.t, part.t_next, s.dynamics, s.eta, times[1]).abs().to(v.device)
        gap = part.restate(mean, std) / of_mean / root_mean_square(v.detach())
        metrics["rollout_gap"] = gap.expand(len(part.x_next)).sum()
    log_ratio = _log_ratio(config, part, mean, std)
    metrics["worst"] = log_ratio.detach().exp().sub(1).abs().max()
    return v, log_ratio, metrics


def _log_ratio(config: GRPOConfig, move: Transition, mean: Tensor, std: Tensor) -> Tensor:
    """(B,) of the policy with these moments to the one that took the step, GRPO-Guard's or the plain one."""
    if config.loss.ratio == "guard":
        return sampler.guard_log_ratio(move.x_next, move.mean, mean, std)
    return sampler.log_prob(move.x_next, mean, std) - move.log_prob


def _over_processes(totals: Mapping[str, float], count: int, procs: Processes) -> dict[str, float]:
    """Metrics from the sums that each process has of its groups; one that has no group has none."""
    parts = list(filter(None, procs.all_gather(dict(totals))))
    worst = max([part.pop("worst") for part in parts])
    total = dict.fromkeys(parts[0], 0.0)
    for part in parts:
        for name in total:
            total[name] += part[name]
    images, loss = total.pop("images"), total.pop("loss")
    average = {name: value / images for name, value in total.items()}
    # Log-ratios lie around 0, so the difference of their moments is accurate; that of ratios around 1 would not be.
    mean, square = average.pop("log_ratio"), average.pop("log_ratio_square")
    average["log_ratio_std"] = max(0.0, square - mean**2) ** 0.5
    return {**average, "loss": loss / count, "ratio_error": worst}
