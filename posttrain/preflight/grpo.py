"""The preflight of grpo: a step of a few groups, drawn, scored and trained on with the code of grpo/train.py.

The update uses +1 and -1 as advantages, so its results do not depend on the rewards.

Legend: P groups, G images of a group, K rewards, N = P G images.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from posttrain.config.types import changed
from posttrain.distributed.processes import Processes
from posttrain.errors import UserError, counted
from posttrain.grpo import train as grpo
from posttrain.grpo import update
from posttrain.grpo.ahead import roles
from posttrain.grpo.config import GRPOConfig, RolloutConfig
from posttrain.model.k2 import K2
from posttrain.preflight.checks import Row, Skip, phase
from posttrain.preflight.common import K2Checks
from posttrain.training import advantages
from posttrain.training.evaluate import gather_scores
from posttrain.training.loop import try_rewards
from posttrain.training.policy import add_policy, load_model
from posttrain.training.prompt_source import PromptSource
from posttrain.training.stepper import RATIO_REMEDY
from prompts.records import PromptRecord, read_prompts
from rewards.background import ScoreQueue
from rewards.base import Failure, Reward, Score, Scores, score_all
from rewards.gates import apply_gates
from rewards.load import load_rewards

GROUPS = 2
"""Most groups that a process draws."""


def rows(config: GRPOConfig, procs: Processes, folder: Path) -> list[Row]:
    """Raises UserError if nothing can be checked."""
    roles(config, procs)  # refuses numbers that do not go together before anything is loaded
    source, heldout = PromptSource(config, read_prompts(config.prompts.train)), read_prompts(config.prompts.heldout)
    try_rewards(config, heldout, source.records)
    phase("the model is read")
    k2 = load_model(config.model, procs.device)
    add_policy(k2, config.lora, config.seed, reference=config.loss.kl > 0)
    return GRPOChecks(config, procs, k2, source, heldout, folder).run()


class Kept(ScoreQueue):
    """A queue that keeps the images."""

    def __init__(self, rewards: Sequence[Reward], group_size: int):
        super().__init__(rewards, group_size)
        self.images: list[Image.Image] = []

    def submit(
        self, images: Sequence[Image.Image], prompts: Sequence[str], columns: dict[str, Any] | None = None
    ) -> None:
        self.images += images
        super().submit(images, prompts, columns)


class GRPOChecks(K2Checks):
    def __init__(
        self, config: GRPOConfig, procs: Processes, k2: K2, source: PromptSource, heldout: list[PromptRecord],
        folder: Path,
    ):  # fmt: skip
        batch, max_tokens, size = 4 * config.groups.micro_batch, config.prompts.max_tokens, config.sampling.sizes[0]
        super().__init__(config, procs, k2, heldout, folder, size, batch, max_tokens, "groups.micro_batch")
        self.whole = config.groups.prompts_per_step
        few = min(self.whole, GROUPS * procs.size)
        self.rollout = config.rollout
        # All processes draw and train here, one after the other, so that each part can be timed.
        groups = changed(config.groups, prompts_per_step=few)
        self.config = changed(
            config, groups=groups, rollout=RolloutConfig(), loss=changed(config.loss, max_weight=None)
        )
        self.source = PromptSource(self.config, source.records)
        self.groups: list[update.Group] = []
        self.scores: Scores | None = None

    def run(self) -> list[Row]:
        with contextlib.ExitStack() as servers:
            self.check("adapter", self.adapter)
            self.check("judges", lambda: self.judges(servers))
            self.check("evaluation", self.evaluation)
            self.urls, self.silent, self.noise = self.procs.from_main((self.urls, self.silent, self.noise))
            asked = self.asked([spec for spec in self.config.rewards if not spec.heldout_only])
            self.config = changed(self.config, rewards=asked)
            with Kept(load_rewards(asked, self.urls), self.config.groups.group_size) as queue:
                self.check("images differ", lambda: self.sample(queue), together=True)
                self.check("missing scores", lambda: self.score(queue), together=True)
        self.check("reward spread", self.spread)
        self.check("planted failure", self.planted)
        self.check("policy gradient", self.policy_gradient)
        self.check("update", self.update, together=True)
        self.check("KL gradient", self.kl_gradient)
        images = self.whole * self.config.groups.group_size
        self.check("cost", lambda: self.cost(self._overlapped(), images))
        self.check("export", lambda: self.export(self._sampled()[0].record.prompt))
        return self.rows

    def _scaled(self, seconds: float) -> float:
        """Seconds of a part of the recipe's step, from those of the groups drawn here."""
        return seconds * self.whole / self.config.groups.prompts_per_step

    def _overlapped(self) -> tuple[str, ...]:
        """The parts of a step, with what `rollout` hides taken off their seconds."""
        parts, gpus, size = ("sample", "score", "optimise"), self.rollout.gpus, self.procs.size
        if not self.rollout.ahead or not {*parts} <= {*self.seconds}:
            return parts
        sample, score, optimise = (self.seconds[part] for part in parts)
        if gpus:  # fewer processes for each, at the same time; judges are waited for after the longer one
            sample, optimise = sample * size / gpus, optimise * size / (size - gpus)
            score = max(0.0, score - max(0.0, optimise - sample))
            sample = max(0.0, sample - optimise)
        else:
            score = max(0.0, score - sample - optimise)
        self.seconds |= dict(zip(parts, (sample, score, optimise)))
        return parts

    # ---- a step's images and scores -----------------------------------------------------------------------

    def sample(self, queue: Kept) -> Iterator[Row]:
        """Checks that no two images of the step are equal, over all processes, prompts and seeds."""
        self.warm_up()
        began = time.perf_counter()
        self.groups = grpo.sample(
            self.k2, self.config, 1, self.source, queue, self.procs, self.config.groups.micro_batch
        )
        self.seconds["sample"] = self._scaled(time.perf_counter() - began)
        # Hashes and not images are exchanged: a step's images may be gigabytes.
        hashes = [hashlib.sha256(image.tobytes()).digest() for image in queue.images]
        places: list[str] = []
        for group in self.groups:
            places += [f"image {j} of group {group.index}" for j in range(self.config.groups.group_size)]
        seen: dict[bytes, str] = {}
        doubles = []
        for hashed, place in itertools.chain(*self.procs.all_gather(list(zip(hashes, places, strict=True)))):
            if seen.setdefault(hashed, place) != place:
                doubles.append(f"; {place} is {seen[hashed]}")
        measured = f"{len(seen)} of {counted(len(seen) + len(doubles), 'image')} different" + "".join(doubles[:1])
        measured += f" ({self.procs.size} processes)" if self.procs.size > 1 else ""
        remedy = "raise sampling.eta if it is tiny; if not, the seeds are alike: report it"
        yield Row("images differ", not doubles, measured, remedy)

    def score(self, queue: Kept) -> Iterator[Row]:
        """Checks that few enough scores failed, and that the prompt pool can be updated with the others."""
        if not self.config.rewards:
            raise Skip("no reward can be asked")
        self._sampled()
        began = time.perf_counter()
        mine, error = None, ""
        try:
            mine = queue.gather() if self.groups else None
        except UserError as raised:
            error = str(raised)
        remedy = "fix the reward: too many failures stop a run"
        # All processes have to know of an error: the others would wait in the next exchange.
        if errors := [error for error in self.procs.by_rank(error) if error]:
            yield Row("missing scores", False, errors[0], remedy)
            return
        places = [group.index for group in self.groups]
        scores = gather_scores(self.procs, mine, self.config.groups.group_size, places)
        grpo.score(self.config, scores, self.noise)
        if not self.silent:
            self.source.update(1, apply_gates(scores, self.config.rewards, self.noise))
        self.seconds["score"] = self._scaled(time.perf_counter() - began)
        self.scores = scores
        failed_K = scores.failed_NK.mean(0).tolist()
        over = [spec for spec, share in zip(self.config.rewards, failed_K) if share > spec.max_failures]
        reasons = "".join(f"; {spec.name}: {scores.failures[spec.name].most_common(1)[0][0]}" for spec in over)
        unscored = int((~scores.valid_NK.any(1)).sum())
        measured = f"{scores.failed_NK.sum()} of {counted(scores.failed_NK.size, 'score')} failed"
        measured += f", {counted(unscored, 'image')} without any"
        if unscored == len(scores.valid_NK):
            remedy = "fix or add a reward: none applies to these prompts, and a step without a score is skipped"
        yield Row("missing scores", not over and unscored < len(scores.valid_NK), measured + reasons, remedy)

    def spread(self) -> Iterator[Row]:
        """Checks that each reward, after the gates, distinguishes the images of at least one group."""
        gated = apply_gates(self._scored(), self.config.rewards, self.noise)
        shape = (-1, self.config.groups.group_size, len(gated.names))
        values_PGK = torch.from_numpy(gated.values_NK).view(*shape)
        valid_PGK = torch.from_numpy(gated.valid_NK).view(*shape)
        flat_PK = advantages.flat(values_PGK, valid_PGK, torch.from_numpy(gated.floor_K))
        several_PK = valid_PGK.sum(1) > 1
        remedy = "it teaches nothing: see that it looks at the image, or give prompts of other difficulty"
        for k, name in enumerate(gated.names):
            rows = several_PK[:, k]
            stds = [values[ok].std() for values, ok in zip(values_PGK[rows, :, k], valid_PGK[rows, :, k])]
            if not stds:
                yield Row(f"spread of {name}", None, "it has two scores in no group of this step")
                continue
            flat = int(flat_PK[rows, k].sum())
            measured = (
                f"mean within-group std {torch.stack(stds).mean():.3g}; {flat} of {counted(len(stds), 'group')} flat"
            )
            yield Row(f"spread of {name}", flat < len(stds), measured, remedy)

    def planted(self) -> Iterator[Row]:
        """Checks that an image whose score fails has no advantage, and that the others are compared without it."""
        names, size = [], self.config.groups.group_size
        for k, spec in enumerate(self.config.rewards):
            values_N, valid_N = self._scored().values_NK[:, k].tolist(), self._scored().valid_NK[:, k].tolist()
            if spec.gate != "none" or sum(valid_N) < 3:
                continue
            names.append(spec.name)
            # The first image that has a score loses it.
            lost = valid_N.index(True)
            known: list[Score] = [value if valid else None for value, valid in zip(values_N, valid_N)]
            known[lost] = Failure("planted by the preflight")
            # The scores are calibrated already, and one failure of a few images must not stop the check.
            plain = changed(spec, scale=1.0, offset=0.0, weight=1.0, group=False, max_failures=1.0)
            stand_in = Reward(plain, lambda images, prompts, known=known: known, set(), False)
            blank = [Image.new("RGB", (1, 1))] * len(known)
            scores = asyncio.run(score_all([stand_in], blank, [""] * len(known), group_size=size))
            loss = changed(self.config.loss, max_advantage=math.inf)
            advantages_PG, _ = grpo.score(changed(self.config, rewards=[plain], loss=loss), scores)
            advantages_G = advantages_PG[lost // size]
            own, total = float(advantages_G[lost % size]), float(advantages_G.sum())
            if scores.valid_NK[lost, 0] or own != 0 or abs(total) > 1e-3:
                measured = f"an image whose {spec.name} failed has advantage {own:.3g}, its group's sum is {total:.3g}"
                yield Row("planted failure", False, measured, "a failure counts as a score: report it")
                return
        if not names:
            raise Skip("no reward has three scores in this step")
        yield Row("planted failure", True, f"of {', '.join(names)}: seen as missing, and in no average")

    def _scored(self) -> Scores:
        if self.scores is None:
            raise Skip("there are no scores")
        return self.scores

    # ---- an update ----------------------------------------------------------------------------------------

    def policy_gradient(self) -> Iterator[Row]:
        yield self._gradient("policy gradient", self._signs(), 0.0)

    def kl_gradient(self) -> Iterator[Row]:
        """Runs after the update: at the reference the gradient is 0."""
        if self.config.loss.kl == 0:
            raise Skip("loss.kl is 0")
        if not self.moved:
            raise Skip("the policy is still the reference, where it is 0")
        yield self._gradient("KL gradient", 0 * self._signs(), self.config.loss.kl)

    def _gradient(self, name: str, advantages_G: Tensor, kl: float) -> Row:
        """The gradient of one term of the loss, over a micro-batch of one step of one group."""
        group = self._sampled()[0]
        # A micro-batch of one step is enough to see whether the term has a gradient.
        few, move = self.config.groups.micro_batch, group.trajectory.transitions[0]
        rows, part = next(move.parts(few))
        group = replace(group, index=0, trajectory=replace(group.trajectory, transitions=[part]))
        config = changed(self.config, loss=changed(self.config.loss, kl=kl))
        update.gradient(self.k2, config, [group], advantages_G[None, rows], self.alone, few)
        norms = [p.grad.norm() for p in self.stepper.parameters if p.grad is not None]
        self.stepper.optimizer.zero_grad(set_to_none=True)  # the update after it starts from no gradient
        norm = float(torch.stack(norms).norm()) if norms else 0.0
        remedy = "raise sampling.eta, or use model.dtype float32" if norm else "this term teaches nothing: report it"
        return Row(name, 0 < norm < math.inf, f"norm {norm:.3g} over {counted(len(part.x_next), 'image')}", remedy)

    def update(self) -> Iterator[Row]:
        """Checks that the training policy equals the sampling policy, and that an update changes only the policy."""
        self._sampled()
        signs_PG = self._signs().expand(self.config.groups.prompts_per_step, -1)
        before = self._velocities()
        began = time.perf_counter()
        metrics = grpo.optimise(
            self.k2, self.config, self.groups, signs_PG, self.stepper, self.procs, self.config.groups.micro_batch
        )
        self.seconds["optimise"] = self._scaled(time.perf_counter() - began)
        error, clip = metrics["ratio_error"], min(self.config.loss.clip_low, self.config.loss.clip_high)
        measured = f"max |ratio - 1| is {error:.2g}; a tenth of the smaller clip is {clip / 10:.2g}"
        yield Row("ratio is 1", error <= clip / 10, measured, RATIO_REMEDY)
        if not self.procs.main:
            return

        yield self.policy_moves(before, self._velocities())

    def _velocities(self) -> dict[str | None, Tensor]:
        """The velocities of an image at a stochastic step."""
        if not self.groups:
            return {}
        group = self.groups[0]
        move = group.trajectory.transitions[0]
        return self.velocities(move.x[:1], move.t, group.text, group.size)

    def _sampled(self) -> list[update.Group]:
        if self.procs.main and not self.groups:
            raise Skip("there are no images")
        return self.groups

    def _signs(self) -> Tensor:
        """(G,) +1 and -1 in turn."""
        return 1.0 - 2.0 * (torch.arange(self.config.groups.group_size) % 2)
