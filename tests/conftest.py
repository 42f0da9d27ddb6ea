"""What several test files begin with."""

import pytest

from tests import runs


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    commands = runs.Commands(tmp_path_factory.mktemp("commands"))
    yield commands
    commands.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from accelerate import PartialState

    from tests import tiny

    PartialState(cpu=True)  # runs must be the same bit for bit, also on a machine with a GPU
    return tiny.save(tmp_path_factory.mktemp("tiny") / "raw")
