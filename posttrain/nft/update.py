"""The update of NFT: the gradient of its loss over a step's groups, noised again, and the old policy that follows.

Legend: P groups, G images of a group, T noise levels of an image, B images that share a forward, N image tokens, C
channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.distributed import shards
from posttrain.distributed.processes import Processes
from posttrain.errors import UserError
from posttrain.model import sampler
from posttrain.model.k2 import K2
from posttrain.nft import losses
from posttrain.nft.config import NFTConfig, OldConfig
from posttrain.training.groups import Prompted
from posttrain.training.policy import POLICY, add_policy
from posttrain.training.stepper import Stepper
from posttrain.training.sums import total_of

OLD = "old"
"""The role of the old policy, where it is not always the policy itself."""
TOLERANCE = 1e-2
"""Largest distance of the old policy's velocity from the policy's, relative to it, where both must be the same: more
than rounding in bfloat16, far less than an update."""
BINS = 4
"""Parts of the noise levels, for which errors are told apart."""


@dataclass
class Group(Prompted):
    """One prompt's images of one step."""

    latents: Tensor
    """(G, N, C) at t = 0."""


# ---- roles ------------------------------------------------------------------------------------------------


def add_roles(k2: K2, config: NFTConfig) -> None:
    """The policy, and the old one as an exact copy of it if the recipe lets it lag. The reference is the role None."""
    add_policy(k2, config.lora, config.seed, reference=config.loss.kl > 0)
    if config.old.max == 0:
        return
    role = k2.roles[POLICY]
    if role is None:  # all weights
        k2.add_full_copy(OLD)
    else:
        k2.add_role(OLD, role.rank, role.alpha, role.targets, config.seed)
        k2.load_role_state_dict(OLD, k2.role_state_dict(POLICY))  # which may continue from an earlier adapter


def decay(config: OldConfig, updates: int) -> float:
    """What the old policy keeps of itself after so many updates, in [0, max]; 0: it becomes the policy."""
    return min(config.max, config.ramp * max(0, updates - config.flat))


def lags(config: NFTConfig, stepper: Stepper) -> bool:
    """Whether the old policy is another one than the policy now."""
    return decay(config.old, stepper.updates) > 0


@torch.no_grad()
def follow(k2: K2, config: NFTConfig, updates: int) -> None:
    """The old policy after that many updates: an average of it and the policy."""
    if OLD not in k2.roles:
        return
    # With kept = 0 it becomes the policy exactly, since lerp by 1 copies.
    old, kept = k2.role_parameters(OLD), decay(config.old, updates)
    # Each process moves the parts that it holds.
    for own, new in zip(old, k2.role_parameters(POLICY)):
        shards.own(own).lerp_(shards.own(new), 1 - kept)
    shards.spread(old)


# ---- noise ------------------------------------------------------------------------------------------------


def noisings(
    config: NFTConfig, step: int, group: Group, times_K: Tensor, micro_batch: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Micro-batches of a group's images at its noise levels: which images, their times (B,) and noise (B, N, C).

    All come from seeds of (run, step, group) and, unless they are shared, image.
    """
    # Where draws are shared one key stands for all images, and expands to them.
    count, shape = len(group.latents), group.latents.shape[1:]
    draws = 1 if config.loss.shared else count
    # Drawn without replacement; the first levels of a schedule are the noisiest.
    levels = times_K[: config.trained_levels()]
    keys, times = [], []
    for j in range(draws):
        keys.append((config.seed, step, group.index, j))
        generator = torch.Generator().manual_seed(sampler.seed_for(*keys[-1], -1))
        times.append(levels[torch.randperm(len(levels), generator=generator)[: config.loss.times]])
    times_JT = torch.stack(times).expand(count, -1)
    for k in range(config.loss.times):
        noise = sampler.noise([sampler.seed_for(*key, -2, k) for key in keys], shape).expand(count, *shape)
        for start in range(0, count, micro_batch):
            rows = slice(start, start + micro_batch)
            yield rows, times_JT[rows, k], noise[rows]


# ---- update -----------------------------------------------------------------------------------------------


def optimise(
    k2: K2,
    config: NFTConfig,
    step: int,
    groups: Sequence[Group],
    advantages_PG: Tensor,
    scored_PG: Tensor,
    stepper: Stepper,
    procs: Processes,
    micro_batch: int,
    check: bool = False,
) -> dict[str, float]:
    """One update on the groups of all processes; the old policy stays as it is. `check` adds `old_error`."""
    metrics = gradient(
        k2, config, step, groups, advantages_PG, scored_PG, procs, micro_batch, lags(config, stepper), check
    )
    procs.sum_gradients(stepper.parameters)
    metrics["grad_norm"] = stepper.step()
    return metrics | stepper.metrics() | {"skipped_updates": stepper.skipped}


def gradient(
    k2: K2,
    config: NFTConfig,
    step: int,
    groups: Sequence[Group],
    advantages_PG: Tensor,
    scored_PG: Tensor,
    procs: Processes,
    micro_batch: int,
    lagging: bool,
    check: bool = False,
) -> dict[str, float]:
    """Adds the loss's gradient over these groups to the policy's, and returns metrics over the groups of all processes.

    Where the old policy is not `lagging`, its velocity is the policy's own, detached: exact, without its forward.
    `check` makes that forward for the first images, and `old_error` is the relative distance of the two.

    The loss is a mean over the groups, images and noise levels of a whole step, whatever is in `groups`; images without
    a score (`scored_PG` is 0) have none. The other metrics are means over the images that have.
    """
    collected: dict[str, list[Tensor]] = {}
    errors: list[float] = []
    loss, count = config.loss, advantages_PG.numel() * config.loss.times
    objective = losses.objective(loss.form, loss.max_advantage, loss.beta, loss.anchor)
    for group in groups:
        advantages_G = advantages_PG[group.index].to(k2.device)
        scored_G = scored_PG[group.index].to(k2.device)
        times = sampler.schedule(config.sampling.steps, k2.mu(*group.size))[:-1]
        for rows, t, eps in noisings(config, step, group, times, micro_batch):
            x0, eps = group.latents[rows], eps.to(k2.device)
            x, u = sampler.noised(x0, eps, t), sampler.velocity_target(x0, eps)
            v = _velocity(k2, POLICY, group, x, t, trained=True)
            v_old = _velocity(k2, OLD, group, x, t) if lagging else v.detach()
            if check and not errors:  # once is enough: all images are drawn by the same weights
                again, own = _velocity(k2, OLD if OLD in k2.roles else POLICY, group, x, t), v.detach()
                errors.append(float((again - own).norm() / own.norm()))
            loss_B = objective(v, v_old, u, t.to(k2.device), advantages_G[rows])
            metrics = losses.measured(v, v_old if lagging else None, u, advantages_G[rows])
            metrics["latent_norm"] = losses.mean_square(x0)
            if loss.kl > 0:
                kl_B = losses.mean_square(v - _velocity(k2, None, group, x, t))
                loss_B = loss_B + loss.kl * kl_B
                metrics["kl"] = kl_B.detach()
            loss_B = loss_B * scored_G[rows]
            with k2.role(POLICY):
                (loss_B.sum() / count).backward()
            for name, value in _sums({**metrics, "loss": loss_B.detach()}, t, scored_G[rows]).items():
                collected.setdefault(name, []).append(value)  # not added up, which would wait for the device each time
    sums = {name: total_of(values) for name, values in collected.items()}
    return _over_processes(sums, errors, count, procs)


def _velocity(k2: K2, role: str | None, group: Group, x: Tensor, t: Tensor, trained: bool = False) -> Tensor:
    """(B, N, C) under a role, with a gradient if it is the one that is trained."""
    with k2.role(role), torch.set_grad_enabled(trained):
        return k2.velocity(x, t, group.text, *group.size)


def _sums(metrics: dict[str, Tensor], t: Tensor, scored_B: Tensor) -> dict[str, Tensor]:
    """Of the metrics of scored images, and how many there are: in all, and by part of the noise levels."""
    sums = {"images": scored_B.sum()}
    for name, value_B in metrics.items():
        if name != "velocity_error":  # which grows with the noise level, so it is told apart below
            sums[name] = (value_B * scored_B).sum()
    parts_B = (t * BINS).long().clamp(max=BINS - 1)
    for part in parts_B.unique().tolist():  # of the times as they were drawn, on the CPU
        own_B = scored_B * (parts_B == part).to(scored_B)
        sums[f"velocity_error_t{part + 1}"] = (metrics["velocity_error"] * own_B).sum()
        sums[f"images_t{part + 1}"] = own_B.sum()
    return sums


def _over_processes(sums: dict[str, float], errors: list[float], count: int, procs: Processes) -> dict[str, float]:
    """Metrics from the sums that each process has of its groups."""
    totals: dict[str, float] = {}
    found: list[float] = []
    for part, part_errors in procs.all_gather((sums, errors)):
        found += part_errors
        for name, value in part.items():
            totals[name] = totals.get(name, 0.0) + value
    metrics = {"loss": totals.pop("loss") / count}
    for name, value in totals.items():
        if name.startswith("images"):
            continue
        # An error of a part of the noise levels is a mean over the images of that part.
        is_part = name.startswith("velocity_error")
        own = totals[name.replace("velocity_error", "images") if is_part else "images"]
        metrics[name] = value / own if own else 0.0
    metrics["latent_norm"] **= 0.5  # a root mean square
    if found:
        metrics["old_error"] = max(found)
    return metrics


def check_old(error: float) -> None:
    """Raises UserError if the old policy is not the policy although it has not been left behind."""
    if not error <= TOLERANCE:
        raise UserError(
            f"old: its velocity is {error:.2g} of the policy's off although it is the policy, so the images are not its"
            " own; use model.dtype float32, or report it"
        )
