"""What is merged: the parents, the base that they share, and what each of them changes of it.

A parent is a list of stages on the base: adapters, or whole weights in place of the base's. A run brings the stages
that it stands on. Those that all parents have in common are there once: the merge stands on them too, and a parent's
change is counted from there.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from posttrain.config.sections import ModelConfig
from posttrain.config.types import changed
from posttrain.errors import UserError
from posttrain.loading import check_keys, is_hub_id
from posttrain.merge import weights
from posttrain.merge.config import SUFFIX, MergeConfig
from posttrain.merge.weights import Weights
from posttrain.model import files
from posttrain.model.adapters.kinds import BIAS, Change
from posttrain.model.adapters.low_rank import Factors, concatenate
from posttrain.model.fingerprint import fingerprint
from posttrain.model.lora_file import A, B, layer_of, linear_shapes, read_adapter
from posttrain.training import checkpoint
from posttrain.training.checkpoint import Checkpoint
from posttrain.training.policy import base_of, earlier_of, is_student, scaled_factors

WHOLE = "weights.safetensors"
"""File of a checkpoint that trained all weights."""


@dataclass(frozen=True)
class Adapter:
    """A stage that adds low-rank changes."""

    factors: Mapping[str, Factors]
    """By layer: B (d_out, r) with its scale and A (r, d_in), fp32."""

    @staticmethod
    def of(factors: Mapping[str, Tensor]) -> Adapter:
        """From factors by their names in a LoRA file, with scales in B."""
        layers = dict.fromkeys(map(layer_of, factors))
        return Adapter({layer: (factors[f"{layer}.{B}"], factors[f"{layer}.{A}"]) for layer in layers})

    def applied(self, name: str, value: Tensor) -> Tensor:
        """A weight of that name, fp32, after this stage."""
        factors = self.factors.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if factors is None:
            return value
        b, a = factors
        return value + b.to(value.device) @ a.to(value.device)


@dataclass(frozen=True)
class Whole:
    """A stage that has values of its own for all weights, or for most."""

    values: Weights

    def applied(self, name: str, value: Tensor) -> Tensor:
        return self.values[name].to(value.device).float() if name in self.values else value


@dataclass(frozen=True)
class Converted:
    """A stage of an adapter's file that is not a LoRA, or not in all layers: DoRA, LoKr, LoHa, whole differences."""

    adapter: Adapter
    """Its layers that are a LoRA."""
    changes: Mapping[str, Change]
    """By weight or bias."""

    def applied(self, name: str, value: Tensor) -> Tensor:
        value, layer = self.adapter.applied(name, value), name.removesuffix(".weight")
        if name.endswith(".bias"):
            change = self.changes.get(f"{name.removesuffix('.bias')}.{BIAS}")
            return value if change is None else value + change.parts[BIAS].to(value)
        # Where nothing was removed it is not the name of a weight.
        change = self.changes.get(layer) if layer != name else None
        return value if change is None else change.of(value)


Stage = Adapter | Whole | Converted


@dataclass
class Parent:
    """One of what is merged."""

    name: str
    weight: float
    stages: list[Stage]
    """Beyond those that all parents share."""
    saved: Checkpoint | None = None
    """Of a run."""

    @property
    def is_adapter(self) -> bool:
        return all(isinstance(stage, Adapter) for stage in self.stages)

    def factors(self) -> dict[str, Factors]:
        """Of a parent that is an adapter: all its stages as one, by layer."""
        parts: dict[str, list[Factors]] = {}
        for stage in self.stages:
            assert isinstance(stage, Adapter)
            for layer, pair in stage.factors.items():
                parts.setdefault(layer, []).append(pair)
        # Stages add up, and so do ranks beside each other: exactly, whatever the ranks are.
        return {layer: concatenate(pairs, [1.0] * len(pairs)) for layer, pairs in parts.items()}

    def describe(self) -> dict[str, Any]:
        """For merge.json."""
        entry: dict[str, Any] = {"name": self.name, "weight": self.weight}
        if self.saved is not None:
            path = self.saved.path
            entry |= {"checkpoint": str(path), "method": self.saved.state.get("method"), "step": self.saved.step}
        entry["kind"] = "adapter" if self.is_adapter else "weights"
        return entry


@dataclass
class Family:
    """The parents of a merge and what they share."""

    parents: list[Parent]
    model: ModelConfig
    """The base."""
    like: dict[str, Tensor]
    """State dict of its transformer, without values."""
    base: str | None
    """Its fingerprint, where a run among the parents knows it."""
    shared: list[dict[str, str]]
    """The earlier stages that all parents stand on, as a checkpoint's `origin.merged` names them."""
    shared_stages: list[Stage]

    @property
    def weights(self) -> list[float]:
        return [parent.weight for parent in self.parents]

    def origin(self) -> dict[str, Any]:
        """What a checkpoint of the merge says of what it stands on."""
        return {"base": self.base, "merged": self.shared, "hub": is_hub_id(self.model.path)}

    def open_base(self) -> Weights:
        """The base's weights. Raises UserError if they are not those that a run was trained on."""
        opened = weights.of_pipeline(self.model.path, self.like, self.model.transformer_file)
        # A fingerprint reads the whole base, so this is asked only where its weights are needed anyway.
        if self.base is not None and fingerprint(opened) != self.base:
            run = next(parent.name for parent in self.parents if parent.saved is not None)
            raise UserError(
                f"{self.model.path}: is not the model that {run} was trained on: its weights differ; name the base"
                " as --model.path"
            )
        return opened


def read(config: MergeConfig) -> Family:
    """Raises UserError for parents that cannot be merged, before any whole model is read."""
    found: list[tuple[str, float, Checkpoint | None]] = []
    runs: dict[str, Checkpoint] = {}
    paths: list[tuple[str, Path]] = []
    histories: list[list[dict[str, str]]] = []
    for name, weight in config.named():
        saved = _checkpoint(name)
        found.append((name, weight, saved))
        paths.append((name, Path(name).resolve() if saved is None else saved.path))
        # A LoRA file or a whole model says nothing of earlier stages: then none are shared.
        histories.append([] if saved is None else _history(saved))
        if saved is not None:
            runs[name] = saved
    _refuse_repeated(paths)
    for name, saved in runs.items():
        if is_student(saved):
            raise UserError(f"parents: {name} is a student of posttrain tdm; merge first, and distil the merge")
    _refuse_ancestors(runs)
    base = _same_base(runs)
    model = _base_of(config, list(runs.values()))
    files.check_directory(model.path, model.transformer_file, model.transformer_format)
    like = weights.expected(model.path)
    shared = _common(histories)
    parents = []
    shared_stages: list[Stage] = []
    for name, weight, saved in found:
        if saved is None:
            stages = [_of_file(name, model, like)]
        else:
            # What all stand on is in the merge once, whatever the weights: it is no change of any parent.
            stages = _of_run(saved, like)
            shared_stages, stages = stages[: len(shared)], stages[len(shared) :]
        parents.append(Parent(name, weight, stages, saved))
    return Family(parents, model, like, base, shared, shared_stages)


def _checkpoint(name: str) -> Checkpoint | None:
    """That of a run; None for a file or a whole model, which are there."""
    if name.endswith(SUFFIX):
        if not Path(name).is_file():
            raise UserError(f"parents: {name}: no such file; give a LoRA file, a run or one of its checkpoints")
        return None
    if weights.is_pipeline(name):
        return None
    try:
        return checkpoint.load(checkpoint.find(name))
    except UserError as error:
        raise UserError(f"parents: {error}") from error


def _refuse_repeated(paths: Sequence[tuple[str, Path]]) -> None:
    """A run and its newest checkpoint are the same parent."""
    for (name, path), (other, other_path) in itertools.combinations(paths, 2):
        if path == other_path:
            raise UserError(f"parents: {name} and {other} are the same; name it once, with the sum of the weights")


def _refuse_ancestors(runs: Mapping[str, Checkpoint]) -> None:
    """What a run stands on is part of its change already."""
    for (name, saved), (other, other_saved) in itertools.permutations(runs.items(), 2):
        if saved.path in [Path(stage["path"]).resolve() for stage in _history(other_saved)]:
            raise UserError(
                f"parents: {other} was trained on top of {name} and holds it already; leave {name} out, and give"
                f" {other} a weight below 1 to lie between the two"
            )
        continued = other_saved.state.get("origin", {}).get("continued")
        if continued is not None and saved.path == Path(continued["path"]).resolve():
            raise UserError(f"parents: {other} has continued {name} and holds it already; leave {name} out")


def _same_base(runs: Mapping[str, Checkpoint]) -> str | None:
    """The fingerprint of the runs' base; None if no run knows it."""
    first, known = "", None
    for name, saved in runs.items():
        base = base_of(saved)
        if known is None:
            first, known = name, base
        elif base not in (None, known):
            raise UserError(
                f"parents: {name} was trained on another base than {first} (their fingerprints differ); merge"
                " what was trained on one base"
            )
    return known


def _base_of(config: MergeConfig, runs: Sequence[Checkpoint]) -> ModelConfig:
    if config.model is not None:
        return config.model
    if not runs:
        raise UserError("model: no parent is a run, which would say what its base is; give it as --model.path")
    # The stages below a run are read from its checkpoint's origin, so its `start` has nothing left to say.
    return changed(ModelConfig(**runs[0].state["model"]), start=None)


# ---- stages ---------------------------------------------------------------------------------------------------


def _history(saved: Checkpoint) -> list[dict[str, str]]:
    """The stages that a run stands on, as its checkpoint names them."""
    return saved.state.get("origin", {}).get("merged", [])


def _common(histories: Sequence[Sequence[dict[str, str]]]) -> list[dict[str, str]]:
    """The stages that all begin with."""
    shared = []
    # By hash, since a run directory may have been moved or copied. zip ends with the shortest history.
    for first, *others in zip(*histories):
        if any(stage["sha256"] != first["sha256"] for stage in others):
            break
        shared.append(first)
    return shared


def _of_run(saved: Checkpoint, like: Mapping[str, Tensor]) -> list[Stage]:
    """All stages of a run, its own last."""
    return [_stage(one, like) for one in (*earlier_of(saved), saved)]


def _stage(saved: Checkpoint, like: Mapping[str, Tensor]) -> Stage:
    if saved.path.is_file():  # a run may start from an adapter's file
        return _of_adapter(str(saved.path), like)
    if saved.state["lora"] is None:
        values = Weights([saved.path / WHOLE], str(saved.path))
        # Some may be missing: what fuses the text is not trained, and so not saved.
        unexpected, misshapen = [], []
        for key, place in values.places.items():
            if key not in like:
                unexpected.append(key)
            elif like[key].shape != place.shape:
                misshapen.append(key)
        check_keys(saved.path, "give runs of one base", unexpected=unexpected, of_another_shape=misshapen)
        return Whole(values)
    return _adapter(scaled_factors([saved]), saved.path, like)


def _of_file(name: str, model: ModelConfig, like: Mapping[str, Tensor]) -> Stage:
    """Of a LoRA file or a whole model."""
    if weights.is_pipeline(name):
        if files.is_distilled(name) != files.is_distilled(model.path):
            raise UserError(
                f"parents: {name}: is_distilled differs from that of the base {model.path}; merge models of the same"
                " kind, or posttrain extract their difference"
            )
        return Whole(weights.of_pipeline(name, like))
    if weights.is_transformer(name, like):
        return Whole(weights.of_file(name, like))
    return _of_adapter(name, like)


def _of_adapter(name: str, like: Mapping[str, Tensor]) -> Stage:
    """Of an adapter's file."""
    read = read_adapter(name, linear_shapes(like))
    if read.changes:
        return Converted(Adapter.of(read.factors), read.changes)
    return _adapter(read.factors, name, like)


def _adapter(factors: Mapping[str, Tensor], where: str | Path, like: Mapping[str, Tensor]) -> Adapter:
    """Raises UserError for one that does nothing, or has layers that the base has not."""
    # B begins at 0 and A does not, so B tells whether anything was trained.
    if not any(value.any() for key, value in factors.items() if key.endswith(B)):
        raise UserError(f"parents: {where}: every B factor is 0, so it does nothing; give a trained adapter")
    shapes, adapter = linear_shapes(like), Adapter.of(factors)
    for layer, (b, a) in adapter.factors.items():
        if shapes.get(layer) != (b.shape[0], a.shape[1]):
            raise UserError(
                f"parents: {where}: {layer} is {[b.shape[0], a.shape[1]]}, and the base's"
                f" {list(shapes[layer]) if layer in shapes else 'has none'}; merge adapters of one base"
            )
    return adapter
