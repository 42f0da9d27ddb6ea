"""Reward-weighted finetuning of K2-nano, by the recipe of a GRPO: the plainest arm of posttrain.nano.bench.methods.

    python -m posttrain.nano.bench.reward_weighted --config recipes/nano/demo.yaml --output runs/rwr

Each step draws groups of images as GRPO would, but without stochastic steps, and finetunes on them as `posttrain sft`
would, each image weighted by the softmax of its advantage in its group (reward-weighted regression, Peters and Schaal
2007; for diffusion Lee et al., arXiv:2302.12192). Of the recipe, the settings of stochastic steps and of the loss are
not read. Each image is used at TIMES times, so that a step costs about as many forwards as GRPO's.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

import posttrain as pt
from posttrain.config.load import load_config
from posttrain.sft.losses import flow_loss
from posttrain.training.stepper import Clock

TEMPERATURE = 0.5
"""Of the softmax over a group's advantages, in standard deviations of the group: at 0.5 the best of eight images has
about half of the weight."""
TIMES = 2
"""Noise levels at which each image is learnt in a step."""


def settings(words: Sequence[str]) -> pt.MethodConfig:
    """Those of a method of one's own which a recipe of GRPO has too."""
    config, _ = load_config("grpo", list(words))
    shared = {entry.name for entry in dataclasses.fields(pt.MethodConfig)} - {"size"}
    values = {name: getattr(config, name) for name in shared}
    return pt.MethodConfig(**values, size=list(config.sampling.sizes[0]))


def train(config: pt.MethodConfig, steps: int, resume: bool = False) -> None:
    """`steps` of the sampler for each image."""
    height, width = config.size
    count, clock = config.groups.group_size, Clock()
    with pt.open_method("rwr", config, resume) as run:
        for step in run.steps():
            clock.start()
            records, rewards, losses = run.prompts(step), [], []
            for place, record in enumerate(records):
                text = run.text(record)
                with run.k2.role(pt.POLICY):
                    x0 = run.k2.sample(text, run.noise(step, place, 0, count=count), steps, height, width)
                clock.lap("sample")
                reward = pt.total(run.score(pt.to_pil(run.k2.decode(x0, height, width)), [record] * count, count))
                rewards.append(reward)
                clock.lap("score")
                weights = weights_of(reward).to(x0)
                for use in range(TIMES):
                    noise = run.noise(step, place, 1 + 2 * use, count=count).to(x0)
                    level = run.noise(step, place, 2 + 2 * use, count=count)[:, 0, 0].to(x0)
                    t = pt.sampler.logit_normal(level, mean=0.0, std=1.0, mu=run.k2.mu(height, width))
                    with run.k2.role(pt.POLICY):
                        v = run.k2.velocity(pt.sampler.noised(x0, noise, t), t, text, height, width)
                        loss = flow_loss(v, pt.sampler.velocity_target(x0, noise)) @ weights
                        (loss / (TIMES * len(records))).backward()
                    losses.append(loss.detach())
                clock.lap("optimise")
            norm = run.stepper.step()
            clock.lap("optimise")
            drawn = step * count * len(records)
            facts = {"reward": torch.cat(rewards).nanmean(), "loss": torch.stack(losses).mean(), "grad_norm": norm}
            run.log(step, facts | {"images": drawn} | clock.seconds)


def weights_of(reward: Tensor) -> Tensor:
    """(G,) softmax of the advantages, whose sum is 1; 0 for a missing reward, which is NaN, and for all of a flat
    group, which teaches nothing."""
    known = ~reward.isnan()
    spread = reward[known].std() if known.sum() > 1 else torch.tensor(0.0)
    if spread < 1e-6:
        return torch.zeros_like(reward)
    advantage = (reward - reward[known].mean()) / spread
    return torch.softmax((advantage / TEMPERATURE).nan_to_num(-torch.inf), 0)


def main() -> None:
    words = sys.argv[1:]
    config, resume = load_config("grpo", words)
    train(settings(words), config.sampling.steps, resume)


if __name__ == "__main__":
    main()
