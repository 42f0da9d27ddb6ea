"""The steps that `posttrain bench` times: each method's own code on random features, latents and advantages.

Prompts cost nothing here: their fused text is made beforehand. Neither do rewards: judges are taken to be elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from posttrain import grpo, sampler, stpo, tdm
from posttrain.bench_config import BenchConfig
from posttrain.config import GRPOConfig, LoraConfig, ModelConfig, PromptsConfig
from posttrain.k2 import K2, Text, to_pil
from posttrain.latents import Batch
from posttrain.loop import Stepper
from posttrain.policy import POLICY, add_policy
from posttrain.processes import Processes
from posttrain.render import drawn
from posttrain.rollout import Trajectory, Transition, rollout
from posttrain.stpo_config import PairSetConfig, STPOConfig
from posttrain.tdm_config import TDMConfig
from posttrain.tdm_rollout import roll_out
from prompts.records import PromptRecord

Lap = Callable[[str], None]
ETA = 0.7


@dataclass
class Steps:
    """A method on a fresh model, one size, in one process of `procs`."""

    k2: K2
    config: BenchConfig
    size: tuple[int, int]
    procs: Processes

    ratio_error: float | None = None
    """Of grpo: how far a ratio was from 1 before an update, at most; see loop.check_ratio."""

    def __post_init__(self) -> None:
        for stage in range(self.config.stages if self.config.rank else 0):
            if stage:
                self.k2.stack_role(POLICY)
            add_policy(self.k2, self._lora, stage, reference=False)
            for name, parameter in self.k2.role_named_parameters(POLICY).items():
                if name.endswith("lora_B.weight"):  # as after some training, so that errors show
                    torch.nn.init.normal_(parameter, std=0.01)

    @property
    def role(self) -> str | None:
        return POLICY if self.config.rank else None

    def images(self, method: str) -> int:
        """Pictures of one step, over all processes."""
        return self.procs.size * (self.config.group if method in ("grpo", "expander") else self.config.batch)

    def count(self, method: str) -> int:
        """Steps to time."""
        repeats = self.config.repeats
        return -(-repeats // self.starts) * self.starts if method == "grpo" else repeats  # each start as often

    @property
    def starts(self) -> int:
        """Places where a random window may begin; see grpo.window_of."""
        return min((self.config.steps + 1) // 2, self.config.steps - self.config.window)

    def run(self, method: str, index: int, lap: Lap) -> None:
        """Step `index`, counted from 0, which calls `lap` with the name of each stage that it has ended."""
        if self.config.encode and method in ("rollout", "grpo", "expander"):
            template = self.k2.pipe.prompt_template_encode_start_idx
            self.k2.encode_tokens([list(range(template + self.config.text))])
            lap("encode")
        {
            "rollout": self._rollout, "expander": self._expander, "step": self._step, "stpo": self._stpo,
            "grpo": self._grpo, "tdm": self._tdm,
        }[method](index, lap)  # fmt: skip

    # ---- methods ----------------------------------------------------------------------------------------------

    def _rollout(self, index: int, lap: Lap) -> None:
        trajectory = self._draw(index, 0, self.config.batch, shared=False)
        lap("sample")
        self.k2.decode(trajectory.latents, *self.size)
        lap("decode")

    def _grpo(self, index: int, lap: Lap) -> None:
        start = self.starts - 1 - index % self.starts
        trajectory = self._draw(index, start, self.config.group, shared=True)
        lap("sample")
        to_pil(self.k2.decode(trajectory.latents, *self.size))
        lap("decode")
        advantages = torch.randn(self.config.group, generator=torch.Generator().manual_seed(index))
        groups = [self._group(trajectory, index, advantages)]
        metrics = grpo.optimise(self.k2, self._grpo_config, groups, self._stepper, self.procs)
        self.ratio_error = max(self.ratio_error or 0.0, metrics["ratio_error"])
        lap("optimise")

    def _expander(self, index: int, lap: Lap) -> None:
        """One noise for all expansions of a prompt."""
        fused = [tokens[: len(tokens) - index % 3] for tokens in self._expansions]
        for _, latents in drawn(self.k2, fused, [index] * len(fused), self.size, self.config.steps, self.config.batch):
            lap("sample")
            to_pil(self.k2.decode(latents, *self.size))
            lap("decode")

    def _step(self, index: int, lap: Lap) -> None:
        times = sampler.schedule(self.config.steps, self.k2.mu(*self.size))
        x, mean, noise = (self._latents(self.config.batch, index, i) for i in range(3))
        std = torch.tensor(0.1)
        move = Transition(1, times[1], times[2], x, mean + std * noise, mean, std, torch.zeros(len(x)))
        group = self._group(Trajectory(x, [move]), index, torch.ones(self.config.batch))
        optimizer = self._stepper.optimizer
        lap("prepare")
        grpo.gradient(self.k2, self._step_config, [group], self.procs)
        lap("step")
        optimizer.zero_grad(set_to_none=True)

    def _stpo(self, index: int, lap: Lap) -> None:
        pairs = self.config.batch // 2
        x_w, x_l, target_w, target_l = (self._latents(pairs, index, i) for i in range(4))
        t, label = torch.rand(pairs).to(x_w.device), torch.ones(pairs, device=x_w.device)
        text = Text.of([self._fused(index + i) for i in range(pairs)] * 2)
        batch = Batch(x_w, x_l, target_w, target_l, t, text, label, self.size, list(range(pairs)))
        lap("prepare")
        stpo.optimise(self.k2, self._stpo_config, 2, [batch], self._stepper, self.procs)
        lap("update")

    def _tdm(self, index: int, lap: Lap) -> None:
        config, k2, (student, fake) = self._tdm_config, self.k2, self._tdm_steppers
        keys = [(index, self.procs.rank, i) for i in range(self.config.batch)]
        fused = [self._fused(index + i) for i in range(self.config.batch)]
        null = Text(self._fused(0)[None, :6])
        batches = roll_out(k2, config.student, fused, keys, self.size, self.config.batch, 2)
        lap("trajectory")
        tdm.update_fake(k2, config, batches, 0, fake, self.procs)
        lap("fake")
        tdm.update_student(k2, config, batches, null, student, self.procs)
        lap("student")

    # ---- what they take ---------------------------------------------------------------------------------------

    def _draw(self, index: int, start: int, count: int, shared: bool) -> Trajectory:
        window = range(start, start + self.config.window)
        rank = self.procs.rank
        seeds = [[sampler.seed_for(index, rank, g, i) for i in range(len(window) + 1)] for g in range(count)]
        times = sampler.schedule(self.config.steps, self.k2.mu(*self.size))
        text = Text(self._fused(index)[None])
        with self.k2.role(self.role):
            return rollout(
                self.k2, text, seeds, times, window, "flow", ETA, *self.size, self.config.batch, shared=shared
            )

    def _group(self, trajectory: Trajectory, index: int, advantages: Tensor) -> grpo.Group:
        text, record = Text(self._fused(index)[None]), PromptRecord("")
        return grpo.Group(self.procs.rank, record, text, self.size, trajectory, advantages.to(self.k2.device))

    def _latents(self, count: int, *index: int) -> Tensor:
        shape = (self.k2.image_tokens(*self.size), self.k2.latent_channels)
        seeds = [sampler.seed_for(self.procs.rank, *index, i) for i in range(count)]
        return sampler.noise(seeds, shape).to(self.k2.device)

    def _fused(self, index: int) -> Tensor:
        """(L, C) of a prompt; lengths change from step to step and from prompt to prompt."""
        return self._texts[index % len(self._texts)]

    @cached_property
    def _texts(self) -> list[Tensor]:
        return [self.k2.fuse(self.k2.random_features(self.config.text + i % 5 - 2, i)) for i in range(5)]

    @cached_property
    def _expansions(self) -> list[Tensor]:
        """(L, C) each, L from half to one and a half of the text length."""
        text, group = self.config.text, self.config.group
        lengths = [text // 2 + text * i // (group - 1) for i in range(group)]
        return [self.k2.fuse(self.k2.random_features(length, i)) for i, length in enumerate(lengths)]

    @cached_property
    def _stepper(self) -> Stepper:
        return Stepper(self.k2.train_role(POLICY), self._grpo_config.optim)

    @cached_property
    def _tdm_steppers(self) -> tuple[Stepper, Stepper]:
        self.k2.add_role(tdm.FAKE, self.config.rank, float(self.config.rank), seed=1)
        return tdm.steppers(self.k2, self._tdm_config)

    @property
    def _lora(self) -> LoraConfig:
        return LoraConfig(self.config.rank, float(self.config.rank))

    @cached_property
    def _grpo_config(self) -> GRPOConfig:
        made = GRPOConfig("", ModelConfig(""), PromptsConfig("", ""), [], lora=self._lora)
        made.optim.kind = self.config.optim
        made.sampling.sizes, made.sampling.steps = [list(self.size)], self.config.steps
        made.sampling.window, made.sampling.eta = self.config.window, ETA
        made.groups.prompts_per_step, made.groups.group_size = self.procs.size, self.config.group
        made.groups.micro_batch = self.config.batch
        return made

    @cached_property
    def _step_config(self) -> GRPOConfig:
        made = GRPOConfig("", ModelConfig(""), PromptsConfig("", ""), [], lora=self._lora)
        made.sampling.steps, made.sampling.window, made.loss.kl = self.config.steps, 1, 0.0
        made.groups.prompts_per_step, made.groups.group_size = self.procs.size, self.config.batch
        made.groups.micro_batch = self.config.batch
        return made

    @cached_property
    def _stpo_config(self) -> STPOConfig:
        made = STPOConfig("", ModelConfig(""), PairSetConfig(""), "", lora=self._lora)
        made.optim.kind = self.config.optim
        made.batch, made.micro_batch = self.procs.size * (self.config.batch // 2), self.config.batch // 2
        made.loss.terms_every = 0
        return made

    @cached_property
    def _tdm_config(self) -> TDMConfig:
        made = TDMConfig("", ModelConfig(""), PromptsConfig("", ""), lora=self._lora)
        made.optim.kind = self.config.optim
        made.batch, made.micro_batch = self.procs.size * self.config.batch, self.config.batch
        made.sizes, made.student.steps = [list(self.size)], [self.config.steps]
        return made
