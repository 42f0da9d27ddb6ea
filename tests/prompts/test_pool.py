"""The adaptive prompt pool: its arithmetic, whom it draws, who rests and comes back, and what it saves."""

import itertools
import math

import numpy as np
import pytest

from posttrain.errors import UserError
from prompts.informativeness import group_moments, informativeness, weighted_mean
from prompts.pool import Kind, Pool, PoolConfig
from prompts.records import PromptRecord

NAN = float("nan")


def records(count: int, tags=()) -> list[PromptRecord]:
    return [PromptRecord(f"prompt {i}", tags=list(tags)) for i in range(count)]


def make(given, draws: int = 1, weights=None, seed: int = 0, **settings) -> Pool:
    given = records(given) if isinstance(given, int) else given
    return Pool(given, weights or {"r": 1.0}, PoolConfig("adaptive", **settings), draws, seed)


def visit(pool: Pool, step: int, rows, *scores) -> None:
    """One visit of each row with the scores of its group, None where there is none."""
    table = np.array([[NAN if s is None else s for s in group] for group in scores])[..., None]
    pool.drawn[rows] = step
    pool.update(step, np.array(rows), np.nan_to_num(table), ~np.isnan(table))


# arithmetic


def test_moments_of_a_group():
    values = np.array([[0, 1, 1, 9], [0.5, 9, 9, 9], [0.3, 0.3, 0.3 + 5e-7, 9]])[..., None]
    valid = np.array([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 0]], bool)[..., None]
    mean, variance = group_moments(values, valid)
    # (0, 1, 1): mean 2/3; squares 4/9 + 1/9 + 1/9 = 2/3, over 3 - 1; one score has no variance; alike is alike
    np.testing.assert_allclose(mean[:, 0], [2 / 3, NAN, 0.3], atol=1e-6)
    np.testing.assert_allclose(variance[:, 0], [1 / 3, NAN, 0], atol=1e-15)


def test_a_spread_within_the_noise_is_none():
    """Floors of .05 and 0: what spans less than the floor is alike, and its prompt is flat."""
    values = np.array([[0.5, 0.54], [0.5, 0.56]])[..., None].repeat(2, -1)
    _, variance = group_moments(values, np.ones((2, 2, 2), bool), np.array([0.05, 0.0]))
    np.testing.assert_allclose(variance, [[0, 8e-4], [1.8e-3, 1.8e-3]])
    pool = make(3, 2, prune_after=2, floor=0)
    for step in (1, 2):
        pool.update(step, np.array([0, 1]), values[..., :1], np.ones((2, 2, 1), bool), np.array([0.05]))
    assert pool.informativeness(np.arange(3)).tolist() == [0, 1, 1] and pool.kinds(np.arange(2)).tolist() == [4, 1]


def test_decay_by_hand():
    """Rates 1, 1/2, 1/3 and from then on 0.3; the variance is averaged and not the standard deviation."""
    pool = make(3)
    seen = []
    for step, group in enumerate([(1, 1), (0, 0), (0, 1), (0, 0), (1, 1)], start=1):
        visit(pool, step, [1], group)
        seen.append((pool.mean_NK[1, 0], pool.variance_NK[1, 0]))
    means = [1, 0.5, 0.5, 0.7 * 0.5, 0.7 * 0.35 + 0.3]
    variances = [0, 0, 0.5 / 3, 0.7 / 6, 0.49 / 6]  # that of (0, 1) is 0.5
    np.testing.assert_allclose(seen, list(zip(means, variances)))
    assert pool.visits.tolist() == [0, 5, 0] and pool.drawn[1] == 5


def test_spread_is_a_mean_over_groups_then_over_steps():
    pool = make(3, 2)
    visit(pool, 1, [0, 1], (0, 1), (0.5, 0.5))
    assert pool.spread_K[0] == pytest.approx(math.sqrt(0.5) / 2)
    visit(pool, 2, [0, 1], (0.5, 0.5), (None, 1))
    assert pool.spread_K[0] == pytest.approx(math.sqrt(0.5) / 4)  # the second group has no spread at all
    pool.spread_steps_K[:] = 50
    visit(pool, 3, [2], (0.5, 0.5))
    assert pool.spread_K[0] == pytest.approx(0.95 * math.sqrt(0.5) / 4)


@pytest.mark.parametrize(
    ("std", "spread", "expected"),
    [
        ((0.1, 0.3), (0.2, 0.2), (1 * 0.5 + 0.5 * 1) / 1.5),
        ((0.1, NAN), (0.2, 0.2), 0.5),  # a missing reward is not a zero
        ((NAN, 0.05), (0.2, 0.2), 0.25),
        ((NAN, NAN), (0.2, 0.2), 1.0),  # never visited
        ((0.0, 0.1), (0.0, 0.2), 0.5 * 0.5 / 1.5),  # a reward that is blind everywhere
    ],
)
def test_informativeness(std, spread, expected):
    got = informativeness(np.square([std]), np.array(spread), np.array([1, 0.5]))
    assert got[0] == pytest.approx(expected)


def test_a_reward_without_weight_does_not_count():
    assert weighted_mean(np.array([[0.2, 0.9], [NAN, 0.9]]), np.array([1.0, 0.0]))[0] == pytest.approx(0.2)
    assert informativeness(np.array([[NAN, 0.9]]), np.ones(2), np.array([1.0, 0.0]))[0] == 1


@pytest.mark.parametrize(
    ("visits", "std", "mean", "kind"),
    [
        (0, NAN, NAN, Kind.NEW),
        (1, 0.0, 1.0, Kind.NEW),
        (2, 0.04, 0.95, Kind.INFORMATIVE),  # 0.04 / 0.2 is the threshold itself
        (2, 0.039, 0.95, Kind.EASY),
        (2, 0.0, 0.05, Kind.HARD),
        (2, 0.0, 0.9, Kind.FLAT),
        (2, 0.0, 0.1, Kind.FLAT),
    ],
)
def test_classes(visits, std, mean, kind):
    pool = make(1)
    pool.visits[0], pool.mean_NK[0], pool.spread_K[0] = visits, mean, 0.2
    pool.variance_NK[0] = (std + 1e-12) ** 2
    assert pool.kinds(np.array([0]))[0] == kind
    assert pool.counts()[kind.name.lower()] == 1 and sum(pool.counts()[k.name.lower()] for k in Kind) == 1


def test_weight():
    pool = make(4)
    pool.spread_K[0], pool.drawn[:] = 0.2, [0, 150, 100, -900]
    pool.variance_NK[:, 0] = [NAN, 0, 0.1**2, 0.2**2]
    # (0.1 + 0.9 I)(1 + min(1, age / 200)) at step 150, I = 1, 0, 0.5, 1
    expected = [1 * 1.75, 0.1 * 1, 0.55 * 1.25, 1 * 2]
    np.testing.assert_allclose(pool.weight(np.arange(4), 150), expected)
    pool.config.sharpness = 2
    assert pool.weight(np.array([2]), 150)[0] == pytest.approx((0.1 + 0.9 * 0.25) * 1.25)


@pytest.mark.parametrize(("success", "expected"), [(0.5, 0.9922), (0.9, 0.5695), (0.95, 0.3366), (0.99, 0.0773)])
def test_chance_that_a_group_of_eight_informs(success, expected):
    """Self-check 39, over all 256 outcomes of a binary reward: 1 - p^8 - (1 - p)^8."""
    outcomes = np.array(list(itertools.product([0.0, 1.0], repeat=8)))
    _, variance = group_moments(outcomes[..., None], np.ones((256, 8, 1), bool))
    right = outcomes.sum(1)
    chance = success**right * (1 - success) ** (8 - right)
    assert chance[variance[:, 0] > 0].sum() == pytest.approx(expected, abs=5e-5)


# draw


def test_draws_follow_the_weights():
    """Two of three prompts, one after the other: P(a then b) = w_a w_b / (1 - w_a), for weights of sum 1."""
    pool = make(3, 2, staleness=10**9, explore=0.1)
    pool.visits[:], pool.spread_K[0] = 2, 1
    pool.variance_NK[:, 0] = np.square([0, 0.5, 1])
    weights = np.array([0.1, 0.55, 1]) / 1.65
    steps = 3000
    pairs = [tuple(sorted(pool.draw(step))) for step in range(1, steps + 1)]
    for a, b in itertools.combinations(range(3), 2):
        expected = weights[a] * weights[b] * (1 / (1 - weights[a]) + 1 / (1 - weights[b]))
        error = math.sqrt(expected * (1 - expected) / steps)
        assert abs(pairs.count((a, b)) / steps - expected) < 4 * error


def test_draws_come_from_seed_and_step_and_not_from_the_order_of_the_file():
    given = records(50)
    other = [given[i] for i in np.random.default_rng(0).permutation(50)]
    pools = [(make(given, 8), given), (make(other, 8), other), (make(given, 8, seed=1), given)]
    for step in (1, 2, 3):
        drawn, again, third = ([file[i].id for i in pool.places[pool.draw(step)]] for pool, file in pools)
        assert drawn == again != third and len(set(drawn)) == 8
    assert len(make(8, 8).draw(1)) == 8  # all there are


def test_quotas():
    """Shares of the draws, rounded up or down; a prompt counts for the first tag; what cannot be had goes elsewhere."""
    given = [*records(30), *(PromptRecord(f"t{i}", tags=["text", "people"]) for i in range(10))]
    given += [PromptRecord(f"p{i}", tags=["people"]) for i in range(3)]
    pool = make(given, 10, quotas={"text": 0.25, "people": 0.2})
    texts, people = [], []
    for step in range(1, 101):
        tags = [given[i].tags for i in pool.places[pool.draw(step)]]
        texts.append(tags.count(["text", "people"]))
        people.append(tags.count(["people"]))
    assert set(texts) == {2, 3} and np.mean(texts) == pytest.approx(2.5, abs=0.2)
    assert set(people) == {2}
    pool.config.quotas["people"] = 0.5
    rows = pool.draw(101)
    assert len(set(rows)) == 10 and [given[i].tags for i in pool.places[rows]].count(["people"]) == 3


# rest


@pytest.mark.parametrize(("score", "kind", "rest"), [(0, Kind.HARD, 300), (0.5, Kind.FLAT, 600), (1, Kind.EASY, 1200)])
def test_rest_and_return(score, kind, rest):
    """The class begins at the second visit, so the second visit of low variance is the third; then T, 2T or 4T."""
    pool = make(4, audit=0)
    for step in (1, 2, 3):
        assert pool.returns[0] == 0
        visit(pool, step, [0, 1], (score,) * 4, (0, 1, 0, 1))
    assert pool.kinds(np.array([0, 1])).tolist() == [kind, Kind.INFORMATIVE]
    assert pool.returns.tolist() == [3 + rest, 0, 0, 0] and pool.counts()["resting"] == 1
    assert all(0 not in pool.draw(step) for step in range(4, 3 + rest, 50))
    mean = pool.mean_NK[0, 0]
    pool.draw(3 + rest)
    assert (pool.returns[0], pool.visits[0], pool.mean_NK[0, 0]) == (0, 1, mean)


def test_one_visit_settles_a_prompt_that_came_back():
    pool = make(4, audit=0)
    for step in (1, 2, 3):
        visit(pool, step, [0, 1, 2], (1, 1), (1, 1), (0, 1))
    pool.draw(1203)
    visit(pool, 1203, [0, 1], (1, 1), (0, 1))
    assert pool.returns.tolist() == [2403, 0, 0, 0]
    assert pool.variance_NK[1, 0] == pytest.approx(0.5 / 2)  # rate 1/2 again
    assert pool.kinds(np.array([1]))[0] == Kind.INFORMATIVE and pool.streak[1] == 0


def test_a_visit_that_informs_ends_the_streak():
    pool = make(4)
    for step, group in enumerate([(1, 1), (1, 1), (0, 1)], start=1):
        visit(pool, step, [0, 1], group, (0, 1))
    assert pool.streak[0] == 0 and not pool.returns.any()


def test_the_floor():
    """Of twelve prompts that teach nothing three stay, and a step of three can always be drawn."""
    pool = make(12, 3, floor=0.25, audit=0, cooldown=10**6)
    for step in range(1, 100):
        rows = pool.draw(step)
        assert len(set(rows)) == 3
        visit(pool, step, rows, *[(1, 1, 1)] * 3)
        assert np.count_nonzero(pool.returns == 0) >= 3
    assert np.count_nonzero(pool.returns == 0) == 3
    assert make(12, 5, floor=0.25).floor == 5


def test_a_pool_that_prunes_all_it_may():
    """Without a floor of its own a step's prompts stay, and those that come back take their turn."""
    pool = make(12, 3, floor=0, audit=0, cooldown=10, prune_after=1)
    for step in range(1, 60):
        rows = pool.draw(step)
        assert len(set(rows)) == 3
        visit(pool, step, rows, *[(1, 1, 1)] * 3)
    assert np.count_nonzero(pool.returns) == 9 and (pool.drawn > 19).all()


def test_the_least_informative_rest_first():
    pool = make(3, floor=0.6)
    pool.spread_K[0], pool.spread_steps_K[0] = 1, 10**6
    pool.visits[:], pool.streak[:], pool.mean_NK[:] = 5, 5, 0.5
    pool.variance_NK[:, 0] = np.square([0.1, 0.01, 0.15])
    visit(pool, 9, [0, 1, 2], (0.5, 0.5), (0.5, 0.5), (0.5, 0.5))
    assert np.flatnonzero(pool.returns).tolist() == [1]  # two of three must stay


def test_too_few_left_are_filled_up_with_the_next_to_return():
    """As when a changed file holds only prompts that rest, or a step takes more prompts than before."""
    pool = make(6, 3, audit=0)
    pool.returns[:] = [900, 500, 800, 600, 700, 1000]
    assert sorted(pool.draw(10)) == [1, 3, 4]


def test_audit_share():
    pool = make(4000, 8, audit=0.25)
    pool.returns[:2000] = 10**6
    audited = 0
    for step in range(1, 201):
        rested = pool.returns > 0
        audited += np.count_nonzero(rested[pool.draw(step)])
    assert audited / 1600 == pytest.approx(0.25, abs=0.05)
    came_back = np.flatnonzero(pool.returns[:2000] == 0)
    assert len(came_back) == audited and (pool.visits[came_back] == 1).all()


# missing and bad scores


def test_missing_scores_leave_that_reward_alone():
    pool = make(2, weights={"a": 1.0, "b": 1.0})
    values, valid = np.zeros((1, 2, 2)), np.ones((1, 2, 2), bool)
    values[0, :, 0], values[0, :, 1] = (0, 1), (0.2, 0.4)
    pool.update(1, np.array([0]), values, valid)
    before = pool.mean_NK[0, 1], pool.variance_NK[0, 1], pool.spread_K[1]
    valid[0, 0, 1] = False  # one score of b is left, which is no group
    pool.update(2, np.array([0]), values, valid)
    assert (pool.mean_NK[0, 1], pool.variance_NK[0, 1], pool.spread_K[1]) == before
    assert pool.visits[0] == 2 and pool.spread_steps_K.tolist() == [2, 1]


def test_a_draw_without_any_score_is_no_visit():
    pool = make(2)
    visit(pool, 5, [0], (None, None))
    assert pool.visits[0] == 0 and pool.weight(np.array([0]), 5)[0] == 1
    assert pool.counts()["unscored"] == 1 and pool.counts()["new"] == 2


def test_scores_that_are_not_calibrated():
    pool = make(2)
    with pytest.raises(UserError, match=r"rewards: r gave 21\.5, .* set its scale and offset, or pool\.kind"):
        visit(pool, 1, [0], (0.3, 21.5))
    visit(pool, 1, [0], (0.3, 1))
    visit(pool, 2, [0], (0.3, 1.1))  # a run under way is not ended for it


def test_pools_that_cannot_be():
    with pytest.raises(UserError, match=r"groups\.prompts_per_step: is 4, but prompts\.train holds 3"):
        make(3, 4)
    with pytest.raises(UserError, match=r"pool\.quotas\.text: no prompt"):
        make(3, quotas={"text": 0.5})


# what it is for


def images_to_reach(success: float, spread: float, adaptive: bool, rate: float = 0.03) -> tuple[int, float]:
    """One skill, learnt from groups of 8 of 32 prompts a step; images until the mean success, share of dead groups.

    A prompt succeeds with chance sigmoid(skill - difficulty), difficulties are normal. The skill follows the policy
    gradient with group-normalised advantages: the mean of A (r - chance).
    """
    rng = np.random.default_rng(0)
    difficulty = rng.normal(0, spread, 2000)
    pool = make(2000, 32)
    skill, dead, order = 0.0, [], np.empty(0, int)
    for step in itertools.count(1):
        chance = 1 / (1 + np.exp(difficulty - skill))
        if chance.mean() >= success:
            return 256 * (step - 1), float(np.mean(dead))
        if adaptive:
            rows = pool.draw(step)
        else:
            order = order if len(order) >= 32 else np.concatenate([order, rng.permutation(2000)])
            rows, order = order[:32], order[32:]
        scores = (rng.random((32, 8)) < chance[rows][:, None]).astype(float)
        if adaptive:
            pool.update(step, rows, scores[..., None], np.ones((32, 8, 1), bool))
        std = scores.std(1, ddof=1, keepdims=True)
        advantages = (scores - scores.mean(1, keepdims=True)) / (std + 1e-4)
        skill += rate * float((advantages * (scores - chance[rows][:, None])).mean())
        dead.append(float((std == 0).mean()))
    raise AssertionError


def test_a_mixed_pool_needs_fewer_images():
    """Hardly fewer where nearly all prompts inform (difficulties of std 2), little over half where most do not (6)."""
    (even_2, _), (pool_2, _) = (images_to_reach(0.8, 2, adaptive) for adaptive in (False, True))
    (even_6, dead_even), (pool_6, dead_pool) = (images_to_reach(0.8, 6, adaptive) for adaptive in (False, True))
    assert 1.0 <= even_2 / pool_2 < 1.25 and even_6 / pool_6 > 1.6
    assert dead_even > 0.65 and dead_pool < 0.53
