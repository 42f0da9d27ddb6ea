"""What the preflights of grpo and nft share: a step of a few groups, drawn and scored with the method's own code.

Legend: P groups, G images of a group, K rewards, N = P G images.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import math
import time
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from posttrain.config.groups import GroupTrainingConfig
from posttrain.config.types import changed
from posttrain.distributed.processes import Processes
from posttrain.errors import UserError, counted
from posttrain.model.k2 import K2
from posttrain.preflight.checks import Row, Skip
from posttrain.preflight.common import K2Checks
from posttrain.training import advantages, groups
from posttrain.training.evaluate import gather_scores
from posttrain.training.prompt_source import PromptSource
from prompts.records import PromptRecord
from rewards.background import ScoreQueue
from rewards.base import Failure, Reward, Score, Scores, score_all
from rewards.gates import apply_gates
from rewards.load import load_rewards

GROUPS = 2
"""Most groups that a process draws."""


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


class GroupChecks(K2Checks):
    """The checks of a step's images, scores and advantages; a method adds those of its update."""

    alike = "two images have one seed: report it"
    """What to do where two images are equal."""

    def __init__(
        self, config: GroupTrainingConfig, procs: Processes, k2: K2, source: PromptSource, heldout: list[PromptRecord],
        folder: Path,
    ):  # fmt: skip
        batch, max_tokens, size = 4 * config.groups.micro_batch, config.prompts.max_tokens, config.image_sizes()[0]
        super().__init__(config, procs, k2, heldout, folder, size, batch, max_tokens, "groups.micro_batch")
        self.whole = config.groups.prompts_per_step
        few = min(self.whole, GROUPS * procs.size)
        self.config: Any = changed(config, groups=changed(config.groups, prompts_per_step=few))
        self.source = PromptSource(self.config, source.records)
        self.groups: list[Any] = []
        self.scores: Scores | None = None

    @abstractmethod
    def draw(self, queue: ScoreQueue) -> list[Any]:
        """This process's groups of the step, submitted for scoring."""

    @abstractmethod
    def updates(self) -> None:
        """The checks of the method's update."""

    def parts(self) -> tuple[str, ...]:
        """The parts of a step, whose seconds are known by now."""
        return ("sample", "score", "optimise")

    def run(self) -> list[Row]:
        with contextlib.ExitStack() as servers:
            self.check("adapter", self.adapter)
            self.check("judges", lambda: self.judges(servers))
            self.check("evaluation", self.evaluation)
            # The main process alone has started the servers and tried the judges.
            self.urls, self.silent, self.noise = self.procs.from_main((self.urls, self.silent, self.noise))
            asked = self.asked([spec for spec in self.config.rewards if not spec.heldout_only])
            self.config = changed(self.config, rewards=asked)
            with Kept(load_rewards(asked, self.urls), self.config.groups.group_size) as queue:
                self.check("images differ", lambda: self.sample(queue), together=True)
                self.check("missing scores", lambda: self.score(queue), together=True)
        self.check("reward spread", self.spread)
        self.check("planted failure", self.planted)
        self.updates()
        images = self.whole * self.config.groups.group_size
        self.check("cost", lambda: self.cost(self.parts(), images))
        self.check("export", lambda: self.export(self.sampled()[0].record.prompt))
        return self.rows

    def scaled(self, seconds: float) -> float:
        """Seconds of a part of the recipe's step, from those of the groups drawn here."""
        return seconds * self.whole / self.config.groups.prompts_per_step

    # ---- a step's images and scores -----------------------------------------------------------------------

    def sample(self, queue: Kept) -> Iterator[Row]:
        """Checks that no two images of the step are equal, over all processes, prompts and seeds."""
        self.warm_up()
        began = time.perf_counter()
        self.groups = self.draw(queue)
        self.seconds["sample"] = self.scaled(time.perf_counter() - began)
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
        yield Row("images differ", not doubles, measured, self.alike)

    def score(self, queue: Kept) -> Iterator[Row]:
        """Checks that few enough scores failed, and that the prompt pool can be updated with the others."""
        if not self.config.rewards:
            raise Skip("no reward can be asked")
        self.sampled()
        began = time.perf_counter()
        mine, error = None, ""
        try:
            mine = queue.gather() if self.groups else None
        except UserError as raised:
            error = str(raised)
        remedy = "fix the reward: too many failures stop a run"
        # All processes have to know of an error: the others would wait in the next exchange.
        errors = list(filter(None, self.procs.by_rank(error)))
        if errors:
            yield Row("missing scores", False, errors[0], remedy)
            return
        places = [group.index for group in self.groups]
        scores = gather_scores(self.procs, mine, self.config.groups.group_size, places)
        groups.score(self.config, scores, self.noise)  # its results are not needed: a step spends time on it
        if not self.silent:
            self.source.update(1, apply_gates(scores, self.config.rewards, self.noise))
        self.seconds["score"] = self.scaled(time.perf_counter() - began)
        self.scores = scores
        failed_K = scores.failed_NK.mean(0).tolist()
        reasons = ""
        for spec, share in zip(self.config.rewards, failed_K):
            if share > spec.max_failures:
                reason, _ = scores.failures[spec.name].most_common(1)[0]
                reasons += f"; {spec.name}: {reason}"
        unscored = int((~scores.valid_NK.any(1)).sum())
        measured = f"{scores.failed_NK.sum()} of {counted(scores.failed_NK.size, 'score')} failed"
        measured += f", {counted(unscored, 'image')} without any"
        if unscored == len(scores.valid_NK):
            remedy = "fix or add a reward: none applies to these prompts, and a step without a score is skipped"
        yield Row("missing scores", not reasons and unscored < len(scores.valid_NK), measured + reasons, remedy)

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
            # The first image that has a score loses it. If the failure counts as a score, it has an advantage; if it is
            # still in the group's mean, the others' advantages have a sum other than 0.
            lost = valid_N.index(True)
            known: list[Score] = [value if valid else None for value, valid in zip(values_N, valid_N)]
            known[lost] = Failure("planted by the preflight")
            # The scores are calibrated already, and one failure of a few images must not stop the check.
            plain = changed(spec, scale=1.0, offset=0.0, weight=1.0, group=False, max_failures=1.0)
            stand_in = Reward(plain, lambda images, prompts, known=known: known, set(), False)
            blank = [Image.new("RGB", (1, 1))] * len(known)
            scores = asyncio.run(score_all([stand_in], blank, [""] * len(known), group_size=size))
            loss = changed(self.config.loss, max_advantage=math.inf)
            advantages_PG, _ = groups.score(changed(self.config, rewards=[plain], loss=loss), scores)
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

    def sampled(self) -> list[Any]:
        if self.procs.main and not self.groups:
            raise Skip("there are no images")
        return self.groups

    def signs(self) -> Tensor:
        """(G,) +1 and -1 in turn: advantages with a mean of 0 that no reward is needed for."""
        return 1.0 - 2.0 * (torch.arange(self.config.groups.group_size) % 2)
