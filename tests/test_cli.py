"""The real command line in a process of its own: a mistake is one line, exit code 2 and no traceback."""

import dataclasses
import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from posttrain import cli, commands
from posttrain.config.load import load_config
from tests.helpers.commands import Commands

ROOT = Path(__file__).parents[1]
RECIPE = """\
output: {tmp}/run
model: {{path: no-such-model}}
prompts: {{train: a.jsonl, heldout: b.jsonl}}
rewards:
- {{name: oracle, function: "pkg.mod:score"}}
"""


@pytest.fixture(scope="module")
def posttrain(tmp_path_factory):
    """The command line in processes that are forked from one that has imported grpo's settings."""
    commands = Commands(
        tmp_path_factory.mktemp("commands"), prepare="import posttrain.config.help, posttrain.grpo.config\n"
    )
    yield commands
    commands.close()


def start(*args) -> subprocess.CompletedProcess:
    """`posttrain ...` as a shell starts it."""
    command = [sys.executable, "-m", "posttrain.cli", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)


@pytest.fixture
def recipe(tmp_path):
    """A function that writes a recipe, the sound one with more text behind it or another text altogether."""

    def write(extra: str = "", text: str | None = None) -> Path:
        path = tmp_path / "x.yaml"
        path.write_text(RECIPE.format(tmp=tmp_path) + extra if text is None else text)
        return path

    return write


def fails(result: subprocess.CompletedProcess, *parts) -> None:
    """Exit code 2 and exactly one line on stderr that holds each part, in this order."""
    assert result.returncode == 2, result
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("posttrain: error: "), result.stderr
    at = 0
    for part in map(str, parts):
        assert part in result.stderr[at:], f"{part!r} not (in order) in {result.stderr!r}"
        at = result.stderr.index(part, at) + len(part)


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ("optim: {lrr: 1.0e-4}", "optim.lrr: unknown key; did you mean optim.lr?"),
        ("samplign: {steps: 4}", "samplign: unknown key; did you mean sampling?"),
        ("optim: {zzz: 1}", "optim.zzz: unknown key; known here: lr, betas"),
        ("optim: {lr: fast}", "optim.lr: is 'fast', expected a number"),
        ("steps: many", "steps: is 'many', expected a whole number"),
        ("steps: 2.5", "steps: is 2.5, expected a whole number"),
        ("sampling: {dynamics: ode}", "sampling.dynamics: is 'ode', expected one of flow, dance, cps"),
        ("sampling: {window: two}", "sampling.window: is 'two', expected a whole number or null"),
        ("sampling: {sizes: [64, 64]}", "sampling.sizes[0]: is 64, expected a list, each a whole number"),
        ("optim: 3", "optim: is 3, expected a section with lr, betas"),
        ("optim:", "optim: is null, expected a section"),
        ("lora: {rnk: 4}", "lora.rnk: unknown key; did you mean lora.rank?"),
        ("lora: {rank: big}", "lora.rank: is 'big', expected a whole number"),
        ("lora: 3", "lora: is 3, expected a section with rank, alpha, targets or null"),
        ("track: {tensorboard: maybe}", "track.tensorboard: is 'maybe', expected true or false"),
        ("pool: {kind: adaptve}", "pool.kind: is 'adaptve', expected one of uniform, adaptive"),
        ("pool: {quotas: {text: much}}", "pool.quotas.text: is 'much', expected a number"),
        ("pool: {quotas: {text: 0}}", "pool.quotas.text: is 0.0; use a number above 0"),
        ("groups: {group_size: 1}", "groups.group_size: is 1, but images are compared"),
        ("eval: {stop: {metrik: a}}", "eval.stop.metrik: unknown key; did you mean eval.stop.metric?"),
        ("eval: {best: orcale}", "eval.best: 'orcale' is no metric of the evaluation; known here: oracle, image/"),
        ("sampling: {sizes: [[64, 100]]}", "sampling.sizes[0]: 100 pixels is not a multiple of 16; use 96"),
    ],
)
def test_wrong_recipe(posttrain, recipe, extra, says):
    path = recipe(extra)
    fails(posttrain("grpo", "--config", path), path, says)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("output: [a\nmodel: b: c\n", "not YAML"),
        ("output: a\nseed: 1\nseed: 2\n", ":3: not YAML: key 'seed' is given twice"),
        ("- a\n- b\n", "is not a recipe"),
        ("", "is not a recipe"),
        ("model: {path: k2}\n", "output, prompts.train, prompts.heldout, rewards: missing; add"),
        ("output: 7\n", "output: is 7, expected text"),
        ("rewards: [{name: a}]\n", "rewards[0].function: is missing"),
        ("rewards: [{name: a, function: 'm:f', wieght: 1}]", "rewards[0].wieght: unknown key; did you mean"),
        ("rewards: [{name: a, function: 'm:f', weight: x}]", "rewards[0].weight: is 'x', expected a number"),
        ("servers: [{name: a, model: m, env: {N: 1}}]", "servers[0].env.N: is 1, expected text"),
    ],
)
def test_broken_recipe(posttrain, recipe, text, says):
    path = recipe(text=text)
    fails(posttrain("grpo", "--config", path), path, says)


def test_all_mistakes_are_told_at_once(posttrain, recipe):
    """A misspelt key also makes a setting missing, which is not one of them."""
    path = recipe(text="outptu: a\nmodel: {path: k2, dtyp: float32}\noptim: {lr: fast}\nsteps: 0\n")
    fails(
        posttrain("grpo", "--config", path), "model.dtyp: unknown key; did you mean model.dtype?",
        "outptu: unknown key; did you mean output?", f"; also {path}: ", "optim.lr: is 'fast', expected a number",
    )  # fmt: skip
    assert "missing" not in posttrain("grpo", "--config", path).stderr
    fails(
        posttrain("grpo", "--config", path, "--batch", "3", "--optim.lr", "1e-3"), "--batch: unknown option",
    )  # fmt: skip


def test_an_option_that_breaks_a_recipes_limit_is_named(posttrain, tmp_path):
    """The recipe's value is right until --steps is less; without that option it is the recipe's own mistake."""
    words = ["tdm", "--config", "recipes/nano/tdm.yaml", "--output", tmp_path / "run"]
    fails(posttrain(*words, "--steps", "5"), "command line: with --steps 5: fake.warmup: is 50 of 5 steps")
    (wrong := tmp_path / "wrong.yaml").write_text("fake: {warmup: 400}\n")
    fails(posttrain(*words, "--config", wrong, "--optim.lr", "1e-4"), f"{wrong}: fake.warmup: is 400 of 400 steps")


def test_export_says_what_check_takes(posttrain):
    assert "With --check LORA it measures" in posttrain("export", "--help").stdout
    fails(posttrain("export", "--check", "a", "--source", "b"), "--source: does not go with --check", "--check RUN")


def test_missing_recipe(tmp_path):
    fails(start("grpo", "--config", tmp_path / "none.yaml"), "none.yaml: no such file")
    fails(start("grpo", f"--config={tmp_path}"), "is a directory")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--optim.lrr", "1"], "--optim.lrr: unknown option; did you mean --optim.lr?"),
        (["--optim.lr", "fast"], "optim.lr: is 'fast', expected a number"),
        (["--optim.lr", "-1"], "optim.lr: is -1.0; use a number above 0"),
        (["--sampling.window=9"], "sampling.window: is 9, but of 8 steps 1 to 7 can have noise"),
        (["--optim", "3"], "optim: is '3', expected a section"),
        (["--lora.rnk", "3"], "--lora.rnk: unknown option; did you mean --lora.rank?"),
        (["--lora.rank", "big"], "lora.rank: is 'big', expected a whole number"),
        (["--lora", "3"], "lora: is '3', expected a section with rank, alpha, targets or null"),
        (["--optim.lr"], "--optim.lr: expected one argument"),
        (["stray.yaml"], "'stray.yaml' is not an option; a recipe is given as --config stray.yaml"),
    ],
)
def test_wrong_option_is_not_blamed_on_the_file(posttrain, recipe, args, says):
    fails(posttrain("grpo", "--config", recipe(), *args), "command line", says)


def test_unknown_command():
    fails(start("gprp"), "'gprp' is not a command; did you mean grpo?")
    assert start().returncode == 2


@pytest.mark.parametrize("command", ["grpo", "sft", "stpo", "tdm", "preflight", "serve", "sample", "export", "report"])
def test_help_is_quick_and_tells_defaults(command):
    began = time.perf_counter()
    result = start(command, "--help")
    assert result.returncode == 0 and result.stderr == ""
    assert time.perf_counter() - began < 3  # a third of a second when nothing else runs
    assert "default:" in result.stdout or "required" in result.stdout
    assert command in start("--help").stdout


def test_overrides_and_the_printed_recipe_can_be_run_again(posttrain, recipe):
    path = recipe("optim: {lr: 1e-5}")
    printed = posttrain("grpo", "--config", path, "--optim.passes", "2", "--print_config").stdout
    values = yaml.safe_load(printed)
    assert values["optim"]["lr"] == 1e-5
    assert values["optim"]["passes"] == 2
    assert "resume" not in values
    again = recipe(text=printed)
    assert posttrain("grpo", "--config", again, "--print_config").stdout == printed


def test_an_option_wins_over_a_recipe_wherever_it_stands(posttrain, recipe):
    path = recipe("optim: {lr: 1e-5}")
    for words in (["--optim.lr", "2e-5", "--config", path], ["--optim.lr=2e-5", f"--config={path}"]):
        assert yaml.safe_load(posttrain("grpo", *words, "--print_config").stdout)["optim"]["lr"] == 2e-5


@pytest.mark.parametrize(
    ("extra", "args", "lora"),
    [
        ("lora: null", [], None),
        ("lora: {rank: 4}", ["--lora", "null"], None),
        ("", ["--lora.rank", "4"], {"rank": 4, "alpha": 32.0, "targets": None}),
        ("lora: {alpha: 8}", ["--lora.rank", "4"], {"rank": 4, "alpha": 8.0, "targets": None}),
    ],
)
def test_an_adapter_or_none(posttrain, recipe, extra, args, lora):
    printed = posttrain("grpo", "--config", recipe(extra), *args, "--print_config").stdout
    assert yaml.safe_load(printed)["lora"] == lora


def test_yaml_anchors_may_be_overridden(posttrain, recipe):
    path = recipe("groups: &g {group_size: 4}\nlora: {rank: 4}\n")
    assert "group_size: 4" in posttrain("grpo", "--config", path, "--print_config").stdout
    path.write_text(path.read_text() + "eval: {<<: {every: 5, seed: 1}, seed: 2}\n")
    values = yaml.safe_load(posttrain("grpo", "--config", path, "--print_config").stdout)
    assert (values["eval"]["every"], values["eval"]["seed"]) == (5, 2)


MAIN = """
import dataclasses, sys, types
from posttrain import cli, commands, preconditions
module = types.ModuleType("fake")
def train(config, resume):
    {body}
module.train = train
sys.modules["fake"] = module
commands.COMMANDS["grpo"] = dataclasses.replace(commands.COMMANDS["grpo"], function="fake:train")
preconditions.check = lambda *_: None  # the recipe names files that are not there
sys.exit(cli.main(["grpo", "--config", {path!r}, *{args}]))
"""


def run_body(recipe, body: str, *args) -> subprocess.CompletedProcess:
    code = MAIN.format(body=body, path=str(recipe()), args=list(args))
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)


def test_the_command_gets_its_settings(recipe):
    body = "print(type(config).__name__, config.rewards[0].name, type(config.optim).__name__, resume)"
    assert run_body(recipe, body).stdout.split() == ["GRPOConfig", "oracle", "OptimConfig", "False"]
    assert run_body(recipe, body, "--resume").stdout.split()[-1] == "True"


def test_exit_codes(recipe):
    result = run_body(recipe, "raise cli.UserError('runs/a: no space left; free some')")
    fails(result, "runs/a: no space left; free some")
    result = run_body(recipe, "raise KeyboardInterrupt")
    assert (result.returncode, result.stderr) == (130, "posttrain: interrupted\n")
    result = run_body(recipe, "raise RuntimeError('a bug')")
    assert result.returncode == 1 and "Traceback" in result.stderr


def test_a_list_takes_nothing_from_the_list_that_it_replaces(tmp_path):
    """Lists are replaced whole, however long they are."""
    first = [{"name": "a", "function": "m:a", "heldout_only": True}, {"name": "b", "function": "m:b", "weight": 0.5}]
    second = [{"name": "c", "function": "m:c"}, {"name": "d", "function": "m:d", "gate": "multiply"}]
    base = {"output": "1e5", "model": {"path": "m"}, "prompts": {"train": "t", "heldout": "h"}, "rewards": first}
    for name, data in (("base", base), ("over", {"rewards": second})):
        (tmp_path / f"{name}.yaml").write_text(json.dumps(data))
    recipes = ["--config", str(tmp_path / "base.yaml"), "--config", str(tmp_path / "over.yaml")]
    for given in (recipes, [*recipes[:2], "--rewards", json.dumps(second)], [*recipes[:2], f"--rewards={second}"]):
        config, _ = load_config("grpo", given)
        assert [(r.name, r.heldout_only, r.weight, r.gate) for r in config.rewards] == [
            ("c", False, 1.0, "none"),
            ("d", False, 1.0, "multiply"),
        ]
        assert config.output == "1e5"


@pytest.mark.parametrize("given", ["'", "[", "2024-13-45"])
def test_an_option_that_is_no_yaml_is_named(capsys, tmp_path, given):
    base = {"output": "a", "model": {"path": "m"}, "prompts": {"train": "t", "heldout": "h"}, "rewards": []}
    (tmp_path / "base.yaml").write_text(json.dumps(base))
    for option, expected in (("--lora.alpha", "lora.alpha: is"), ("--rewards", "rewards: is")):
        assert cli.main(["grpo", "--config", str(tmp_path / "base.yaml"), option, given]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"posttrain: error: command line: {expected}") and error.count("\n") == 1


def test_nor_do_sections_of_its_entries(tmp_path):
    def delta(**weaker):
        return {"stronger": {"guidance": 3.5}, "weaker": weaker}

    first = [{"name": "a", "delta": delta(guidance=1.5)}, {"name": "b", "judged": {"group_size": 8}}]
    second = [{"name": "c", "delta": delta(drop=0.25)}, {"name": "d", "judged": {}}]
    ranks = [{"name": "r", "function": "m:r"}]
    base = {"output": "out", "model": {"path": "m"}, "prompts": "p", "sources": first, "rewards": ranks}
    for name, data in (("base", base), ("over", {"sources": second})):
        (tmp_path / f"{name}.yaml").write_text(json.dumps(data))
    recipes = ["--config", str(tmp_path / "base.yaml"), "--config", str(tmp_path / "over.yaml")]
    for given in (recipes, [*recipes[:2], "--sources", json.dumps(second)]):
        c, d = load_config("pairs", given)[0].sources
        assert (c.delta.weaker.guidance, c.delta.weaker.drop, c.judged) == (0.0, 0.25, None)
        assert (d.judged.group_size, d.delta) == (4, None)


def test_help_is_a_word_too(capsys):
    assert cli.main(["help"]) == 0 and "commands:" in capsys.readouterr().out
    assert cli.main(["help", "report"]) == 0 and "usage: posttrain report" in capsys.readouterr().out


def test_a_report_of_nothing_says_what_to_give(capsys):
    assert cli.main(["report"]) == 2
    assert capsys.readouterr().err == "posttrain: error: runs: missing; give it: posttrain report RUNS\n"


@pytest.mark.parametrize("number, remedy", [(errno.ENOSPC, "free some space"), (errno.EFBIG, "raise the limit")])
def test_a_disk_that_is_full_is_one_line_in_any_command(capsys, monkeypatch, tmp_path, number, remedy):
    def full(config):
        raise OSError(number, os.strerror(number))

    row = dataclasses.replace(commands.COMMANDS["report"], function="tests.test_cli:replaced")
    monkeypatch.setitem(commands.COMMANDS, "report", row)
    monkeypatch.setitem(globals(), "replaced", full)
    assert cli.main(["report", str(tmp_path), "--output", "a.html"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"posttrain: error: a.html: cannot be written: {os.strerror(number)}; ") and remedy in said
