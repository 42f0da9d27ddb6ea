"""Jobs of the next step are made while one trains."""

import threading

import numpy as np
import pytest

from posttrain.errors import UserError
from posttrain.style import dataset
from posttrain.style import train as style
from posttrain.style.batches import Ahead, jobs_of_step


def test_jobs_made_ahead_are_the_same(made, config):
    """In steps that follow each other, after a jump, and none beyond the last step."""
    _, views = made
    order, asked = style.order_of(views, config), []

    def make(step):
        asked.append(step)
        return jobs_of_step(views, config, order, step, range)

    with Ahead(make, 5) as ahead:
        found = {step: ahead(step) for step in (1, 2, 4, 5)}
    assert asked == [1, 2, 3, 4, 5]
    for step, jobs in found.items():
        alone = jobs_of_step(views, config, style.order_of(views, config), step, range)
        assert (jobs.entries, jobs.side) == (alone.entries, alone.side)
        for own, other in zip(jobs.own, alone.own, strict=True):
            assert own.job == other.job and len(own.views) == len(other.views)
            assert all(map(np.array_equal, own.views, other.views))


def test_the_next_step_is_made_while_one_trains():
    """And a loop that is left waits for it, and makes no more."""
    begun = {step: threading.Event() for step in (1, 2, 3)}

    def make(step):
        begun[step].set()
        return step

    with Ahead(make, 3) as ahead:
        assert ahead(1) == 1
        assert begun[2].wait(60)  # nobody has asked for it
    assert not begun[3].is_set()


def test_an_error_ahead_is_raised_at_its_step():
    def make(step):
        if step == 2:
            raise UserError("broken.png: is truncated")
        return step

    with Ahead(make, 3) as ahead:
        assert ahead(1) == 1
        with pytest.raises(UserError, match="is truncated"):
            ahead(2)


@pytest.mark.parametrize("kept", (0, dataset.KEPT))
def test_an_image_is_opened_once_while_there_is_room(made, config, monkeypatch, kept):
    """And what is shown is the same, however much is kept."""
    _, views = made
    expected = drawn(views)
    fresh, opened = dataset.Views(views.source, views.images, config), []
    monkeypatch.setattr(dataset, "KEPT", kept)
    read = dataset.StyleSet.__getitem__
    monkeypatch.setattr(dataset.StyleSet, "__getitem__", lambda source, row: opened.append(row) or read(source, row))
    for _ in range(2):
        assert all(map(np.array_equal, drawn(fresh), expected))
    if kept:
        assert len(opened) == len(set(opened))
    else:
        assert len(opened) == 2 * len(expected)


def drawn(views):
    """A reference of each image."""
    rng = np.random.default_rng(0)
    return [views.draw(entry, 16, rng) for entry in views.train]
