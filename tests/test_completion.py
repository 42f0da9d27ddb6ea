"""Shell completion, in a real bash, and methods that other packages add."""

import importlib.metadata
import subprocess
import sys
import types
from dataclasses import field

import pytest

from posttrain import cli, commands
from posttrain.completion import script
from posttrain.config.sections import TrainingConfig
from posttrain.config.types import AtLeast1, keyword_settings
from posttrain.errors import UserError


def complete(line: str) -> list[str]:
    """What bash offers for the last word of a command line."""
    words = line.split(" ")
    typed = " ".join(word or "''" for word in words)
    ask = (
        f"{script('bash')}\nCOMP_WORDS=({typed}); COMP_CWORD={len(words) - 1};"
        " _posttrain; printf '%s\\n' \"${COMPREPLY[@]}\""
    )
    result = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True)
    return result.stdout.split()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("posttrain gr", ["grpo"]),
        ("posttrain exp", ["expander", "expand", "export"]),
        ("posttrain expander g", ["gdpo"]),
        ("posttrain grpo --optim.l", ["--optim.lr"]),
        ("posttrain grpo --re", ["--resume", "--rewards"]),
        ("posttrain expander gdpo --renderer.re", ["--renderer.retries"]),
        ("posttrain run --dry", ["--dry-run"]),
        ("posttrain sample --resume", []),
    ],
)
def test_bash_completes(line, offered):
    assert sorted(complete(line)) == sorted(offered)


def test_bash_completes_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").touch()
    assert complete("posttrain grpo --config rec") == ["recipe.yaml"]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_the_same_words(shell, capsys):
    assert cli.main(["--completion", shell]) == 0
    text = capsys.readouterr().out
    assert "optim.lr" in text and "gdpo" in text and "dry-run" in text


def test_an_unknown_shell_is_one_line(capsys):
    assert cli.main(["--completion", "tcsh"]) == 2
    assert capsys.readouterr().err == "posttrain: error: --completion: is 'tcsh'; use one of bash, zsh, fish\n"
    with pytest.raises(UserError):
        script("")


# ---- methods of other packages -------------------------------------------------------------------------------------


@keyword_settings
class OtherConfig(TrainingConfig):
    """A method of another package."""

    rounds: AtLeast1 = 3
    """Rounds of it."""
    tags: list[str] = field(default_factory=list)
    """Words."""


class Point:
    """An entry point as importlib.metadata has it."""

    name = "othermethod"

    def load(self):
        return commands.Command("other_method:OtherConfig", "other_method:train", "train with another", resumable=True)


@pytest.fixture
def other(monkeypatch):
    """The settings that the command of another package was called with."""
    calls = []
    module = types.ModuleType("other_method")
    vars(module)["OtherConfig"] = OtherConfig
    vars(module)["train"] = lambda config, resume: calls.append((config, resume))
    monkeypatch.setitem(sys.modules, "other_method", module)
    monkeypatch.setattr(OtherConfig, "__module__", "other_method")
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda group: [Point()] if group == "posttrain.methods" else []
    )
    return calls


def test_a_method_of_another_package_is_a_command(other, capsys):
    assert cli.main(["othermethod", "--output", "o", "--model.path", "m", "--rounds", "5", "--resume"]) == 0
    ((config, resume),) = other
    assert isinstance(config, OtherConfig) and (config.rounds, config.steps, resume) == (5, 500, True)
    assert commands.of(config)[0] == "othermethod"
    assert cli.main(["othermethod", "--output", "o", "--model.path", "m", "--rounds", "0"]) == 2
    assert capsys.readouterr().err == "posttrain: error: command line: rounds: is 0; use 1 or more\n"
    assert cli.main(["--help"]) == 0
    assert "othermethod" in capsys.readouterr().out
    assert "othermethod" in script("bash")
