"""A method of one's own: reward-weighted regression, K2 learns from its own images, and most from the best of them.

    python examples/reward_weighted_regression.py --output runs/rwr      # a minute on a CPU; --resume carries on
    posttrain export --source runs/rwr --output out/rwr.safetensors --format lora

Each step draws a group of images for some prompts, and weighs an image by the softmax of its reward in the group. The
loss is the rectified-flow loss of Krea 2's own training, with these weights.
"""

import argparse
from dataclasses import dataclass

import torch
from torch import Tensor

import posttrain as pt
from posttrain.nano.world import oracles


@dataclass
class RWRConfig(pt.MethodConfig):
    temperature: float = 0.1  # in units of the reward: small, and only the best image of a group counts
    draw_steps: int = 8


# ---- the method -----------------------------------------------------------------------------------------------


def train(config: RWRConfig, resume: bool = False) -> None:
    height, width = config.size
    count = config.groups.group_size
    with pt.open_method("rwr", config, resume) as run:
        k2 = run.k2
        for step in run.steps():
            rewards, losses = [], []
            for place, record in enumerate(run.prompts(step)):
                text = run.text(record)
                with k2.role(pt.POLICY):
                    x0 = k2.sample(text, run.noise(step, place, 0, count=count), config.draw_steps, height, width)
                scores = run.score(pt.to_pil(k2.decode(x0, height, width)), [record] * count, count)
                reward = pt.total(scores)
                # An image without a score teaches nothing, and neither does a group in which none has one.
                weights = torch.softmax((reward / config.temperature).nan_to_num(-torch.inf), 0).nan_to_num(0)
                eps, other = (run.noise(step, place, use, count=count).to(x0) for use in (1, 2))
                with k2.role(pt.POLICY):
                    loss = flow_loss(k2, x0, eps, other[:, 0, 0], text, config.size)
                    (loss @ weights.to(loss)).backward()
                rewards.append(reward)
                losses.append(loss.detach())
            norm = run.stepper.step()
            run.log(step, {"reward": torch.cat(rewards).nanmean(), "loss": torch.cat(losses).mean(), "grad_norm": norm})


def flow_loss(k2: pt.K2, x0: Tensor, eps: Tensor, n: Tensor, text: pt.Text, size: list[int]) -> Tensor:
    """(B,) squared distance of the velocity from its target, at logit-normal times of n, (B,) standard normal."""
    t = pt.sampler.logit_normal(n, mean=0.0, std=1.0, mu=k2.mu(*size))
    v = k2.velocity(pt.sampler.noised(x0, eps, t), t, text, *size)
    return (v - pt.sampler.velocity_target(x0, eps)).square().mean((1, 2))


# ---- its settings on K2-nano ----------------------------------------------------------------------------------


def nano_config(output: str, steps: int) -> RWRConfig:
    return RWRConfig(
        output=output,
        model=pt.ModelConfig(str(pt.NANO), dtype="float32"),
        prompts=pt.PromptsConfig("prompts/nano/train.jsonl", "prompts/nano/heldout.jsonl", max_tokens=64),
        rewards=[pt.RewardSpec("graded", oracles.graded), pt.RewardSpec("oracle", oracles.rubric, heldout_only=True)],
        steps=steps,
        size=[64, 64],
        lora=pt.LoraConfig(rank=8, alpha=8.0),
        groups=pt.GroupsConfig(prompts_per_step=2, group_size=4, micro_batch=8),
        optim=pt.OptimConfig(lr=1e-3),
        eval=pt.EvalConfig(every=0, prompts=8, steps=8, groups=0),
        checkpoint=pt.CheckpointConfig(every=1),
        track=pt.TrackConfig(tensorboard=False),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Reward-weighted regression on K2-nano.")
    parser.add_argument("--output", default="runs/rwr")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    train(nano_config(options.output, options.steps), options.resume)
