"""The checks that methods share: judges and cost of all, and adapter, evaluation, update and export of those of K2.

Legend: N image tokens, C channels.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain.config.types import changed
from posttrain.distributed.processes import Processes
from posttrain.errors import counted
from posttrain.model import architecture, fp8, sampler
from posttrain.model.adapters.targets import reaches, target_of
from posttrain.model.k2 import K2, Text, to_pil
from posttrain.model.lora_file import linear_shapes
from posttrain.model.references import References
from posttrain.preflight.checks import Row, Skip, run_check
from posttrain.preflight.round_trip import round_trip
from posttrain.runs.progress import duration
from posttrain.runs.run import peak_memory
from posttrain.training.evaluate import Evaluation, Evaluator, SamplingSettings
from posttrain.training.policy import POLICY, described, policy_state
from posttrain.training.stepper import Stepper
from prompts.records import PromptRecord
from rewards.base import Noise, Reward, RewardSpec
from rewards.load import load_rewards
from rewards.noise import noise_metrics, noise_of, repeatability
from rewards.serve import serve

FULL = 0.95
"""Share of a GPU's memory above which a run is likely to run out of it."""
MISSED = 0.2
"""Largest error of the exported policy in the stock pipeline, as a share of the policy's change."""
SHOWN, STEPS = 4, 8
"""Images that the judges are tested on, and the most steps they are drawn in."""
FEW, FEW_STEPS, GROUP = 2, 4, 3
"""Most prompts of the tested evaluation, most steps, and most images of a group."""


class Checks(ABC):
    """The checks of every method, each an iterator of rows, and the values that they pass to later checks."""

    def __init__(self, config: Any, procs: Processes, folder: Path, field: str) -> None:
        """`field` is the setting that decides the peak memory."""
        self.config, self.procs, self.folder, self.field = config, procs, folder, field
        self.rows: list[Row] = []
        self.urls: dict[str, list[str]] | None = None
        """URLs of the recipe's servers, once they run."""
        self.silent: set[str] = set()
        """Rewards whose judge does not answer."""
        self.noise: dict[str, Noise] = {}
        """By reward: how much two scores of one image differ."""
        self.seconds: dict[str, float] = {}
        """Seconds of each part of a step of the recipe, and of an evaluation."""
        self.moved = False
        """Whether an update changed the policy."""

    def check(self, name: str, rows: Callable[[], Iterable[Row]], together: bool = False) -> None:
        """Runs a check on the main process, or on all processes together."""
        if together or self.procs.main:
            self.rows += run_check(name, rows, alone=not together or self.procs.size == 1)

    def asked(self, specs: Sequence[RewardSpec]) -> list[RewardSpec]:
        """The rewards that can be asked."""
        return [] if self.urls is None else [spec for spec in specs if spec.name not in self.silent]

    def judges(self, servers: contextlib.ExitStack) -> Iterator[Row]:
        """Starts the recipe's servers, and checks that each judge answers and scores one image the same every time."""
        self.urls = servers.enter_context(serve(self.config.servers, self.folder / "servers"))
        images, records = self.judged_images()
        rewards = load_rewards(self.config.rewards, self.urls)
        judges = asyncio.run(repeatability(rewards, images, [record.prompt for record in records]))
        self.noise = noise_of(rewards, noise_metrics(judges))
        for judge in judges:
            if judge.spread is None:
                self.silent.update(judge.rewards)
            yield Row(f"judge {judge.judge}", not judge.remedy, judge.measured, judge.remedy)
        if not judges:
            raise Skip("no reward asks a judge")

    @abstractmethod
    def judged_images(self) -> tuple[list[Any], Sequence[PromptRecord]]:
        """A few images to try the judges on, and the records of their prompts, in the same order."""

    def cost(self, parts: Sequence[str], images: int, unit: str = "images") -> Iterator[Row]:
        """Time of a step and of the run. A step of the recipe takes `images` of the unit."""
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
        # One before the first step; without `every`, one after the last.
        evaluations = 1 + (math.ceil(config.steps / config.eval.every) if config.eval.every else 1)
        each = self.seconds["evaluation"]
        total = f"about {duration(config.steps * step + evaluations * each)}, {config.steps * images} {unit}"
        yield Row(
            "run",
            True,
            f"{total}: {counted(config.steps, 'step')} and {counted(evaluations, 'evaluation')} of {each:.1f} s",
        )


class K2Checks(Checks):
    """The checks of the methods that train K2."""

    def __init__(
        self, config: Any, procs: Processes, k2: K2, heldout: list[PromptRecord], folder: Path, size: Sequence[int],
        batch: int, max_tokens: int, field: str,
    ):  # fmt: skip
        """`batch` is how many images an evaluation draws at a time; `field` is the setting that decides it."""
        super().__init__(config, procs, folder, field)
        self.k2, self.heldout = k2, heldout
        self.size, self.batch, self.max_tokens = (size[0], size[1]), batch, max_tokens
        self.alone = procs.alone()
        fp8.train_in_float8(k2)
        k2.train_role(POLICY)
        self.stepper = Stepper(k2.role_named_parameters(POLICY), config.optim)
        self.begun = policy_state(k2)
        # The peak that counts is that of the steps, not of loading.
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    # ---- the model and the judges -------------------------------------------------------------------------

    def adapter(self) -> Iterator[Row]:
        """Checks that exactly the layers named by the targets are adapted."""
        trained, role = self.k2.role_named_parameters(POLICY), self.k2.roles[POLICY]
        weights = f"{sum(parameter.numel() for parameter in trained.values()) / 1e6:.3g} M weights"
        if role is None:
            yield Row("adapter", True, f"none: {weights} in {counted(len(trained), 'tensor')} are trained themselves")
            return
        # The layer's name is in front of those of its A and its B.
        layers = {name.partition(".lora_")[0] for name in trained}
        named = {layer for layer in linear_shapes(self.k2.base_state_dict()) if reaches(role.targets, layer)}
        if role.lanes == "references":
            named &= set(self.k2.layers_of(role.targets, role.lanes))
        # Within a block a target is the rest of the name, the same for all blocks; outside it is the whole name.
        outside = {layer for layer in layers if target_of(layer) == layer}
        blocks, targets = len(architecture.blocks(self.k2.transformer)), set(map(target_of, named - outside))
        measured = f"{counted(len(layers - outside), 'layer')} adapted in {counted(blocks, 'block')}"
        measured += f", {len(targets)} are named for each"
        if outside:
            measured += f", and {len(outside)} outside them"
        if self.k2.adapts_text:
            measured += ", which fuse text in every forward"
        # Of an adapter on references alone the last block has fewer.
        whole = role.lanes == "references" or len(layers) == blocks * len(targets) + len(outside)
        ok = layers == named and len(layers) > 0 and whole
        yield Row("adapter", ok, f"{measured}; {weights}", "name in lora.targets what the model has")

    def judged_images(self) -> tuple[list[Any], Sequence[PromptRecord]]:
        # Drawing these images also warms up what is timed later.
        evaluation = self._evaluate([], SHOWN, 0, [0.0], STEPS)()
        return to_pil(torch.from_numpy(evaluation.images)), self.heldout

    def evaluation(self) -> Iterator[Row]:
        """Runs a part of an evaluation with all rewards, and estimates the time of a whole one."""
        config, rewards = self.config.eval, load_rewards(self.asked(self.config.rewards), self.urls)
        whole, steps = min(config.prompts, len(self.heldout)), min(self.full_steps()[0], FEW_STEPS)
        prompts, groups = min(whole, FEW), min(config.groups, 1)
        self._evaluate([], prompts, groups, config.guidance, 1)()  # compiles, outside of the timed calls
        # The time scales with the images; that of drawing, known from two numbers of steps, scales with the steps too.
        _, half = self.timed(self._evaluate([], prompts, groups, config.guidance, steps // 2 or 1))
        _, full = self.timed(self._evaluate([], prompts, groups, config.guidance, steps))
        result, seconds = self.timed(self._evaluate(rewards, prompts, groups, config.guidance, steps))
        # Seconds of all these images for one more step.
        each_step = max(0.0, full - half) / max(1, steps - steps // 2)
        images = prompts + groups * min(config.group_size, GROUP)
        all_images = whole + min(config.groups, whole) * config.group_size
        as_configured = sum(seconds + each_step * (n - steps) for n in self.full_steps())
        # In a run the processes share an evaluation; here one has drawn alone.
        self.seconds["evaluation"] = as_configured * all_images / images / self.procs.size
        missing = [name for name, value in result.metrics.items() if value is None]
        measured = f"{counted(images * len(config.guidance), 'image')} of {counted(steps, 'step')} in {seconds:.1f} s"
        measured += f"; no score from {', '.join(missing)}" if missing else ""
        relied_on = {config.best, config.stop.metric} & set(missing)
        remedy = "eval.best and eval.stop need a figure that these prompts have: watch another"
        # A reward that scored none of these prompts may score others.
        ok = None if relied_on and prompts < whole else not relied_on
        yield Row("evaluation", ok, measured, remedy)

    def _evaluate(
        self, rewards: list[Reward], prompts: int, groups: int, guidance: list[float], steps: int
    ) -> Callable[[], Evaluation]:
        """A function that draws and scores so many prompts and groups under the policy."""
        steps, size = min(steps, self.config.eval.steps), min(GROUP, self.config.eval.group_size)
        few = changed(self.config.eval, prompts=prompts, groups=groups, group_size=size, guidance=guidance, steps=steps)
        # `alone`: only the main process is here, and an exchange would wait for the others for ever.
        ways = self.ways(few.steps)
        evaluator = Evaluator(
            self.k2, self.heldout, rewards, few, self.size, self.batch, self.max_tokens, self.alone, ways
        )

        def run() -> Evaluation:
            with self.k2.role(POLICY), fp8.exact(self.k2):
                return evaluator()

        return run

    def ways(self, steps: int) -> list[SamplingSettings] | None:
        """The settings that evaluations draw with; None: those of the recipe."""
        return None

    def full_steps(self) -> list[int]:
        """Steps of an image for each setting that an evaluation draws with; the first one is measured here."""
        return [self.config.eval.steps]

    @torch.no_grad()
    def warm_up(self) -> None:
        """Compiles the forward for images of one prompt, so that no measured time includes it."""
        x = torch.zeros(2, self.k2.image_tokens(*self.size), self.k2.latent_channels, device=self.k2.device)
        with self.k2.role(POLICY):
            self.k2.velocity(x, 0.5, self.k2.text([""]), *self.size)

    def timed(self, call: Callable[[], Any]) -> tuple[Any, float]:
        """The result of the call, and its seconds."""
        if torch.cuda.is_available():  # kernels of earlier calls may still run
            torch.cuda.synchronize()
        began = time.perf_counter()
        result = call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return result, time.perf_counter() - began

    # ---- an update ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def velocities(
        self, x: Tensor, t: sampler.Time, text: Text, size: tuple[int, int], shown: References | None = None
    ) -> dict[str | None, Tensor]:
        """The velocities at latents (1, N, C) under every role and, as None, of the reference if there is one."""
        roles: list[str | None] = list(self.k2.roles)
        if described(self.k2) or self.k2.reference:
            roles.append(None)
        velocities: dict[str | None, Tensor] = {}
        for role in roles:
            with self.k2.role(role):
                velocities[role] = self.k2.velocity(x, t, text, *size, shown=shown)
        return velocities

    def policy_moves(self, before: dict[str | None, Tensor], after: dict[str | None, Tensor]) -> Row:
        """Checks that an update changes the policy, and does not change the reference."""
        now, adapter = policy_state(self.k2), described(self.k2) is not None
        # While an adapter's B factors are 0, its A factors have no gradient.
        watched = [name for name in now if not adapter or name.endswith("lora_B.weight")]
        # Bit for bit: what gets no update stays exactly as it was.
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

    # ---- what comes out -----------------------------------------------------------------------------------

    def export(self, prompt: str) -> Iterator[Row]:
        """Checks that the stock pipeline, with the exported policy, draws what the policy draws."""
        if not self.moved:
            raise Skip("the policy has not moved")
        if (described(self.k2) or {}).get("lanes") == "references":
            raise Skip("an adapter on references alone is exported in no format")
        shape = (self.k2.image_tokens(*self.size), self.k2.latent_channels)
        noise = sampler.noise([sampler.seed_for(self.config.seed, -3)], shape)  # a seed that nothing else uses
        effect, missed = round_trip(
            self.k2, self.config.model, self.begun, prompt, noise, self.size, self.max_tokens, self.folder
        )
        measured = f"latents move by {effect:.2g} of themselves; the stock pipeline misses {missed:.1g} of that"
        yield Row("export", missed <= MISSED, measured, "what is exported is not what was trained: report it")


def memory_row(field: str) -> Row:
    """The peak memory of this process so far. `field` is the setting to lower."""
    peak = peak_memory()
    if not torch.cuda.is_available():
        return Row("memory", True, f"peak {peak['peak_ram_gib']:.1f} GiB of RAM")
    # What PyTorch allocated; the allocator's own fragments need some room beyond it.
    used, there = peak["peak_gpu_gib"], torch.cuda.get_device_properties().total_memory / 2**30
    return Row("memory", used <= FULL * there, f"peak {used:.1f} of the GPU's {there:.1f} GiB", f"lower {field}")


def finite(name: str, values: dict[str, float | None], loss: str, norm: str) -> Row:
    """Checks that the loss is finite, and that the gradient is finite and not 0."""
    shown, gradient = values[loss], values[norm]
    good = shown is not None and gradient is not None and math.isfinite(shown) and 0 < gradient < math.inf
    remedy = "use model.dtype float32; if that does not help, report it"
    return Row(name, good, f"loss {shown:.4g}, gradient norm {gradient:.3g}", remedy)
