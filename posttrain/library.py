"""The library: what a notebook, or a method of one's own, needs around its loss (docs/library.md).

    k2 = load_model()                                     # K2-nano; or the path or hub id of any K2
    images = draw(k2, ["two red stars"], size=(64, 64))
    scores = score(load_rewards([my_reward]), images, ["two red stars"])

`open_method` opens a run directory as the methods of this project do: evaluation, checkpoints, resuming, a report, and
checkpoints that `posttrain export` and `posttrain sample` read.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from posttrain.config.groups import GroupsConfig
from posttrain.config.sections import (
    CheckpointConfig,
    EvalConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    PromptsConfig,
    TrackConfig,
)
from posttrain.distributed.processes import Processes
from posttrain.errors import UserError
from posttrain.image_reader import to_rgb
from posttrain.model import fp8, sampler
from posttrain.model.k2 import K2, Text, to_pil
from posttrain.references.draw import How
from posttrain.references.shown import LONGEST, Drawer, encoded, scaled
from posttrain.resources import NANO, packaged
from posttrain.runs.run import Run
from posttrain.training import checkpoint, policy
from posttrain.training.evaluate import Evaluator, SamplingSettings, means
from posttrain.training.loop import Training, open_run, resuming
from posttrain.training.policy import POLICY
from posttrain.training.prompt_source import in_turn
from posttrain.training.stepper import Stepper
from prompts.records import PromptRecord, columns, read_prompts
from rewards.base import Reward, RewardSpec, Scores, score_all
from rewards.load import load_rewards
from rewards.serve import ServerSpec

# ---- draw and score ---------------------------------------------------------------------------------------------


def load_model(
    path: str | Path = NANO,
    adapter: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
) -> K2:
    """A K2 from a diffusers directory or hub id, frozen; K2-nano if there is no path.

    With `adapter`, a run directory, a checkpoint or a LoRA file, what that trained is the role POLICY: draw in `with
    k2.role(POLICY)`. What of a file is not a LoRA (DoRA, LoKr, ...) is merged into the weights, and needs no role.
    bfloat16 suits the released model on a GPU, where it takes 34 GB. `device` None: the GPU if there is one. Raises
    UserError for what cannot be read.
    """
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    k2 = K2.load(packaged(str(path)), None, dtype, place)
    if adapter is not None:
        policy.add_stage(k2, policy.load_stage(str(adapter), {"path": packaged(str(path))}))
    return k2


def draw(
    k2: K2,
    prompts: Sequence[str],
    size: tuple[int, int] = (512, 512),
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    micro_batch: int = 8,
    max_tokens: int = 512,
    references: Sequence[tuple[Image.Image, float]] = (),
    strength: How = "attention",
) -> list[Image.Image]:
    """One image for each prompt, under the active role.

    `size` is (height, width) in pixels, multiples of 16 (K2-nano: 64 x 64, made for that size alone). `guidance` is
    K2's, v = c + s (c - u), and 0 is off. `steps` and `guidance` None: 28 and 4.5, or 8 and 0 for a Turbo. Image i
    depends on its prompt, `seed` and i, and on nothing beside it. `references` are images whose style is drawn, each
    with its strength, under a role of `posttrain style`; `strength` says how these act, as in `posttrain sample`.
    Raises UserError for another size, and for references that cannot be shown.
    """
    height, width = size
    steps = sampler.STEPS[k2.is_distilled] if steps is None else steps
    guidance = sampler.GUIDANCE[k2.is_distilled] if guidance is None else guidance
    features = k2.encode(prompts, max_tokens).features
    fused = [k2.text_tokens(feature) for feature in features]
    null = k2.text([""]) if guidance > 0 else None
    images: list[Image.Image] = []
    drawer = None
    if references:
        longest = min(LONGEST, max(size))
        given = [scaled(to_rgb(image), longest, k2.pixel_multiple, "references") for image, _ in references]
        strengths = tuple(value for _, value in references)
        # Encoded once: all prompts share them.
        drawer = Drawer(k2, [encoded(k2, given)] * len(prompts), [strengths] * len(prompts), size, strength)
    for first in range(0, len(prompts), micro_batch):
        rows = range(first, min(first + micro_batch, len(prompts)))
        # By the prompt's place, so that the micro-batch does not change what is drawn.
        seeds = [sampler.seed_for(seed, row) for row in rows]
        noise = sampler.noise(seeds, (k2.image_tokens(height, width), k2.latent_channels))
        text = Text.of(fused[first : first + micro_batch])
        if drawer is None:
            latents = k2.sample(text, noise, steps, height, width, guidance, null)
        else:
            latents = drawer(rows, text, noise, SamplingSettings(steps, guidance), null)
        images += to_pil(k2.decode(latents, height, width))
    return images


def score(
    rewards: Sequence[Reward],
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    columns: Mapping[str, Sequence[Any]] | None = None,
    group_size: int = 1,
) -> Scores:
    """What all rewards say about N images: `values_NK`, `valid_NK` (False where a score is missing), `failures`.

    Rewards see the images in 8-bit RGB, as posttrain/image_reader.py converts them; UserError for one that cannot be.
    `columns` are the prompts' other fields, one entry an image; `posttrain.columns(records)` makes them of records.
    Every `group_size` neighbouring images are one group. Raises RewardError for a reward that breaks its contract or
    fails too often. Works in a notebook, whose event loop is running already.
    """
    images = _as_rgb(images)
    work = score_all(rewards, images, prompts, dict(columns or {}), group_size)
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    from concurrent.futures import ThreadPoolExecutor

    # A thread of its own has no loop yet, and one may be run there.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()


def _as_rgb(images: Sequence[Image.Image]) -> list[Image.Image]:
    converted = []
    for i, image in enumerate(images):
        try:
            converted.append(to_rgb(image))
        except ValueError as error:
            raise UserError(f"images[{i}]: {error}") from None
    return converted


def total(scores: Scores, weights: Sequence[float] | None = None) -> Tensor:
    """(N,) weighted mean of an image's scores that are there, fp32; NaN where all are missing."""
    weights_K = torch.ones(len(scores.names)) if weights is None else torch.tensor(weights, dtype=torch.float32)
    weights_NK = weights_K * torch.from_numpy(scores.valid_NK)
    values_NK = torch.from_numpy(scores.values_NK).float()
    # Where all are missing this is 0 / 0, which is NaN: missing is not zero.
    return (weights_NK * values_NK).sum(1) / weights_NK.sum(1)


# ---- a method of one's own --------------------------------------------------------------------------------------


@dataclass
class MethodConfig:
    """Settings that a method of one's own begins with; add fields by inheriting, each with a default."""

    output: str
    """Run directory, created; one that holds a run already needs resume."""
    model: ModelConfig
    prompts: PromptsConfig
    rewards: list[RewardSpec]
    """Rewards to train on; those with heldout_only are measured at evaluation alone."""
    servers: list[ServerSpec] = field(default_factory=list)
    """Judges to serve while the run lasts; rewards name one as server://NAME."""
    steps: int = 200
    """Training steps, >= 1."""
    seed: int = 0
    """Seed of everything drawn, >= 0."""
    size: list[int] = field(default_factory=lambda: [512, 512])
    """[height, width] in pixels, multiples of 16."""
    lora: LoraConfig | None = field(default_factory=LoraConfig)
    """The adapter to train; null: all weights but the text fusion's."""
    groups: GroupsConfig = field(default_factory=GroupsConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    track: TrackConfig = field(default_factory=TrackConfig)


class MethodRun:
    """A run of a method of one's own: `open_method` makes it."""

    def __init__(
        self,
        config: MethodConfig,
        k2: K2,
        directory: Run,
        training: Training,
        source: list[PromptRecord],
        rewards: list[Reward],
    ):
        self.config, self.k2, self.path = config, k2, directory.path
        self.stepper = training.stepper
        """Steps AdamW over the role POLICY: `stepper.step()` after `loss.backward()` returns the gradient's norm."""
        self._directory, self._training, self._source, self._rewards = directory, training, source, rewards

    def steps(self) -> Iterator[int]:
        """The steps still to train, from 1. Evaluates, saves and stops between them, and sums up after the last."""
        training = self._training
        if training.begin():
            self._evaluate(0)
        for step in training.steps():
            yield step
            if training.evaluation_due(step):
                self._evaluate(step)
            if training.save_due(step):
                training.save(step)
        training.finish()

    def _evaluate(self, step: int) -> None:
        with self._training.policy():
            evaluation = self._training.evaluator()
        self._training.record(step, evaluation)

    def prompts(self, step: int) -> list[PromptRecord]:
        """The step's prompts: `groups.prompts_per_step` of them, every one once before any comes again."""
        # Counted over the whole run, so that no prompt comes twice before all have come once.
        count = self.config.groups.prompts_per_step
        places = range((step - 1) * count, step * count)
        return [self._source[in_turn(self.config.seed, place, len(self._source))] for place in places]

    def text(self, record: PromptRecord) -> Text:
        """A prompt's fused text, a batch of one, which serves any number of images."""
        features = self.k2.encode([record.prompt], self.config.prompts.max_tokens).features
        return Text.of([self.k2.text_tokens(features[0])])

    def noise(self, step: int, *place: int, count: int) -> Tensor:
        """(count, N tokens, C channels) standard normal on the CPU, from the run's seed, step and place alone.

        So a resumed run draws what the uninterrupted one would have. Give each use within a step a place of its own.
        """
        seeds = [sampler.seed_for(self.config.seed, step, *place, i) for i in range(count)]
        height, width = self.config.size
        return sampler.noise(seeds, (self.k2.image_tokens(height, width), self.k2.latent_channels))

    def score(self, images: Sequence[Image.Image], records: Sequence[PromptRecord], group_size: int = 1) -> Scores:
        """The scores of the rewards to train on; see `posttrain.score`."""
        return score(self._rewards, images, [record.prompt for record in records], columns(records), group_size)

    def log(self, step: int, metrics: Mapping[str, Any], scores: Scores | None = None) -> None:
        """Writes a step's metrics, numbers or 0-d tensors or None, to metrics.jsonl; of `scores` each reward's mean."""
        row: dict[str, Any] = {}
        if scores is not None:
            for name, value in means(scores).items():
                row[f"reward/{name}"] = value
        self._directory.log(step, row | dict(metrics))


@contextlib.contextmanager
def open_method(name: str, config: MethodConfig, resume: bool = False) -> Iterator[MethodRun]:
    """A run directory with the model, the role POLICY to train, rewards and servers, in one process.

    With `resume` it continues from the newest checkpoint, if there is one. Leaves report.html in the directory. `name`
    is written into checkpoints as their method. Raises UserError for what the user can correct, such as a directory
    that holds a run already. Ctrl-C and SIGTERM save, and Ctrl-C is raised again afterwards.
    """
    procs = Processes()
    if procs.size > 1:
        raise UserError("open_method: runs in one process; start it without a launcher")
    resume = resuming(config, resume, procs)
    source, heldout = read_prompts(config.prompts.train), read_prompts(config.prompts.heldout)
    saved = checkpoint.load_latest(Path(config.output) / "checkpoints") if resume else None
    k2 = policy.load_model(config.model, procs.device, saved)
    policy.add_policy(k2, config.lora, config.seed, reference=False)
    fp8.train_in_float8(k2)  # when all roles are there
    with open_run(config, resume, procs) as directory:
        trained = load_rewards([spec for spec in config.rewards if not spec.heldout_only], directory.urls)
        # A judge's client keeps to one event loop, so evaluation has rewards of its own.
        measured = load_rewards(config.rewards, directory.urls)
        height, width = config.size
        evaluator = Evaluator(
            k2, heldout, measured, config.eval, (height, width), config.groups.micro_batch,
            config.prompts.max_tokens, procs,
        )  # fmt: skip
        k2.train_role(POLICY)
        steppers = {POLICY: Stepper(k2.role_named_parameters(POLICY), config.optim)}
        training = Training(name, config, directory, procs, k2, steppers, evaluator, saved, facts={})
        yield MethodRun(config, k2, directory, training, source, trained)
