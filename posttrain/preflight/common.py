"""What the preflights of the methods that train K2 share: adapter, judges, an evaluation, cost, export.

Legend: N image tokens, C channels.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain.distributed.processes import Processes
from posttrain.model import sampler
from posttrain.model.k2 import K2, Text, to_pil
from posttrain.preflight.checks import Row, Skip, made
from posttrain.preflight.round_trip import round_trip
from posttrain.runs.progress import duration
from posttrain.runs.run import peak_memory
from posttrain.training.evaluate import Evaluation, Evaluator, SamplingSettings
from posttrain.training.policy import POLICY, described, policy_state
from posttrain.training.stepper import Stepper
from prompts.records import PromptRecord
from rewards.base import Noise, Reward, RewardSpec
from rewards.load import load_rewards
from rewards.noise import noise_metrics, noise_of
from rewards.preflight import repeatability
from rewards.serve import serve

FULL = 0.95
"""Share of a GPU's memory beyond which a run is likely to meet the end of it."""
MISSED = 0.2
"""Share of what the policy changes by which the stock pipeline may miss it after an export."""
SHOWN, STEPS = 4, 8
"""Images that judges are tried on, and the steps that these are drawn in at most."""
FEW, FEW_STEPS, GROUP = 2, 4, 3
"""Prompts of the evaluation that is made, its steps, and the images of its group, at most."""


class Checks:
    """The checks, each an iterator of rows, and what they hand on."""

    def __init__(
        self, config: Any, procs: Processes, k2: K2, heldout: list[PromptRecord], folder: Path, size: Sequence[int],
        batch: int, max_tokens: int, field: str,
    ):  # fmt: skip
        """`batch` is how many images evaluation draws at a time; `field` is the setting that says how many."""
        self.config, self.procs, self.k2, self.heldout, self.folder = config, procs, k2, heldout, folder
        self.size, self.batch, self.max_tokens, self.field = (size[0], size[1]), batch, max_tokens, field
        self.alone = procs.alone()
        self.stepper = Stepper(k2.train_role(POLICY), config.optim)
        self.begun = policy_state(k2)
        self.rows: list[Row] = []
        self.urls: dict[str, list[str]] | None = None
        """Of the recipe's servers, once they run."""
        self.silent: set[str] = set()
        """Rewards whose judge does not answer."""
        self.noise: dict[str, Noise] = {}
        """How far two scores of one image differ, by reward."""
        self.seconds: dict[str, float] = {}
        """What each part of a step of the recipe takes, and an evaluation."""
        self.moved = False
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def check(self, name: str, rows: Callable[[], Iterable[Row]], together: bool = False) -> None:
        """Made by the main process alone, or by all of them together."""
        if together or self.procs.main:
            self.rows += made(name, rows, alone=not together or self.procs.size == 1)

    def asked(self, specs: Sequence[RewardSpec]) -> list[RewardSpec]:
        """Those of the rewards that can be asked."""
        return [] if self.urls is None else [spec for spec in specs if spec.name not in self.silent]

    # ---- the model and the judges -------------------------------------------------------------------------

    def adapter(self) -> Iterator[Row]:
        """Every layer that the targets name is adapted, and no other."""
        trained, role = self.k2.role_named_parameters(POLICY), self.k2.roles[POLICY]
        weights = f"{sum(parameter.numel() for parameter in trained.values()) / 1e6:.3g} M weights"
        if role is None:
            yield Row("adapter", True, f"none: {weights} in {len(trained)} tensors are trained themselves")
            return
        layers = {name.partition(".lora_")[0] for name in trained}
        blocks, targets = len(self.k2.transformer.transformer_blocks), len(set(role.targets))
        measured = f"{len(layers)} layers adapted in {blocks} blocks, {targets} are named for each; {weights}"
        yield Row("adapter", len(layers) == blocks * targets > 0, measured, "name in lora.targets what the blocks have")

    def judges(self, servers: contextlib.ExitStack) -> Iterator[Row]:
        """Starts the recipe's servers; each judge answers, and gives an image the same score whenever it is asked.

        Drawing for it also warms up what is timed from here on.
        """
        self.urls = servers.enter_context(serve(self.config.servers, self.folder / "servers"))
        images = to_pil(torch.from_numpy(self._evaluate([], SHOWN, 0, [0.0], STEPS)().images))
        rewards = load_rewards(self.config.rewards, self.urls)
        yield from judge_rows(rewards, images, self.heldout, self.silent, self.noise)

    def evaluation(self) -> Iterator[Row]:
        """A part of one, by all rewards, and what a whole one takes. That scales with the images; the drawing, which is
        timed in few steps and in half of them, scales with the steps too."""
        config, rewards = self.config.eval, load_rewards(self.asked(self.config.rewards), self.urls)
        whole, steps = min(config.prompts, len(self.heldout)), min(self.full_steps()[0], FEW_STEPS)
        prompts, groups = min(whole, FEW), min(config.groups, 1)
        self._evaluate([], prompts, groups, config.guidance, 1)()  # what is compiled is compiled here
        _, half = self.timed(self._evaluate([], prompts, groups, config.guidance, steps // 2 or 1))
        _, full = self.timed(self._evaluate([], prompts, groups, config.guidance, steps))
        result, seconds = self.timed(self._evaluate(rewards, prompts, groups, config.guidance, steps))
        each_step = max(0.0, full - half) / max(1, steps - steps // 2)
        images = prompts + groups * min(config.group_size, GROUP)
        all_images = whole + min(config.groups, whole) * config.group_size
        as_configured = sum(seconds + each_step * (n - steps) for n in self.full_steps())
        self.seconds["evaluation"] = as_configured * all_images / images / self.procs.size
        missing = [name for name, value in result.metrics.items() if value is None]
        measured = f"{images * len(config.guidance)} images of {steps} steps in {seconds:.1f} s"
        measured += f"; no score from {', '.join(missing)}" if missing else ""
        relied_on = {config.best, config.stop.metric} & set(missing)
        remedy = "eval.best and eval.stop need a figure that these prompts have: watch another"
        ok = None if relied_on and prompts < whole else not relied_on  # the other prompts may have it
        yield Row("evaluation", ok, measured, remedy)

    def _evaluate(
        self, rewards: list[Reward], prompts: int, groups: int, guidance: list[float], steps: int
    ) -> Callable[[], Evaluation]:
        """Draws and scores so many prompts and groups under the policy."""
        steps, size = min(steps, self.config.eval.steps), min(GROUP, self.config.eval.group_size)
        few = replace(self.config.eval, prompts=prompts, groups=groups, group_size=size, guidance=guidance, steps=steps)
        ways = self.ways(few.steps)
        evaluator = Evaluator(
            self.k2,
            self.heldout,
            rewards,
            few,
            self.size,
            self.batch,
            self.max_tokens,
            self.alone,
            ways,
        )

        def run() -> Evaluation:
            with self.k2.role(POLICY):
                return evaluator()

        return run

    def ways(self, steps: int) -> list[SamplingSettings] | None:
        """How evaluation draws; None: as its settings say."""
        return None

    def full_steps(self) -> list[int]:
        """Steps of an image in each way that an evaluation draws, of which the first is measured here."""
        return [self.config.eval.steps]

    @torch.no_grad()
    def warm_up(self) -> None:
        """Compiles what draws images of one prompt, which is not to be part of a time."""
        x = torch.zeros(2, self.k2.image_tokens(*self.size), self.k2.latent_channels, device=self.k2.device)
        with self.k2.role(POLICY):
            self.k2.velocity(x, 0.5, self.k2.text([""]), *self.size)

    def timed(self, call: Callable[[], Any]) -> tuple[Any, float]:
        """What it returns, and its seconds."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        began = time.perf_counter()
        result = call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return result, time.perf_counter() - began

    # ---- an update ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def velocities(self, x: Tensor, t: sampler.Time, text: Text, size: tuple[int, int]) -> dict[str | None, Tensor]:
        """Of latents (1, N, C), by every role and, if there is one, by the reference."""
        found: dict[str | None, Tensor] = {}
        roles = [*self.k2.roles, *([None] if described(self.k2) or self.k2.reference else [])]
        for role in roles:
            with self.k2.role(role):
                found[role] = self.k2.velocity(x, t, text, *size)
        return found

    def policy_moves(self, before: dict[str | None, Tensor], after: dict[str | None, Tensor]) -> Row:
        """An update moves the policy, and the reference not at all."""
        now, adapter = policy_state(self.k2), described(self.k2) is not None
        # While an adapter's B factors are 0, its A factors have no gradient.
        watched = [name for name in now if not adapter or name.endswith("lora_B.weight")]
        changed = sum(not torch.equal(now[name], self.begun[name]) for name in watched)
        distance = float((after[POLICY] - before[POLICY]).norm() / before[POLICY].norm())
        kept = None not in before or torch.equal(after[None], before[None])
        self.moved = distance > 0
        measured = f"{changed} of {len(watched)} {'B factors' if adapter else 'tensors'} changed, the velocity by"
        measured += f" {distance:.2g} of itself"
        if None in before:
            measured += "; the reference's is bit-identical" if kept else "; the reference's changed too"
        remedy = "raise optim.lr" if kept else "the reference must not change: report it"
        return Row("policy moves", changed == len(watched) and self.moved and kept, measured, remedy)

    # ---- what it costs, and what comes out ----------------------------------------------------------------

    def cost(self, parts: Sequence[str], images: int, unit: str = "images") -> Iterator[Row]:
        """`images` is how many of the unit a step of the recipe takes."""
        yield memory_row(self.field)
        if missing := [part for part in parts if part not in self.seconds]:
            yield Row("run", None, f"how long a step takes to {' and to '.join(missing)} is not known")
            return
        config, step = self.config, sum(self.seconds[part] for part in parts)
        split = ", ".join(f"{part} {self.seconds[part]:.1f}" for part in parts)
        yield Row("step", True, f"{step:.1f} s for {images} {unit} ({split})")
        if "evaluation" not in self.seconds:
            yield Row("run", None, "how long an evaluation takes is not known")
            return
        evaluations = 1 + (math.ceil(config.steps / config.eval.every) if config.eval.every else 1)
        each = self.seconds["evaluation"]
        total = f"about {duration(config.steps * step + evaluations * each)}, {config.steps * images} {unit}"
        yield Row("run", True, f"{total}: {config.steps} steps and {evaluations} evaluations of {each:.1f} s")

    def export(self, prompt: str) -> Iterator[Row]:
        """What was trained, exported and loaded by the stock pipeline, draws what the policy draws."""
        if not self.moved:
            raise Skip("the policy has not moved")
        shape = (self.k2.image_tokens(*self.size), self.k2.latent_channels)
        noise = sampler.noise([sampler.seed_for(self.config.seed, -3)], shape)
        effect, missed = round_trip(
            self.k2, self.config.model, self.begun, prompt, noise, self.size, self.max_tokens, self.folder
        )
        measured = f"latents move by {effect:.2g} of themselves; the stock pipeline misses {missed:.1g} of that"
        yield Row("export", missed <= MISSED, measured, "what is exported is not what was trained: report it")


def judge_rows(
    rewards: list[Reward],
    images: list[Any],
    records: Sequence[PromptRecord],
    silent: set[str],
    noise: dict[str, Noise] | None = None,
) -> Iterator[Row]:
    """One for each judge; adds to `silent` the rewards whose judge does not answer, and to `noise` how far two scores
    of one image differ."""
    judges = asyncio.run(repeatability(rewards, images, [record.prompt for record in records]))
    if noise is not None:
        noise |= noise_of(rewards, noise_metrics(judges))
    for judge in judges:
        silent |= set() if judge.spread is not None else set(judge.rewards)
        yield Row(f"judge {judge.judge}", not judge.remedy, judge.measured, judge.remedy)
    if not judges:
        raise Skip("no reward asks a judge")


def memory_row(field: str) -> Row:
    """The peak of this process so far; `field` is the setting to lower."""
    peak = peak_memory()
    if not torch.cuda.is_available():
        return Row("memory", True, f"peak {peak['peak_ram_gib']:.1f} GiB of RAM")
    used, there = peak["peak_gpu_gib"], torch.cuda.get_device_properties().total_memory / 2**30
    return Row("memory", used <= FULL * there, f"peak {used:.1f} of the GPU's {there:.1f} GiB", f"lower {field}")


def finite(name: str, values: dict[str, float | None], loss: str, norm: str) -> Row:
    """A loss that is a number, and a gradient that is one and not 0."""
    shown, gradient = values[loss], values[norm]
    good = shown is not None and gradient is not None and math.isfinite(shown) and 0 < gradient < math.inf
    remedy = "use model.dtype float32; if that does not help, report it"
    return Row(name, good, f"loss {shown:.4g}, gradient norm {gradient:.3g}", remedy)
