import time

import pytest
import torch

from posttrain.nano.build import judge_model
from tests.chaos import methods
from tests.helpers import expander_runs, runs
from tests.helpers.commands import Commands


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    commands = Commands(tmp_path_factory.mktemp("commands"), methods.PREPARE)
    commands("--version")  # when that is done, so are the imports
    yield commands
    commands.close()


@pytest.fixture(scope="module")
def parts(tmp_path_factory, model):
    folder = expander_runs.parts(tmp_path_factory.mktemp("parts"), model)
    torch.manual_seed(0)
    tokenizer = judge_model.make_tokenizer()
    judge_model.save(judge_model.make_model(tokenizer), tokenizer, folder / "judge")
    return folder


@pytest.fixture(scope="module")
def whole(command, parts, tmp_path_factory):
    """Of each method, what an uninterrupted run leaves, and its seconds."""
    held: dict[str, tuple[tuple, float]] = {}

    def get(method: str) -> tuple[tuple, float]:
        if method not in held:
            folder = tmp_path_factory.mktemp(method.replace(" ", "-"))
            make, state = methods.METHODS[method]
            path, began = runs.recipe(make(folder, parts, method), folder / "recipe.yaml"), time.monotonic()
            result = command(*method.split(), "--config", path)
            assert result.returncode == 0, result.stderr
            held[method] = state(folder / "run"), time.monotonic() - began
        return held[method]

    return get
