"""The steps that `posttrain bench` times: each method's own code on random features, latents and rewards.

Steps of grpo, nft, sft, stpo, tdm and mopd come from a run's own loop, from its first step on, with all that is due.
Prompts cost no time unless `encode` is set; rewards cost none, because judges are assumed to run on other GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from posttrain.bench import mopd
from posttrain.bench.config import BenchConfig
from posttrain.config.sections import LoraConfig, ModelConfig, PromptsConfig, TrainingConfig
from posttrain.distributed.processes import Processes
from posttrain.expander.renderer import draw_in_batches
from posttrain.grpo import train as grpo
from posttrain.grpo import update
from posttrain.grpo.config import GRPOConfig
from posttrain.grpo.rollout import Trajectory, Transition, rollout
from posttrain.model import sampler
from posttrain.model.fp8 import add_copies
from posttrain.model.k2 import K2, Encoding, Text, to_pil
from posttrain.nft import train as nft
from posttrain.nft.config import NFTConfig
from posttrain.sft import train as sft
from posttrain.sft.cache import Crop, EncodedImages, Kept
from posttrain.sft.config import ImageSetConfig, SFTConfig
from posttrain.sft.order import Order
from posttrain.stpo import train as stpo
from posttrain.stpo.config import PairSetConfig, STPOConfig
from posttrain.stpo.latent_cache import EncodedPair, EncodedPairs
from posttrain.tdm import train as tdm
from posttrain.tdm.config import TDMConfig
from posttrain.training.oom_retry import MicroBatch
from posttrain.training.policy import POLICY, add_policy
from posttrain.training.prompt_source import PromptSource
from posttrain.training.stepper import Clock, Stepper
from prompts.records import PromptRecord
from rewards.background import ScoreQueue
from rewards.base import RewardSpec
from rewards.load import load_rewards

Lap = Callable[[str], None]
ETA = 0.7
NOISE = RewardSpec("noise", "posttrain.bench.steps:noise")
Config = TypeVar("Config", bound=TrainingConfig)
Grouped = TypeVar("Grouped", GRPOConfig, NFTConfig)


def noise(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    """A reward that takes no time: random numbers in [0, 1) from a fixed seed."""
    return np.random.default_rng(len(images)).random(len(images)).tolist()


class RandomPairs(EncodedPairs):
    """Pairs of random latents without a cache; each read takes the next of the bench's texts."""

    def __init__(self, steps: Steps, pairs: int):
        self._steps = steps
        self.train, self.size = np.arange(pairs), np.array([steps.size] * pairs)
        self.shown = [((), ())] * pairs

    def __getitem__(self, i: int) -> EncodedPair:
        chosen, rejected = self._steps.latents(2, i).cpu()
        return EncodedPair(chosen, rejected, self._steps.next_text(), 1.0, self._steps.size, [])


class RandomImages(EncodedImages):
    """Images of random latents without a cache, none of them cropped; each read takes the next of the bench's texts."""

    def __init__(self, steps: Steps, images: int):
        self._steps = steps
        height, width = steps.size
        whole = Crop(steps.size, (0.0, 0.0, float(width), float(height)))
        self.images = [Kept(i, i, steps.size, [], [whole]) for i in range(images)]
        self.entries = [(i, 0) for i in range(images)]
        self.size = np.array([steps.size] * images)

    def read(self, entry: int, choice: float) -> tuple[Tensor, Tensor]:
        return self._steps.latents(1, entry)[0].cpu(), self._steps.next_text()


class BenchClock(Clock):
    """A loop's clock that passes its laps on to the bench."""

    def __init__(self, steps: Steps):
        super().__init__()
        self._steps = steps

    def lap(self, name: str) -> None:
        self._steps.lap(name)


@dataclass
class Steps:
    """Runs steps of a method on a fresh model, for images of one size, in one process of `procs`."""

    k2: K2
    config: BenchConfig
    size: tuple[int, int]
    procs: Processes

    ratio_error: float | None = None
    """grpo: the largest distance of a ratio from 1 before an update; see loop.check_ratio."""
    lap: Lap = field(default=lambda stage: None, init=False)
    """Ends a stage of the step that is being timed."""
    _loops: dict[str, Iterator[tuple[int, dict[str, Any]]]] = field(default_factory=dict, init=False)
    _read: Iterator[int] = field(default_factory=count, init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator(self.k2.device).manual_seed(0)
        for stage in range(self.config.stages if self.role else 0):
            if stage:
                self.k2.stack_role(POLICY)
            add_policy(self.k2, self.lora, stage, reference=False)
            for name, parameter in self.k2.role_named_parameters(POLICY).items():
                if name.endswith("lora_B.weight"):  # not zero as at the start of training, or errors would not show
                    torch.nn.init.normal_(parameter, std=0.01, generator=generator)

    @property
    def role(self) -> str | None:
        return None if self.config.rank == 0 else POLICY

    def images(self, method: str) -> int:
        """Images of one step, over all processes."""
        return self.procs.size * (self.config.group if method in ("grpo", "nft", "expander") else self.config.batch)

    def count(self, method: str) -> int:
        """Number of steps to time."""
        repeats = self.config.repeats
        # grpo's window must start at each place equally often, since the place decides how much work a step is
        return -(-repeats // self.starts) * self.starts if method == "grpo" else repeats

    @property
    def starts(self) -> int:
        """Number of places where a random window may begin; see grpo.window_of."""
        return min((self.config.steps + 1) // 2, self.config.steps - self.config.window)

    def run(self, method: str, index: int, lap: Lap) -> None:
        """Runs step `index`, counted from 0, which calls `lap` with the name of each stage when the stage ends.

        Steps of grpo, nft, sft, stpo, tdm and mopd must be run in order, as in a run.
        """
        self.lap = lap
        loops = {
            "grpo": self._grpo, "nft": self._nft, "sft": self._sft, "stpo": self._stpo, "tdm": self._tdm,
            "mopd": lambda: mopd.loop(self),
        }  # fmt: skip
        if method in loops:
            if method not in self._loops:
                self._loops[method] = loops[method]()
            _, metrics = next(self._loops[method])
            if method == "grpo":
                self.ratio_error = max(self.ratio_error or 0.0, metrics["ratio_error"])
            return
        if method != "step":
            self._encode_one()
        {"rollout": self._rollout, "expander": self._expander, "step": self._step}[method](index, lap)

    def close(self) -> None:
        """Ends the loops that have started."""
        for loop in self._loops.values():
            loop.close()  # type: ignore[attr-defined]

    # ---- methods ----------------------------------------------------------------------------------------------

    def _rollout(self, index: int, lap: Lap) -> None:
        trajectory = self._draw(index)
        lap("sample")
        self.k2.decode(trajectory.latents, *self.size)
        lap("decode")

    def _expander(self, index: int, lap: Lap) -> None:
        # lengths differ from step to step, so that a graph compiled for one length alone would show
        fused = [tokens[: len(tokens) - index % 3] for tokens in self._expansions]
        seeds = [index] * len(fused)  # one noise for all expansions of a prompt
        for _, latents in draw_in_batches(self.k2, fused, seeds, self.size, self.config.steps, self.config.batch):
            lap("sample")
            to_pil(self.k2.decode(latents, *self.size))
            lap("decode")

    def _step(self, index: int, lap: Lap) -> None:
        times = sampler.schedule(self.config.steps, self.k2.mu(*self.size))
        batch = self.config.batch
        # Any transition will do: the operations of a step do not depend on where it leads.
        x, mean, noise = self.latents(batch, index, 0), self.latents(batch, index, 1), self.latents(batch, index, 2)
        std = torch.tensor(0.1)
        move = Transition(1, times[1], times[2], x, mean + std * noise, mean, std, torch.zeros(len(x)))
        text, record = Text(self._fused(index)[None]), PromptRecord("")
        group = update.Group(self.procs.rank, record, text, self.size, Trajectory(x, [move]))
        advantages_PG = torch.ones(self.procs.size, batch, device=self.k2.device)
        optimizer = self.stepper.optimizer
        lap("prepare")
        update.gradient(self.k2, self._step_config, [group], advantages_PG, self.procs, self.config.batch)
        lap("step")
        optimizer.zero_grad(set_to_none=True)  # the optimiser's step is not part of this method

    # ---- loops of runs ----------------------------------------------------------------------------------------

    def _grpo(self) -> Iterator[tuple[int, dict[str, Any]]]:
        return self._of_groups(self._grpo_config, grpo.updates)

    def _nft(self) -> Iterator[tuple[int, dict[str, Any]]]:
        return self._of_groups(self._nft_config, nft.updates)

    def _of_groups(self, config: Any, updates: Callable[..., Iterator[Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
        k2, decode = self.k2, self.k2.decode

        def decoded(latents: Tensor, height: int, width: int, batch: int | None = None) -> Tensor:
            self.lap("sample")
            images = decode(latents, height, width, batch)
            self.lap("decode")
            return images

        # Replaced on the model, since the method's own code calls them: so decoding becomes a stage of its own.
        k2.encode, k2.decode = self._encode, decoded
        source = PromptSource(config, [PromptRecord(str(i)) for i in range(self.procs.size)])
        with ScoreQueue(load_rewards(config.rewards), self.config.group) as queue:
            micro_batch = self.micro_batch(config.groups.micro_batch)
            steps = updates(
                k2, config, source, queue, self.stepper, count(1), self.procs, {}, micro_batch, self.clock()
            )
            for step, metrics, _ in steps:
                yield step, metrics

    def _sft(self) -> Iterator[tuple[int, dict[str, Any]]]:
        config = self._sft_config
        images, micro_batch = RandomImages(self, config.batch), self.micro_batch(config.micro_batch)
        order = Order(dict.fromkeys(range(config.batch), self.size), config.batch, config.seed)
        return sft.updates(
            self.k2, config, images, order, self.stepper, count(1), self.procs, micro_batch, self.clock()
        )

    def _stpo(self) -> Iterator[tuple[int, dict[str, Any]]]:
        config = self._stpo_config
        pairs, micro_batch = RandomPairs(self, config.batch), self.micro_batch(config.micro_batch)
        return stpo.updates(self.k2, config, pairs, self.stepper, count(1), self.procs, micro_batch, self.clock())

    def _tdm(self) -> Iterator[tuple[int, dict[str, Any]]]:
        config, null = self._tdm_config, Text(self._fused(0)[None, :6])  # about as long as the empty prompt's text
        records = [PromptRecord(str(i)) for i in range(config.batch)]
        student, fake = self._tdm_steppers
        return tdm.updates(
            self.k2, config, self.next_texts, null, records, student, fake, count(1), self.procs,
            self.micro_batch(config.micro_batch), self.clock(),
        )  # fmt: skip

    def clock(self) -> BenchClock:
        return BenchClock(self)

    def micro_batch(self, size: int) -> MicroBatch:
        """Never halved: that would not be the step that is to be timed."""
        return MicroBatch(size, "batch", self.procs, halve=False)

    # ---- what they take ---------------------------------------------------------------------------------------

    def _draw(self, index: int) -> Trajectory:
        window = range(self.config.window)
        seeds = []
        for image in range(self.config.batch):
            # one for the first noise and one for each stochastic step
            seeds.append([sampler.seed_for(index, self.procs.rank, image, i) for i in range(len(window) + 1)])
        times = sampler.schedule(self.config.steps, self.k2.mu(*self.size))
        text = Text(self._fused(index)[None])
        # Not shared: each image is drawn from its own noise, so all steps of all images are work.
        with self.k2.role(self.role):
            return rollout(
                self.k2, text, seeds, times, window, "flow", ETA, *self.size, self.config.batch, shared=False
            )

    def latents(self, count: int, *index: int) -> Tensor:
        """(count, N, C) noise; the seeds follow from `index` and the process."""
        shape = (self.k2.image_tokens(*self.size), self.k2.latent_channels)
        seeds = [sampler.seed_for(self.procs.rank, *index, i) for i in range(count)]
        return sampler.noise(seeds, shape).to(self.k2.device)

    def _fused(self, index: int) -> Tensor:
        """(L, C) fused text of a prompt; L differs from step to step and from prompt to prompt."""
        return self._texts[index % len(self._texts)]

    def next_text(self) -> Tensor:
        """The next fused text at each call."""
        return self._fused(next(self._read))

    def next_texts(self, prompts: Sequence[str]) -> list[Tensor]:
        """One for each prompt, whatever the prompts say."""
        return [self.next_text() for _ in prompts]

    def _encode(self, prompts: Sequence[str], max_tokens: int = 512, batch: int = 16) -> Encoding:
        """Replaces K2.encode by random features. With `encode`, a prompt is encoded too, so that its time counts."""
        self._encode_one()
        # Five lengths in turn, up to two tokens from the usual one, as prompts have (see `text` of BenchConfig).
        lengths = [self.config.text + next(self._read) % 5 - 2 for _ in prompts]
        return Encoding([self.k2.random_features(length) for length in lengths], [0] * len(prompts))

    def _encode_one(self) -> None:
        if self.config.encode:
            template = self.k2.pipe.prompt_template_encode_start_idx
            self.k2.encode_tokens([list(range(template + self.config.text))])
            self.lap("encode")

    @cached_property
    def _texts(self) -> list[Tensor]:
        return [self.k2.fuse(self.k2.random_features(self.config.text + i % 5 - 2, i)) for i in range(5)]

    @cached_property
    def _expansions(self) -> list[Tensor]:
        """Fused texts (L, C), with L from half to one and a half of the text length."""
        text, group = self.config.text, self.config.group
        lengths = [text // 2 + text * i // (group - 1) for i in range(group)]
        return [self.k2.fuse(self.k2.random_features(length, i)) for i, length in enumerate(lengths)]

    @cached_property
    def stepper(self) -> Stepper:
        self.k2.train_role(POLICY)
        return Stepper(self.k2.role_named_parameters(POLICY), self._grpo_config.optim)

    @cached_property
    def _tdm_steppers(self) -> tuple[Stepper, Stepper]:
        assert self.lora is not None
        self.k2.add_role(tdm.FAKE, self.lora.rank, self.lora.alpha, seed=1)
        return tdm.steppers(self.k2, self._tdm_config)

    @property
    def lora(self) -> LoraConfig | None:
        rank = self.config.rank
        return None if rank is None else LoraConfig(rank, float(rank))

    def empty(self, config: type[Config], **own: Any) -> Config:
        """A recipe that names no files: nothing is read or written here."""
        if self.config.optim is not None:
            own["optim"] = self.config.optim
        return config(output="none", model=ModelConfig(""), lora=self.lora, **own)

    def _grouped(self, kind: type[Grouped], group: int) -> Grouped:
        """A recipe whose step has one group of so many images a process."""
        config = self.empty(kind, prompts=PromptsConfig("", ""), rewards=[NOISE])
        config.sampling.sizes, config.sampling.steps = [list(self.size)], self.config.steps
        config.groups.prompts_per_step, config.groups.group_size = self.procs.size, group
        config.groups.micro_batch = self.config.batch
        return config

    @cached_property
    def _grpo_config(self) -> GRPOConfig:
        config = self._grouped(GRPOConfig, self.config.group)
        config.sampling.window, config.sampling.eta = self.config.window, ETA
        config.sampling.window_start, config.sampling.window_every = "sliding", 1  # starts at each place in turn
        return self._quantized(config)

    @cached_property
    def _nft_config(self) -> NFTConfig:
        config = self._grouped(NFTConfig, self.config.group)
        # Without the reference and the old policy, whose forwards are counted apart (see counts.py).
        config.loss.times, config.loss.kl, config.old.max = self.config.times, 0.0, 0.0
        return self._quantized(config)

    def _quantized(self, config: Grouped) -> Grouped:
        if self.config.rollout_quantize is not None:
            config.rollout.quantize = self.config.rollout_quantize
            add_copies(self.k2, self.k2.device)
        return config

    @cached_property
    def _step_config(self) -> GRPOConfig:
        config = self._grouped(GRPOConfig, self.config.batch)
        config.sampling.window, config.loss.kl = 1, 0.0  # one forward and backward of the policy, no reference
        return config

    @cached_property
    def _sft_config(self) -> SFTConfig:
        config = self.empty(SFTConfig, images=ImageSetConfig("none", drop_caption=0.0))
        config.batch, config.micro_batch = self.procs.size * self.config.batch, self.config.batch
        return config

    @cached_property
    def _stpo_config(self) -> STPOConfig:
        # Both images of a pair go through the network, so half as many pairs make a batch.
        config = self.empty(STPOConfig, pairs=PairSetConfig("none"), heldout="none")
        config.batch, config.micro_batch = self.procs.size * (self.config.batch // 2), self.config.batch // 2
        return config

    @cached_property
    def _tdm_config(self) -> TDMConfig:
        config = self.empty(TDMConfig, prompts=PromptsConfig("", ""))
        config.batch, config.micro_batch = self.procs.size * self.config.batch, self.config.batch
        config.sizes, config.student.steps = [list(self.size)], [self.config.steps]
        config.fake.warmup = 0  # warm-up steps update only the fake score
        return config
