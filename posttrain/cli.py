"""The command line: `posttrain <command> --config RECIPE --section.field value`.

A user's mistake ends in one line on stderr (file, field, remedy) and exit code 2; a bug keeps its traceback.
Below that line may follow what another program said, such as the end of a server's log.
The code of a command, and torch with it, is imported only when the command runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import itertools
import json
import re
import sys
from argparse import SUPPRESS, ArgumentError
from dataclasses import dataclass
from typing import Any, get_args, get_origin

import yaml

from posttrain import __version__, early
from posttrain.bench.config import BenchConfig
from posttrain.config.ranges import ConfigError
from posttrain.config.recipe import (
    check_recipe,
    completed,
    describe,
    dumped,
    field_types,
    fits,
    read_recipe,
    suggestion,
)
from posttrain.config.sections import ExportConfig, GRPOConfig, ReportConfig, SampleConfig, ServeConfig
from posttrain.early import CHECK
from posttrain.errors import UserError
from posttrain.expander.config import ExpandConfig, ExpanderDataConfig, ExpanderSFTConfig
from posttrain.expander.gdpo_config import ExpanderGDPOConfig
from posttrain.export.config import CarryoverConfig
from posttrain.judge.config import JudgeConfig
from posttrain.pairs.config import AnnotateConfig, AnnotationsConfig, PairsConfig
from posttrain.pipeline.config import PipelineConfig
from posttrain.project import DemoConfig, InitConfig
from posttrain.resources import packaged
from posttrain.runs import startup
from posttrain.stpo.config import STPOConfig
from posttrain.tdm.config import TDMConfig
from posttrain.validate import validate


@dataclass(frozen=True)
class Command:
    """A command: the dataclass of its settings and the import path of the function that takes one.

    The function may return an exit code.
    """

    config: type
    function: str
    help: str
    resumable: bool = False
    any_recipe: bool = False
    """It takes another command's recipe and reads only the keys that it knows."""
    positional: str | None = None
    """The option that a first argument without -- in front of it is the value of; if it is a list, all such first
    arguments are its values."""
    dry: bool = False
    """It has --dry-run."""
    others: tuple[type, ...] = ()
    """Of further commands whose recipes it takes: the one that knows the keys best."""


COMMANDS = {
    "init": Command(
        InitConfig, "posttrain.project:init", "write a project: recipes, prompts and a reward", positional="directory"
    ),
    "demo": Command(DemoConfig, "posttrain.project:demo", "carry out the whole of post-training on K2-nano"),
    "stpo": Command(
        STPOConfig, "posttrain.stpo.train:train", "train with STPO on pairs and write a run directory", True
    ),
    "grpo": Command(GRPOConfig, "posttrain.grpo.train:train", "train with GRPO and write a run directory", True),
    "tdm": Command(
        TDMConfig, "posttrain.tdm.train:train", "distil with TDM into few steps and write a run directory", True
    ),
    "preflight": Command(
        GRPOConfig,
        "posttrain.preflight.command:preflight",
        "check and time a recipe of grpo, stpo, tdm, pairs or expander gdpo before a run",
        others=(STPOConfig, TDMConfig, PairsConfig, ExpanderGDPOConfig),
    ),
    "pairs": Command(PairsConfig, "posttrain.pairs.make:make", "make preference pairs from prompts", True),
    "judge": Command(JudgeConfig, "posttrain.judge.train:train", "train a judge, as an adapter for vLLM", True),
    "serve": Command(ServeConfig, "posttrain.judge.serve:serve", "serve a recipe's judges", any_recipe=True),
    "annotate": Command(
        AnnotateConfig,
        "posttrain.annotate.serve:annotate",
        "serve a page where people choose between images or mark faults",
    ),
    "annotations": Command(
        AnnotationsConfig, "posttrain.annotate.export:write", "report and export what they answered"
    ),
    "expander data": Command(
        ExpanderDataConfig, "posttrain.expander.data:make", "make short prompts for long captions", True
    ),
    "expander sft": Command(
        ExpanderSFTConfig, "posttrain.expander.sft:train", "teach a chat model to expand prompts", True
    ),
    "expander gdpo": Command(
        ExpanderGDPOConfig, "posttrain.expander.gdpo:train", "train an expander by the pictures it makes", True
    ),
    "expand": Command(
        ExpandConfig, "posttrain.expander.expand:main", "expand a prompt in several ways", positional="prompt"
    ),
    "sample": Command(SampleConfig, "posttrain.sample_images:sample", "draw images from a checkpoint"),
    "bench": Command(BenchConfig, "posttrain.bench.run:bench", "measure the methods at true size, or plan a run"),
    "export": Command(ExportConfig, "posttrain.export.export:export", "write a checkpoint for other tools"),
    CHECK: Command(
        CarryoverConfig, "posttrain.export.lora_transfer:check", "measure on Turbo what a LoRA trained on Raw does"
    ),
    "run": Command(
        PipelineConfig,
        "posttrain.pipeline.run:carry_out",
        "carry out a pipeline of stages",
        True,
        dry=True,
        positional="config",
    ),
    "report": Command(
        ReportConfig, "posttrain.report.page:report", "write report.html for a run, or compare runs", positional="runs"
    ),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 for a failed check, 2 for a user's mistake, 130 for Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        return _run(argv)
    except UserError as error:
        print(f"posttrain: error: {_printable(' '.join(str(error).split()))}", file=sys.stderr)
        if error.detail:
            print(error.detail, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("posttrain: interrupted", file=sys.stderr)
        return 130


def _printable(text: str) -> str:
    """What a message quotes may hold what a terminal would obey."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def load_config(name: str, argv: list[str]) -> tuple[Any, bool]:
    """The checked settings of a command from its arguments, and whether --resume was given.

    Raises UserError for a missing file, an unknown key, a wrong type or a value out of range.
    """
    command, argv = COMMANDS[name], _recipes_first(argv)
    recipes = {path: read_recipe(path) for path in _recipe_paths(argv)}
    command = _of_recipes(command, recipes)
    if command.any_recipe:
        known = {f.name for f in dataclasses.fields(command.config)}
        recipes = {path: {k: v for k, v in data.items() if k in known} for path, data in recipes.items()}
    for path, data in recipes.items():
        check_recipe(path, data, command.config)
    parser = _parser(name, command)
    whole = {path: completed(data, command.config) for path, data in recipes.items()}
    try:
        values = parser.parse_args(_inlined(_completed(argv, field_types(command.config)), whole))
        parts = parser.instantiate(values)
    except ArgumentError as error:
        raise UserError(_explain(str(error), command, argv, recipes)) from error
    config = command.config(**{f.name: parts[f.name] for f in dataclasses.fields(command.config)})
    try:
        validate(config)
    except ConfigError as error:
        raise UserError(f"{_source(error.field, argv, recipes)}: {error.field}: {error.problem}") from None
    return config, bool(values.get("resume"))


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"posttrain {__version__}")
        return 0
    name, config, resume, options = parse(argv)
    command = COMMANDS[name]
    startup.lap("import")
    early.check(name, config, resume)
    startup.lap("check")
    module, _, function = command.function.partition(":")
    run = getattr(importlib.import_module(module), function)
    startup.lap("import")
    code = run(config, resume=resume, **options) if command.resumable else run(config)
    return code or 0


def parse(argv: list[str]) -> tuple[str, Any, bool, dict[str, bool]]:
    """A command's name, its checked settings, whether to resume, and further options of its function.

    Raises UserError.
    """
    seconds = [known.split()[1] for known in COMMANDS if known.startswith(f"{argv[0]} ") and known != CHECK]
    words = 2 if seconds else 1
    name, rest = " ".join(argv[:words]), argv[words:]
    if name not in COMMANDS:
        if seconds:
            raise UserError(f"{argv[0]}: is followed by one of {', '.join(seconds)}, not by '{' '.join(argv[1:2])}'")
        raise UserError(f"'{name}' is not a command{suggestion(name, list(COMMANDS))}")
    command = COMMANDS[name]
    rest = [_packaged(word) for word in rest]
    types = field_types(command.config)
    if command.positional and rest and not rest[0].startswith("-"):
        given = [*itertools.takewhile(lambda word: not word.startswith("-"), rest)]
        many = get_origin(types.get(command.positional)) is list
        rest = [f"--{command.positional}={json.dumps(given) if many else rest[0]}", *rest[len(given) if many else 1 :]]
    flags = {f"--{field}" for field, kind in types.items() if kind is bool}
    following = [*rest[1:], "--"]
    rest = [f"{a}=true" if a in flags and b.startswith("--") else a for a, b in zip(rest, following)]
    if name == "export" and any(word.partition("=")[0] == "--check" for word in rest):
        name, command = CHECK, COMMANDS[CHECK]
        rest = ["--help"] if {"-h", "--help"} & {*rest} else rest
    options: dict[str, bool] = {}
    if command.dry:
        options["dry_run"] = "--dry-run" in rest
        rest = [word for word in rest if word != "--dry-run"]
    config, resume = load_config(name, rest)
    return name, config, resume, options


def _packaged(word: str) -> str:
    """A word whose path, after the = if there is one, is a file of the package."""
    option, equals, path = word.partition("=")
    return f"{option}={packaged(path)}" if equals and option.startswith("--") else packaged(word)


def _usage() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{command.help}" for name, command in COMMANDS.items()]
    return (
        "usage: posttrain <command> --config RECIPE [--section.field value ...]\n\n"
        "Post-training for Krea 2 (K2). Settings come from recipes (YAML), a later one wins;"
        " options win over all.\n\n"
        "commands:\n" + "\n".join(lines) + "\n\n"
        "`posttrain <command> --help` lists the settings of a command with units and defaults;\n"
        "`posttrain <command> --config RECIPE --print_config` shows what they come to.\n"
        "Exit codes: 0 done, 1 a bug or a failed check, 2 a mistake in the input, 130 interrupted."
    )


def _of_recipes(command: Command, recipes: dict[str, Any]) -> Command:
    """The command with the settings of the one whose recipes these are."""
    given = {key for data in recipes.values() if isinstance(data, dict) for key in data}

    def unknown(config: type) -> int:
        return len(given - {field.name for field in dataclasses.fields(config)})

    return dataclasses.replace(command, config=min((command.config, *command.others), key=unknown))


def _parser(name: str, command: Command) -> Any:
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    about = (command.config.__doc__ or "").strip()
    if command.others:
        about = f"{command.help.capitalize()}; the recipe's keys say whose it is, and these are that one's. {about}"
    parser = ArgumentParser(
        prog=f"posttrain {name}",
        description=f"{about} Options given after --config override it.",
        usage=f"posttrain {name} --config RECIPE [--section.field value ...]",
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="Recipe: a YAML file with the keys below.")
    if command.resumable:
        parser.add_argument(
            "--resume",
            action="store_true",
            default=SUPPRESS,  # no part of the recipe, so --print_config must not print it
            help="Carry on from the newest whole checkpoint in the run directory, if there is one.",
        )
    if command.dry:
        parser.add_argument(
            "--dry-run",
            action="store_true",
            default=SUPPRESS,
            help="Only check all settings and paths, and tell the plan.",
        )
    parser.add_class_arguments(command.config)
    return parser


def _recipe_paths(argv: list[str]) -> list[str]:
    paths = [following for option, following in itertools.pairwise(argv) if option == "--config"]
    return paths + [arg.removeprefix("--config=") for arg in argv if arg.startswith("--config=")]


def _recipes_first(argv: list[str]) -> list[str]:
    """The arguments with the recipes before the options, which win wherever they stand."""
    recipes: list[str] = []
    others: list[str] = []
    for previous, word in itertools.pairwise(["", *argv]):
        chosen = "--config" in (previous, word.partition("=")[0])
        (recipes if chosen else others).append(word)
    return recipes + others


def _inlined(argv: list[str], recipes: dict[str, Any]) -> list[str]:
    """The arguments with what was read of a recipe in the place of its path."""
    texts = {path: dumped(data) for path, data in recipes.items()}
    words = []
    for previous, word in itertools.pairwise(["", *argv]):
        option, equals, path = word.partition("=")
        if previous == "--config":
            words.append(texts[word])
        else:
            words.append(f"--config={texts[path]}" if option == "--config" and equals else word)
    return words


def _completed(argv: list[str], types: dict[str, Any]) -> list[str]:
    """The arguments with whole entries where an option is a list of sections."""
    words = []
    for previous, word in itertools.pairwise(["", *argv]):
        option, equals, value = word.partition("=") if word.startswith("--") else (previous, "", word)
        kind = types.get(option.removeprefix("--")) if option.startswith("--") else None
        if get_origin(kind) is list and value and dataclasses.is_dataclass(get_args(kind)[0]):
            entries = _read(value)
            with contextlib.suppress(TypeError):  # a date is no JSON: jsonargparse says what is wrong with it
                value = json.dumps(completed(entries, kind)) if isinstance(entries, list) else value
            word = f"{option}={value}" if equals else value
        words.append(word)
    return words


def _read(option: str) -> Any:
    """The value of an option, as YAML reads it; what is no YAML stays text."""
    try:
        return yaml.safe_load(option)
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError):
        return option


def _given(field: str, argv: list[str]) -> str | None:
    """The value of a field, or of a section around it, on the command line."""
    parts = re.sub(r"\[.*", "", field).split(".")
    options = {"--" + ".".join(parts[:n]) for n in range(1, len(parts) + 1)}
    for i, arg in enumerate(argv):
        option, equals, value = arg.partition("=")
        if option.removesuffix("+") in options:
            return value if equals else next(iter(argv[i + 1 : i + 2]), "")
    return None


def _source(field: str, argv: list[str], recipes: dict[str, Any]) -> str:
    """Where a field's value came from: the command line or the last recipe that sets it."""
    if _given(field, argv) is not None or not recipes:
        return "command line"
    parts = re.sub(r"\[.*", "", field).split(".")
    for path, data in reversed(recipes.items()):
        for part in parts:
            data = data.get(part) if isinstance(data, dict) else None
        if data is not None:
            return path
    return list(recipes)[-1]


def _explain(message: str, command: Command, argv: list[str], recipes: dict[str, Any]) -> str:
    """jsonargparse's message as `source: field: problem; remedy`."""
    types = field_types(command.config)
    if match := re.fullmatch(r"unrecognized arguments: (.*)", message, re.DOTALL):
        option = match[1].split()[0]
        if not option.startswith("-"):
            return f"command line: '{option}' is not an option; a recipe is given as --config {option}"
        return _unknown(option.partition("=")[0].lstrip("-"), command, types)
    if match := re.search(r"the following arguments are required: (.*)", message):
        missing = match[1].split(", ")
        where = list(recipes)[-1] if recipes else "command line"
        options = " and ".join(f"--{field}" for field in missing)
        return f"{where}: {', '.join(missing)}: missing; add it to the recipe or pass {options}"
    if (match := re.match(r'Parser key "([^"]+)"', message)) and match[1] in types:
        field = match[1]
        # A section that may be null is one value to jsonargparse: which option in it was wrong?
        for option in [arg[2:].partition("=")[0] for arg in argv if arg.startswith(f"--{match[1]}.")]:
            if option not in types:
                return _unknown(option, command, types)
            if not fits(_read(_given(option, argv) or ""), types[option]):
                field = option
        value = _given(field, argv)
        shown = "" if value is None else f"is '{value}', "
        return f"{_source(field, argv, recipes)}: {field}: {shown}expected {describe(types[field])}"
    return f"command line: {message}"


def _unknown(option: str, command: Command, types: dict[str, Any]) -> str:
    known = ["config", "help", *(["resume"] if command.resumable else []), *types]
    return f"command line: --{option}: unknown option{suggestion(option, known, '--')}"


if __name__ == "__main__":
    sys.exit(main())
