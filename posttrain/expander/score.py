"""Expansions to rewards: each is drawn once and scored once, whatever the number of rewards that read the result.

Order: the format and the text's safety are checked; what passes is drawn, all of a group from one noise; the pictures'
safety is checked and every reward asked at once. An expansion that fails a check has gate g = 0 and gets the worst
score of every reward, R <- g R + (1 - g) R_min with R_min = 0 unless the recipe's `worst` says otherwise: before any
normalisation, so that no quality can outbid it. A picture that could not be had leaves its rewards missing.

Legend: N expansions in whole groups of G neighbours, K rewards; the last reward is diversity.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from posttrain.errors import UserError
from posttrain.expander.config import DIVERSITY, ExpanderGDPOConfig
from posttrain.expander.renderer import Renderer
from posttrain.expander.text_metrics import CAUSES, causes
from posttrain.training import advantages
from prompts.records import PromptRecord, columns
from rewards.base import Noise, Reward, RewardError, RewardSpec, Scores, score_all
from rewards.diversity import Features, contributions
from rewards.load import load_rewards


@dataclass
class Expansion:
    """What the model wrote for one prompt."""

    record: PromptRecord
    text: str
    ended: bool = True
    """Whether it ends with the model's end token."""
    special: Sequence[str] = ()
    """Special tokens in it, before that end."""
    tokens: int = 0


@dataclass
class Scored:
    """N expansions with all that is known of them."""

    names: list[str]
    values_NK: np.ndarray
    """0 where missing."""
    valid_NK: np.ndarray
    causes_N: list[list[str]]
    """Format faults, by expansion.CAUSES."""
    unsafe_N: list[list[str]]
    """Names of the safety checks that an expansion fails, and nothing else."""
    images_N: list[Image.Image | None]
    drawn_N: list[bool]
    """Whether there is an image, also where `images_N` of several processes does not hold it."""
    features: Tensor | None
    """(N, E) features of the pictures, zero where there is none; None of several processes."""
    cut_N: list[int]
    """Tokens beyond K2's text length."""
    renders: int
    failures: Counter[str]
    seconds: dict[str, float] = field(default_factory=dict)
    """`render` and `score`."""
    noise: Mapping[str, Noise] = field(default_factory=dict)
    """Of rewards, by name; those that are not there have none."""

    @property
    def gate_N(self) -> np.ndarray:
        """1 where format and safety are in order, else 0."""
        return np.array([not faults and not bad for faults, bad in zip(self.causes_N, self.unsafe_N)], float)

    def rewards(self, name: str) -> list[float | None]:
        """One reward: None where it is missing."""
        k = self.names.index(name)
        return [float(v) if ok else None for v, ok in zip(self.values_NK[:, k], self.valid_NK[:, k])]

    def rewards_for_trl(self, name: str, group_size: int) -> list[float | None]:
        """One reward as TRL takes it, with its noise floor: see `with_floor`."""
        k = self.names.index(name)
        values_N = with_floor(self.values_NK[:, k], self.valid_NK[:, k], group_size, self._floor(name))
        return [float(v) if ok else None for v, ok in zip(values_N, self.valid_NK[:, k])]

    def noise_share(self, weights: Sequence[float], group_size: int) -> float | None:
        """`advantages.noise_share` of rewards with these weights, in the order of `names`."""
        values_PGK, valid_PGK = self._groups(group_size)
        noise_K = torch.tensor([self.noise[n].spread if n in self.noise else 0.0 for n in self.names])
        return advantages.noise_share(values_PGK, valid_PGK, torch.tensor(weights), self._floors(), noise_K)

    def _groups(self, group_size: int) -> tuple[Tensor, Tensor]:
        shape = (-1, group_size, len(self.names))
        return torch.from_numpy(self.values_NK).view(shape), torch.from_numpy(self.valid_NK).view(shape)

    def _floor(self, name: str) -> float:
        return self.noise[name].floor if name in self.noise else 0.0

    def _floors(self) -> Tensor:
        return torch.tensor([self._floor(name) for name in self.names])

    def figures(self, group_size: int) -> dict[str, float | None]:
        """Shares and means for metrics: format, causes, safety, missing pictures, cuts, groups without signal."""
        n = len(self.causes_N)
        cut = [tokens for tokens in self.cut_N if tokens]
        wanted = sum(not f and not u for f, u in zip(self.causes_N, self.unsafe_N))
        missing = sum(not there and g > 0 for there, g in zip(self.drawn_N, self.gate_N))
        found: dict[str, float | None] = {
            "format": sum(not faults for faults in self.causes_N) / n,
            **{f"format/{cause}": sum(cause in faults for faults in self.causes_N) / n for cause in CAUSES},
            "safe": sum(not bad for bad in self.unsafe_N) / n,
            "missing_images": missing / wanted if wanted else None,
            "cut": len(cut) / n,
            "cut_tokens": sum(cut) / len(cut) if cut else None,
            "renders": float(self.renders),
        }
        flat = advantages.flat(*self._groups(group_size), self._floors()).double().mean(0).tolist()
        return found | {f"flat/{name}": share for name, share in zip(self.names, flat)}


def joined(parts: Sequence[tuple[Sequence[int], Scored]], images: Mapping[int, Image.Image]) -> Scored:
    """What several processes scored, in one order: each part has the places of its rows. `images` is by place too, and
    need not hold all. Times are the first part's."""
    held = [part for _, part in parts]
    order = np.argsort(np.concatenate([places for places, _ in parts])).tolist()

    def in_order(name: str) -> list[Any]:
        rows = [row for part in held for row in getattr(part, name)]
        return [rows[i] for i in order]

    return Scored(
        held[0].names, np.stack(in_order("values_NK")), np.stack(in_order("valid_NK")),
        in_order("causes_N"), in_order("unsafe_N"), [images.get(place) for place in range(len(order))],
        in_order("drawn_N"), None, in_order("cut_N"),
        sum(part.renders for part in held), sum((part.failures for part in held), Counter()), held[0].seconds,
    )  # fmt: skip


class Scorer:
    """Renderer, rewards, features and checks of a recipe, loaded once."""

    def __init__(
        self,
        config: ExpanderGDPOConfig,
        renderer: Renderer,
        features: Features,
        template: str,
        urls: Mapping[str, Sequence[str]],
    ):
        """`template` is the expander's own text, which must not be in an expansion."""
        self.config, self.renderer, self.features, self.template = config, renderer, features, template
        self.rewards = load_rewards(config.rewards, urls)
        specs = [RewardSpec(f"safety {c.name}", c.function, timeout=c.timeout, max_failures=1) for c in config.safety]
        self.safety = list(zip(config.safety, load_rewards(specs, urls)))
        self.trained = [reward.spec.name for reward in self.rewards if not reward.spec.heldout_only] + [DIVERSITY]
        """Rewards that TRL gets, in its order."""
        self.noise: dict[str, Noise] = {}
        """Of the rewards, once it is known."""

    def __call__(
        self, expansions: Sequence[Expansion], seeds: Sequence[int], group_size: int, heldout: bool = False
    ) -> Scored:
        """Scores whole groups; `seeds` has one for each expansion. With `heldout`, those rewards too that only measure.

        Raises UserError when a safety check cannot be had, or when pictures or scores fail too often.
        """
        if len(expansions) % group_size:
            raise ValueError(f"{len(expansions)} expansions are not whole groups of {group_size}")
        began = time.perf_counter()
        faults = [causes(e.record.prompt, e.text, e.ended, self.template, e.special) for e in expansions]
        drawn = [i for i, found in enumerate(faults) if not found]
        unsafe: list[list[str]] = [[] for _ in expansions]
        texts = [expansions[i].text for i in drawn]
        self._apply("text", unsafe, drawn, texts, [expansions[i] for i in drawn])
        drawn = [i for i in drawn if not unsafe[i]]
        checked = time.perf_counter()

        jobs = list(dict.fromkeys((expansions[i].text, seeds[i]) for i in drawn))  # alike from one noise: one picture
        rendering = self.renderer([text for text, _ in jobs], [seed for _, seed in jobs])
        place = {job: n for n, job in enumerate(jobs)}
        images: list[Image.Image | None] = [None] * len(expansions)
        cut = [0] * len(expansions)
        for i in drawn:
            n = place[expansions[i].text, seeds[i]]
            images[i], cut[i] = rendering.images[n], rendering.cut[n]
        rendered = time.perf_counter()

        seen = [i for i in drawn if images[i] is not None]
        pictures = [image for i in seen if (image := images[i]) is not None]
        there = [expansions[i] for i in seen]
        self._apply("image", unsafe, seen, pictures, there)
        rewards = [reward for reward in self.rewards if heldout or not reward.spec.heldout_only]
        scores = self._score(rewards, there, pictures)
        features = self._features(len(expansions), seen, pictures)
        values, valid = self._gated(rewards, scores, seen, [not f and not u for f, u in zip(faults, unsafe)])
        distances = _diversity(features, images, faults, unsafe, group_size)
        values = np.column_stack([values, [d or 0.0 for d in distances]])
        valid = np.column_stack([valid, [d is not None for d in distances]])
        names = [*(reward.spec.name for reward in rewards), DIVERSITY]
        failures = rendering.failures + sum((scores.failures[n] for n in names[:-1]), Counter())
        seconds = {"render": rendered - checked, "score": time.perf_counter() - rendered + checked - began}
        there_N = [image is not None for image in images]
        return Scored(
            names, values, valid, faults, unsafe, images, there_N, features, cut, len(jobs), failures, seconds,
            self.noise,
        )  # fmt: skip

    def _apply(
        self, kind: str, unsafe: list[list[str]], rows: Sequence[int], seen: Sequence[Any], there: Sequence[Expansion]
    ) -> None:
        """Adds to `unsafe`, at the given rows, the names of the checks of this kind that are failed."""
        checks = [(spec, check) for spec, check in self.safety if spec.sees == kind]
        if not rows or not checks:
            return
        scores = self._score([check for _, check in checks], there, seen)
        for k, (spec, _) in enumerate(checks):
            if not scores.valid_NK[:, k].all():
                reasons = scores.failures[scores.names[k]].most_common(1)
                reason = reasons[0][0] if reasons else "it gave no score"
                raise UserError(
                    f"safety {spec.name}: cannot be checked: {reason}; the run stops, since nothing is safe by default"
                )
            for row, score in zip(rows, scores.values_NK[:, k]):
                if not 0 <= score <= 1:
                    raise UserError(f"safety {spec.name}: a score is {score:g}: return a probability, 1 is safe")
                if score < spec.threshold:
                    unsafe[row].append(spec.name)

    def _score(self, rewards: Sequence[Reward], there: Sequence[Expansion], pictures: Sequence[Any]) -> Scores:
        return asyncio.run(score_all(rewards, pictures, [e.record.prompt for e in there], self.columns(there)))

    def columns(self, there: Sequence[Expansion]) -> dict[str, Sequence[Any]]:
        """Every reward sees the user's prompt and its columns, and the column `expansion`. Where a prompt has no
        requirements they are None, so that the rubric finds them: an expansion is always held to its prompt."""
        records = [e.record for e in there]
        requirements = [r.requirements or None for r in records]
        return {**columns(records), "expansion": [e.text for e in there], "requirements": requirements}

    def _features(self, count: int, seen: Sequence[int], pictures: list[Image.Image]) -> Tensor | None:
        if not seen:
            return None
        first = list({id(p): p for p in pictures}.values())
        order = {id(p): n for n, p in enumerate(first)}
        found = self.features(first)
        features = torch.zeros(count, found.shape[1])
        features[list(seen)] = found[[order[id(p)] for p in pictures]]
        return features

    def _gated(
        self, rewards: Sequence[Reward], scores: Scores, seen: Sequence[int], passed: Sequence[bool]
    ) -> tuple[np.ndarray, np.ndarray]:
        """(N, K) values and whether they are there, from the scores of the rows `seen`."""
        values = np.zeros((len(passed), len(rewards)))
        valid = np.zeros(values.shape, bool)
        rows = list(seen)
        values[rows], valid[rows] = scores.values_NK, scores.valid_NK
        gate_N = np.array(passed, float)
        for k, reward in enumerate(rewards):
            name = reward.spec.name
            worst = self.config.worst.get(name, 0.0)
            lowest = values[valid[:, k], k].min(initial=np.inf)
            if lowest < worst and not reward.spec.heldout_only:
                raise RewardError(
                    f"reward {name}: a score of {lowest:g} is below the worst ({worst:g}) that a gated expansion gets:"
                    " set worst, or scale and offset"
                )
            if not reward.spec.heldout_only:  # what only measures, measures what was drawn
                values[:, k], valid[:, k] = gate(values[:, k], valid[:, k], gate_N, worst)
        return values, valid


def with_floor(values_N: np.ndarray, valid_N: np.ndarray, group_size: int, floor: float) -> np.ndarray:
    """Values from which TRL, which knows no floor, computes the advantages of one reward with a floor.

    TRL has (R - mean) / (std + 1e-4). With deviations from the group's mean c times as large, that is
    c (R - mean) / (c std + 1e-4). Where std is below the floor, c = 1e-4 / (floor - std + 1e-4) makes it
    (R - mean) / (floor + 1e-4). A flat group gets one number: its mean, rounded to 12 bits, so that the fp32 mean of
    equal numbers is that number and nothing is left.
    """
    if not floor:
        return values_N
    result_N = values_N.copy()
    for first in range(0, len(values_N), group_size):
        rows = first + np.flatnonzero(valid_N[first : first + group_size])
        if not len(rows):
            continue
        mean = values_N[rows].mean()
        if np.ptp(values_N[rows]) < floor:
            fraction, exponent = np.frexp(mean)
            result_N[rows] = np.ldexp(np.round(np.ldexp(fraction, 12)), exponent - 12)
        elif (short := floor - values_N[rows].std(ddof=1)) > 0:
            result_N[rows] = mean + (values_N[rows] - mean) * advantages.EPSILON / (short + advantages.EPSILON)
    return result_N


def gate(values_N: np.ndarray, valid_N: np.ndarray, gate_N: np.ndarray, worst: float) -> tuple[np.ndarray, np.ndarray]:
    """g R + (1 - g) R_min, and what is there: all that is gated, whether it was drawn or not. g is 0 or 1."""
    return gate_N * values_N + (1 - gate_N) * worst, valid_N | (gate_N == 0)


def _diversity(
    features: Tensor | None,
    images: Sequence[Image.Image | None],
    faults: Sequence[Sequence[str]],
    unsafe: Sequence[Sequence[str]],
    group_size: int,
) -> list[float | None]:
    passed = [not f and not u for f, u in zip(faults, unsafe)]
    if features is None:
        return [None if ok else 0.0 for ok in passed]
    found: list[float | None] = []
    for i in range(0, len(passed), group_size):
        group = slice(i, i + group_size)
        found += contributions(features[group], [image is not None for image in images[group]], passed[group])
    return found
