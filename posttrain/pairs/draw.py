"""Draws images with the settings of a `DrawConfig`: checkpoint, guidance, steps, degraded prompt, noise.

Noise and the omitted parts of a prompt depend on the seed of each image alone. Forwards and decodes are counted and
some of them timed, so that a run can report which share of its time was spent on them.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any

import torch
from torch import Tensor

from posttrain.config.types import changed
from posttrain.errors import UserError
from posttrain.model import sampler
from posttrain.model.blocks import compiles_by_default
from posttrain.model.k2 import Text
from posttrain.pairs.config import BASE, DrawConfig, PairsConfig
from posttrain.pairs.select import degrade
from posttrain.references import shown as references
from posttrain.references.shown import Named
from posttrain.training import checkpoint
from posttrain.training.checkpoint import Checkpoint
from posttrain.training.evaluate import SamplingSettings
from posttrain.training.policy import POLICY, add_saved_policy, is_student, load_model, stack_earlier, stands_on


@dataclass
class Cost:
    """The work of the model: `forward` (two for a guided step) and `decode`, each of one image."""

    images: Counter[str] = field(default_factory=Counter)
    """How many of each there were."""
    measured: Counter[str] = field(default_factory=Counter)
    """How many of each were timed."""
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """The seconds that these took."""
    waited: float = 0.0
    """Seconds of waiting for scores with nothing else to do."""
    parts: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Seconds of `text`, `sample`, `decode`, `show` (submitting images for scoring) and `measure`."""

    def add(self, other: Cost) -> None:
        self.images.update(other.images)
        self.measured.update(other.measured)
        self.waited += other.waited
        for name, seconds in other.parts.items():
            self.parts[name] += seconds
        for name, seconds in other.seconds.items():
            self.seconds[name] += seconds

    def unit(self) -> dict[str, float]:
        """Seconds of one forward and one decode."""
        return {name: self.seconds[name] / count for name, count in self.measured.items()}

    def counted(self) -> float:
        """Seconds that all forwards and decodes should take, by the timed ones."""
        return sum(self.images[name] * seconds for name, seconds in self.unit().items())


Show = Callable[[list[int], Tensor], None]


class Drawer:
    """The model with every checkpoint that the recipe's sources draw with."""

    def __init__(self, config: PairsConfig, device: torch.device) -> None:
        self.config = config
        used, guided = {config.policy or BASE}, False
        for source in config.sources:
            for draw in source.draws():
                used.add(config.resolved(draw).checkpoint)
                guided = guided or draw.guidance > 0
        # The policy first: it becomes the role POLICY, and its earlier stages become the model's stack.
        names = sorted(used - {BASE}, key=lambda name: (name != config.policy, name))
        saved = {name: _saved(config, name) for name in names}
        self.k2 = load_model(config.model, device)
        if config.policy in saved and config.model.start is None:
            stack_earlier(self.k2, saved[config.policy])
        for name, one in saved.items():
            if one.state["lora"] is None and len(used) > 1:
                raise UserError(
                    f"checkpoint: {name} has trained all weights, so nothing can be drawn beside it; export it, or"
                    " leave every other checkpoint out"
                )
        # The last adapter that is merged into the model, if any, made the base what it is.
        merged = self.k2.origin["merged"]
        self.names = {BASE: merged[-1]["path"] if merged else config.model.path}
        """The names in the written pairs, by `checkpoint` of a resolved DrawConfig."""
        self.roles: dict[str, str | None] = {BASE: None}
        for name, one in saved.items():
            self.names[name] = str(one.path)
            self._add(name, one)
        self.null = self.k2.text([""]) if guided else None
        self.begin()

    def _add(self, name: str, saved: Checkpoint) -> None:
        if not stands_on(saved, self.k2):
            raise UserError(
                f"checkpoint: {name} was trained on another base than what is drawn here: another model, or other"
                " earlier runs; give its model, and its start as model.start"
            )
        if not self.k2.roles:
            add_saved_policy(self.k2, saved)
            self.roles[name] = POLICY
        else:
            self.roles[name] = role = f"drawn{len(self.roles)}"
            self.k2.add_role(role, **saved.state["lora"])
            self.k2.load_role_state_dict(role, saved.tensors["adapter"])

    def describe(self, draw: DrawConfig) -> str:
        """The checkpoint, and the settings that differ from how the policy draws."""
        own, policy = self.config.resolved(draw), self.config.resolved(DrawConfig())
        parts = [self.names[own.checkpoint]]
        for name in ("guidance", "steps", "drop", "noise"):
            if getattr(own, name) != getattr(policy, name):
                parts.append(f"{name} {getattr(own, name):g}")
        return ", ".join(parts)

    def begin(self) -> None:
        """Call before the `draw`s of a block; it clears what is kept of the block before."""
        self._cost, self._cut = Cost(), 0
        # Latents, text, size and role of a micro-batch from the middle, whose text has an average length.
        self._typical: tuple[Tensor, Text, tuple[int, int], str | None] | None = None
        self._fused: dict[str, Tensor] = {}
        self._drawn: dict[tuple[Any, ...], Tensor] = {}

    @torch.no_grad()
    def end(self, measure: bool) -> tuple[Cost, int]:
        """The cost of the block, and how many of its prompts, degraded ones too, were longer than max_tokens.

        With `measure` it times another forward and decode, which costs two of each. Nothing else should run meanwhile.
        """
        began = self._now()
        if measure and self._typical is not None:
            latents, text, size, role = self._typical
            calls = {
                "forward": lambda: self.k2.velocity(latents, 0.5, text, *size),
                "decode": lambda: self.k2.decode(latents, *size),
            }
            for name, call in calls.items():
                with self.k2.role(role):  # adapters take time too
                    call()  # the first call after other work has to allocate its memory
                    first = self._now()
                    call()
                    self._cost.seconds[name] += self._now() - first
                self._cost.measured[name] += len(latents)
        self._cost.parts["measure"] += self._now() - began
        return self._cost, self._cut

    @torch.no_grad()
    def draw(
        self, draw: DrawConfig, prompts: Sequence[str], seeds: Sequence[int], size: tuple[int, int], show: Show,
        named: Sequence[Sequence[Named]] = (),
    ) -> None:  # fmt: skip
        """Draws one image of each prompt. `show` gets the rows of each micro-batch and its images, uint8 (B, H, W, 3).
        `named` are the references of each prompt, if any has one.

        Within a block, settings that differ only in `noise` share the latents before it.
        """
        draw = self.config.resolved(draw)
        if draw.drop:
            prompts = [degrade(prompt, draw.drop, seed) for prompt, seed in zip(prompts, seeds)]
        last = self._now()

        def lap(part: str) -> None:
            nonlocal last
            now = self._now()
            self._cost.parts[part] += now - last
            last = now

        self._fuse(prompts)
        lap("text")
        fused = [self._fused[prompt] for prompt in prompts]
        # Prompts of similar length go together: little padding, and equal lengths need no mask.
        rows = sorted(range(len(prompts)), key=lambda i: len(fused[i]))
        with self.k2.role(self.roles[draw.checkpoint]):
            for first in range(0, len(rows), self.config.micro_batch):
                part = rows[first : first + self.config.micro_batch]
                text = Text.of([fused[i] for i in part])
                own_seeds = [seeds[i] for i in part]
                key = (*astuple(changed(draw, noise=0.0)), first)
                if (latents := self._drawn.get(key)) is None:
                    own = [named[i] for i in part] if any(named) else []
                    latents = self._drawn[key] = self._sample(draw, text, own_seeds, size, own)
                if draw.noise:
                    # Another seed than the one the image was drawn from: -1 is no index of anything else.
                    noise = sampler.noise([sampler.seed_for(seed, -1) for seed in own_seeds], latents.shape[1:])
                    # As `sampler.noised`, in the type of the latents.
                    latents = (1 - draw.noise) * latents + draw.noise * noise.to(latents)
                lap("sample")
                self._cost.images["decode"] += len(part)
                images = self.k2.decode(latents, *size)
                lap("decode")
                show(part, images)
                lap("show")
                if first <= len(rows) // 2 < first + len(part):
                    self._typical = (latents, text, size, self.k2.active)

    @torch.no_grad()
    def warm_up(self) -> float:
        """Compiles the network for every role that the recipe draws with, and returns the seconds.

        Otherwise compiling would count as drawing time of the first blocks.
        """
        began, compiled = self._now(), self.k2.blocks.compiled
        if not (compiles_by_default(self.k2.device, self.k2.dtype) if compiled is None else compiled):
            return 0.0
        size = (self.config.sizes[0][0], self.config.sizes[0][1])
        x = sampler.noise([0, 1], (self.k2.image_tokens(*size), self.k2.latent_channels)).to(self.k2.device)
        tokens = self.k2.text([""]).tokens[0]
        for role in dict.fromkeys(self.roles.values()):
            with self.k2.role(role):
                # Equal lengths have no mask, different ones have: torch compiles both.
                for text in (Text.of([tokens, tokens]), Text.of([tokens, tokens[:-1]])):
                    self.k2.velocity(x, 0.5, text, *size)
        self.k2.decode(x, *size)
        return self._now() - began

    def _fuse(self, prompts: Sequence[str]) -> None:
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._fused]
        encoding = self.k2.encode(new, self.config.max_tokens)
        for prompt, features, cut in zip(new, encoding.features, encoding.cut):
            self._fused[prompt] = self.k2.text_tokens(features)
            self._cut += cut > 0

    def _sample(
        self,
        draw: DrawConfig,
        text: Text,
        seeds: Sequence[int],
        size: tuple[int, int],
        named: Sequence[Sequence[Named]],
    ) -> Tensor:
        assert draw.steps is not None
        shape = (self.k2.image_tokens(*size), self.k2.latent_channels)
        self._cost.images["forward"] += len(seeds) * self.config.forwards(draw)
        if named:
            own = references.Drawer.of(self.k2, named, size)
            settings = SamplingSettings(draw.steps, draw.guidance)
            return own(range(len(seeds)), text, sampler.noise(seeds, shape), settings, self.null)
        return self.k2.sample(text, sampler.noise(seeds, shape), draw.steps, *size, draw.guidance, self.null)

    def _now(self) -> float:
        if self.k2.device.type == "cuda":  # kernels run on after the call returns
            torch.cuda.synchronize()
        return time.perf_counter()


def _saved(config: PairsConfig, name: str) -> Checkpoint:
    try:
        saved = checkpoint.load(checkpoint.find(name))
        if "lora" not in saved.state:
            raise UserError(f"{name}: holds no adapter and no weights; give a run that trained the model")
        if is_student(saved):  # its schedule would apply to every draw
            raise UserError(f"{name}: is a distilled student; pairs are for training Raw: give a run of stpo or grpo")
    except UserError as error:
        raise UserError(f"{'policy' if name == config.policy else 'checkpoint'}: {error}") from error
    return saved
