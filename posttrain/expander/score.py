"""Turns expansions into rewards: each is drawn once and scored once, however many rewards read the result.

First the format and the safety of the text are checked. Expansions that pass are drawn, all of a group from one noise.
Then the safety of the images is checked and all rewards are asked at once. An expansion that fails a check has gate
g = 0 and gets the worst score of every reward, R <- g R + (1 - g) R_min. R_min is 0 unless the recipe's `worst` says
otherwise. This happens before any normalisation, so that no quality can outbid a failed check. If an image could not be
drawn, its rewards are missing.

Legend: N expansions in whole groups of G neighbours, K rewards; the last reward is diversity.
"""

from __future__ import annotations

import asyncio
import itertools
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
from posttrain.expander.gdpo_config import DIVERSITY, ScoringConfig
from posttrain.expander.renderer import Renderer
from posttrain.expander.text_metrics import CAUSES, causes
from posttrain.expander.trl_rewards import for_trl
from posttrain.training import advantages
from prompts.records import PromptRecord, columns
from rewards.base import NO_NOISE, Noise, Reward, RewardError, RewardSpec, Scores, score_all
from rewards.diversity import Features, contributions
from rewards.load import load_rewards


@dataclass
class Expansion:
    """The model's answer to one prompt."""

    record: PromptRecord
    text: str
    """The caption, without the thought before it."""
    ended: bool = True
    """Whether the model wrote its end token."""
    special: Sequence[str] = ()
    """Special tokens before the end token."""
    tokens: int = 0
    """Tokens of the whole answer."""
    thought: str | None = None
    thought_tokens: int = 0
    thought_ok: bool = True
    """Whether the thought, if there is one, has the form of thinking.py and no more tokens than it allows."""


@dataclass
class Scored:
    """N expansions with their checks, images and scores."""

    names: list[str]
    values_NK: np.ndarray
    """0 where missing."""
    valid_NK: np.ndarray
    causes_N: list[list[str]]
    """Format faults, from text_metrics.CAUSES."""
    unsafe_N: list[list[str]]
    """Names of the safety checks that an expansion fails."""
    images_N: list[Image.Image | None]
    drawn_N: list[bool]
    """Whether there is an image; after a merge of processes `images_N` does not hold all of them."""
    features: Tensor | None
    """(N, E) features of the images, zero where there is none; None after a merge of processes."""
    cut_N: list[int]
    """Tokens beyond K2's text length."""
    renders: int
    """Images drawn: equal texts of a group share one."""
    failures: Counter[str]
    seconds: dict[str, float] = field(default_factory=dict)
    """Times of the stages `render` and `score`."""
    noise: Mapping[str, Noise] = field(default_factory=dict)
    """Reward -> noise; a reward that is not in it has none."""

    @property
    def gate_N(self) -> np.ndarray:
        """1 where format and safety are in order, else 0."""
        return np.array(_passed(self.causes_N, self.unsafe_N), float)

    def rewards(self, name: str) -> list[float | None]:
        """The scores of one reward: None where missing."""
        k = self.names.index(name)
        return _optional(self.values_NK[:, k], self.valid_NK[:, k])

    def rewards_for_trl(self, name: str, group_size: int) -> list[float | None]:
        """The scores of one reward for TRL, with its noise floor: see `for_trl`."""
        k = self.names.index(name)
        valid_N = self.valid_NK[:, k]
        return _optional(for_trl(self.values_NK[:, k], valid_N, group_size, self.noise_of(name).floor), valid_N)

    def noise_share(self, weights: Sequence[float], group_size: int) -> float | None:
        """`advantages.noise_share` of rewards with these weights, in the order of `names`."""
        values_PGK, valid_PGK = self._groups(group_size)
        noise_K = torch.tensor([self.noise_of(name).spread for name in self.names])
        return advantages.noise_share(values_PGK, valid_PGK, torch.tensor(weights), self._floors(), noise_K)

    def noise_of(self, name: str) -> Noise:
        return self.noise.get(name, NO_NOISE)

    def _groups(self, group_size: int) -> tuple[Tensor, Tensor]:
        shape = (-1, group_size, len(self.names))  # (P, G, K)
        return torch.from_numpy(self.values_NK).view(shape), torch.from_numpy(self.valid_NK).view(shape)

    def _floors(self) -> Tensor:
        return torch.tensor([self.noise_of(name).floor for name in self.names])

    def figures(self, group_size: int) -> dict[str, float | None]:
        """Shares and means for metrics: format and its faults, safety, missing images, cuts, groups without signal."""
        n = len(self.causes_N)
        passed = self.gate_N > 0
        missing = passed & ~np.array(self.drawn_N)  # an expansion that failed a check was not to be drawn
        cut = list(filter(None, self.cut_N))
        result: dict[str, float | None] = {"format": self.causes_N.count([]) / n}
        counts = Counter(itertools.chain(*self.causes_N))
        for cause in CAUSES:
            result[f"format/{cause}"] = counts[cause] / n
        result |= {
            "safe": self.unsafe_N.count([]) / n,
            "missing_images": int(missing.sum()) / int(passed.sum()) if passed.any() else None,
            "cut": len(cut) / n,
            "cut_tokens": sum(cut) / len(cut) if cut else None,
            "renders": float(self.renders),
        }
        flat_PK = advantages.flat(*self._groups(group_size), self._floors())
        for name, share in zip(self.names, flat_PK.double().mean(0).tolist()):
            result[f"flat/{name}"] = share
        return result


def _passed(causes_N: Sequence[Sequence[str]], unsafe_N: Sequence[Sequence[str]]) -> list[bool]:
    return [not faults and not unsafe for faults, unsafe in zip(causes_N, unsafe_N)]


def _optional(values_N: np.ndarray, valid_N: np.ndarray) -> list[float | None]:
    return [float(value) if valid else None for value, valid in zip(values_N, valid_N)]


def merge(parts: Sequence[tuple[Sequence[int], Scored]], images: Mapping[int, Image.Image]) -> Scored:
    """Merges the scores of several processes into one order.

    Each part comes with the places of its rows. `images` maps places to images and need not be complete. Times are
    those of the first part.
    """
    places: list[int] = []
    renders, failures = 0, Counter[str]()
    for rows, part in parts:
        places += rows
        renders += part.renders
        failures += part.failures
    order = np.argsort(places).tolist()  # rows of the joined parts in global order

    def in_order(name: str) -> list[Any]:
        joined: list[Any] = []
        for _, part in parts:
            joined += list(getattr(part, name))
        return [joined[i] for i in order]

    first = parts[0][1]
    return Scored(
        names=first.names,
        values_NK=np.stack(in_order("values_NK")),
        valid_NK=np.stack(in_order("valid_NK")),
        causes_N=in_order("causes_N"),
        unsafe_N=in_order("unsafe_N"),
        images_N=list(map(images.get, range(len(order)))),
        drawn_N=in_order("drawn_N"),
        features=None,
        cut_N=in_order("cut_N"),
        renders=renders,
        failures=failures,
        seconds=first.seconds,
    )


class Scorer:
    """The renderer, rewards, features and checks of a recipe, loaded once."""

    def __init__(
        self,
        config: ScoringConfig,
        renderer: Renderer,
        features: Features,
        template: str,
        urls: Mapping[str, Sequence[str]],
    ):
        """`template` is the expander's own instruction, which must not appear in an expansion."""
        self.config, self.renderer, self.features, self.template = config, renderer, features, template
        self.rewards = load_rewards(config.rewards, urls)
        specs = []
        for check in config.safety:
            # max_failures 1: a failed check is handled here, and always ends the run.
            specs.append(RewardSpec(f"safety {check.name}", check.function, timeout=check.timeout, max_failures=1))
        self.safety = list(zip(config.safety, load_rewards(specs, urls)))
        self.trained = [*(spec.name for spec in config.trained), DIVERSITY]
        """Rewards that TRL gets, in its order."""
        self.noise: dict[str, Noise] = {}
        """Noise by reward, once it has been measured."""

    def __call__(
        self, expansions: Sequence[Expansion], seeds: Sequence[int], group_size: int, heldout: bool = False
    ) -> Scored:
        """Scores whole groups; `seeds` has one seed for each expansion. With `heldout`, heldout_only rewards are scored
        too.

        Raises UserError when a safety check cannot be made, or when images or scores fail too often.
        """
        if len(expansions) % group_size:  # diversity would compare expansions of different prompts
            raise ValueError(f"{len(expansions)} expansions are not whole groups of {group_size}")
        began = time.perf_counter()
        faults: list[list[str]] = []
        for e in expansions:
            faults.append(causes(e.record.prompt, e.text, e.ended, self.template, e.special, e.thought_ok))
        unsafe: list[list[str]] = [[] for _ in expansions]
        # What fails a cheap check is neither drawn nor judged.
        well_formed = np.flatnonzero(_passed(faults, unsafe)).tolist()
        written = [expansions[i] for i in well_formed]
        self._check_safety("text", unsafe, well_formed, [e.text for e in written], written)
        rows = np.flatnonzero(_passed(faults, unsafe)).tolist()
        checked = time.perf_counter()

        images, cut, renders, failures = self._draw(expansions, seeds, rows)
        rendered = time.perf_counter()

        there_N = [image is not None for image in images]
        drawn = np.flatnonzero(there_N).tolist()
        shown = [image for image in images if image is not None]
        written = [expansions[i] for i in drawn]
        self._check_safety("image", unsafe, drawn, shown, written)
        rewards = [reward for reward in self.rewards if heldout or not reward.spec.heldout_only]
        scores = self._score(rewards, written, shown)
        passed = _passed(faults, unsafe)
        values, valid = self._gated(rewards, scores, drawn, passed)
        features = self._features(expansions, seeds, drawn, shown)
        distances_N = np.array(_diversity(features, there_N, passed, group_size), float)  # None becomes NaN
        names = [reward.spec.name for reward in rewards]
        for name in names:
            failures += scores.failures[name]
        ended = time.perf_counter()
        return Scored(
            names=[*names, DIVERSITY],
            values_NK=np.column_stack([values, np.nan_to_num(distances_N)]),
            valid_NK=np.column_stack([valid, ~np.isnan(distances_N)]),
            causes_N=faults,
            unsafe_N=unsafe,
            images_N=images,
            drawn_N=there_N,
            features=features,
            cut_N=cut,
            renders=renders,
            failures=failures,
            # The checks of the texts count as scoring.
            seconds={"render": rendered - checked, "score": ended - rendered + checked - began},
            noise=self.noise,
        )

    def _draw(
        self, expansions: Sequence[Expansion], seeds: Sequence[int], rows: Sequence[int]
    ) -> tuple[list[Image.Image | None], list[int], int, Counter[str]]:
        """(images, cut tokens, number of images drawn, failures): the first two for all expansions."""
        keys = _image_keys(expansions, seeds, rows)
        jobs = list(dict.fromkeys(keys))  # the same text and noise give the same image, which is drawn once
        texts = [text for text, _ in jobs]
        rendering = self.renderer(texts, [seed for _, seed in jobs])
        images: list[Image.Image | None] = [None] * len(expansions)
        cut = [0] * len(expansions)
        for i, key in zip(rows, keys):
            n = jobs.index(key)
            images[i], cut[i] = rendering.images[n], rendering.cut[n]
        return images, cut, len(jobs), Counter(rendering.failures)

    def _check_safety(
        self,
        kind: str,
        unsafe: list[list[str]],
        rows: Sequence[int],
        inputs: Sequence[Any],
        expansions: Sequence[Expansion],
    ) -> None:
        """Adds to `unsafe`, at the given rows, the names of the failed checks of this kind (text or image)."""
        if not rows:
            return
        checks = [(spec, check) for spec, check in self.safety if spec.sees == kind]
        scores = self._score([check for _, check in checks], expansions, inputs)
        for k, (spec, _) in enumerate(checks):
            if not scores.valid_NK[:, k].all():
                reasons = scores.failures[scores.names[k]].most_common(1)
                reason = reasons[0][0] if reasons else "it gave no score"
                raise UserError(
                    f"safety {spec.name}: cannot be checked: {reason}; the run ends, since nothing is safe by default"
                )
            for row, score in zip(rows, scores.values_NK[:, k]):
                if not 0 <= score <= 1:
                    raise UserError(f"safety {spec.name}: a score is {score:g}; return a probability, where 1 is safe")
                if score < spec.threshold:
                    unsafe[row].append(spec.name)

    def _score(self, rewards: Sequence[Reward], expansions: Sequence[Expansion], inputs: Sequence[Any]) -> Scores:
        prompts = [e.record.prompt for e in expansions]
        return asyncio.run(score_all(rewards, inputs, prompts, self.columns(expansions)))

    def columns(self, expansions: Sequence[Expansion]) -> dict[str, Sequence[Any]]:
        """The columns that every reward sees: those of the user's prompt, and `expansion`."""
        records = [e.record for e in expansions]
        # None makes the rubric derive requirements from the user's prompt, never from the expansion.
        requirements = [record.requirements or None for record in records]
        return {**columns(records), "expansion": [e.text for e in expansions], "requirements": requirements}

    def _features(
        self, expansions: Sequence[Expansion], seeds: Sequence[int], drawn: Sequence[int], images: list[Image.Image]
    ) -> Tensor | None:
        """(N, E), computed once for an image that several expansions share."""
        if not drawn:
            return None
        keys = _image_keys(expansions, seeds, drawn)
        unique = dict(zip(keys, images))
        order = list(unique)
        unique_UE = self.features(list(unique.values()))
        features = torch.zeros(len(expansions), unique_UE.shape[1])
        features[list(drawn)] = unique_UE[list(map(order.index, keys))]  # each unique image's row to all that share it
        return features

    def _gated(
        self, rewards: Sequence[Reward], scores: Scores, drawn: Sequence[int], passed: Sequence[bool]
    ) -> tuple[np.ndarray, np.ndarray]:
        """(N, K) values and validity, from the scores of the rows `drawn`."""
        values = np.zeros((len(passed), len(rewards)))
        valid = np.zeros(values.shape, bool)
        rows = list(drawn)
        values[rows], valid[rows] = scores.values_NK, scores.valid_NK
        gate_N = np.array(passed, float)
        for k, reward in enumerate(rewards):
            if reward.spec.heldout_only:
                continue  # it measures the images that were drawn; a penalty would hide what they are like
            name = reward.spec.name
            worst = self.config.worst.get(name, 0.0)
            lowest = values[valid[:, k], k].min(initial=np.inf)
            # Then failing a check would pay more than passing it.
            if lowest < worst:
                raise RewardError(
                    f"reward {name}: a score of {lowest:g} is below the worst score ({worst:g}) that an expansion gets"
                    " when a check fails; set worst, or scale and offset"
                )
            values[:, k], valid[:, k] = gate(values[:, k], valid[:, k], gate_N, worst)
        return values, valid


def _image_keys(expansions: Sequence[Expansion], seeds: Sequence[int], rows: Sequence[int]) -> list[tuple[str, int]]:
    # With the seed: another group has another noise, and so another image of the same text.
    return [(expansions[i].text, seeds[i]) for i in rows]


def gate(values_N: np.ndarray, valid_N: np.ndarray, gate_N: np.ndarray, worst: float) -> tuple[np.ndarray, np.ndarray]:
    """(g R + (1 - g) R_min, validity): a gated expansion has a score, whether it was drawn or not. g is 0 or 1."""
    return gate_N * values_N + (1 - gate_N) * worst, valid_N | (gate_N == 0)


def _diversity(
    features: Tensor | None, there: Sequence[bool], passed: Sequence[bool], group_size: int
) -> list[float | None]:
    if features is None:  # nothing was drawn
        return [None if ok else 0.0 for ok in passed]
    distances: list[float | None] = []
    for first in range(0, len(passed), group_size):
        group = slice(first, first + group_size)
        distances += contributions(features[group], there[group], passed[group])
    return distances
