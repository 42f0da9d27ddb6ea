"""Full and read-only disks, clocks that jump, damaged checkpoints, two runs at once, NaN, and no memory."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.chaos import methods
from tests.helpers import runs
from tests.helpers.commands import Commands

TRAINING = ["sft", "stpo", "grpo", "nft", "mopd", "tdm"]
ALL = list(methods.METHODS)


@pytest.fixture
def recipe(tmp_path, parts):
    def write(method: str, **changes) -> Path:
        made = methods.METHODS[method][0](tmp_path, parts, method)
        for name, value in changes.items():
            setattr(made, name, value)
        return runs.recipe(made, tmp_path / "recipe.yaml")

    return write


def fails(result, *says: str) -> None:
    """Exit code 2 and a last line that says so; progress may stand above."""
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("posttrain: error: ") and all(part in last for part in says), result.stderr


# ---- disks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ALL)
def test_full_disk(command, recipe, whole, tmp_path, method):
    """Files may have 60 KB, which some of what every method writes is longer than; with more, it goes on to the end."""
    path = recipe(method)
    result = command(*method.split(), "--config", path, limit=60_000 if method != "pairs" else 15_000)
    fails(result, str(tmp_path))
    assert not list((tmp_path / "run").rglob(".tmp-*"))
    result = command(*method.split(), "--config", path, "--resume")
    assert result.returncode == 0, result.stderr
    methods.assert_same(whole(method)[0], methods.METHODS[method][1](tmp_path / "run"))


@pytest.fixture
def read_only(tmp_path):
    """A function that makes a directory that cannot be written to, not even by root."""
    made = []

    def make(path: Path) -> None:
        path.mkdir(parents=True)
        mount = ["mount", "-t", "tmpfs", "-o", "size=1m,ro", "tmpfs", str(path)]
        if os.geteuid() != 0 or not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("mounting a small disk is not permitted here")
        made.append(path)

    yield make
    for path in made:
        subprocess.run(["umount", str(path)], check=True)


@pytest.mark.parametrize("method", ALL)
def test_read_only_directory(command, recipe, read_only, tmp_path, method):
    read_only(tmp_path / "disk")
    fails(command(*method.split(), "--config", recipe(method, output=str(tmp_path / "disk/run"))),
          str(tmp_path / "disk"), "Read-only file system")  # fmt: skip


@pytest.mark.parametrize("method", [*TRAINING, "expander gdpo", "expander sft", "judge"])
def test_checkpoints_that_cannot_be_written(command, recipe, read_only, tmp_path, method):
    """Which a run finds out after its first step."""
    read_only(tmp_path / "run/checkpoints")
    fails(command(*method.split(), "--config", recipe(method)), str(tmp_path / "run"), "ead-only file system")


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("name", ["run", "run/metrics.jsonl", "run/.lock"])
def test_something_in_the_way(command, recipe, tmp_path, method, name):
    """A file where the run should be, and directories where its files should be."""
    path, place = recipe(method), tmp_path / name
    if name == "run":
        place.write_text("mine")
    else:
        place.mkdir(parents=True)
    fails(command(*method.split(), "--config", path), "run")
    assert name != "run" or place.read_text() == "mine"


# ---- clocks ---------------------------------------------------------------------------------------------------------

JUMPING = """
import itertools, time
real, jumps = time.time, itertools.cycle([0, 3600, -3600, 7200, -86400 * 400])
time.time = lambda: real() + next(jumps)
"""


def test_a_clock_that_jumps(parts, whole, tmp_path):
    """At every look at it, by up to a year."""
    commands = Commands(tmp_path, methods.PREPARE + JUMPING)
    try:
        for method in ALL:
            folder = tmp_path / method
            folder.mkdir()
            path = runs.recipe(methods.METHODS[method][0](folder, parts, method), folder / "recipe.yaml")
            result = commands(*method.split(), "--config", path)
            assert result.returncode == 0, result.stderr
            methods.assert_same(whole(method)[0], methods.METHODS[method][1](folder / "run"))
    finally:
        commands.close()


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(data)


DAMAGES = {
    "flipped": lambda file: flip(file),
    "truncated": lambda file: os.truncate(file, file.stat().st_size // 2),
    "empty": lambda file: os.truncate(file, 0),
    "gone": lambda file: file.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("method", [*TRAINING, "expander gdpo", "expander sft", "judge"])
def test_damaged_checkpoint(command, recipe, whole, tmp_path, method, damage):
    path, run = recipe(method), tmp_path / "run"
    assert command(*method.split(), "--config", path).returncode == 0
    newest = sorted(p for p in (run / "checkpoints").iterdir() if p.name.partition("-")[2].isdigit())[-1]
    files = sorted(file for file in newest.iterdir() if file.name != "README.md")
    DAMAGES[damage](files[sum(map(ord, method + damage)) % len(files)])
    result = command(*method.split(), "--config", path, "--resume")
    assert result.returncode == 0, result.stderr
    assert f"{newest}: not a whole checkpoint: " in result.stderr and "trying the one before" in result.stderr
    methods.assert_same(whole(method)[0], methods.METHODS[method][1](run))


# ---- two at once ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    commands = Commands(tmp_path_factory.mktemp("others"), methods.PREPARE)
    commands("--version")
    yield commands
    commands.close()


@pytest.mark.parametrize("method", ALL)
def test_two_runs_on_one_directory(command, recipe, others, whole, tmp_path, method):
    path = recipe(method)
    command.start(*method.split(), "--config", path)
    began = time.monotonic()
    while not (tmp_path / "run/recipe.yaml").exists() and time.monotonic() - began < 60:
        time.sleep(0.005)
    second = others(*method.split(), "--config", path, "--resume")
    result = command.wait()
    fails(second, "is at work here; wait for it or stop it")
    assert result.returncode == 0, result.stderr
    methods.assert_same(whole(method)[0], methods.METHODS[method][1](tmp_path / "run"))


# ---- NaN ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", [*TRAINING, "pairs"])
def test_weights_that_are_not_finite(command, recipe, parts, tmp_path, method, value):
    model = shutil.copytree(parts / "k2", tmp_path / "model")
    file = next((model / "transformer").glob("*.safetensors"))
    weights = load_file(file)
    name = sorted(weights)[len(method)]
    weights[name].view(-1)[-1] = value
    save_file(weights, file, {"format": "pt"})
    result = command(method, "--config", recipe(method), "--model.path", model)
    fails(result, str(model), "holds numbers that are not finite")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", methods.SCORING)
def test_scores_that_are_not_finite(command, recipe, method):
    """A mistake of the reward's, which is named: a score that is missing would be None."""
    reward = {"name": "brightness", "function": "tests.chaos.rewards:nan"}
    result = command(*method.split(), "--config", recipe(method, rewards=[reward]))
    fails(result, "reward brightness: score 1 is nan: return None where there is no score")


# ---- memory ---------------------------------------------------------------------------------------------------------

WANTING = """
import os, torch
from posttrain.model.k2 import K2
velocity = K2.velocity
def wanting(self, x, *arguments, **options):
    if os.environ.get("RANK") == "1" and torch.is_grad_enabled() and len(x) > 2:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return velocity(self, x, *arguments, **options)
K2.velocity = wanting
"""


@pytest.mark.parametrize("method", TRAINING)
def test_one_of_two_processes_has_no_room(recipe, tmp_path, method):
    """Both begin the step again, with half of micro_batch."""
    commands = Commands(tmp_path, methods.PREPARE + WANTING)
    try:
        path = recipe(method, steps=2, **({"micro_batch": 2} if method == "stpo" else {}))
        result = commands(method, "--config", path, processes=2)
        assert result.returncode == 0, result.stderr
        assert result.stderr.count("it is retried with") == 1
        assert runs.latest(tmp_path / "run").step == 2
    finally:
        commands.close()
