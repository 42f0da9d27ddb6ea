"""Roles: LoRA adapters on one frozen transformer, or the transformer itself and copies of it.

Policy, student and fake score are adapters; the reference and the teacher are the model without them. That model is the
base plus the stack: the adapters of earlier stages, frozen, fp32, and active under every role. They are not merged into
the base, because a weight in bf16 loses every change below half a unit in its last place. Their factors are
concatenated with those of the role, so any number of stages costs one product.

Where all weights are trained, the first role consists of them, any other of a copy, and the reference is a frozen copy,
if one was kept. Such a role adds the stack to its weights, which are fp32.
"""

from __future__ import annotations

import contextlib
import copy
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import Krea2Transformer2DModel
from torch import Tensor, nn

from posttrain.distributed import shards
from posttrain.errors import UserError
from posttrain.model import sampler
from posttrain.model.adapters import targets as names_of
from posttrain.model.adapters.targets import ON_REFERENCES, TARGETS, Lanes, fuses_text
from posttrain.model.linears import FP8, LoraLinear
from posttrain.model.load import check_names

STAGES = "stages"
"""The adapter that holds the stack."""


@dataclass(frozen=True)
class Role:
    """The settings of a LoRA adapter."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    lanes: Lanes = "all"


class Roles:
    """The roles of a transformer. Nothing is trainable until `train_role`."""

    def __init__(self, transformer: Krea2Transformer2DModel) -> None:
        self.transformer = transformer
        self.roles: dict[str, Role | None] = {}
        """By name; None: a role of all weights."""
        self._stored: dict[str, torch.dtype] = {}
        """The names of the weights in a role of all weights, with the types that they have outside it."""
        self.deferred = False
        """Whether a role of all weights keeps their types for now; what shards it (parallelize.py, zero.py) makes it
        fp32."""
        self._copies: dict[str, Krea2Transformer2DModel] = {}
        """The transformers of the other roles of all weights."""
        # All adapted layers read their active adapters from this one list, so a switch is one assignment.
        self._active: list[str] = []
        self._on_references: list[str] = []
        """Of the active role, what acts on the rows of references alone; see `K2.keys_and_values`."""
        self._layers: list[tuple[str, LoraLinear]] = []
        self._stack_of_full: dict[int, tuple[Tensor, Tensor]] = {}
        """Factors that are still to be added to a weight of the role of all weights, by its id; see `master`."""

    def add_role(
        self, name: str, rank: int, alpha: float, targets: Sequence[str] = TARGETS, seed: int = 0, lanes: Lanes = "all"
    ) -> None:
        """Adds an adapter on the layers that `targets` name (adapters/targets.py): fp32 on any base, without effect
        until it is trained (B = 0).

        It is not active or trainable yet. One that reaches layers which fuse the text must be there before any text
        is prepared: see `K2.text_tokens`.
        """
        if name in self.roles or name in (STAGES, FP8) or self._stored or not re.fullmatch(r"\w+", name):
            raise ValueError(f"role {name!r} exists already, stands beside one of all weights, or is not a word")
        for target in targets:
            if not (names_of.is_known(target) and self.layers_of([target])):
                raise UserError(
                    f"LoRA targets: {target!r} is no linear of a K2 block, nor a layer outside them; choose from"
                    f" {names_of.choices()}"
                )
            if not self.layers_of([target], lanes):
                raise UserError(f"LoRA targets: {target!r} does nothing where lanes is references; leave it out")
        self.roles[name] = Role(rank, alpha, tuple(targets), lanes)
        for index, layer in enumerate(self._adapted(self.layers_of(targets, lanes))):
            # nn.Linear's own range, drawn on the CPU by index, so that every device and process gets the same.
            generator = torch.Generator().manual_seed(sampler.seed_for(seed, 2 * index))
            uniform = torch.rand(rank, layer.in_features, generator=generator) * 2 - 1
            a, b = uniform / math.sqrt(layer.in_features), torch.zeros(layer.out_features, rank)
            layer.add(name, a, b, alpha / rank)

    @torch.no_grad()
    def add_full_role(self, name: str, reference: bool = False) -> Krea2Transformer2DModel | None:
        """Makes the weights themselves a role, in fp32 whatever type the network computes in.

        The weights that fuse the text are left out: their output is cached. There can be no adapter beside this role.
        It begins as the sum of base and stack in fp32, and the stack is gone but for what of it fuses the text. With
        `reference`, a frozen copy is returned.
        """
        if self.roles:
            raise ValueError(f"role {name!r} of all weights cannot stand beside {sorted(self.roles)}")
        self._stack_of_full = self._unstack(keep_text=True)
        copied = frozen_copy(self.transformer) if reference else None
        # deepcopy keeps the order of parameters. The copy takes the stack now, the role at its first `master`.
        for weight, own in zip(self.transformer.parameters(), copied.parameters() if copied is not None else ()):
            if factors := self._stack_of_full.get(id(weight)):
                own.data = _sum(weight, factors).to(own.dtype)  # rounded as the forward rounds the role's weights
        self._stored = {key: parameter.dtype for key, parameter in self.transformer.named_parameters() if _full(key)}
        self.roles[name] = None
        if not self.deferred:
            for parameter in self.role_parameters(name):
                parameter.data = self.master(parameter)
        return copied

    def master(self, parameter: Tensor) -> Tensor:
        """The initial fp32 value of a weight of the role of all weights. The stack's change is added at the first
        call."""
        # Popped, so that a second call does not add it twice.
        factors = self._stack_of_full.pop(id(parameter), None)
        return parameter.data.float() if factors is None else _sum(parameter, factors)

    def add_full_copy(self, name: str) -> None:
        """Adds a role of all weights that begins as a copy of the first one."""
        if not self._stored or name in self.roles:
            raise ValueError(f"role {name!r} exists already, or there is no role of all weights to copy")
        copied = self._copies[name] = frozen_copy(self.transformer)
        for weight, own in zip(self.transformer.parameters(), copied.parameters()):
            if factors := self._stack_of_full.get(id(weight)):
                self._stack_of_full[id(own)] = factors
        self.roles[name] = None

    def layers_of(self, targets: Sequence[str], lanes: Lanes = "all") -> list[str]:
        """The names of the linears that these targets reach, in the order of the model. With `lanes` references those
        on which the references' keys and values depend: all others would have no gradient."""
        blocks = len(self.transformer.transformer_blocks)
        found: list[str] = []
        for name, module in self.transformer.named_modules():
            is_read = lanes == "all" or names_of.is_before_keys(name, blocks)
            if isinstance(module, nn.Linear) and is_read and names_of.reaches(targets, name):
                found.append(name)
        return found

    @property
    def adapts_text(self) -> bool:
        """Whether a role adapts layers that fuse the text, so that fused text differs between roles. Earlier stages
        are no role: they are active under each."""
        return any(fuses_text(name) and set(layer.scales) - {STAGES} for name, layer in self._layers)

    @contextlib.contextmanager
    def role(self, name: str | None, fp8: bool = False, beside: Sequence[str] = ()) -> Iterator[None]:
        """Runs as this role, then restores the previous one. None is base and stack, which are the reference. `beside`
        are adapters whose changes are added to it.

        With `fp8`, linears multiply by their copies in fp8, where they have them (fp8.add_copies).
        """
        for asked in (name, *beside):
            if asked is not None and asked not in self.roles:
                raise ValueError(f"no role {asked!r}; there are {sorted(self.roles)}")
        stack = [STAGES] if self.has_stack else []
        own = self.roles.get(name or "")
        named = [] if name is None else [name]
        on_references = named if own is not None and own.lanes == "references" else []
        names = [*stack, *([] if on_references else named), *beside]
        with switched(self._active, [*names, FP8] if fp8 else names), switched(self._on_references, on_references):
            yield

    @property
    def active(self) -> str | None:
        """The role that the network runs as now; None: base and stack."""
        return next((name for name in (*self._on_references, *self._active) if name not in (STAGES, FP8)), None)

    @property
    def has_stack(self) -> bool:
        """Whether earlier stages are active under every role."""
        return any(STAGES in layer.scales for _, layer in self._layers)

    def role_named_parameters(self, name: str) -> dict[str, nn.Parameter]:
        """An adapter's factors by name, as in `transformer_blocks.0.attn.to_q.lora_A.weight`; or all weights."""
        if self.roles[name] is None:
            transformer = self._copies.get(name, self.transformer)
            return {key: transformer.get_parameter(key) for key in self._stored}
        factors: dict[str, nn.Parameter] = {}
        for module, layer in self._layers:
            if name in layer.scales:
                for factor in "AB":
                    factors[f"{module}.lora_{factor}.weight"] = layer.factor(factor, name)
        return factors

    def role_parameters(self, name: str) -> list[nn.Parameter]:
        return list(self.role_named_parameters(name).values())

    def role_state_dict(self, name: str) -> dict[str, Tensor]:
        state = {}
        for key, parameter in self.role_named_parameters(name).items():
            # Where it is sharded, nothing is gathered yet.
            state[key] = shards.joined(shards.own(parameter).detach(), parameter)
        return state

    @torch.no_grad()
    def load_role_state_dict(self, name: str, state_dict: Mapping[str, Tensor]) -> None:
        """Copies the values in. A missing, unexpected or misshapen key raises UserError before anything changes."""
        own, full = self.role_named_parameters(name), self.roles[name] is None
        remedy = "give weights of this model" if full else "give the adapter of this rank and these targets"
        check_names(f"{'weights' if full else 'adapter'} {name!r}", self.role_state_dict(name), state_dict, remedy)
        for key, parameter in own.items():
            shards.own(parameter).copy_(shards.part(state_dict[key], parameter))
        # Some engines keep whole copies of what is divided.
        shards.spread(list(own.values()))

    def train_role(self, name: str) -> list[nn.Parameter]:
        """Returns this role's parameters, which are from now on the only ones that require grad."""
        for transformer in (self.transformer, *self._copies.values()):
            transformer.requires_grad_(False)
        parameters = self.role_parameters(name)
        for parameter in parameters:
            parameter.requires_grad_(True)
        return parameters

    def active_factors(self, name: str | None) -> dict[str, Tensor]:
        """The factors that are active under this role, with the stack and with scales, as the forward uses them. Named
        as in `role_named_parameters`, (r, in) and (out, r), fp32."""
        active: dict[str, Tensor] = {}
        with self.role(name):
            for module, layer in self._layers:
                factors = layer.factors(self._active)
                if factors is not None:
                    active[f"{module}.lora_A.weight"], active[f"{module}.lora_B.weight"] = factors
        return active

    @torch.no_grad()
    def stack_role(self, name: str) -> None:
        """Ends a role whose training is over. It becomes a part of the model, and so of the reference.

        An adapter joins the stack, unchanged. A role of all weights becomes the base, in the types that the base had.
        """
        if self.active is not None:
            raise RuntimeError(f"cannot stack {name!r} while role {self.active!r} is active")
        if (own := self.roles[name]) is not None and own.lanes == "references":
            raise UserError(ON_REFERENCES)
        if own is None:
            for key, parameter in self.role_named_parameters(name).items():
                parameter.data = parameter.data.to(self._stored[key])
                parameter.requires_grad_(False)
            self._stored = {}
        for _, layer in self._layers:
            # The stack stays one adapter, whose rank grows: scales are in B now, so its own is 1.
            if name in layer.scales and (factors := layer.factors([STAGES, name])):
                for other in (STAGES, name):
                    if other in layer.scales:
                        layer.remove(other)
                layer.add(STAGES, *factors, scale=1.0)
        del self.roles[name]
        self._active[:] = [STAGES] if self.has_stack else []

    @torch.no_grad()
    def merge_stack(self, *grids: torch.dtype) -> dict[str, list[Kept]]:
        """Merges the stack into the base, all stages at once, with one rounding to the type of each weight.

        Returns by layer how much of the change rounding to each type of `grids` keeps. There must be no roles.
        """
        if self.roles:
            raise RuntimeError(f"cannot merge the stack under {sorted(self.roles)}")
        kept: dict[str, list[Kept]] = {}
        # Before the layers are taken apart; weights are the same objects afterwards.
        layers = {id(layer.weight): (name, layer.weight) for name, layer in self._layers}
        for key, (a, b) in self._unstack().items():
            (name, weight), change = layers[key], b @ a
            merged = weight.detach().float() + change
            of = {grid: Kept.of(weight, change, merged, grid) for grid in set(grids)}
            kept[name] = [of[grid] for grid in grids]
            weight.data = merged.to(weight.dtype)
        return kept

    def drop_roles(self) -> None:
        """Removes every adapter, those of the stack too, so that only the base is left."""
        if self.active is not None or None in self.roles.values():
            raise RuntimeError("roles that are active, or of all weights, cannot be dropped")
        self._unstack()
        self.roles = {}
        self.transformer.requires_grad_(False)

    def base_state_dict(self) -> dict[str, Tensor]:
        """The transformer's own weights in diffusers' names, without adapters."""
        return {key: value for key, value in self.transformer.state_dict().items() if ".lora_" not in key}

    def _adapted(self, wanted: Sequence[str]) -> list[LoraLinear]:
        """These linears, as LoraLinear, in the order of the model."""
        for name in wanted:
            linear = self.transformer.get_submodule(name)
            if isinstance(linear, nn.Linear) and not isinstance(linear, LoraLinear):
                self.transformer.set_submodule(name, LoraLinear(linear, self._active), strict=True)
        modules = self.transformer.named_modules()
        self._layers = [(name, layer) for name, layer in modules if isinstance(layer, LoraLinear)]
        # By the order of the model, whatever was asked for: seeds are drawn by it.
        return [layer for name, layer in self._layers if name in wanted]

    def _unstack(self, keep_text: bool = False) -> dict[int, tuple[Tensor, Tensor]]:
        """Removes the stack and puts plain linears back, with `keep_text` not where they fuse the text. Returns A and B
        of all its stages by id of a linear's weight."""
        stack: dict[int, tuple[Tensor, Tensor]] = {}
        kept: list[tuple[str, LoraLinear]] = []
        for name, layer in self._layers:
            if keep_text and fuses_text(name):
                kept.append((name, layer))
                continue
            if factors := layer.factors([STAGES]):
                stack[id(layer.weight)] = factors
            self.transformer.set_submodule(name, layer.plain(), strict=True)
        # In place: blocks and layers share the list of active adapters.
        self._layers, self._active[:] = kept, [STAGES] if kept else []
        return stack


PART = 2**18
"""Numbers that are measured at a time."""


@dataclass(frozen=True)
class Kept:
    """How much of a change of weights is left after rounding, as inner products over all weights."""

    rounded: float
    """<change that is left, change that was wanted>"""
    wanted: float
    """<wanted, wanted>"""
    weight: float
    """<weights, weights>"""

    @staticmethod
    def of(weight: Tensor, change: Tensor, merged: Tensor, grid: torch.dtype) -> Kept:
        """For `merged` = weight + change, fp32, rounded to type `grid`."""
        rounded = wanted = squares = 0.0
        # In parts that a CPU's cache holds: on whole weights of K2 the time goes into memory.
        own_parts, added_parts, both_parts = (x.detach().reshape(-1).split(PART) for x in (weight, change, merged))
        for own, added, both in zip(own_parts, added_parts, both_parts):
            left = both.to(grid).float() - own.to(grid).float()
            rounded += float((left * added).sum())
            wanted += float(added.square().sum())
            squares += float(own.float().square().sum())
        return Kept(rounded, wanted, squares)

    @property
    def share(self) -> float:
        """1 if nothing is lost, or if there was no change."""
        return self.rounded / self.wanted if self.wanted else 1.0

    @property
    def size(self) -> float:
        """The wanted change relative to the weights."""
        return math.sqrt(self.wanted / self.weight) if self.weight else math.inf

    def __add__(self, other: Kept) -> Kept:
        return Kept(self.rounded + other.rounded, self.wanted + other.wanted, self.weight + other.weight)


def _sum(weight: Tensor, factors: tuple[Tensor, Tensor]) -> Tensor:
    """The weight with its change, in fp32."""
    a, b = factors
    with torch.no_grad():
        return weight.detach().float() + b @ a


def _full(key: str) -> bool:
    """Whether a weight belongs to the role of all weights: all do, except those that fuse the text."""
    return not fuses_text(key)


def frozen_copy(transformer: Krea2Transformer2DModel) -> Krea2Transformer2DModel:
    """A frozen copy that computes exactly what the role of all weights computes at its start.

    It shares what is never trained. Weights of linears keep their type, because autocast rounds the role's to it as
    well. Everything else is fp32, as in the role.
    """
    # deepcopy takes what its memo holds for already copied.
    memo: dict[int, Any] = {id(p): p for key, p in transformer.named_parameters() if not _full(key)}
    copied = copy.deepcopy(transformer, memo).requires_grad_(False)
    linear: set[int] = set()
    for module in copied.modules():
        if isinstance(module, nn.Linear):
            linear.update(map(id, module.parameters()))
    for key, parameter in copied.named_parameters():
        if _full(key) and id(parameter) not in linear:
            parameter.data = parameter.data.float()
    return copied


@contextlib.contextmanager
def switched(active: list[str], names: Sequence[str]) -> Iterator[None]:
    """Has these adapters active inside it, and the previous ones afterwards."""
    before = list(active)
    active[:] = names
    try:
        yield
    finally:
        active[:] = before
