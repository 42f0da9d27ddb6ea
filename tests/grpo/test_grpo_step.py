"""Single steps of GRPO on a tiny real K2 against autograd, what they are drawn from, and averages of the weights."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from posttrain.config.sections import OptimConfig
from posttrain.distributed.processes import Processes
from posttrain.grpo import train as grpo
from posttrain.grpo import update
from posttrain.model import sampler
from posttrain.model.k2 import K2
from posttrain.model.sampler import sde_moments
from posttrain.training.prompt_source import PromptSource, in_turn
from posttrain.training.stepper import Stepper
from prompts.records import read_prompts
from rewards.background import ScoreQueue
from rewards.base import RewardSpec, Scores
from rewards.load import load_rewards
from tests.helpers import runs


@pytest.fixture
def config(tmp_path, model):
    return runs.config(tmp_path, model)


@pytest.fixture
def one_step(config, model):
    """A policy that differs from the base, and a function that samples and scores a step's groups."""
    k2 = K2.load(model)
    k2.add_role("policy", 4, 8.0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in k2.role_named_parameters("policy").items():
            if "lora_B" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    parameters = k2.train_role("policy")
    source = PromptSource(config, read_prompts(config.prompts.train))

    def draw(step=1):
        with ScoreQueue(load_rewards(config.rewards), config.groups.group_size) as queue:
            groups = grpo.sample(k2, config, step, source, queue, Processes(), config.groups.micro_batch)
            advantages_PG, _ = grpo.score(config, queue.gather())
        return groups, advantages_PG

    def gradient(groups, advantages_PG):
        """What one update would follow, flat; nothing is changed."""
        stepper = Stepper(parameters, config.optim)
        seen = []
        stepper.step = lambda: seen.append(torch.cat([p.grad.flatten() for p in parameters])) or 0.0  # type: ignore
        metrics = grpo.optimise(k2, config, groups, advantages_PG, stepper, Processes(), config.groups.micro_batch)
        for parameter in parameters:
            parameter.grad = None
        return seen[0], metrics

    return k2, parameters, draw, gradient


@pytest.mark.parametrize("ratio", ["plain", "guard"])
@pytest.mark.parametrize("window", [2, None])
def test_gradient_of_a_step(config, one_step, ratio, window):
    """-mean over images and SDE steps of A grad log p; GRPO-Guard: times S / delta over the mean 1 / delta of all steps
    but the last."""
    k2, parameters, draw, gradient = one_step
    config.loss.ratio, config.loss.kl, config.sampling.window = ratio, 0.0, window
    config.sampling.sizes = [[32, 32], [16, 48]]
    groups, advantages_PG = draw()
    got, metrics = gradient(groups, advantages_PG)
    assert metrics["ratio_error"] <= 1e-5

    terms = []
    for group in groups:
        moves = group.trajectory.transitions
        assert len(moves) == (window or 3)
        # Shared by the group up to a window, each image's own where all steps are stochastic.
        assert [len(move.x) for move in moves] == ([1, 4] if window else [4, 4, 4])
        times = sampler.schedule(4, k2.mu(*group.size))
        inverse = 1 / (times[:3] - times[1:4])
        for move in moves:
            weight = inverse[move.index] / inverse.mean()
            with k2.role("policy"):
                x = move.x.expand_as(move.x_next)  # a forward of each image, also where one stands for all
                v = k2.velocity(x, move.t, group.text, *group.size)
                mean, std = sde_moments(x, v, move.t, move.t_next, "flow", config.sampling.eta, times[1])
            factor = weight * std if ratio == "guard" else 1.0
            terms.append(factor * advantages_PG[group.index] * sampler.log_prob(move.x_next, mean, std))
    loss = -torch.cat(terms).mean()
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
    assert (got - expected).norm() < 1e-4 * expected.norm() and expected.norm() > 0


@pytest.mark.parametrize("ratio", ["plain", "guard"])
def test_a_shared_step_has_the_gradient_of_its_images(config, one_step, ratio):
    """One backward with the sum of the weights is that of each image, also where the policy has moved and some are
    clipped, and with the KL."""
    _, parameters, draw, gradient = one_step
    config.loss.ratio, config.loss.kl = ratio, 0.1
    groups, advantages_PG = draw()
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=1e-2)
    once, metrics = gradient(groups, advantages_PG)
    for group in groups:
        group.trajectory.transitions = [
            replace(move, x=move.x.expand_as(move.x_next), mean=move.mean.expand_as(move.x_next))
            for move in group.trajectory.transitions
        ]
    each, expected = gradient(groups, advantages_PG)
    assert (once - each).norm() < 1e-5 * each.norm() and each.norm() > 0
    assert metrics["clip_low"] + metrics["clip_high"] > 0
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-3, abs=1e-6), name


def test_forwards_of_an_update(config, one_step, monkeypatch):
    """A step that images share has one forward of the policy and one of the reference. The reference stays the same, so
    later passes do not ask it again; their gradient is what it would be if they did."""
    k2, parameters, draw, _ = one_step
    config.loss.kl, config.optim.passes = 0.1, 2
    groups, advantages_PG = draw()
    asked: list[tuple[str | None, int]] = []
    velocity = K2.velocity

    def noted(self, x, *rest):
        asked.append((self.active, len(x)))
        return velocity(self, x, *rest)

    def gradient(references):
        update.gradient(k2, config, groups, advantages_PG, Processes(), 3, True, references)
        found = torch.cat([p.grad.flatten() for p in parameters])
        for parameter in parameters:
            parameter.grad = None
        return found

    monkeypatch.setattr(K2, "velocity", noted)
    references: update.References = {}
    first, second, alone = gradient(references), gradient(references), gradient(None)
    policy, reference = [("policy", 1), ("policy", 3), ("policy", 1)], [(None, 1), (None, 3), (None, 1)]
    both = [call for pair in zip(policy, reference) for call in pair]
    assert asked == 2 * both + 2 * policy + 2 * both  # of two groups
    assert torch.equal(first, second) and torch.equal(first, alone) and first.norm() > 0


def test_gradient_does_not_depend_on_the_micro_batch(config, one_step):
    _, _, draw, gradient = one_step
    drawn = draw()
    gradients = []
    for micro_batch in (4, 3, 1):
        config.groups.micro_batch = micro_batch
        gradients.append(gradient(*drawn)[0])
    for other in gradients[1:]:
        assert (other - gradients[0]).norm() < 1e-4 * gradients[0].norm()


@pytest.mark.parametrize("ratio", ["plain", "guard"])
def test_kl_pulls_towards_the_base(config, one_step, ratio):
    """Without advantages the step follows the squared velocity distance to the adapter-free model alone; GRPO-Guard's
    weight of a step is that of its distance too."""
    k2, parameters, draw, gradient = one_step
    config.loss.kl, config.loss.ratio = 0.5, ratio
    groups, _ = draw()
    got, metrics = gradient(groups, torch.zeros(2, 4))
    terms, weights = [], []
    for group in groups:
        guard = sampler.guard_weights(sampler.schedule(4, k2.mu(*group.size)), "flow", config.sampling.eta)
        for move in group.trajectory.transitions:
            weights += 4 * [guard[move.index] if ratio == "guard" else torch.tensor(1.0)]
            x = move.x.expand_as(move.x_next)
            with k2.role("policy"):
                v = k2.velocity(x, move.t, group.text, *group.size)
            with torch.no_grad(), k2.role(None):
                reference = k2.velocity(x, move.t, group.text, *group.size)
            terms.append((v - reference).square().flatten(1).mean(1))
    kl, weighted = torch.cat(terms).mean(), (torch.stack(weights) * torch.cat(terms)).mean()
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(0.5 * weighted, parameters)])
    assert (got - expected).norm() < 1e-4 * expected.norm() and expected.norm() > 0
    assert metrics["kl"] == pytest.approx(kl.item(), rel=1e-4) and metrics["kl"] > 1e-4


def test_a_step_is_drawn_from_its_number_alone(config, one_step):
    _, _, draw, _ = one_step
    config.sampling.window_start = 0  # the first transition begins at the noise itself
    first, other = draw(3), draw(4)
    torch.manual_seed(5)
    again = draw(3)
    for a, b in zip(first[0], again[0]):
        assert a.record == b.record and torch.equal(a.trajectory.latents, b.trajectory.latents)
    assert torch.equal(first[1], again[1])
    config.seed = 1
    starts = [group.trajectory.transitions[0].x[0] for groups, _ in (first, other, draw(3)) for group in groups]
    assert len({tuple(start.flatten().tolist()) for start in starts}) == 6  # two groups in each of three steps


def test_prompts_come_once_each_before_any_comes_twice():
    order = [in_turn(0, i, 7) for i in range(21)]
    epochs = [order[:7], order[7:14], order[14:]]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert order != [in_turn(1, i, 7) for i in range(21)]


@pytest.mark.parametrize(("steps", "window", "starts"), [(8, 2, 4), (10, 2, 5), (4, 3, 1), (4, 2, 2), (2, 1, 1)])
def test_windows_lie_in_the_first_half(config, steps, window, starts):
    config.sampling.steps, config.sampling.window = steps, window
    windows = [grpo.window_of(config, step) for step in range(1, 60)]
    assert {w.start for w in windows} == set(range(starts))
    assert all(len(w) == window and w.stop <= steps - 1 for w in windows)
    config.sampling.window_start, config.sampling.window_every = "sliding", 3
    slid = [grpo.window_of(config, step).start for step in range(1, 3 * starts + 4)]
    assert slid == [i for i in [*range(starts), 0] for _ in range(3)]
    config.sampling.window_start = 0
    assert grpo.window_of(config, 9) == range(window)
    config.sampling.window = None
    assert grpo.window_of(config, 9) == range(steps - 1)


def test_a_reward_without_scores_does_not_lower_the_mean(config):
    """Two prompts of which none asks for a text: the mean reward is the other's, not half of it."""
    config.rewards.append(RewardSpec("text", "tests.helpers.runs:nothing"))
    values, valid = np.array([[0.6, 0.0], [0.8, 0.0]] * 4), np.array([[True, False]] * 8)
    scores = Scores(["brightness", "text"], values, valid, np.zeros_like(valid), {}, {}, {})
    advantages_PG, metrics = grpo.score(config, scores)
    assert metrics["reward"] == pytest.approx(0.7) and metrics["reward/text"] is None
    assert metrics["missing"] == 0 and metrics["flat_groups"] == 0
    expected = [-1.0, 1.0] * 2
    for advantages_G in advantages_PG:
        assert [a > 0 for a in advantages_G.tolist()] == [e > 0 for e in expected]
    assert all(a == b for a, b in itertools.pairwise(advantages_G.tolist()[::2] for advantages_G in advantages_PG))


def test_average_of_the_weights():
    """a += (1 - d)(p - a), d = min(ema, (1 + n) / (10 + n)); inside the block the parameters are the average."""
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    stepper = Stepper([parameter], OptimConfig(lr=0.1, ema=0.2))
    expected = parameter.detach().clone()
    for n in range(1, 5):
        parameter.grad = torch.tensor([1.0, float(n)])
        stepper.step()
        decay = [2 / 11, 0.2, 0.2, 0.2][n - 1]
        expected = decay * expected + (1 - decay) * parameter.detach()
    live = parameter.detach().clone()
    with pytest.raises(RuntimeError), stepper.averaged():
        torch.testing.assert_close(parameter.detach(), expected)
        raise RuntimeError
    assert torch.equal(parameter, live) and not torch.equal(live, expected)


def test_average_of_many_updates():
    """Self-check 34: from 0 towards 1 at decay .99, 100 updates: 1 - .99^100 = .633968."""
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    stepper = Stepper([parameter], OptimConfig(weight_decay=0.0, ema=0.99))
    stepper.restore_counters({"updates": 10_000, "skipped": 0, "skipped_in_a_row": 0})  # the quick beginning is over
    with torch.no_grad():
        parameter.fill_(1.0)
    for _ in range(100):
        parameter.grad = torch.zeros_like(parameter)
        stepper.step()
    with stepper.averaged():
        assert parameter.item() == pytest.approx(0.633968, abs=5e-7)


def test_the_rate_falls_at_the_end(config, monkeypatch):
    """Of four steps the last two cool down: shares 1, 1, 2/3 and 1/3 of the rate."""
    step, rates = Stepper.step, []

    def watched(self):
        norm = step(self)
        rates.append(self.optimizer.param_groups[0]["lr"])
        return norm

    monkeypatch.setattr(Stepper, "step", watched)
    config.steps, config.optim.lr, config.optim.cooldown_steps = 4, 3e-3, 2
    grpo.train(config)
    assert rates == pytest.approx([3e-3, 3e-3, 2e-3, 1e-3])
