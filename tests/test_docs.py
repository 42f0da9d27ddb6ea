"""Every command in the README and docs/ is run, made small by docs_commands.py, or is on its list of reasons.

Commands run in one workspace, one after another in the order of the pages and in this process; what they read of other
commands must have been made before, as for a reader. Snippets of recipes are read by the command that they are for.
"""

import importlib.util
import json
import re
import runpy
import shlex
import shutil
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from PIL import Image

from posttrain import cli
from posttrain.annotate.answers import Showing, Store
from posttrain.annotate.marked_images import Images
from posttrain.commands import COMMANDS
from posttrain.config.load import Given, resolve
from posttrain.errors import UserError
from posttrain.preferences.dataset import read_preferences
from rewards.base import RewardSpec
from rewards.load import check_rewards
from tests.annotate.test_annotations import SETTINGS
from tests.helpers import docs_commands, runs

INDEX = runs.ROOT / "docs/README.md"
LIBRARY = runs.ROOT / "docs/library.md"
ORDER = re.findall(r"\((\w+\.md)\)", INDEX.read_text())
PAGES = [runs.ROOT / "README.md", INDEX, *(INDEX.parent / name for name in dict.fromkeys(ORDER))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.S | re.M)
START = re.compile(
    r"^(?:\w+=\S+ )*(?:\.venv/bin/)?(?:posttrain|(?:torchrun|accelerate launch) .*-m posttrain\.cli) (.*)"
)
PYTHON = re.compile(r"^(?:\w+=\S+ )*(?:python|accelerate launch .*) -m ((?:posttrain|prompts)\.(?!cli)[\w.]+)(.*)")
INLINE = re.compile(r"`(posttrain [^`]*--config recipes/[^`]*)`")


def blocks(page: Path, *languages: str) -> list[str]:
    return [text for language, text in FENCE.findall(page.read_text()) if language in languages]


def commands(page: Path) -> list[str]:
    """Lines of shell blocks, continuations joined and comments dropped."""
    lines = [line for text in blocks(page, "bash", "sh", "") for line in text.replace("\\\n", " ").splitlines()]
    lines = [" ".join(re.sub(r"(^|\s)#\s.*", "", line).split()) for line in lines]
    return [line for line in lines if line]


ALL = list(dict.fromkeys(line for page in PAGES for line in commands(page)))
"""In the order of the pages, each once."""


def reason(line: str) -> str | None:
    """Why a command is not run."""
    if "--help" in line or line.endswith("--dry-run") or "--print_for" in line:
        return None
    return next((why for start, why in docs_commands.NOT_RUN.items() if line.startswith(start)), None)


RUN = [line for line in ALL if reason(line) is None]


# ---- what commands find ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A directory as a reader's checkout is, with the files that the pages say to write."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("recipes", "prompts", "posttrain", "rewards"):
        (folder / name).symlink_to(runs.ROOT / name)
    readme = runs.ROOT / "README.md"
    for text in blocks(readme, "python", "yaml"):
        name = re.match(r"# ([\w.]+)", text)
        assert name is not None, "a snippet of the README begins with its file's name"
        (folder / name[1]).write_text(text)
    shutil.copy(runs.ROOT / "recipes/nano/demo.yaml", folder / "recipe.yaml")
    yield folder
    sys.modules.pop("my_rewards", None)


def before(line: str) -> None:
    """Makes what a command reads and no command makes: a person's choices, and runs of names that stand for any."""
    if line.startswith("posttrain annotations") and not Path("runs/choices.jsonl").exists():
        store = Store(Path("runs/choices.jsonl"), SETTINGS)
        for pair in read_preferences(Path("runs/nano-pairs")):
            store.add("ann", Showing(pair.id, False, "chosen"), "left", 1.0)
        store.close()
    if line.startswith("posttrain annotations --images runs/mine"):
        store = Store(Path("runs/marks.jsonl"), replace(SETTINGS, mode="artifact"))
        for image in Images("runs/mine").prompts:
            store.add("ann", Showing(image, False, None), "faulty", 1.0)
        store.close()
    alike = {"runs/a": "runs/mine", "runs/a-0": "runs/mine", "runs/a-1": "runs/warm", "runs/b-0": "runs/mine",
             "runs/nano-grpo": "runs/mine", "runs/nano-text": "runs/mine", "runs/nano-count": "runs/mine"}  # fmt: skip
    words = {word.removesuffix("/checkpoints/best") for word in line.split()}
    if line.startswith("posttrain mopd"):
        words |= {"runs/nano-text", "runs/nano-count"}  # the teachers of its recipe, and prompts of both
        shutil.copy("prompts/nano/heldout.jsonl", "runs/nano-mopd-heldout.jsonl")
    for name in words & {*alike} - {path for path in alike if Path(path).exists()}:
        shutil.copytree(alike[name], name, symlinks=True)
        newest = sorted(Path(name, "checkpoints").glob("step-*"))[-1]
        if not (best := Path(name, "checkpoints/best")).exists():
            best.symlink_to(newest.name)
    if "runs/best-of" in line and not Path("runs/best-of").exists():  # its page makes it, in another test
        shutil.copytree("runs/mine", "runs/best-of", symlinks=True)
    if "theirs.safetensors" in line and not Path("theirs.safetensors").exists():
        Path("theirs.safetensors").symlink_to("out/lora.safetensors")
    if "lora.safetensors --turbo out/turbo" in line:
        Path("lora.safetensors").symlink_to("out/lora.safetensors")
        assert cli.main(["export", "--source", "runs/nano-tdm", "--output", "out/turbo"]) == 0


def small(kind: str, line: str) -> list[str]:
    assert kind in docs_commands.SMALL, f"{line}: docs_commands.SMALL does not say what makes {kind} small"
    more = [word for part, options in docs_commands.MORE.items() if part in line for word in options]
    return docs_commands.SMALL[kind] + more


def clear(words: list[str]) -> None:
    """Away with what the command will make, if another one made it; those that go on leave it."""
    if "--resume" in words or words[0] == "run":
        return
    config = yaml.safe_load(Path(words[words.index("--config") + 1]).read_text()) if "--config" in words else {}
    output = words[words.index("--output") + 1] if "--output" in words else config.get("output")
    if output and Path(output).is_dir():
        shutil.rmtree(output)
    elif output:
        Path(output).unlink(missing_ok=True)


@pytest.mark.long
@pytest.mark.parametrize("line", RUN, ids=lambda line: line[:100])
def test_a_command_runs(line, workspace, monkeypatch, capsys):
    monkeypatch.chdir(workspace)
    monkeypatch.setattr(sys, "path", [str(workspace), *sys.path])
    before(line)
    if module := PYTHON.match(line):
        monkeypatch.setattr(sys, "argv", [module[1], *shlex.split(module[2]), *small(module[1], line)])
        runpy.run_module(module[1], run_name="__main__", alter_sys=True)
        return
    match = START.match(line)
    assert match is not None, f"{line}: neither a command of posttrain nor a reason in docs_commands.NOT_RUN"
    words = shlex.split(match[1])
    if "--help" in words or "--print_config" in words:
        assert cli.main(words) == 0 and len(capsys.readouterr().out) > 200
        return
    kind = " ".join(words[:2]) if " ".join(words[:2]) in COMMANDS else words[0]
    clear(words)
    options = [] if "--dry-run" in words or "--print_for" in words else small(kind, line)
    assert cli.main([*words, *options]) == 0, capsys.readouterr().err


@pytest.mark.long  # draws with what the commands of its page have made
def test_the_snippet_for_a_turbo_draws(workspace, monkeypatch):
    """docs/exports.md; with the size of K2-nano's pictures, since it is K2-nano's Turbo."""
    monkeypatch.chdir(workspace)
    if not Path("out/turbo").exists():
        source = "runs/nano-tdm"
        assert Path(source).exists(), "made by the commands above"
        assert cli.main(["export", "--source", source, "--output", "out/turbo"]) == 0
    (text,) = blocks(runs.ROOT / "docs/exports.md", "python")
    scope: dict = {}
    exec(text.replace("guidance_scale=0", "guidance_scale=0, height=64, width=64"), scope)
    assert scope["image"].size == (64, 64)


@pytest.mark.long  # draws with what the commands of its page have made
def test_the_snippet_for_an_extracted_lora_draws(workspace, monkeypatch):
    """docs/merge.md, after the command above it: others clear the folder that it writes to."""
    monkeypatch.chdir(workspace)
    (line,) = (line for line in commands(runs.ROOT / "docs/merge.md") if line.startswith("posttrain extract"))
    assert cli.main(shlex.split(line)[1:]) == 0
    (text,) = blocks(runs.ROOT / "docs/merge.md", "python")
    scope: dict = {}
    exec(text, scope)
    assert scope["image"].size == (64, 64)


def test_the_notebook_of_the_readme_runs(workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    monkeypatch.setattr(sys, "path", [str(workspace), *sys.path])
    scope: dict = {}
    exec(Path("notebook.py").read_text(), scope)
    assert scope["scores"].valid_NK.tolist() == [[True], [False]] and 0 < scope["scores"].values_NK[0, 0] < 1


def test_the_code_of_the_library_page_runs(workspace, monkeypatch):
    """One block after another in one namespace, as the cells of a notebook."""
    monkeypatch.chdir(workspace)
    shutil.rmtree("runs/best-of", ignore_errors=True)
    scope: dict = {"__name__": "notebook"}
    # dataclass looks up the module that its class is of.
    monkeypatch.setitem(sys.modules, "notebook", types.ModuleType("notebook"))
    for text in blocks(LIBRARY, "python"):
        exec(text, scope)
    assert [image.size for image in scope["images"]] == [(64, 64)] * 4 and len(scope["after"]) == 2
    assert scope["again"].shape == scope["latents"].shape
    assert float(scope["log_ratio"].detach().abs().max()) < 1e-4  # the policy that drew is the one that is trained
    assert scope["advantages"].sum().abs() < 1e-6
    for name in ("metrics.jsonl", "report.html", "checkpoints"):
        assert Path("runs/best-of", name).exists(), name


def test_each_reason_is_needed_and_its_test_is_there():
    for start, why in docs_commands.NOT_RUN.items():
        assert start in {s for line in ALL for s in docs_commands.NOT_RUN if line.startswith(s)}, f"no command: {start}"
        for file, name in re.findall(r"(tests/\w+\.py)::(\w*)", why):
            assert name, f"{start}: names no test of {file}"
            assert f"def {name}(" in (runs.ROOT / file).read_text(), f"{start}: {file} has no {name}"
    kinds = {*COMMANDS} | {match[1] for line in ALL if (match := PYTHON.match(line))}
    assert {*docs_commands.SMALL} <= kinds


# ---- what is not run ------------------------------------------------------------------------------------------


def arguments(line: str) -> list[str]:
    match = START.match(line)
    return shlex.split(match[1]) if match else []


@pytest.mark.parametrize(
    "line", [*(line for line in ALL if reason(line) and START.match(line)),
             *(line for page in PAGES for line in INLINE.findall(" ".join(page.read_text().split())))],
)  # fmt: skip
def test_a_command_parses(line, monkeypatch):
    monkeypatch.chdir(runs.ROOT)
    parsed = cli.parse(arguments(line))
    assert parsed.text or isinstance(parsed.config, parsed.command.settings()) or parsed.name == "preflight"


@pytest.mark.parametrize("match", [m for line in ALL if (m := PYTHON.match(line))], ids=lambda match: match[0][:80])
def test_a_module_is_there_and_knows_its_options(match):
    spec = importlib.util.find_spec(match[1])
    assert spec is not None and spec.origin is not None
    source = Path(spec.origin).read_text()
    if "common.parser(" in source:  # options that all benches of runs share
        source += Path(spec.origin).with_name("common.py").read_text()
    for option in re.findall(r"--([a-z][\w-]*)", match[2].partition(" -- ")[0]):
        assert f'"--{option}"' in source, f"{match[1]} has no --{option}"


def test_rewards_in_the_pages_score():
    """The smallest reward of all, as the README and docs/rewards.md have it."""
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ((200, 0, 0), (0, 0, 200)))
    for page in (runs.ROOT / "README.md", runs.ROOT / "docs/rewards.md"):
        (text,) = [text for text in blocks(page, "python") if "def warmth" in text]
        scope: dict = {}
        exec(text, scope)
        scores = scope["warmth"]([red, blue, red], ["a room", "a hall", "a blue room"], requirements=None)
        assert scores == [pytest.approx(200 / 201), pytest.approx(0 / 201), None]


def recipes() -> list:
    return [
        pytest.param(page, text, id=f"{page.name}: {' '.join(text.split())[:60]}")
        for page in PAGES
        for text in blocks(page, "yaml")
    ]


@pytest.mark.parametrize(("page", "text"), recipes())
def test_a_snippet_is_a_part_of_a_recipe(page, text):
    data = yaml.safe_load(text)
    assert isinstance(data, dict)
    refused = []
    for name, command in COMMANDS.items():
        try:
            resolve(command.settings(), Given({page.name: data}))
        except UserError as error:
            if ": missing; add it to the recipe" in str(error):  # all that a part of a recipe lacks
                break
            refused.append(f"{name}: {error}")
            continue
        break
    else:
        pytest.fail("; ".join(refused))
    rewards = [RewardSpec(**entry) for entry in data.get("rewards", []) if "my_rewards" not in str(entry)]
    check_rewards(rewards, [server["name"] for server in data.get("servers", [])])


def test_records_in_the_pages_are_records(tmp_path):
    from prompts.records import read_prompts

    (text,) = blocks(runs.ROOT / "docs/runs.md", "json")
    (tmp_path / "p.jsonl").write_text(text)
    (record,) = read_prompts(tmp_path / "p.jsonl")
    assert json.loads(text)["texts"] == record.texts and record.requirements


def test_each_recipe_of_true_size_says_whether_it_has_been_run():
    for path in sorted((runs.ROOT / "recipes/k2").glob("*.yaml")):
        first = path.read_text().splitlines()[0]
        assert re.match(r"# (Run at true size with random weights on .+, 20\d\d-\d\d-\d\d|Not run)", first), path


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_each_page_is_in_the_index():
    assert {*PAGES[1:]} == {*(runs.ROOT / "docs").glob("*.md")} and len(PAGES) > 15


def test_paths_of_recipes_are_there():
    for page in PAGES:
        for path in re.findall(r"\brecipes/[\w/.-]+\.yaml", page.read_text()):
            assert (runs.ROOT / path).is_file(), f"{page.name}: {path}"
