"""Operations of a recipe's training steps and evaluations, by the formulas of model/flops.py; those of
recomputed blocks are included.

Counted are those of the GPU that has the most: grpo's and nft's groups are divided whole, pairs and images one by one.
Text is as long as in the measurement. A step that differs from the others (stpo's shares of terms, tdm's warm-up)
counts with its share of the steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from posttrain.errors import UserError
from posttrain.grpo.config import GRPOConfig
from posttrain.model import flops
from posttrain.mopd.config import ANCHOR, MOPDConfig
from posttrain.nft.config import NFTConfig
from posttrain.sft.config import SFTConfig
from posttrain.stpo.config import STPOConfig
from posttrain.style.config import StyleConfig
from posttrain.tdm.config import TDMConfig

Recipe = GRPOConfig | NFTConfig | MOPDConfig | SFTConfig | STPOConfig | TDMConfig
Size = Sequence[int]


@dataclass(frozen=True)
class Work:
    """What one GPU does."""

    flop: float
    """Operations of the network."""
    images: float = 0.0
    """Images that are decoded."""


@dataclass(frozen=True)
class Cost:
    """Operations of one sample of (height, width) pixels, with `text` tokens."""

    shape: flops.Shape
    multiple: int
    """Pixels along one side of an image token."""
    text: int
    rank: int
    """Of the trained adapter."""
    stack: int = 0
    """The sum of the ranks of earlier stages, which the reference has too."""
    recomputed: Callable[[Size], int] = field(default=lambda size: 0)
    """How many blocks recompute their activations in backward, by size."""

    def tokens(self, size: Size) -> int:
        return (size[0] // self.multiple) * (size[1] // self.multiple)

    def reference(self, size: Size) -> float:
        return flops.forward(self.shape, self.tokens(size), self.text, self.stack)

    def forward(self, size: Size) -> float:
        return flops.forward(self.shape, self.tokens(size), self.text, self.stack + self.rank)

    def train(self, size: Size) -> float:
        """Forward and backward, with what is recomputed."""
        tokens, rank = self.tokens(size), self.stack + self.rank
        again = self.recomputed(size) * flops.block(self.shape, tokens + self.text, rank)
        return self.forward(size) + flops.backward(self.shape, tokens, self.text, rank) + again


def step(recipe: Recipe, cost: Cost, gpus: int, size: Size) -> Work:
    """One training step with images of this size; a mean over all steps."""
    if isinstance(recipe, GRPOConfig):
        return _grpo(recipe, cost, gpus, size)
    if isinstance(recipe, NFTConfig):
        return _nft(recipe, cost, gpus, size)
    if isinstance(recipe, MOPDConfig):
        return _mopd(recipe, cost, gpus, size)
    own = math.ceil(recipe.batch / gpus)
    if isinstance(recipe, SFTConfig):
        shown = _shown(recipe, cost, size) if isinstance(recipe, StyleConfig) else 1.0
        return Work(own * cost.train(size) * shown)
    if isinstance(recipe, STPOConfig):
        return Work(own * _stpo(recipe, cost, own, gpus, size))
    return Work(own * _tdm(recipe, cost, size))


def _shown(recipe: StyleConfig, cost: Cost, size: Size) -> float:
    """How many times the operations of a step without references it takes with the mean number of them."""
    own = recipe.references
    tokens = sum((side // cost.multiple) ** 2 for side in own.sizes) / len(own.sizes)
    mean = (1 - own.drop - own.drop_both) * (1 + own.two)
    image, rank = cost.tokens(size), cost.stack + cost.rank
    one = flops.forward_with_references(cost.shape, image, cost.text, [round(tokens)], cached=False, rank=rank)
    return 1 + mean * (one / cost.forward(size) - 1)


def _grpo(recipe: GRPOConfig, cost: Cost, gpus: int, size: Size) -> Work:
    """A group shares the forwards up to its window's first step, and that step's forward and backward in training."""
    s, groups = recipe.sampling, recipe.groups
    shared, together, apart = 0.0, 0, s.steps - 1  # forwards of the group; steps that it and that each image trains
    if s.window is not None:
        places = min((s.steps + 1) // 2, s.steps - s.window)
        # A window that slides or is random begins at each place equally often.
        before = s.window_start if isinstance(s.window_start, int) else (places - 1) / 2
        shared, together, apart = before + 1, 1, s.window - 1
    drawn = (shared + groups.group_size * (s.steps - shared)) * cost.forward(size)
    reference = cost.reference(size) if recipe.loss.kl > 0 else 0.0
    trained = (together + groups.group_size * apart) * recipe.optim.passes * (cost.train(size) + reference)
    # A group stays on one GPU, so the GPU with the most groups decides.
    own = math.ceil(groups.prompts_per_step / gpus)
    return Work(own * (drawn + trained), own * groups.group_size)


def _nft(recipe: NFTConfig, cost: Cost, gpus: int, size: Size) -> Work:
    """Each image is drawn on its own and trained at each of its noise levels."""
    groups, loss = recipe.groups, recipe.loss
    level = cost.train(size) + (cost.reference(size) if loss.kl > 0 else 0.0)
    level += cost.forward(size) if recipe.old.max > 0 else 0.0  # of the old policy, which lags for most of a run
    images = math.ceil(groups.prompts_per_step / gpus) * groups.group_size
    return Work(images * (recipe.sampling.steps * cost.forward(size) + loss.times * level), images)


def _mopd(recipe: MOPDConfig, cost: Cost, gpus: int, size: Size) -> Work:
    """The student's forward at a compared state is the one that has the gradient; behind the last state there is none.
    A teacher's adapter counts as the student's. Whether there are prompts of the anchor is not known: they count."""
    steps, states = recipe.sampling.steps, recipe.sampling.states
    walked = states * (steps + 1) / (states + 1)  # expected: the last of some of the steps, drawn without replacement
    flop = 0.0
    for name in (*recipe.teachers, ANCHOR):
        guided = name != ANCHOR and recipe.teachers[name].guidance > 0
        teacher = cost.reference(size) if name == ANCHOR else (2 if guided else 1) * cost.forward(size)
        reference = cost.reference(size) if recipe.loss.reference > 0 and name != ANCHOR else 0.0
        image = (walked - states) * cost.forward(size) + states * (cost.train(size) + teacher + reference)
        flop += math.ceil(recipe.images_of(name) / gpus) * image
    return Work(flop)


def _stpo(recipe: STPOConfig, cost: Cost, own: int, gpus: int, size: Size) -> float:
    """Of one pair. Where terms are apart, chosen images are trained three times or two, rejected ones twice."""
    loss, forward, train = recipe.loss, cost.forward(size), cost.train(size)
    exact = loss.kind == "stpo" and loss.guard == "exact"
    # The hinge needs the mean over the batch before any gradient.
    first_pass = loss.kind == "stpo" and loss.hinge > 0 and not exact and (gpus > 1 or own > recipe.micro_batch)
    usual = 2 * train + (forward if first_pass else 0.0)
    apart = 2 * forward + (5 if exact else 4) * train + (forward if first_pass else 0.0)
    share = 1.0 if exact else 0.0
    if loss.terms_every and not exact:
        share = math.ceil(recipe.steps / loss.terms_every) / recipe.steps
    return 2 * cost.reference(size) + share * apart + (1 - share) * usual


def _tdm(recipe: TDMConfig, cost: Cost, size: Size) -> float:
    """Of one image. The first steps train the fake score alone."""
    fake = recipe.fake
    teacher = (2 if recipe.teacher.guidance else 1) * cost.reference(size)  # guidance takes the empty prompt too
    warming = walked(recipe, fake.updates) * cost.forward(size) + fake.updates * cost.train(size)
    n = fake.updates + 1  # points for the fake score's updates and the student's
    full = (walked(recipe, n) + 1) * cost.forward(size) + teacher + n * cost.train(size)
    share = fake.warmup / recipe.steps
    return share * warming + (1 - share) * full


def walked(recipe: TDMConfig, points: int) -> float:
    """Expected steps of a trajectory of K steps to the last of n uniformly drawn points: K - sum_{j<K} (j/K)^n."""
    expected = []
    for k in recipe.student.steps:
        expected.append(k - sum((j / k) ** points for j in range(k)))
    return fmean(expected)


def evaluation(recipe: Recipe, cost: Cost, gpus: int) -> Work:
    """One evaluation."""
    e, size = recipe.eval, sizes(recipe)[0]
    images, forwards = _images(recipe, gpus), [steps * (2 if scale else 1) for steps, scale in recipe.eval_draws()]
    flop = images * sum(forwards) * cost.forward(size)
    if isinstance(recipe, SFTConfig):  # the policy on held-out images
        flop += math.ceil(recipe.images.measured / gpus) * cost.forward(size)
    if isinstance(recipe, STPOConfig):  # both images of held-out pairs, by the policy and the reference
        flop += math.ceil(recipe.pairs.measured / gpus) * 2 * (cost.forward(size) + cost.reference(size))
    if isinstance(recipe, TDMConfig):  # the fake score's loss on held-out prompts
        flop += math.ceil(e.prompts / gpus) * (walked(recipe, 1) + 1) * cost.forward(size)
    return Work(flop, images * len(forwards))


def teacher_images(recipe: Recipe, cost: Cost, gpus: int) -> Work:
    """What tdm and mopd draw once, before their first step; nothing in other methods."""
    if isinstance(recipe, MOPDConfig):  # the base and each teacher
        images, scales = _images(recipe, gpus), [0.0, *(teacher.guidance for teacher in recipe.teachers.values())]
        forwards = recipe.eval.steps * sum(2 if scale else 1 for scale in scales)
        return Work(images * forwards * cost.forward(sizes(recipe)[0]), images * len(scales))
    if not isinstance(recipe, TDMConfig):
        return Work(0.0)
    images = _images(recipe, gpus)
    forwards = recipe.eval.steps * (2 if recipe.teacher.guidance else 1)
    return Work(images * forwards * cost.reference(sizes(recipe)[0]), images)


def evaluations(recipe: Recipe) -> int:
    """One before the first step and one after the last, at least."""
    return 2 + ((recipe.steps - 1) // recipe.eval.every if recipe.eval.every else 0)


def sizes(recipe: Recipe) -> list[list[int]]:
    """Raises UserError if the size of the images is not known."""
    found = recipe.image_sizes()
    if not found:
        raise UserError("pairs.size: is null, so the size of the images is not known; set it in the recipe")
    return found


def _images(recipe: Recipe, gpus: int) -> int:
    """Images that one GPU draws in an evaluation with each setting."""
    e = recipe.eval
    return math.ceil(e.prompts / gpus) + math.ceil(min(e.groups, e.prompts) * e.group_size / gpus)
