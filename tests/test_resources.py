"""Names and files that a user has too, rewards.py, prompts/ and recipes/, and the package's where the user has none."""

import subprocess
import sys
from pathlib import Path

import pytest

from posttrain import resources, supported
from posttrain.resources import packaged, packaged_all
from tests.helpers import runs

WARM = """
from rewards.base import Failure

def warm(images, prompts):
    return [1.0, Failure("none")][: len(images)]
"""
TRY = """
import sys
import posttrain
from rewards.base import RewardSpec
from rewards.load import load_rewards
from prompts.records import read_prompts
reward, = load_rewards([RewardSpec("mine", sys.argv[1])])
score, failure = reward.function([1, 2], ["a", "b"])
print(reward.function.__module__, score, type(failure).__module__)
"""


def python(folder: Path, *words: str) -> subprocess.CompletedProcess:
    """Python in a folder that comes first on sys.path, as a notebook's and that of `python -m` does."""
    path = f"{folder}:{runs.ROOT}"
    command = [sys.executable, "-c", *words]
    return subprocess.run(command, cwd=folder, env={"PYTHONPATH": path}, capture_output=True, text=True)


def lay(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.mark.parametrize(
    "files, function",
    [
        ({"rewards.py": WARM, "prompts.py": "raise SystemExit(1)"}, "rewards:warm"),
        ({"rewards/__init__.py": WARM, "prompts/__init__.py": ""}, "rewards:warm"),
        ({"rewards/mine.py": WARM, "prompts/train.jsonl": ""}, "rewards.mine:warm"),
        ({"rewards/mine.py": WARM, "rewards/__init__.py": "", "prompts/__init__.py": ""}, "rewards.mine:warm"),
    ],
)
def test_a_user_has_rewards_and_prompts_of_the_same_name(tmp_path, files, function):
    lay(tmp_path, files)
    done = python(tmp_path, TRY, function)
    assert done.returncode == 0, done.stderr
    module, score, failure = done.stdout.split()
    assert module in ("user_rewards", "rewards.mine") and float(score) == 1
    assert failure == "rewards.base"  # the same class as everywhere, so that a failure is known as one


def test_the_users_module_may_be_imported_before_and_after(tmp_path):
    lay(tmp_path, {"rewards.py": "def warm(images, prompts): return [1.0]"})
    text = "import rewards as before, posttrain\nfrom rewards import warm\nprint(before.warm(1, 2), warm(1, 2))"
    assert python(tmp_path, text).stdout.split() == ["[1.0]", "[1.0]"]
    done = python(tmp_path, "import posttrain, rewards; rewards.cold")
    assert "AttributeError: module 'rewards' has no attribute 'cold'" in done.stderr


def test_names_of_our_modules_are_ours(tmp_path):
    """Even before they are imported."""
    lay(tmp_path, {"rewards.py": "supervise = judge = 1", "prompts.py": "records = templates = 1"})
    text = "import posttrain\nfrom rewards import judge, supervise\nfrom prompts import records, templates\n"
    text += "print(*(m.__name__ for m in (judge, supervise, records, templates)))"
    names = python(tmp_path, text).stdout.split()
    assert names == ["rewards.judge", "rewards.supervise", "prompts.records", "prompts.templates"]


def test_an_error_in_the_users_module_is_shown(tmp_path):
    lay(tmp_path, {"rewards.py": "import no_such_module"})
    done = python(tmp_path, TRY, "rewards:warm")
    message = "reward mine: function: cannot import rewards: ModuleNotFoundError: No module named 'no_such_module' ("
    assert f"UserError: {message}" in done.stderr


def test_the_package_has_what_is_not_here(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(resources, "_told", set())
    data = {
        "a": ["recipes/nano/demo.yaml", 1],
        "b": {"c": "prompts/nano/train.jsonl"},
        "d": None,
        "e": "recipes/no.yaml",
    }
    found = packaged_all(data)
    assert Path(found["a"][0]) == runs.ROOT / "recipes/nano/demo.yaml" and found["a"][1] == 1
    assert Path(found["b"]["c"]).read_text().startswith("{") and found["d"] is None and found["e"] == "recipes/no.yaml"
    assert Path(packaged("posttrain/nano/weights/k2-nano"), "model_index.json").is_file()
    packaged("recipes/nano/grpo.yaml")
    lines = capsys.readouterr().err.splitlines()
    told = f"posttrain: recipes/nano/demo.yaml is not in this directory; taking the package's, {found['a'][0]}"
    assert lines == [told]  # and not again for the others


def test_a_file_that_is_here_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lay(tmp_path, {"recipes/nano/demo.yaml": ""})
    assert packaged("recipes/nano/demo.yaml") == "recipes/nano/demo.yaml"


def test_importing_the_package_takes_no_torch():
    done = python(runs.ROOT, "import sys, posttrain; print('torch' in sys.modules, len(dir(posttrain)) > 40)")
    assert done.stdout.split() == ["False", "True"], done.stderr


@pytest.mark.parametrize(
    ("version", "platform", "says"),
    [((3, 10), "linux", "Python: is 3.10, and 3.11 or later is needed"), ((3, 13), "win32", "Windows: is not")],
)
def test_where_it_does_not_run(version, platform, says):
    assert supported.problem(version, platform).startswith(says)
    assert supported.problem((3, 11), "linux") is supported.problem((3, 14), "darwin") is None


def test_a_platform_that_is_not_supported_is_one_line(tmp_path):
    code = "import sys; sys.platform = 'win32'; import posttrain.cli"
    done = subprocess.run([sys.executable, "-c", code], cwd=runs.ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("posttrain: error: Windows: ") and done.stderr.count("\n") == 1


def test_each_public_name_is_there_once():
    import posttrain

    assert sorted(posttrain.__all__) == sorted({*posttrain._HOMES, "NANO", "sampler"})
    for name in posttrain.__all__:
        assert getattr(posttrain, name).__doc__, name
