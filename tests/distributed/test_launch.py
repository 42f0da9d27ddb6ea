"""A world that is said to have several processes, without what they need to meet, is refused before anything loads."""

import pytest

from posttrain.distributed import launch
from posttrain.distributed.processes import Processes
from posttrain.errors import UserError

WHOLE = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


def world(monkeypatch, values):
    for name in WHOLE:
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("values", [{}, {"WORLD_SIZE": "1"}, {"WORLD_SIZE": ""}, {"RANK": "3"}, WHOLE])
def test_worlds_that_are_whole_or_of_one(monkeypatch, values):
    world(monkeypatch, values)
    launch.check()


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"WORLD_SIZE": "2"}, "is 2, and RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set: start it with"),
        (WHOLE | {"LOCAL_RANK": ""}, "WORLD_SIZE: is 2, and LOCAL_RANK not set"),
        (WHOLE | {"WORLD_SIZE": "two"}, "WORLD_SIZE: is 'two', not a number"),
        (WHOLE | {"RANK": "2"}, "RANK: is 2 of WORLD_SIZE=2: ranks count from 0"),
    ],
)
def test_worlds_that_are_not(monkeypatch, values, says):
    world(monkeypatch, values)
    with pytest.raises(UserError, match=says):
        launch.check()
    with pytest.raises(UserError, match=says):  # from Python too
        Processes()
