"""What a checkpoint keeps of an adaptive pool: restored equals uninterrupted, a changed file is matched by id."""

import numpy as np

from prompts.pool import Pool
from prompts.records import PromptRecord
from tests.prompts.test_pool import NAN, make, records


def play(pool: Pool, steps) -> list[list[int]]:
    """Draws and random scores of some steps, half of the prompts always alike; the keys drawn."""
    drawn = []
    for step in steps:
        rows = pool.draw(step)
        scores = np.random.default_rng(step).random((len(rows), 4, len(pool.rewards)))
        scores[pool.keys[rows] % 2 == 0] = 0.5
        pool.update(step, rows, scores, np.ones(scores.shape, bool))
        drawn.append(pool.keys[rows].tolist())
    return drawn


def test_restored_equals_uninterrupted():
    settings = {"draws": 8, "weights": {"a": 1.0, "b": 0.5}, "cooldown": 5, "audit": 0.2}
    whole, first, second = make(60, **settings), make(60, **settings), make(60, **settings)
    expected = play(whole, range(1, 61))
    assert play(first, range(1, 31)) == expected[:30]
    second.load_state(*first.state())
    assert play(second, range(31, 61)) == expected[30:]
    (a, x), (b, y) = whole.state(), second.state()
    assert x == y and all(np.array_equal(a[name], b[name], equal_nan=True) for name in a)
    assert whole.counts()["resting"] > 5 and len(a["keys"]) == len(whole.keys)


def test_a_changed_file_is_matched_by_id():
    pool = make(20, 4, weights={"a": 1.0, "b": 0.5})
    play(pool, range(1, 20))
    arrays, state = pool.state()
    given = [*records(20)[:14:-1], PromptRecord("another"), *records(10)]
    changed = make(given, 4, weights={"b": 1.0, "c": 1.0})
    changed.load_state(arrays, state)
    at = {int(key): row for row, key in enumerate(pool.keys)}
    for row, key in enumerate(changed.keys):
        if int(key) not in at:
            assert given[changed.places[row]].prompt == "another" and changed.visits[row] == 0
            continue
        old = at[int(key)]
        for name in ("visits", "drawn", "streak", "returns"):
            assert getattr(changed, name)[row] == getattr(pool, name)[old]
        np.testing.assert_array_equal(changed.mean_NK[row], [pool.mean_NK[old, 1], NAN])
    assert changed.spread_K.tolist() == [pool.spread_K[1], 0]
    fresh = make(5)
    fresh.load_state(*make(5).state())
    assert not fresh.drawn.any()


def test_prompts_never_drawn_cost_a_checkpoint_nothing():
    pool = make(1000, 4)
    play(pool, range(1, 6))
    assert {len(array) for array in pool.state()[0].values()} == {len(set(np.flatnonzero(pool.drawn)))}


def test_ends():
    pool = make(5)
    pool.visits[:4], pool.spread_K[0] = 2, 0.2
    pool.mean_NK[:4, 0], pool.variance_NK[:4, 0] = [0.3, 1, 0, 0.6], np.square([0.1, 0, 0, 0.2])
    ends = {name: rows.tolist() for name, rows in pool.ends(2).items()}
    assert ends == {"easiest": [1, 3], "hardest": [2, 0], "most informative": [3, 0]}
