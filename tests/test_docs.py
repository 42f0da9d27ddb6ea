"""Every command in the README and docs/ is one: it parses, its recipe is there, and its settings pass their checks."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from posttrain import cli
from tests import runs

PAGES = [runs.ROOT / "README.md", *sorted((runs.ROOT / "docs").glob("*.md"))]
START = re.compile(
    r"^(?:\w+=\S+ )*(?:\.venv/bin/)?(?:posttrain|(?:torchrun|accelerate launch) .*-m posttrain\.cli) (.*)"
)
PYTHON = re.compile(r"^(?:\w+=\S+ )*(?:python|accelerate launch .*) -m (posttrain\.(?!cli)[\w.]+)(.*)")
RECIPES = {"run": "recipes/nano/pipeline.yaml", "serve": "recipes/nano/grpo.yaml", "grpo": "recipes/nano/demo.yaml"}
"""What recipe.yaml stands for, by command."""


def commands(text: str) -> list[str]:
    """Lines of shell blocks, continuations joined and comments dropped."""
    blocks = re.findall(r"^```(?:bash|sh)?\n(.*?)^```$", text, flags=re.S | re.M)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in (re.sub(r"(^|\s)#\s.*", "", line).strip() for line in lines) if line]


def found(pattern: re.Pattern) -> list:
    return [
        pytest.param(page, match, id=f"{page.name}: {match[0]}"[:100])
        for page in PAGES
        for line in commands(page.read_text())
        if (match := pattern.match(line))
    ]


@pytest.mark.parametrize(("page", "match"), found(START))
def test_a_command_parses(page, match, monkeypatch):
    monkeypatch.chdir(runs.ROOT)
    words = shlex.split(match[1])
    if "--help" in words:
        words.remove("--help")
        assert " ".join(words) in cli.COMMANDS
        return
    standing = RECIPES.get(words[0], "recipes/nano/demo.yaml")
    command, config, _, _ = cli.parse([standing if word == "recipe.yaml" else word for word in words])
    assert isinstance(config, command.config)


@pytest.mark.parametrize(("page", "match"), found(PYTHON))
def test_a_module_is_there_and_knows_its_options(page, match):
    spec = importlib.util.find_spec(match[1])
    assert spec is not None and spec.origin is not None
    source = Path(spec.origin).read_text()
    for option in re.findall(r"--([a-z][\w-]*)", match[2].partition(" -- ")[0]):
        assert f'"--{option}"' in source, f"{match[1]} has no --{option}"


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_paths_of_recipes_are_there():
    for page in PAGES:
        for path in re.findall(r"\brecipes/[\w/.-]+\.yaml", page.read_text()):
            assert (runs.ROOT / path).is_file(), f"{page.name}: {path}"
