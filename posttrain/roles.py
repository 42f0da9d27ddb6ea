"""Roles: LoRA adapters on one frozen transformer, or the transformer itself and copies of it.

Policy, student and fake score are adapters; the reference and the teacher are the base with none active. Where all
weights are trained, the first role is made of them and any other of a copy, and the reference is a frozen copy, if one
was kept.
"""

import contextlib
import copy
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import Krea2Transformer2DModel
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from posttrain import sampler, shards
from posttrain.load import check_names
from prompts.errors import UserError

TARGETS = ("to_q", "to_k", "to_v", "to_gate", "to_out.0", "ff.gate", "ff.up", "ff.down")
"""The linears of a transformer block that a role adapts by default: all of them."""


@dataclass(frozen=True)
class Role:
    """What makes a LoRA adapter, beside its weights."""

    rank: int
    alpha: float
    targets: tuple[str, ...]


class Roles:
    """The roles of a transformer. Nothing is trainable until `train_role`."""

    def __init__(self, transformer: Krea2Transformer2DModel) -> None:
        self.transformer = transformer
        self.roles: dict[str, Role | None] = {}
        """By name; None is the role of all weights."""
        self._stored: dict[str, torch.dtype] = {}
        """The weights of the role of all weights, with the types that they have outside it."""
        self.deferred = False
        """Whether a role of all weights keeps their types for now; fsdp.py makes it fp32 where it cuts it up."""
        self._copies: dict[str, Krea2Transformer2DModel] = {}
        """The transformers of roles of all weights beside that one."""
        # Every adapted layer reads its active adapters from this one list: a switch is one assignment. peft's
        # own walks the layers and changes requires_grad as it goes, which must not happen in training.
        self._active: list[str] = []
        self._layers: list[tuple[str, LoraLayer]] = []

    def add_role(self, name: str, rank: int, alpha: float, targets: Sequence[str] = TARGETS, seed: int = 0) -> None:
        """Add an adapter on the transformer blocks: fp32 on any base, without effect until trained (B = 0).

        It is neither active nor trainable yet. The text fusion is never adapted: its output is cached.
        """
        if name in self.roles or self._stored or not re.fullmatch(r"\w+", name):
            raise ValueError(f"role {name!r} exists already, stands beside one of all weights, or is not a word")
        if unknown := [target for target in targets if target not in TARGETS]:
            known = ", ".join(TARGETS)
            raise UserError(f"LoRA targets: {unknown[0]!r} is no linear of a K2 block; choose from {known}")
        trainable = self._trainable()
        pattern = rf"transformer_blocks\.\d+\.(attn\.)?({'|'.join(re.escape(target) for target in targets)})"
        options: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "target_modules": pattern}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are the point
            warnings.filterwarnings("ignore", "TorchaoLoraLinear was instantiated")  # nothing is merged by peft
            self.transformer.add_adapter(LoraConfig(**options), name)
        self.roles[name] = Role(rank, alpha, tuple(targets))
        self._relink(trainable)
        for index, (key, parameter) in enumerate(self.role_named_parameters(name).items()):
            parameter.data = torch.zeros_like(parameter, dtype=torch.float32)
            if key.endswith("lora_A.weight"):
                # nn.Linear's own range, drawn on the CPU by index: the same on every device and process.
                generator = torch.Generator().manual_seed(sampler.seed_for(seed, index))
                uniform = torch.rand(parameter.shape, generator=generator) * 2 - 1
                parameter.data.copy_(uniform / math.sqrt(parameter.shape[1]))

    def add_full_role(self, name: str) -> None:
        """Make the weights themselves a role, in fp32 whatever the arithmetic, so that small updates are not lost.

        All but those that fuse the text, whose output is cached. There can be no other role then.
        """
        if self.roles:
            raise ValueError(f"role {name!r} of all weights cannot stand beside {sorted(self.roles)}")
        self._stored = {key: parameter.dtype for key, parameter in self.transformer.named_parameters() if _full(key)}
        self.roles[name] = None
        for parameter in self.role_parameters(name) if not self.deferred else ():
            parameter.data = parameter.data.float()

    def add_full_copy(self, name: str) -> None:
        """Make a copy of the role of all weights, as it is now, another such role."""
        if not self._stored or name in self.roles:
            raise ValueError(f"role {name!r} exists already, or there is no role of all weights to copy")
        self._copies[name] = frozen_copy(self.transformer)
        self.roles[name] = None

    @contextlib.contextmanager
    def role(self, name: str | None) -> Iterator[None]:
        """Run as this role; None is the base, which is the reference. The previous one returns afterwards."""
        if name is not None and name not in self.roles:
            raise ValueError(f"no role {name!r}; there are {sorted(self.roles)}")
        with switched(self._active, [] if name is None else [name]):
            yield

    @property
    def active(self) -> str | None:
        """The role that it runs as."""
        return self._active[0] if self._active else None

    def role_named_parameters(self, name: str) -> dict[str, nn.Parameter]:
        """An adapter's factors by name, as in `transformer_blocks.0.attn.to_q.lora_A.weight`; or all weights."""
        if self.roles[name] is None:
            transformer = self._copies.get(name, self.transformer)
            return {key: transformer.get_parameter(key) for key in self._stored}
        return {
            f"{module}.{factor}.weight": getattr(layer, factor)[name].weight
            for module, layer in self._layers
            if name in layer.lora_A
            for factor in ("lora_A", "lora_B")
        }

    def role_parameters(self, name: str) -> list[nn.Parameter]:
        return list(self.role_named_parameters(name).values())

    def role_state_dict(self, name: str) -> dict[str, Tensor]:
        return {key: shards.joined(shards.own(p).detach(), p) for key, p in self.role_named_parameters(name).items()}

    @torch.no_grad()
    def load_role_state_dict(self, name: str, state_dict: Mapping[str, Tensor]) -> None:
        """Copy the values in; a missing, unexpected or misshapen key raises before anything changes."""
        own, full = self.role_named_parameters(name), self.roles[name] is None
        remedy = "give weights of this model" if full else "give the adapter of this rank and these targets"
        check_names(f"{'weights' if full else 'adapter'} {name!r}", self.role_state_dict(name), state_dict, remedy)
        for key, parameter in own.items():
            shards.own(parameter).copy_(shards.part(state_dict[key], parameter))
        shards.spread(list(own.values()))

    def train_role(self, name: str) -> list[nn.Parameter]:
        """Only this role's parameters require grad from here on; returns them."""
        for transformer in (self.transformer, *self._copies.values()):
            transformer.requires_grad_(False)
        parameters = self.role_parameters(name)
        for parameter in parameters:
            parameter.requires_grad_(True)
        return parameters

    @torch.no_grad()
    def merge_role(self, name: str) -> None:
        """Fold a role into the base and forget it: from here on the base, so the reference, has it."""
        if self._active:
            raise RuntimeError(f"cannot merge {name!r} while role {self._active[0]!r} is active")
        if self.roles[name] is None:
            for key, parameter in self.role_named_parameters(name).items():
                parameter.data = parameter.data.to(self._stored[key])
                parameter.requires_grad_(False)
            del self.roles[name]
            self._stored = {}
            return
        trainable = self._trainable()
        for _, layer in self._layers:
            if name in layer.lora_A:
                weight: Any = layer.get_base_layer().weight
                a, b = (getattr(layer, factor)[name].weight for factor in ("lora_A", "lora_B"))
                weight.copy_(weight.float() + layer.scaling[name] * (b @ a))
        del self.roles[name]
        if self.roles:
            self.transformer.delete_adapters(name)
        else:
            self.transformer.unload_lora()
        self._relink(trainable)

    def drop_roles(self) -> None:
        """Forget every adapter: what is left is the base as it is, without a trace of them."""
        if self._active or None in self.roles.values():
            raise RuntimeError("roles that are active, or of all weights, cannot be dropped")
        if self.roles:
            self.transformer.unload_lora()
        self.roles = {}
        self._layers = []
        self.transformer.requires_grad_(False)

    def base_state_dict(self) -> dict[str, Tensor]:
        """The transformer's own weights in diffusers' names, without adapters."""
        state = self.transformer.state_dict()
        return {key.replace(".base_layer.", "."): value for key, value in state.items() if ".lora_" not in key}

    def _trainable(self) -> set[int]:
        return {id(parameter) for parameter in self.transformer.parameters() if parameter.requires_grad}

    def _relink(self, trainable: set[int]) -> None:
        """After peft has changed the layers: find them again, share the list, restore what was trainable."""
        for parameter in self.transformer.parameters():
            parameter.requires_grad_(id(parameter) in trainable)
        modules = self.transformer.named_modules()
        self._layers = [(name, layer) for name, layer in modules if isinstance(layer, LoraLayer)]
        for _, layer in self._layers:
            layer._active_adapter = self._active


def _full(key: str) -> bool:
    """Whether a weight belongs to the role of all weights: it does not if it fuses the text."""
    return not key.startswith(("text_fusion.", "txt_in."))


def frozen_copy(transformer: Krea2Transformer2DModel) -> Krea2Transformer2DModel:
    """A copy that stays as it is when all weights become a role, and computes what they compute then.

    It shares what is never trained. The factors of matrix products keep their type, to which arithmetic brings the
    role's as well; what is added or scales is fp32, as in the role.
    """
    shared: dict[int, Any] = {id(p): p for key, p in transformer.named_parameters() if not _full(key)}
    copied = copy.deepcopy(transformer, shared).requires_grad_(False)
    linear = {id(p) for module in copied.modules() if isinstance(module, nn.Linear) for p in module.parameters()}
    for key, parameter in copied.named_parameters():
        if _full(key) and id(parameter) not in linear:
            parameter.data = parameter.data.float()
    return copied


@contextlib.contextmanager
def switched(active: list[str], names: Sequence[str]) -> Iterator[None]:
    before = list(active)
    active[:] = names
    try:
        yield
    finally:
        active[:] = before
