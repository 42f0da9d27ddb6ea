"""What the fast path and its options change, against the exact path; see bench.py."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice

import torch
from torch import Tensor, nn

from posttrain.bench.steps import Steps
from posttrain.config.sections import OptimConfig
from posttrain.model.k2 import Text
from posttrain.training.policy import POLICY
from posttrain.training.stepper import Stepper

UPDATES = 5
FACTORS = 16
"""Of the adapter's factors, those of the first block."""


def observed(steps: Steps) -> dict[str, Tensor]:
    """What the model computes on fixed inputs as it runs now: velocity (B, N, C), a trained adapter's gradient as one
    vector, and, where parts are offloaded, a prompt's features and pixels. On the CPU."""
    k2, config = steps.k2, steps.config
    text = Text(k2.fuse(k2.random_features(config.text))[None])
    x = torch.randn(2, k2.image_tokens(*steps.size), k2.latent_channels, generator=torch.Generator().manual_seed(0))
    x = x.to(k2.device)
    with torch.no_grad(), k2.role(steps.role):
        found = {"velocity": k2.velocity(x, 0.5, text, *steps.size)}
    if steps.role is not None:
        parameters = k2.train_role(POLICY)
        with k2.role(POLICY):
            k2.velocity(x, 0.5, text, *steps.size).square().mean().backward()
        found["gradient"] = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        for parameter in parameters:
            parameter.requires_grad_(False).grad = None
    if "text_encoder" in config.offload:
        found["features"] = k2.encode_tokens([list(range(k2.pipe.prompt_template_encode_start_idx + config.text))])[0]
    if "vae" in config.offload:
        found["pixels"] = k2.decode(x, *steps.size)
    return {name: tensor.float().cpu() for name, tensor in found.items()}


def adapter(steps: Steps) -> list[Tensor]:
    """A copy of the trained adapter, on the CPU."""
    return [p.detach().to("cpu", copy=True) for p in _parameters(steps)]


def set_adapter(steps: Steps, values: list[Tensor]) -> None:
    """To what `adapter` gave."""
    with torch.no_grad():
        for parameter, value in zip(_parameters(steps), values, strict=True):
            parameter.copy_(value)


def _parameters(steps: Steps) -> list[nn.Parameter]:
    return [] if steps.role is None else steps.k2.role_parameters(POLICY)


def distances(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, float]:
    """Relative L2."""
    return {name: float((value - exact[name]).norm() / exact[name].norm()) for name, value in found.items()}


def of_updates(steps: Steps) -> dict[str, float]:
    """Relative L2 distance of what updates by random gradients change to what those of AdamW change."""
    if steps.role is None or steps.config.optim == "adamw":
        return {}
    changes = []
    for kind in ("adamw", steps.config.optim):
        begun = [p.detach() for p in islice(steps.k2.role_parameters(POLICY), FACTORS)]
        stepper = Stepper([p.clone().requires_grad_() for p in begun], OptimConfig(kind=kind))
        generator = torch.Generator(begun[0].device).manual_seed(0)
        for _ in range(UPDATES):
            for parameter in stepper.parameters:
                noise = torch.randn(parameter.shape, generator=generator, device=parameter.device)
                parameter.grad = noise + 0.5
            stepper.step()
        changes.append(torch.cat([(p.detach() - b).flatten() for p, b in zip(stepper.parameters, begun)]))
    return {"update": float((changes[1] - changes[0]).norm() / changes[0].norm())}
