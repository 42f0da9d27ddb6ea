"""Errors of the fast path and its options against the exact path; see bench/run.py."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from posttrain.bench.steps import Steps
from posttrain.config.sections import OptimConfig
from posttrain.model.k2 import Text
from posttrain.training.policy import POLICY
from posttrain.training.stepper import Stepper

UPDATES = 5
FACTORS = 16
"""LoRA factors of the first block, enough to see the error of 8-bit moments; of all weights so many tensors."""


def observed(steps: Steps) -> dict[str, Tensor]:
    """The model's outputs on fixed inputs as it runs now, in fp32 on the CPU: velocity (B, N, C), the adapter's
    gradient as one vector, and, where parts are offloaded, a prompt's features and an image's pixels."""
    k2, config = steps.k2, steps.config
    text = Text(k2.fuse(k2.random_features(config.text))[None])
    x = torch.randn(2, k2.image_tokens(*steps.size), k2.latent_channels, generator=torch.Generator().manual_seed(0))
    x = x.to(k2.device)  # drawn on the CPU, so that it does not depend on the device
    with torch.no_grad(), k2.role(steps.role):
        outputs = {"velocity": k2.velocity(x, 0.5, text, *steps.size)}
    if steps.role is not None:
        parameters = k2.train_role(POLICY)
        # any scalar of the velocity has a gradient through all layers
        with k2.role(POLICY):
            k2.velocity(x, 0.5, text, *steps.size).square().mean().backward()
        few = parameters if steps.config.rank is not None else parameters[:FACTORS]  # all of K2's are 51 GB
        gradients = [p.grad.flatten() for p in few if p.grad is not None]
        outputs["gradient"] = torch.cat(gradients)
        for parameter in parameters:
            parameter.requires_grad_(False).grad = None
    if "text_encoder" in config.model.offload:
        # the template's tokens come before the prompt's and are dropped after encoding
        tokens = list(range(k2.pipe.prompt_template_encode_start_idx + config.text))
        outputs["features"] = k2.encode_tokens([tokens])[0]
    if "vae" in config.model.offload:
        outputs["pixels"] = k2.decode(x, *steps.size)
    return {name: tensor.float().cpu() for name, tensor in outputs.items()}


def adapter(steps: Steps) -> list[Tensor]:
    """A copy of the trained adapter, on the CPU."""
    return [p.detach().to("cpu", copy=True) for p in _parameters(steps)]


def set_adapter(steps: Steps, values: list[Tensor]) -> None:
    """Restores the copy that `adapter` made."""
    with torch.no_grad():
        for parameter, value in zip(_parameters(steps), values, strict=True):
            parameter.copy_(value)


def _parameters(steps: Steps) -> list[nn.Parameter]:
    # All weights are measured without an optimiser, so there is nothing to restore.
    return [] if not steps.config.rank else steps.k2.role_parameters(POLICY)


def distances(outputs: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, float]:
    """Relative L2 distances by name."""
    return {name: _distance(value, exact[name]) for name, value in outputs.items()}


def _distance(value: Tensor, exact: Tensor) -> float:
    return float((value - exact).norm() / exact.norm())


def of_updates(steps: Steps) -> dict[str, float]:
    """Relative L2 distance of an optimiser's updates from AdamW's, with random gradients; {} for AdamW itself."""
    optim = steps.config.optim
    if not steps.config.rank or optim is None or optim.kind == "adamw":
        return {}
    changes = []
    for kind in ("adamw", optim.kind):
        before = [p.detach() for p in steps.k2.role_parameters(POLICY)[:FACTORS]]
        stepper = Stepper([p.clone().requires_grad_() for p in before], OptimConfig(kind=kind))
        # From one seed, so that both optimisers get the same gradients.
        generator = torch.Generator(before[0].device).manual_seed(0)
        for _ in range(UPDATES):
            for parameter in stepper.parameters:
                noise = torch.randn(parameter.shape, generator=generator, device=parameter.device)
                parameter.grad = noise + 0.5  # a mean, so that updates do not cancel
            stepper.step()
        change = [(after.detach() - start).flatten() for after, start in zip(stepper.parameters, before)]
        changes.append(torch.cat(change))
    return {"update": _distance(changes[1], changes[0])}
