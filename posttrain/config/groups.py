"""What the recipes of methods have in common that learn from rewards of groups of images. Never imports torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import field
from typing import Annotated, Literal

from pydantic import model_validator

from posttrain.config import metric_names
from posttrain.config.rewards import measured
from posttrain.config.sections import PromptsConfig, Rewards, TrainingConfig
from posttrain.config.types import AtLeast0, AtLeast1, Filled, Range, keyword_settings, refusal, settings
from prompts.pool import PoolConfig
from rewards.base import RewardSpec


@settings
class GroupsConfig:
    """How many images a training step draws, over all processes together."""

    prompts_per_step: AtLeast1 = 8
    """Prompts (groups) in a training step; need not divide by the number of processes."""
    group_size: Annotated[int, Range(2, why="but images are compared within a group")] = 16
    """Images of one prompt that are compared with each other."""
    micro_batch: AtLeast1 = 8
    """Images in one forward of the model; sets memory, not the result."""
    flat: Literal["skip", "kl"] = "skip"
    """Groups whose images score alike, so that they have no advantages. skip: they are not trained on. kl: on the
    distance to the reference alone."""


@settings
class RolloutConfig:
    """In which precision a step's images are drawn."""

    quantize: Literal["fp8"] | None = None
    """fp8: images are drawn with a copy of the base in fp8, through torchao: more images a second, half of the base's
    memory more. What trains is exact: grpo's log-probs are those of the exact policy, and `rollout_gap` says how far
    the drawn velocities are from its own."""


@keyword_settings
class GroupTrainingConfig(TrainingConfig, ABC):
    """A method that draws groups of images, scores them and learns from their advantages."""

    prompts: PromptsConfig
    rewards: Annotated[Rewards, Filled("name at least one reward to train on")]
    """Rewards to train on, each with name, function, weight, heldout_only."""
    steps: AtLeast1 = 200
    """Training steps: each draws images, scores them and updates."""
    idle_steps: AtLeast0 = 50
    """Steps in a row from which nothing could be learnt, as no image could be scored or the images of each group score
    alike, after which the run ends; 5 are warned of. 0: never."""
    advantages: Literal["gdpo", "sum"] = "gdpo"
    """gdpo: normalise each reward in its group, then weigh, then normalise over the batch.
    sum: weigh, then normalise in the group."""
    groups: GroupsConfig = field(default_factory=GroupsConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    pool: PoolConfig = field(default_factory=PoolConfig)

    def images_at_once(self) -> int:
        return self.groups.micro_batch

    @abstractmethod
    def max_advantage(self) -> float:
        """Advantages are clipped to plus or minus this."""

    def suffixes(self) -> list[str]:
        """Of the names of an evaluation's metrics, one for each setting that it draws with."""
        return [metric_names.suffix(scale) for scale in self.eval.guidance]

    def metric_names(self) -> list[str]:
        rewards = measured(self.rewards, self.eval.groups)
        found: list[str] = []
        for suffix in self.suffixes():
            # Guidance 0 has no suffix of its own, so these are the bare names.
            found += [name + suffix for name in metric_names.names(rewards, [0.0], self.eval.groups)]
        return found

    @model_validator(mode="after")
    def _quantize_fits(self) -> GroupTrainingConfig:
        if self.rollout.quantize is None:
            return self
        why = None
        if self.model.dtype != "bfloat16":
            why = f"multiplies in bfloat16, and model.dtype is {self.model.dtype}; change it"
        elif self.model.quantize is not None:
            why = "is what model.quantize does for training as well; leave one of them out"
        elif self.lora is None:
            why = "keeps a copy of weights that stay as they are, and lora is null; use one of the two"
        if why is not None:
            raise refusal("rollout.quantize", f"fp8 {why}")
        return self

    @model_validator(mode="after")
    def _rewards_fit(self) -> GroupTrainingConfig:
        trained = [reward for reward in self.rewards if not reward.heldout_only]
        # A gate multiplies or masks what the others say, and says nothing itself.
        weights = [reward.weight for reward in trained if reward.gate == "none"]
        if sum(weights) <= 0:
            raise refusal(
                "rewards", "the weights of the trained rewards, gates aside, sum to zero; give one a weight above 0"
            )
        self._refuse_trained_metrics(trained)
        return self

    def _refuse_trained_metrics(self, trained: list[RewardSpec]) -> None:
        """What is trained on rises while it is being cheated, so it can neither pick a step nor end a run."""
        chosen = {"eval.best": self.eval.best, "eval.stop.metric": self.eval.stop.metric}
        for reward in self.rewards:
            # The same function under another name is trained on as well.
            alike = next((other.name for other in trained if other.function == reward.function), None)
            if alike is None:
                continue
            own = [reward.name + suffix for suffix in self.suffixes()]
            how = "is trained on" if reward in trained else f"is the same function as '{alike}', which is trained on"
            for setting, name in chosen.items():
                if name in own:
                    raise refusal(
                        setting,
                        f"'{name}' {how}, so it rises while it is being cheated; name a reward with heldout_only:"
                        " true, best a judge of another model family, or a metric such as image/diversity",
                    )
