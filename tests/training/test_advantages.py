"""Advantages against arithmetic done by hand, and what must never change them.

Shapes: P prompts, G images of a prompt, K rewards. Where a number is worked out, 1.0001 is 1 + EPSILON.
"""

import functools

import pytest
import torch

from posttrain.training.advantages import FLAT, flat, gdpo, noise_share, standardise, sum_then_normalise

NONE = float("nan")
SCALES = ["group", "batch", "none"]


def table(*groups):
    """rewards_PGK and valid_PGK from groups of rows; NONE is missing. What stands at a missing place is junk."""
    rewards = torch.tensor(groups, dtype=torch.float64)
    valid = ~rewards.isnan()
    return rewards.masked_fill(~valid, -77.0), valid


def weights(*values):
    return torch.tensor(values, dtype=torch.float64)


def random_table(seed, shape=(6, 8, 3), missing=0.0):
    generator = torch.Generator().manual_seed(seed)
    rewards = 10 * torch.randn(shape, generator=generator, dtype=torch.float64)
    return rewards, torch.rand(shape, generator=generator) >= missing


METHODS = {"gdpo": gdpo} | {f"sum-{scale}": functools.partial(sum_then_normalise, scale=scale) for scale in SCALES}


@pytest.fixture(params=METHODS)
def method(request):
    return METHODS[request.param]


def numbers(got):
    assert got.dtype == torch.float64
    return got.flatten().tolist()


def near(*expected):
    return pytest.approx(expected, abs=5e-5)


# worked examples


def test_two_rewards():
    """Reward 1: mean .5, std .57735: +-.5 / (.57735 * 1.0001) = +-.86594. Reward 2: mean .5, std .25820: -+1.16178,
    -+.38726.

    Weighed: .86594 - .5 * 1.16178 = .28505 and .86594 - .5 * .38726 = .67231, with a minus each.
    Over the batch: std = sqrt(2 (.28505^2 + .67231^2) / 3) = .59624, so .28505 / .59624 = .4781.
    """
    rewards, valid = table([(1, 0.2), (0, 0.8), (1, 0.4), (0, 0.6)])
    assert numbers(gdpo(rewards, valid, weights(1, 0.5))) == near(0.47808, -0.47808, 1.12758, -1.12758)
    # Summed: 1.1, .4, 1.2, .3; mean .75, std .46547; .35 / (.46547 * 1.0001) = .75186 and .45 / ... = .96667.
    assert numbers(sum_then_normalise(rewards, valid, weights(1, 0.5))) == near(0.75186, -0.75186, 0.96667, -0.96667)


def test_missing_scores():
    """Reward 1 over three: mean 2/3, std .57735: .57729, -1.15459, .57729. Reward 2 over two: +-.70704.

    Weighed: .57729, -1.15459 + .35352 = -.80107, .57729 - .35352 = .22377. The last image is out; over the
    three others std = sqrt((.33326 + .64171 + .05007) / 2) = .71590.
    """
    rewards, valid = table([(1, NONE), (0, 0.8), (1, 0.4), (NONE, NONE)])
    assert numbers(gdpo(rewards, valid, weights(1, 0.5))) == near(0.80638, -1.11897, 0.31257, 0)


def test_flat_group_beside_another():
    """std of (0, 1, 0, 1) is .57735: -+.86594; over eight rows std = sqrt(4 * .74985 / 7) = .65458."""
    rewards, valid = table([[1], [1], [1], [1]], [[0], [1], [0], [1]])
    assert numbers(gdpo(rewards, valid, weights(1))) == near(0, 0, 0, 0, -1.3229, 1.3229, -1.3229, 1.3229)


def test_collapse_of_the_sum():
    """One reward better, or both: the sum's own spread hides the difference, GDPO keeps it.

    Sum: (0, 1) and (0, 2) each become -+.5/.7071. GDPO weighs -+.707 against -+1.414; over the batch
    std = sqrt(2 (.5 + 2) / 3) = 1.291, so -+.5477 and -+1.0954.
    """
    rewards, valid = table([(0, 0), (0, 1)], [(0, 0), (1, 1)])
    one = sum_then_normalise(rewards, valid, weights(1, 1))
    assert numbers(one) == near(-0.70700, 0.70700, -0.70706, 0.70706)
    assert numbers(gdpo(rewards, valid, weights(1, 1))) == near(-0.5477, 0.5477, -1.0954, 1.0954)


def test_scales_of_the_sum():
    """Two groups, (0, 1) and (0, 3): centred -+.5 and -+1.5, std .70711 and 2.12132, of which the mean is 1.41421."""
    rewards, valid = table([[0], [1]], [[0], [3]])
    one = weights(1)
    assert numbers(sum_then_normalise(rewards, valid, one, "none")) == near(-0.5, 0.5, -1.5, 1.5)
    assert numbers(sum_then_normalise(rewards, valid, one, "group")) == near(-0.70697, 0.70697, -0.70706, 0.70706)
    # std over the batch = sqrt(2 (.25 + 2.25) / 3) = 1.29099
    assert numbers(sum_then_normalise(rewards, valid, one, "batch")) == near(-0.3873, 0.3873, -1.1619, 1.1619)
    assert sum_then_normalise(rewards, valid, one).equal(sum_then_normalise(rewards, valid, one, "group"))


# missing is not zero


def test_missing_counts_as_the_average_of_the_group():
    """In the sum a missing score and the group's average are the same; a zero is not."""
    rewards, valid = table([(1, 0.9), (0, 0.8), (1, NONE), (0, 0.6)], [(0, 0.1), (1, 0.3), (1, 0.5), (1, 0.9)])
    average, zero = rewards.clone(), rewards.clone()
    average[0, 2, 1], zero[0, 2, 1] = (0.9 + 0.8 + 0.6) / 3, 0.0
    for scale in SCALES:
        got = sum_then_normalise(rewards, valid, weights(1, 0.5), scale)
        full = torch.ones_like(valid)
        assert torch.allclose(got, sum_then_normalise(average, full, weights(1, 0.5), scale), atol=1e-12)
        assert (got - sum_then_normalise(zero, full, weights(1, 0.5), scale))[0].abs().max() > 0.05


def test_missing_adds_nothing_in_gdpo():
    """The image without the second score gets what the average image gets from it, 0; and so only the first."""
    rewards, valid = table([(1, 0.9), (0, 0.8), (1, NONE), (0, 0.6)])
    normal = standardise(rewards, valid)
    assert normal[0, 2, 1] == 0
    average = rewards.clone()
    average[0, 2, 1] = (0.9 + 0.8 + 0.6) / 3
    assert standardise(average, torch.ones_like(valid))[0, 2, 1].abs() < 1e-12
    # The others are judged among themselves: as in a group of three.
    three = standardise(rewards[:, [0, 1, 3], 1:], valid[:, [0, 1, 3], 1:])
    assert torch.equal(normal[:, [0, 1, 3], 1:], three)
    zero = rewards.clone()
    zero[0, 2, 1] = 0
    assert standardise(zero, torch.ones_like(valid))[0, 2, 1] < -1


def test_images_without_any_score_are_out(method):
    rewards, valid = random_table(0, missing=0.2)
    valid[:, :2, 0] = True
    wide = torch.cat([rewards, 100 * torch.ones(6, 2, 3)], 1)
    none = torch.cat([valid, torch.zeros(6, 2, 3, dtype=torch.bool)], 1)
    before, after = (method(r, v, weights(1, 2, 0.5)) for r, v in ((rewards, valid), (wide, none)))
    assert torch.allclose(after[:, :8], before, atol=1e-12)
    assert (after[:, 8:] == 0).all() and (before != 0).any()


def test_a_group_without_any_score_changes_no_other(method):
    rewards, valid = random_table(1)
    more = torch.cat([rewards, rewards[:1]]), torch.cat([valid, torch.zeros_like(valid[:1])])
    after = method(*more, weights(1, 1, 1))
    assert torch.allclose(after[:6], method(rewards, valid, weights(1, 1, 1)), atol=1e-12)
    assert (after[6] == 0).all()
    assert (method(rewards, torch.zeros_like(valid), weights(1, 1, 1)) == 0).all()


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), -1e30])
def test_what_stands_at_a_missing_place_does_not_matter(method, junk):
    rewards, valid = random_table(2, missing=0.4)
    valid[0], valid[1, :, 0] = False, False
    got = method(rewards.masked_fill(~valid, junk), valid, weights(1, 1, 1))
    assert got.isfinite().all()
    assert torch.equal(got, method(rewards.masked_fill(~valid, 0), valid, weights(1, 1, 1)))


# flat groups


def test_flat_groups_are_exactly_zero(method):
    """Also beside groups that are not, and where the mean of equal numbers is rounded: (.1 + .1 + .1) / 3 > .1."""
    rewards, valid = random_table(3, (4, 3, 2))
    rewards[0] = 0.1
    rewards[1] = 0.1 + torch.tensor([0, 0.3, 0.9])[:, None] * 0.1 * FLAT
    got = method(rewards, valid, weights(1, 0.7))
    assert (got[:2] == 0).all()
    assert (got[2:].abs() > 1e-3).all()
    assert (method(rewards[:2], valid[:2], weights(1, 0.7)) == 0).all()


def test_a_score_alone_in_its_group_is_flat(method):
    rewards, valid = table([(1, 5), (0, NONE), (1, NONE)])
    without = table([(1, NONE), (0, NONE), (1, NONE)])
    assert torch.equal(method(rewards, valid, weights(1, 1)), method(*without, weights(1, 1)))


def test_flat():
    rewards, valid = table(
        [(1, 0, NONE, 0), (1, 1, NONE, 1), (1, 0, 3, NONE)],
        [(0, 0, NONE, 2), (2e-6, 9e-7, NONE, 2), (0, 0, NONE, NONE)],  # of rewards whose largest values are 1, 1, 3, 2
    )
    assert flat(rewards, valid).tolist() == [[True, False, True, False], [False, True, True, True]]


# noise


def test_floor():
    """(0, .02, 0, .02): std .011547, so with a floor of .02 -+.01 / (.02 * 1.0001) = -+.49995, and with .03 it is flat.
    One of .01 leaves it as it is.

    The second reward has no floor: (0, 1, 1, 0), std .57735: -+.5 / (.57735 * 1.0001) = -+.86594. Weighed -1.36589,
    1.36589, .36599, -.36599; over the batch std = sqrt(2 (1.86566 + .13395) / 3) = 1.15459.
    """
    rewards, valid = table([(0, 0), (0.02, 1), (0, 1), (0.02, 0)])
    small, large = weights(0.02, 0), weights(0.03, 0)
    assert numbers(standardise(rewards, valid, small)[..., 0]) == near(-0.49995, 0.49995, -0.49995, 0.49995)
    assert numbers(gdpo(rewards, valid, weights(1, 1), small)) == near(-1.18301, 1.18301, 0.31699, -0.31699)
    assert torch.equal(standardise(rewards, valid, weights(0.01, 0)), standardise(rewards, valid))
    assert flat(rewards, valid, large).tolist() == [[True, False]]
    alone = table([(NONE, 0), (NONE, 1), (NONE, 1), (NONE, 0)])
    for of_both in (gdpo, sum_then_normalise):
        assert torch.equal(of_both(rewards, valid, weights(1, 1), floor_K=large), of_both(*alone, weights(1, 1)))
    # Summed: (0, 1.02, 1, .02), mean .51, std .57747, floor sqrt(.02^2 + .7^2) = .70029: -+.51 and -+.49 / .70036.
    got = sum_then_normalise(rewards, valid, weights(1, 1), floor_K=weights(0.02, 0.7))
    assert numbers(got) == near(-0.7282, 0.7282, 0.6996, -0.6996)
    # A flat reward brings no floor of its own into the sum: not -+.5 / .70007, but as the second alone.
    got = sum_then_normalise(rewards, valid, weights(1, 1), floor_K=weights(0.7, 0))
    assert numbers(got) == near(-0.86594, 0.86594, 0.86594, -0.86594)


def test_a_floor_of_zero_is_none(method):
    rewards, valid = random_table(9, missing=0.2)
    got = method(rewards, valid, weights(1, 1, 0.3), floor_K=weights(0, 0, 0))
    assert torch.equal(got, method(rewards, valid, weights(1, 1, 0.3)))


@pytest.mark.parametrize("size", [8, 16])
@pytest.mark.parametrize(("noise", "floor"), [(1e-3, 0.01), (2e-3, 0.01), (1e-2, 3 * 3.7e-2)])
def test_noise_of_a_saturated_reward_teaches_nothing(size, noise, floor):
    """The first reward is real, the second .99 with noise. Without a floor its advantages are nearly as large.

    .01 is the least floor, even if nothing was measured: a noise of .002 ranges over .0075 in 20 scores. The range of
    20 scores with a standard deviation of .01 is .037, of which the floor is three times.
    """
    generator = torch.Generator().manual_seed(0)
    real = (torch.rand((256, size), generator=generator) < 0.5).double()
    saturated = 0.99 + noise * torch.randn((256, size), generator=generator, dtype=torch.float64)
    rewards, floors = torch.stack([real, saturated], -1), weights(0, floor)
    valid, one = torch.ones_like(rewards, dtype=torch.bool), weights(1, 1)

    def shares(floor_K):
        """Of the second reward in the variance of both; of groups that have only noise beside those that are real."""
        variance = standardise(rewards, valid, floor_K).square().mean((0, 1))
        alone = torch.cat([rewards[:128, :, :1], rewards[128:, :, 1:]])
        of_one = gdpo(alone, valid[..., :1], weights(1), None if floor_K is None else floor_K[1:]).square().sum(1)
        return float(variance[1] / variance.sum()), float(of_one[128:].sum() / of_one.sum())

    assert standardise(rewards, valid)[..., 1].abs().mean() > 0.65
    assert min(shares(None)) > 0.37 and max(shares(floors)) < 0.03
    measured = weights(0, 3.7 * noise)
    before = noise_share(rewards, valid, one, weights(0, 0), measured)
    after = noise_share(rewards, valid, one, floors, measured)
    assert before == pytest.approx(shares(None)[0], abs=0.1) and after is not None and after < 0.03
    # And what is real is not touched: the same advantages as without the second reward, where all of it is flat.
    apart = gdpo(rewards, valid, one, floors) - gdpo(rewards[..., :1], valid[..., :1], weights(1))
    assert apart.square().mean() < 0.03


def test_noise_share():
    """One group (0, .2, 0, .2): std .11547; with floor .12 advantages -+.1 / .120012, and noise of .04, which has std
    .01, becomes .01 / .120012: (.01 / .1)^2 = .01. Beside it a flat group, which has neither.

    A second reward (0, 1, 0, 1) of the same group, without noise, adds .86594 (std .57735) to .83325: noise
    (.01 / .120012)^2 = .0069430 in 1.69919^2 = 2.88725.
    """
    first, second = table([[0], [0.2], [0], [0.2]], [[0], [0.02], [0], [0.02]]), [(0, 0), (0.2, 1), (0, 0), (0.2, 1)]
    one, floor, noise = weights(1), weights(0.12), weights(0.04)
    assert noise_share(*first, one, floor, noise) == pytest.approx(0.01)
    assert noise_share(*first, one, floor, noise, summed=True) == pytest.approx(0.01)
    assert noise_share(*first, one, weights(0.3), noise) is None  # nothing is left
    assert noise_share(*first, one, floor, 100 * noise) == 1
    both = table(second)
    got = noise_share(*both, weights(1, 1), weights(0.12, 0), weights(0.04, 0))
    assert got == pytest.approx(0.0069430 / 2.88725, rel=1e-4)
    # Summed: (0, 1.2, 0, 1.2), so deviations of .6 beside .01.
    got = noise_share(*both, weights(1, 1), weights(0.03, 0), weights(0.04, 0), summed=True)
    assert got == pytest.approx((0.01 / 0.6) ** 2)


# invariances


def test_gdpo_does_not_see_units():
    """An affine map with a positive factor, another one for each reward in each group, up to EPSILON."""
    rewards, valid = random_table(4, missing=0.2)
    generator = torch.Generator().manual_seed(5)
    factor = 0.5 + 4 * torch.rand(6, 1, 3, generator=generator)
    offset = 100 * torch.randn(6, 1, 3, generator=generator)
    plain, mapped = (gdpo(r, valid, weights(1, 1, 0.3)) for r in (rewards, rewards * factor + offset))
    assert torch.allclose(plain, mapped, atol=1e-3)
    turned = gdpo(rewards * torch.tensor([1.0, 1.0, -1.0]), valid, weights(1, 1, 0.3))
    assert (plain - turned).abs().max() > 0.1


@pytest.mark.parametrize("unit", [3e-5, 1e-12, 1e9])
def test_a_reward_of_any_unit_teaches_the_same(unit):
    """Beside others, with a noise floor in its own units, within groups that are flat; exactly, up to rounding."""
    rewards, valid = random_table(10, missing=0.1)
    rewards[0, :, 0] = 0.25
    scaled = rewards * weights(unit, 1, 1)
    for floor, of_unit in [(None, None), (weights(4, 0, 1), weights(4 * unit, 0, 1))]:
        plain, other = gdpo(rewards, valid, weights(1, 1, 1), floor), gdpo(scaled, valid, weights(1, 1, 1), of_unit)
        assert torch.allclose(plain, other, atol=1e-9)
    assert flat(scaled, valid)[0].tolist() == [True, False, False]
    alone = sum_then_normalise(scaled[..., :1], valid[..., :1], weights(1))
    assert torch.allclose(alone, sum_then_normalise(rewards[..., :1], valid[..., :1], weights(1)), atol=1e-9)


def test_the_sum_sees_units():
    rewards, valid = random_table(6)
    for scale in SCALES:
        plain, mapped = (
            sum_then_normalise(r, valid, weights(1, 1, 1), scale)
            for r in (rewards, rewards * torch.tensor([1.0, 1, 50]))
        )
        assert (plain - mapped).abs().max() > 0.5


def test_size_does_not_depend_on_the_number_of_rewards():
    for k in (1, 3, 10):
        got = gdpo(*random_table(7, (8, 8, k)), torch.ones(k))
        assert got.mean().abs() < 1e-12 and got.std().item() == pytest.approx(1, abs=1e-3)


def test_a_common_factor_of_the_weights_does_not_matter():
    rewards, valid = random_table(8)
    a, b = (gdpo(rewards, valid, factor * weights(1, 0.5, 2)) for factor in (1, 10))
    assert torch.allclose(a, b, atol=1e-3)
    assert torch.equal(gdpo(rewards, valid, weights(1, 0, 0)), gdpo(rewards[..., :1], valid[..., :1], weights(1)))
