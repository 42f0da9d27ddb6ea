"""Plain words: phrases that no page, message, comment or recipe of this project should use."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("posttrain", "rewards", "prompts", "docs", "recipes", "README.md", "CHANGELOG.md")
"""Where the words are looked for."""
TRAINED_WITH = (
    "prompts/judges", "prompts/expander.md", "prompts/make_k2.py", "rewards/injection.py",
    "posttrain/nano/world/captions.py", "posttrain/nano/build/judge_model.py", "posttrain/nano/weights/judge-",
)  # fmt: skip
"""Questions, captions and instructions that models were trained or measured with: another word is another question."""
SUFFIXES = (".py", ".md", ".yaml", ".sh", ".html", ".css", ".js", ".txt")
BANNED = {
    r"pictures?\b": "image",
    r"what is no YAML stays text": "values that are not valid YAML are kept as strings",
    r"shows what they come to|what it all comes to": "prints the resolved config",
    r"whole or not there": "atomic",
    r"whatever becomes of one": "runs every check, even if one fails",
    r"begun (once more|again)": "retried",
    r"the velocity that the network should say": "the target velocity",
    r"the eye stays as it is": "the vision tower is frozen",
    r"holds what is no": "contains a non-numeric value",
    r"how it is cut": "architecture",
    r"what comes? of (which|it)\b": "name the thing",
    r"\bmend(s|ed)?\b": "fix",
    r"goes? on (with|from|after|where)\b": "continue",
    r"\bquickened\b": "apply_runtime_options",
    r"\b(is|are) no (image|text|reward|number|list|prompt|multiple|divisor)\b": "is not",
}


def texts() -> list[Path]:
    files: list[Path] = []
    for name in FOLDERS:
        path = ROOT / name
        files += [path] if path.is_file() else sorted(path.rglob("*"))
    return [
        file for file in files if file.suffix in SUFFIXES and not str(file.relative_to(ROOT)).startswith(TRAINED_WITH)
    ]


@pytest.mark.parametrize("pattern", BANNED)
def test_a_word_is_not_used(pattern):
    found = []
    for file in texts():
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            if re.search(pattern, line, re.IGNORECASE):
                found.append(f"{file.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not found, f"say: {BANNED[pattern]}\n" + "\n".join(found)


PLURALS = re.compile(
    r" (?:[a-z-]+ )?(images|prompts|pairs|rows|tokens|steps|scores|groups|records|captions|candidates|expansions|"
    r"tensors|keys|layers|checks|attempts|processes|stages|runs|points|answers|samples|entries|cells)\b"
)
NEVER_ONE = (
    "procs.size", "processes", "count", "launched", "ranks", "per_process", "expansions", "len(runs)", "row",
    "config.max_length", "sampling.steps",
)  # fmt: skip
"""What stands before such a word and is never 1: processes that do not divide something, and the like."""


def messages(tree: ast.Module) -> Iterator[ast.JoinedStr]:
    """The f-strings of a module that a user may read: not those of errors in our own calls."""
    ours: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            if getattr(node.exc.func, "id", "") in ("ValueError", "RuntimeError"):
                ours |= set(ast.walk(node))
        elif isinstance(node, ast.JoinedStr) and node not in ours:
            yield node


def test_what_is_counted_may_be_one():
    """`counted` says 1 image and 2 images."""
    found = []
    for file in texts():
        if file.suffix != ".py" or "nano" in file.parts or file.parent.name == "prompts":
            continue
        for message in messages(ast.parse(file.read_text(encoding="utf-8"))):
            for value, text in zip(message.values, message.values[1:]):
                if not isinstance(value, ast.FormattedValue) or not isinstance(text, ast.Constant):
                    continue
                said = ast.unparse(value.value)
                if PLURALS.match(str(text.value)) and not said.isupper() and not said.endswith(NEVER_ONE):
                    found.append(f"{file.relative_to(ROOT)}:{message.lineno}: {said}{text.value}")
    assert not found, "use posttrain.errors.counted:\n" + "\n".join(found)
