"""The command line: `posttrain <command> --config RECIPE --section.field value`.

A user's mistake ends in one line on stderr (file, field, remedy) and exit code 2; a bug keeps its traceback.
Below that line may follow what another program said, such as the end of a server's log.
The code of a command, and torch with it, is imported only when the command runs; settings and pydantic with them only
where there is a command.
"""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import sys
from dataclasses import dataclass, field
from typing import Any, get_origin

from posttrain import __version__, commands
from posttrain.commands import CHECK, Command
from posttrain.errors import UserError
from posttrain.resources import packaged


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
    """A message may quote control characters, which a terminal would obey."""
    return "".join([c if c.isprintable() else repr(c)[1:-1] for c in text])


def _run(argv: list[str]) -> int:
    if argv[:1] == ["help"]:
        argv = [*argv[1:], "--help"]
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"posttrain {__version__}")
        return 0
    # Only here, so that no command pays for it.
    if argv[0].partition("=")[0] == "--completion":
        from posttrain.completion import script

        print(script(" ".join(argv).partition("--completion")[2].lstrip("= ")), end="")
        return 0
    parsed = parse(argv)
    if parsed.text:
        print(parsed.text, end="")
        return 0
    from posttrain import preconditions
    from posttrain.runs import startup

    startup.lap("import")
    preconditions.check(parsed.name, parsed.config, parsed.resume)
    startup.lap("check")
    # torch is imported with the command's code, which takes seconds.
    run = parsed.command.call()
    startup.lap("import")
    try:
        return run(parsed.config, **parsed.options()) or 0
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        # A library that writes a file need not say which.
        where = error.filename or getattr(parsed.config, "output", None) or "a file"
        raise UserError(f"{where}: cannot be written: {error.strerror}; {UNWRITABLE[error.errno]}") from error


UNWRITABLE = {
    errno.ENOSPC: "free some space, remove what was written, and run it again",
    errno.EDQUOT: "free some of your quota, remove what was written, and run it again",
    errno.EFBIG: "write to another disk, or raise the limit (ulimit -f)",
    errno.EROFS: "choose another place",
}
"""What a user can do where a disk does not take a file, whichever command writes it."""


@dataclass
class Parsed:
    """What a command line says."""

    name: str
    command: Command
    config: Any = None
    """The checked settings, unless there is a text to print instead."""
    flags: set[str] = field(default_factory=set)
    text: str = ""
    """The answer to --help or --print_config."""

    @property
    def resume(self) -> bool:
        return "resume" in self.flags

    def options(self) -> dict[str, bool]:
        """What the command's function takes besides the settings."""
        options = {"resume": self.resume} if self.command.resumable else {}
        return options | ({"dry_run": "dry-run" in self.flags} if self.command.dry else {})


def parse(argv: list[str]) -> Parsed:
    """Raises UserError."""
    from posttrain.config.load import resolve, split

    name, words = _name(argv)
    command = commands.get(name)
    assert command is not None
    words = _with_positional(command, list(map(_packaged, words)))
    # It is a command of its own, but one question to the user: what became of the LoRA.
    options = [word.partition("=")[0] for word in words]
    if name == "export" and "--check" in options:
        name, command = CHECK, commands.COMMANDS[CHECK]
        words = ["--help"] if {"-h", "--help"} & {*words} else words
        if "--source" in options and words != ["--help"]:
            raise UserError("command line: --source: does not go with --check, which names the run itself: --check RUN")
    config, given = split(command, words)
    parsed = Parsed(name, command, flags=given.flags)
    # Before the settings are checked: --help needs none of those that are required.
    if "help" in given.flags:
        from posttrain.config.help import help_text

        parsed.text = help_text(name, command, config) + "\n"
        return parsed
    parsed.config = resolve(config, given)
    if "print_config" in given.flags:
        from posttrain.config.load import printed

        parsed.text = printed(parsed.config)
    return parsed


def _name(argv: list[str]) -> tuple[str, list[str]]:
    """The command's name, of one or two words, and the words after it."""
    # Installed packages are looked through for an unknown name only: that takes tens of milliseconds.
    every = commands.COMMANDS if argv[0] in commands.COMMANDS else commands.every()
    seconds = [name.split()[1] for name in every if name.startswith(f"{argv[0]} ") and name != CHECK]
    # `expander sft` is one command of two words; `style` is one, and `style play` another.
    has_second = len(argv) > 1 and argv[1] in seconds
    count = 2 if has_second or (seconds and argv[0] not in every) else 1
    name = " ".join(argv[:count])
    if name in every and name != CHECK:
        return name, argv[count:]
    if seconds:
        raise UserError(f"{argv[0]}: is followed by one of {', '.join(seconds)}, not by '{' '.join(argv[1:2])}'")
    from posttrain.config.fields import suggestion

    raise UserError(f"'{name}' is not a command{suggestion(name, list(every))}")


def _with_positional(command: Command, words: list[str]) -> list[str]:
    """The words with a first argument that has no -- as the option that it stands for."""
    if command.positional and not words and _is_required(command, command.positional):
        name = next(name for name, row in commands.every().items() if row is command)
        raise UserError(f"{command.positional}: missing; give it: posttrain {name} {command.positional.upper()}")
    if not command.positional or not words or words[0].startswith("-"):
        return words
    from posttrain.config.fields import bare, hints

    kind = hints(command.settings()).get(command.positional)
    if get_origin(bare(kind)) is not list:
        return [f"--{command.positional}={words[0]}", *words[1:]]
    # As one option, since a list is replaced whole.
    given = [*itertools.takewhile(lambda word: not word.startswith("-"), words)]
    return [f"--{command.positional}={json.dumps(given)}", *words[len(given) :]]


def _is_required(command: Command, setting: str) -> bool:
    for entry in dataclasses.fields(command.settings()):
        if entry.name == setting:
            return entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
    return False


def _packaged(word: str) -> str:
    """A word whose path, after the = if there is one, is a file of the package."""
    option, equals, path = word.partition("=")
    return f"{option}={packaged(path)}" if equals and option.startswith("--") else packaged(word)


def _usage() -> str:
    every = commands.every()
    width = max(map(len, every)) + 2
    lines = [f"  {name:<{width}}{command.help}" for name, command in every.items()]
    return (
        "usage: posttrain <command> --config RECIPE [--section.field value ...]\n\n"
        "Post-training for Krea 2 (K2). Settings come from recipes (YAML), of which later ones win;"
        " options override them.\n\n"
        "commands:\n" + "\n".join(lines) + "\n\n"
        "`posttrain <command> --help` lists the settings of a command with units, ranges and defaults;\n"
        "`posttrain <command> --config RECIPE --print_config` prints the resolved settings;\n"
        "`posttrain --completion bash|zsh|fish` prints a script that completes commands and options.\n"
        "Exit codes: 0 done, 1 a bug or a failed check, 2 a mistake in the input, 130 interrupted."
    )


if __name__ == "__main__":
    sys.exit(main())
