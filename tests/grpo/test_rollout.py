"""Rollouts of a tiny real K2: what is stored is what was sampled, and noise comes from seeds alone."""

import pytest
import torch

from posttrain.grpo.rollout import rollout
from posttrain.model import sampler
from posttrain.model.k2 import K2
from tests.helpers import tiny

HEIGHT, WIDTH = 32, 24
STEPS = 5
ETA = {"flow": 0.7, "dance": 0.5, "cps": 0.7}


@pytest.fixture(scope="module")
def k2(tmp_path_factory):
    """With an adapter that does something, active throughout."""
    model = K2.load(tiny.save(tmp_path_factory.mktemp("tiny") / "raw"))
    model.add_role("policy", rank=4, alpha=8)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.role_named_parameters("policy").items():
            if "lora_B" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    with model.role("policy"):
        yield model


@pytest.fixture(scope="module")
def text(k2):
    return k2.text([tiny.PROMPTS[1]])


@pytest.fixture(scope="module")
def times(k2):
    return sampler.schedule(STEPS, k2.mu(HEIGHT, WIDTH))


def seeds_for(group, window, run=0):
    return [[sampler.seed_for(run, g, i) for i in range(len(window) + 1)] for g in range(group)]


@pytest.fixture
def draw(k2, text, times):
    """A function that samples a group of four, with whatever is to be different."""

    def call(window=range(1, 3), dynamics="flow", eta=0.7, micro_batch=4, shared=True, group=4, seeds=None):
        seeds = seeds_for(group, window) if seeds is None else seeds
        return rollout(k2, text, seeds, times, window, dynamics, eta, HEIGHT, WIDTH, micro_batch, shared)

    return call


def distance(a, b):
    return (a - b).abs().max().item()


def same(a, b):
    fields = ("t", "t_next", "x", "x_next", "mean", "std", "log_prob")
    return torch.equal(a.latents, b.latents) and all(
        torch.equal(getattr(p, f), getattr(q, f))
        for p, q in zip(a.transitions, b.transitions, strict=True)
        for f in fields
    )


@pytest.mark.parametrize("dynamics", ETA)
@pytest.mark.parametrize("window", [range(1, 3), range(STEPS - 1)])
def test_ratio_is_one_before_the_first_update(k2, text, times, draw, dynamics, window):
    """Recomputed from the stored steps as training does it, with the same micro-batch and with another."""
    eta = ETA[dynamics]
    trajectory = draw(window, dynamics, eta, micro_batch=2)
    assert [move.index for move in trajectory.transitions] == list(window)
    for move in trajectory.transitions:
        assert move.std > 0
        assert all(value.dtype == torch.float32 for value in (move.x, move.x_next, move.mean, move.log_prob))
        for micro_batch, tolerance in ((2, 0.0), (3, 1e-5)):
            for _, part in move.parts(micro_batch):
                v = k2.velocity(part.x, part.t, text, HEIGHT, WIDTH)
                mean, std = sampler.sde_moments(part.x, v, part.t, part.t_next, dynamics, eta, times[1])
                plain = sampler.log_prob(part.x_next, mean, std) - part.log_prob
                guard = sampler.guard_log_ratio(part.x_next, part.mean, mean, std)
                assert (plain.exp() - 1).abs().max() <= tolerance
                assert (guard.exp() - 1).abs().max() <= tolerance
                assert torch.equal(std, move.std)


def test_another_policy_has_another_ratio(k2, text, times, draw):
    (move,) = draw(range(1, 2)).transitions
    with k2.role(None):
        v = k2.velocity(move.x, move.t, text, HEIGHT, WIDTH)
    mean, std = sampler.sde_moments(move.x, v, move.t, move.t_next, "flow", 0.7, times[1])
    assert (sampler.log_prob(move.x_next, mean, std) - move.log_prob).exp().sub(1).abs().max() > 1e-3


@pytest.mark.parametrize("window", [range(1, 3), range(2, 4), range(STEPS - 1)])
def test_each_step_begins_where_the_last_one_ended(k2, text, times, draw, window):
    """The whole trajectory walked again from its stored steps; outside the window, the last step included, by ODE."""
    trajectory = draw(window, shared=False)
    x = sampler.noise([s[0] for s in seeds_for(4, window)], (12, 64))
    moves = {move.index: move for move in trajectory.transitions}
    for i in range(STEPS):
        if i in moves:
            assert torch.equal(moves[i].x, x) and (moves[i].t, moves[i].t_next) == (times[i], times[i + 1])
            x = moves[i].x_next
        else:
            x = sampler.ode_step(x, k2.velocity(x, times[i], text, HEIGHT, WIDTH), times[i], times[i + 1])
    assert STEPS - 1 not in moves and torch.equal(trajectory.latents, x)


@pytest.mark.parametrize("dynamics", ETA)
def test_a_step_is_its_mean_and_the_noise_of_its_seed(draw, dynamics):
    window = range(1, 3)
    trajectory = draw(window, dynamics, ETA[dynamics])
    for i, move in enumerate(trajectory.transitions):
        z = sampler.noise([s[1 + i] for s in seeds_for(4, window)], (12, 64))
        assert torch.equal(move.x_next, move.mean + move.std * z)
        expected = torch.distributions.Normal(move.mean, move.std).log_prob(move.x_next).flatten(1).mean(1)
        assert distance(move.log_prob, expected) < 1e-5


def test_noise_does_not_depend_on_the_batch(draw):
    """Neither on the micro-batch nor on the other images of the group."""
    window = range(0, 2)
    whole = draw(window, shared=False)
    for other in (draw(window, shared=False, micro_batch=1), draw(window, shared=False, micro_batch=3)):
        for a, b in zip(whole.transitions, other.transitions):
            assert distance(a.x_next - a.mean, b.x_next - b.mean) < 1e-5
            assert distance(a.x_next, b.x_next) < 1e-4
        assert distance(whole.latents, other.latents) < 1e-4
    alone = draw(window, shared=False, seeds=seeds_for(4, window)[2:3])
    assert alone.latents.shape == (1, 12, 64)
    assert distance(alone.latents, whole.latents[2:3]) < 1e-4


def test_shared_prefix_equals_unshared_steps_from_the_same_noise(draw):
    window = range(2, 4)
    seeds = [[7, *rest] for _, *rest in seeds_for(4, window)]
    shared, unshared = (draw(window, seeds=seeds, shared=s) for s in (True, False))
    assert distance(shared.latents, unshared.latents) < 1e-4
    for a, b in zip(shared.transitions, unshared.transitions, strict=True):
        assert a.x_next.shape == b.x.shape == b.x_next.shape == (4, 12, 64)
        assert distance(a.x, b.x) < 1e-4 and distance(a.x_next, b.x_next) < 1e-4
        assert distance(a.log_prob, b.log_prob) < 1e-4
    assert [len(move.x) for move in shared.transitions] == [1, 4]  # the first begins where all of them are
    assert distance(shared.latents[0], shared.latents[1]) > 0.1  # apart from the window on

    # Only the first image's noise counts when it is shared.
    others = [[7, *seeds[0][1:]], *[[8 + g, *rest] for g, (_, *rest) in enumerate(seeds[1:])]]
    assert torch.equal(draw(window, seeds=others, shared=True).latents, shared.latents)
    assert distance(draw(window, seeds=others, shared=False).latents[1:], shared.latents[1:]) > 0.1


@pytest.mark.parametrize("window", [range(1, 3), range(STEPS - 1)])
def test_parts_are_the_whole_step(draw, window):
    """Each image once, whatever fits into a forward; images that share x are one part."""
    for i, move in enumerate(draw(window).transitions):
        parts = list(move.parts(3))
        assert torch.cat([torch.arange(4)[rows] for rows, _ in parts]).tolist() == [0, 1, 2, 3]
        assert [len(part.x) for _, part in parts] == ([1] if i == 0 else [3, 1])
        assert torch.equal(torch.cat([part.x_next for _, part in parts]), move.x_next)
        assert torch.equal(torch.cat([part.log_prob for _, part in parts]), move.log_prob)


def test_forwards_of_a_group(k2, draw, monkeypatch):
    """One up to and in the window's first step, then one of each image."""
    made, velocity = [], k2.velocity

    def counted(x, *rest):
        made.append(len(x))
        return velocity(x, *rest)

    monkeypatch.setattr(k2, "velocity", counted)
    draw(range(1, 3), micro_batch=3)
    assert made == [1, 1, 3, 1, 3, 1, 3, 1]


def test_the_same_seeds_give_the_same_trajectory(draw):
    torch.manual_seed(1)
    first = draw()
    torch.manual_seed(2)
    assert same(first, draw())
    assert not same(first, draw(seeds=seeds_for(4, range(1, 3), run=1)))


@pytest.mark.parametrize("dynamics", ETA)
def test_little_noise_is_the_ode_sampler(k2, text, draw, dynamics):
    window = range(STEPS - 1)
    trajectory = draw(window, dynamics, eta=1e-6, shared=False)
    noise = sampler.noise([s[0] for s in seeds_for(4, window)], (12, 64))
    expected = k2.sample(text, noise, STEPS, HEIGHT, WIDTH)
    assert distance(trajectory.latents, expected) < 1e-4
    assert distance(draw(window, dynamics, ETA[dynamics], shared=False).latents, expected) > 0.1


@pytest.mark.parametrize("window", [range(2, STEPS), range(STEPS - 1, STEPS), range(2, 2), range(-1, 2), range(4, 9)])
def test_a_window_outside_the_stochastic_steps_is_refused(draw, window):
    """The last step, which goes to t = 0, has no noise that could be trained on."""
    with pytest.raises(ValueError, match="must lie in the first 4 of 5 steps"):
        draw(window)
