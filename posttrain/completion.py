"""`posttrain --completion bash|zsh|fish`: a script for the shell that completes commands and options.

    source <(posttrain --completion bash)          # in ~/.bashrc; of zsh the same in ~/.zshrc, after compinit
    posttrain --completion fish | source           # in ~/.config/fish/config.fish

The words are those of this installation: print the script again after an update.
"""

from __future__ import annotations

import shlex

from posttrain import commands
from posttrain.config.fields import field_types
from posttrain.errors import UserError

SHELLS = ("bash", "zsh", "fish")

BASH = """\
_posttrain() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} first=${{COMP_WORDS[1]}} words=
    local name=$first
    [[ $first == expander && COMP_CWORD -gt 2 ]] && name="$first ${{COMP_WORDS[2]}}"
    if (( COMP_CWORD == 1 )); then
        words={commands}
    elif [[ $first == expander && COMP_CWORD -eq 2 ]]; then
        words={seconds}
    elif [[ $word == -* ]]; then
        case $name in
{cases}
        esac
    else
        # Recipes, run directories and other values: paths.
        COMPREPLY=($(compgen -f -- "$word"))
        return
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o filenames -F _posttrain posttrain
"""
ZSH = """\
autoload -U +X bashcompinit && bashcompinit
"""


def script(shell: str) -> str:
    if shell not in SHELLS:
        raise UserError(f"--completion: is '{shell}'; use one of {', '.join(SHELLS)}")
    options = {name: _options(command) for name, command in commands.every().items() if name != commands.CHECK}
    if shell == "fish":
        return _fish(options)
    # Bash completes one word at a time, so `expander sft` is offered as two.
    firsts: dict[str, None] = {}
    seconds, cases = [], []
    for name, words in options.items():
        first, *rest = name.split()
        firsts[first] = None
        seconds += rest
        cases.append(f"            {shlex.quote(name)}) words={shlex.quote(' '.join(words))} ;;")
    text = BASH.format(
        commands=shlex.quote(" ".join(firsts)), seconds=shlex.quote(" ".join(seconds)), cases="\n".join(cases)
    )
    return ZSH + text if shell == "zsh" else text


def _options(command: commands.Command) -> list[str]:
    words = ["--config", "--help", "--print_config", *(["--resume"] if command.resumable else [])]
    words += ["--dry-run"] if command.dry else []
    return words + [f"--{path}" for path in field_types(command.settings())]


def _fish(options: dict[str, list[str]]) -> str:
    lines = []
    for name, words in options.items():
        first, _, second = name.partition(" ")
        lines.append(f"complete -c posttrain -n __fish_use_subcommand -a {first}")
        seen = f"__fish_seen_subcommand_from {first}"
        if second:
            lines.append(f"complete -c posttrain -n '{seen}' -a {second}")
            # fish has no notion of a command of two words.
            seen += f"; and __fish_seen_subcommand_from {second}"
        for word in words:
            lines.append(f"complete -c posttrain -n '{seen}' -l {word.removeprefix('--')}")
    # `expander` is the first word of several commands, and is offered once.
    return "\n".join(dict.fromkeys(lines)) + "\n"
