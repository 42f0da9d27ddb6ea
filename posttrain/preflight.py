"""Preflight: what a run relies on, checked and measured before it costs anything.

    posttrain preflight --config recipes/nano/grpo.yaml

It draws a whole step of the recipe, scores it and makes an update from it, with the code of grpo.py, and throws all of
it away: no run directory is made or touched. One table on stdout tells of each check what was measured and, where it
failed, what to do; a check that fails keeps no other from being made. Exit code 1 if any failed.

Under `torchrun` the processes share the step as a run's do, and their images are compared; the rest is the main one's.
In the update +1 and -1 stand in for the advantages, so that what it shows does not hang on the rewards.

Legend: P groups, G images of a group, K rewards, N = P G images.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from posttrain import advantages, grpo, sampler
from posttrain.checks import Row, Skip, made, show
from posttrain.config import GRPOConfig, RewardSpec
from posttrain.evaluate import Evaluation, Evaluator
from posttrain.k2 import K2, to_pil
from posttrain.loop import RATIO_REMEDY, Stepper
from posttrain.policy import POLICY, add_policy, described, load_model, policy_state
from posttrain.processes import Processes
from posttrain.progress import duration
from posttrain.roundtrip import round_trip
from posttrain.source import PromptSource
from posttrain.track import peak_memory
from prompts.errors import UserError
from prompts.records import PromptRecord, read_prompts
from rewards.background import ScoreQueue
from rewards.base import Failure, Noise, Reward, Score, Scores, score_all
from rewards.gates import apply_gates
from rewards.load import load_rewards
from rewards.noise import noise_metrics, noise_of
from rewards.preflight import repeatability
from rewards.serve import serve

FULL = 0.95
"""Share of a GPU's memory beyond which a run is likely to meet the end of it."""
MISSED = 0.2
"""Share of what the policy changes by which the stock pipeline may miss it after an export."""


def preflight(config: GRPOConfig) -> int:
    """Prints the table and returns the exit code. Raises UserError where nothing can be checked."""
    procs = Processes()
    source, heldout = PromptSource(config, read_prompts(config.prompts.train)), read_prompts(config.prompts.heldout)
    load_rewards(config.rewards, {server.name: ["http://127.0.0.1/"] for server in config.servers})
    k2 = load_model(config.model, procs.device)
    add_policy(k2, config.lora, config.seed, reference=config.loss.kl > 0)
    with tempfile.TemporaryDirectory(prefix="posttrain-preflight-") as folder:
        rows = Preflight(config, procs, k2, source, heldout, Path(folder)).run()
    if not procs.main:
        return 0  # a launcher that saw another code would end the main process, which may not be done
    show(rows)
    return int(any(row.ok is False for row in rows))


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


class Preflight:
    """The checks, each an iterator of rows, and what they hand on."""

    def __init__(
        self, config: GRPOConfig, procs: Processes, k2: K2, source: PromptSource, heldout: list[PromptRecord],
        folder: Path,
    ):  # fmt: skip
        self.config, self.procs, self.k2, self.source, self.heldout = config, procs, k2, source, heldout
        self.folder, self.alone = folder, procs.alone()
        self.stepper = Stepper(k2.train_role(POLICY), config.optim)
        self.begun = policy_state(k2)
        self.rows: list[Row] = []
        self.urls: dict[str, list[str]] | None = None
        """Of the recipe's servers, once they run."""
        self.silent: set[str] = set()
        """Rewards whose judge does not answer."""
        self.noise: dict[str, Noise] = {}
        self.groups: list[grpo.Group] = []
        self.scores: Scores | None = None
        self.seconds: dict[str, float] = {}
        self.moved = False

    def run(self) -> list[Row]:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        with contextlib.ExitStack() as servers:
            self._check("adapter", self.adapter)
            self._check("judges", lambda: self.judges(servers))
            self._check("evaluation", self.evaluation)
            self.urls, self.silent, self.noise = self.procs.from_main((self.urls, self.silent, self.noise))
            asked = self._asked([spec for spec in self.config.rewards if not spec.heldout_only])
            self.config = replace(self.config, rewards=asked)
            with Kept(load_rewards(asked, self.urls), self.config.groups.group_size) as queue:
                self._check("images differ", lambda: self.sample(queue), together=True)
                self._check("missing scores", lambda: self.score(queue), together=True)
        self._check("reward spread", self.spread)
        self._check("planted failure", self.planted)
        self._check("policy gradient", self.policy_gradient)
        self._check("update", self.update, together=True)
        self._check("KL gradient", self.kl_gradient)
        self._check("cost", self.cost)
        self._check("export", self.export)
        return self.rows

    def _check(self, name: str, rows: Callable[[], Iterable[Row]], together: bool = False) -> None:
        """Made by the main process alone, or by all of them together."""
        if together or self.procs.main:
            self.rows += made(name, rows, alone=not together or self.procs.size == 1)

    def _asked(self, specs: Sequence[RewardSpec]) -> list[RewardSpec]:
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
        images = to_pil(torch.from_numpy(self._evaluate([], 4, 0, [0.0]).images))
        prompts = [record.prompt for record in self.heldout]
        rewards = load_rewards(self.config.rewards, self.urls)
        judges = asyncio.run(repeatability(rewards, images, prompts))
        self.noise = noise_of(rewards, noise_metrics(judges))
        for judge in judges:
            self.silent |= set() if judge.spread is not None else set(judge.rewards)
            yield Row(f"judge {judge.judge}", not judge.remedy, judge.measured, judge.remedy)
        if not judges:
            raise Skip("no reward asks a judge")

    def evaluation(self) -> Iterator[Row]:
        """A part of one, by all rewards, and what a whole one takes."""
        config, rewards = self.config.eval, load_rewards(self._asked(self.config.rewards), self.urls)
        whole = min(config.prompts, len(self.heldout))
        prompts, groups = min(whole, 4 * self.config.groups.micro_batch), min(config.groups, 1)
        images = prompts + groups * config.group_size
        began = time.perf_counter()
        figures = self._evaluate(rewards, prompts, groups, config.guidance).figures
        seconds = time.perf_counter() - began
        share = (whole + min(config.groups, whole) * config.group_size) / images
        self.seconds["evaluation"] = seconds * share / self.procs.size
        missing = [name for name, value in figures.items() if value is None]
        measured = f"{images * len(config.guidance)} images of {config.steps} steps in {seconds:.1f} s"
        measured += f"; no score from {', '.join(missing)}" if missing else ""
        relied_on = {config.best, config.stop.metric} & set(missing)
        remedy = "eval.best and eval.stop need a figure that these prompts have: watch another"
        yield Row("evaluation", not relied_on, measured, remedy)

    def _evaluate(self, rewards: list[Reward], prompts: int, groups: int, guidance: list[float]) -> Evaluation:
        few = replace(self.config.eval, prompts=prompts, groups=groups, guidance=guidance)
        height, width = self.config.sampling.sizes[0]
        batch, tokens = 4 * self.config.groups.micro_batch, self.config.prompts.max_tokens
        with self.k2.role(POLICY):
            return Evaluator(self.k2, self.heldout, rewards, few, (height, width), batch, tokens, self.alone)()

    # ---- a step's images and scores -----------------------------------------------------------------------

    def sample(self, queue: Kept) -> Iterator[Row]:
        """No image of the step is another one's double, whichever process, prompt and seed they are of."""
        began = time.perf_counter()
        self.groups = grpo.sample(self.k2, self.config, 1, self.source, queue, self.procs)
        self.seconds["sample"] = time.perf_counter() - began
        places = [f"image {j} of group {g.index}" for g in self.groups for j in range(self.config.groups.group_size)]
        mine = [(hashlib.sha256(i.tobytes()).digest(), place) for i, place in zip(queue.images, places, strict=True)]
        seen: dict[bytes, str] = {}
        doubles = []
        for hashed, place in itertools.chain(*self.procs.each(mine)):
            if seen.setdefault(hashed, place) != place:
                doubles.append(f"; {place} is {seen[hashed]}")
        measured = f"{len(seen)} of {len(seen) + len(doubles)} images are different" + "".join(doubles[:1])
        measured += f" ({self.procs.size} processes)" if self.procs.size > 1 else ""
        remedy = "raise sampling.eta if it is tiny; if not, the seeds are alike: report it"
        yield Row("images differ", not doubles, measured, remedy)

    def score(self, queue: Kept) -> Iterator[Row]:
        """Few enough scores are missing because they failed, and an adaptive pool can do with those that are not."""
        if not self.config.rewards:
            raise Skip("no reward can be asked")
        self._sampled()
        began = time.perf_counter()
        mine, error = None, ""
        try:
            mine = queue.gather() if self.groups else None
        except UserError as raised:
            error = str(raised)
        remedy = "mend the reward: too many failures stop a run"
        if errors := [error for error in self.procs.each(error) if error]:
            yield Row("missing scores", False, errors[0], remedy)
            return
        places = [group.index for group in self.groups]
        scores = self.procs.scores(mine, self.config.groups.group_size, places)
        grpo.score(self.config, self.groups, scores, self.noise)
        if not self.silent:
            self.source.update(1, apply_gates(scores, self.config.rewards, self.noise))
        self.seconds["score"] = time.perf_counter() - began
        self.scores = scores
        failed_K = scores.failed_NK.mean(0).tolist()
        over = [spec for spec, share in zip(self.config.rewards, failed_K) if share > spec.max_failures]
        reasons = "".join(f"; {spec.name}: {scores.failures[spec.name].most_common(1)[0][0]}" for spec in over)
        unscored = int((~scores.valid_NK.any(1)).sum())
        measured = f"{scores.failed_NK.sum()} of {scores.failed_NK.size} scores failed, {unscored} images have none"
        yield Row("missing scores", not over, measured + reasons, remedy)

    def spread(self) -> Iterator[Row]:
        """Each reward tells the images of some group apart, after the gates."""
        gated = apply_gates(self._scored(), self.config.rewards, self.noise)
        shape = (-1, self.config.groups.group_size, len(gated.names))
        values_PGK, valid_PGK = (torch.from_numpy(table).view(*shape) for table in (gated.values_NK, gated.valid_NK))
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
            measured = f"mean within-group std {torch.stack(stds).mean():.3g}; {flat} of {len(stds)} groups are flat"
            yield Row(f"spread of {name}", flat < len(stds), measured, remedy)

    def planted(self) -> Iterator[Row]:
        """An image whose score fails gets nothing from that reward, and the others are compared without it."""
        names, size = [], self.config.groups.group_size
        for k, spec in enumerate(self.config.rewards):
            values_N, valid_N = self._scored().values_NK[:, k].tolist(), self._scored().valid_NK[:, k].tolist()
            if spec.gate != "none" or sum(valid_N) < 3:
                continue
            names.append(spec.name)
            lost = valid_N.index(True)
            known: list[Score] = [value if valid else None for value, valid in zip(values_N, valid_N)]
            known[lost] = Failure("planted by the preflight")
            plain = replace(spec, scale=1.0, offset=0.0, weight=1.0, group=False, max_failures=1.0)
            stand_in = Reward(plain, lambda images, prompts, known=known: known, set(), False)
            blank = [Image.new("RGB", (1, 1))] * len(known)
            scores = asyncio.run(score_all([stand_in], blank, [""] * len(known), group_size=size))
            group = replace(self.groups[0], index=lost // size)
            loss = replace(self.config.loss, max_advantage=math.inf)
            grpo.score(replace(self.config, rewards=[plain], loss=loss), [group], scores)
            own, total = float(group.advantages[lost % size]), float(group.advantages.sum())
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
        """Taken after the update: at the reference it is 0."""
        if self.config.loss.kl == 0:
            raise Skip("loss.kl is 0")
        if not self.moved:
            raise Skip("the policy is still the reference, where it is 0")
        yield self._gradient("KL gradient", 0 * self._signs(), self.config.loss.kl)

    def _gradient(self, name: str, advantages_G: Tensor, kl: float) -> Row:
        """Of one term of the loss, over one group."""
        group = replace(self._sampled()[0], advantages=advantages_G)
        grpo.gradient(self.k2, replace(self.config, loss=replace(self.config.loss, kl=kl)), [group], self.alone)
        norms = [p.grad.norm() for p in self.stepper.parameters if p.grad is not None]
        self.stepper.optimizer.zero_grad(set_to_none=True)
        norm = float(torch.stack(norms).norm()) if norms else 0.0
        remedy = "raise sampling.eta, or use model.dtype float32" if norm else "this term teaches nothing: report it"
        return Row(name, 0 < norm < math.inf, f"norm {norm:.3g} over one group", remedy)

    def update(self) -> Iterator[Row]:
        """The policy that trains is the one that sampled; an update moves it, and the reference not at all."""
        for group in self._sampled():
            group.advantages = self._signs()
        before = self._velocities()
        began = time.perf_counter()
        metrics = grpo.optimise(self.k2, self.config, self.groups, self.stepper, self.procs)
        self.seconds["optimise"] = time.perf_counter() - began
        error, clip = metrics["ratio_error"], min(self.config.loss.clip_low, self.config.loss.clip_high)
        measured = f"max |ratio - 1| is {error:.2g}; a tenth of the smaller clip is {clip / 10:.2g}"
        yield Row("ratio is 1", error <= clip / 10, measured, RATIO_REMEDY)
        if not self.procs.main:
            return

        after, now, adapter = self._velocities(), policy_state(self.k2), described(self.k2) is not None
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
        remedy = "raise optim.lr" if kept else "the KL would pull to a moving end: report it"
        yield Row("policy moves", changed == len(watched) and self.moved and kept, measured, remedy)

    @torch.no_grad()
    def _velocities(self) -> dict[str | None, Tensor]:
        """Of an image at a stochastic step, by the policy and by the reference, if there is one."""
        found: dict[str | None, Tensor] = {}
        for group in self.groups[:1]:
            move = group.trajectory.transitions[0]
            for role in (POLICY, None) if described(self.k2) or self.k2.reference else (POLICY,):
                with self.k2.role(role):
                    found[role] = self.k2.velocity(move.x[:1], move.t, group.text, *group.size)
        return found

    def _sampled(self) -> list[grpo.Group]:
        if self.procs.main and not self.groups:
            raise Skip("there are no images")
        return self.groups

    def _signs(self) -> Tensor:
        """(G,) +1 and -1 in turn."""
        return 1.0 - 2.0 * (torch.arange(self.config.groups.group_size) % 2)

    # ---- what it costs, and what comes out ----------------------------------------------------------------

    def cost(self) -> Iterator[Row]:
        peak = peak_memory()
        if torch.cuda.is_available():
            used, there = peak["peak_gpu_gib"], torch.cuda.get_device_properties().total_memory / 2**30
            measured = f"peak {used:.1f} of the GPU's {there:.1f} GiB"
            yield Row("memory", used <= FULL * there, measured, "lower groups.micro_batch")
        else:
            yield Row("memory", True, f"peak {peak['peak_ram_gib']:.1f} GiB of RAM")
        config, parts = self.config, ("sample", "score", "optimise")
        if missing := [part for part in parts if part not in self.seconds]:
            yield Row("run", None, f"how long a step takes to {' and to '.join(missing)} is not known")
            return
        step = sum(self.seconds[part] for part in parts)
        split = ", ".join(f"{part} {self.seconds[part]:.1f}" for part in parts)
        images = config.groups.prompts_per_step * config.groups.group_size
        yield Row("step", True, f"{step:.1f} s for {images} images ({split})")
        if "evaluation" not in self.seconds:
            yield Row("run", None, "how long an evaluation takes is not known")
            return
        evaluations = 1 + (math.ceil(config.steps / config.eval.every) if config.eval.every else 1)
        each = self.seconds["evaluation"]
        total = f"about {duration(config.steps * step + evaluations * each)}, {config.steps * images} images"
        yield Row("run", True, f"{total}: {config.steps} steps and {evaluations} evaluations of {each:.1f} s")

    def export(self) -> Iterator[Row]:
        """What was trained, exported and loaded by the stock pipeline, draws what the policy draws."""
        if not self.moved:
            raise Skip("the policy has not moved")
        group = self._sampled()[0]
        noise = sampler.noise([sampler.seed_for(self.config.seed, -3)], group.trajectory.latents.shape[1:])
        effect, missed = round_trip(
            self.k2, self.config.model, self.begun, group.record.prompt, noise, group.size,
            self.config.prompts.max_tokens, self.folder,
        )  # fmt: skip
        measured = f"latents move by {effect:.2g} of themselves; the stock pipeline misses {missed:.1g} of that"
        yield Row("export", missed <= MISSED, measured, "what is exported is not what was trained: report it")
