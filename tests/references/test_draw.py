"""Drawing with references: strengths, mixes, guidance; on a tiny K2 of the real classes."""

import math

import pytest
import torch

import posttrain
from posttrain.errors import UserError
from posttrain.model import sampler
from posttrain.model.k2 import K2, Text
from posttrain.model.references import KAPPA, References
from posttrain.references.draw import Shown, draw
from tests.helpers import style_runs, tiny


@pytest.fixture(scope="module")
def k2():
    made = K2.random("cpu", torch.float32, "tiny", text=False)
    made.add_role("policy", 4, 4.0)
    for parameter in made.role_parameters("policy"):
        torch.nn.init.normal_(parameter, std=0.1)
    return made


def shown(k2, strengths, how="attention", null="none", order=(0, 1)):
    generator = torch.Generator().manual_seed(3)
    grids = ((2, 2), (1, 3))
    latents = [torch.randn(1, rows * columns, k2.latent_channels, generator=generator) for rows, columns in grids]
    chosen = order[: len(strengths)]
    own = References(tuple(latents[i] for i in chosen), tuple(grids[i] for i in chosen))
    return Shown(own, tuple(strengths), how, null)


def image(k2, given, guidance=0.0, steps=1):
    """The latents, of one step: then they are linear in the velocity."""
    side, noise = k2.pixel_multiple, sampler.noise([5], (4, k2.latent_channels))
    text, null = (Text.of([k2.fuse(k2.random_features(4, seed))]) for seed in (0, 1))
    with k2.role("policy"):
        if given is None:
            return k2.sample(text, noise, steps, 2 * side, 2 * side, guidance, null)
        return draw(k2, text, noise, steps, 2 * side, 2 * side, given, guidance, null)


@pytest.mark.parametrize("how", ["attention", "velocity"])
def test_strength_zero_is_no_reference_bit_for_bit(k2, how):
    for guidance in (0.0, 1.5):
        plain = image(k2, None, guidance, steps=3)
        assert torch.equal(image(k2, shown(k2, [0.0], how), guidance, 3), plain)
        assert torch.equal(image(k2, shown(k2, [0.0, 0.0], how), guidance, 3), plain)
        assert not torch.equal(image(k2, shown(k2, [1.0], how), guidance, 3), plain)


def test_a_reference_keeps_its_place_where_another_has_no_strength(k2):
    second = image(k2, shown(k2, [0.0, 1.0]))
    almost = image(k2, shown(k2, [1e-6, 1.0]))
    assert torch.allclose(second, almost, atol=1e-5)
    assert (second - image(k2, shown(k2, [1.0], order=(1,)))).abs().max() > 1e-4


def test_velocity_is_linear(k2):
    """Check 4: c = c_0 + sum s_i (c_i - c_0), and guidance afterwards."""
    base, both = image(k2, None), [image(k2, shown(k2, s, "velocity")) for s in ([1.0, 0.0], [0.0, 1.0])]
    for a, b in ((-1.0, 0.0), (0.5, 0.5), (2.0, -1.5)):
        expected = base + a * (both[0] - base) + b * (both[1] - base)
        assert torch.allclose(image(k2, shown(k2, [a, b], "velocity")), expected, atol=2e-5)


def test_check_4():
    c_0, c_a, c_b = 0.2, 0.6, -0.4
    one = [c_0 + s * (c_a - c_0) for s in (-1, 0.5, 2)]
    assert one == pytest.approx([-0.2, 0.4, 1.0])
    mixed = c_0 + 0.5 * (c_a - c_0) + 0.5 * (c_b - c_0)
    guided = sampler.guide(torch.tensor(mixed), torch.tensor(0.0), 1.5)
    assert mixed == pytest.approx(0.1) and float(guided) == pytest.approx(0.25)


def test_attention_takes_the_user_s_strength_to_a_power(k2):
    """Half a strength is a quarter of the odds."""
    by_hand = shown(k2, [1.0])
    strength = torch.tensor([[0.5**KAPPA]])
    side, noise = k2.pixel_multiple, sampler.noise([5], (4, k2.latent_channels))
    with k2.role("policy"), torch.no_grad():
        text = Text.of([k2.fuse(k2.random_features(4, 0))])
        x = noise
        times = sampler.schedule(1, k2.mu(2 * side, 2 * side))
        v = k2.velocity(x, times[0], text, 2 * side, 2 * side, shown=by_hand.references.at(strength))
    expected = sampler.ode_step(x, v, times[0], times[1])
    assert torch.allclose(image(k2, shown(k2, [0.5])), expected, atol=1e-5)


def test_guidance_with_and_without_references(k2):
    apart, same = (image(k2, shown(k2, [1.0], null=null), 1.5) for null in ("none", "same"))
    assert (apart - same).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("strengths", "how", "says"),
    [
        ([1.0, 1.0, 1.0], "attention", "2 images and 3 strengths"),
        ([1.5], "attention", "must lie in 0 to 1"),
        ([-0.5], "attention", "use --strength velocity"),
        ([math.nan], "attention", "must lie in 0 to 1"),
        ([5.0], "velocity", "at most 4"),
        ([math.nan], "velocity", "at most 4"),
    ],
)
def test_bad_strengths(k2, strengths, how, says):
    with pytest.raises(UserError, match=says):
        shown(k2, strengths, how)


def test_the_library_draws_with_references(model):
    """As `posttrain sample` does; at strength 0 as without any."""
    k2 = posttrain.load_model(model)
    shown, settings = style_runs.image(1), {"size": (32, 32), "steps": 3, "guidance": 1.0}
    none = posttrain.draw(k2, tiny.PROMPTS[:3], **settings)
    zero = posttrain.draw(k2, tiny.PROMPTS[:3], references=[(shown, 0.0)], **settings)
    assert [image.tobytes() for image in zero] == [image.tobytes() for image in none]
    one = posttrain.draw(k2, tiny.PROMPTS[:3], references=[(shown, 1.0)], **settings, micro_batch=2)
    assert all(a.tobytes() != b.tobytes() for a, b in zip(one, none))
    with pytest.raises(UserError, match="must lie in 0 to 1"):
        posttrain.draw(k2, tiny.PROMPTS[:1], references=[(shown, 2.0)], **settings)
