"""Measures the shape of the code: size, density, folders, and how far the command is from the loss.

    python -m tests.house                          # this tree
    python -m tests.house --revision 7d01825       # a commit beside it, counted in the same way
    python -m tests.house --no-trace               # without the runs of a few seconds that the calls are counted in

"Product" is posttrain/, rewards/ and prompts/, Python files only.
"""

from __future__ import annotations

import argparse
import ast
import io
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[1]
PRODUCT = ("posttrain", "rewards", "prompts")
PUBLISHED = {"gdpo", "grpo"}
"""Names of published methods, which one letter tells apart, and which stay."""
LONG = 60
"""Lines of a function beyond which it counts as long, decorators and docstring included."""
METHODS = ("grpo", "stpo", "tdm")
BENCH = Path("posttrain/bench")
"""Measures the methods that it names; a method runs without it."""
OWN_FILES = 4
"""Files that any new method brings: its package (counted once), a recipe, a page of docs, a test."""
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
SETTINGS = re.compile(
    r"posttrain/(config/(?!metrics)\w+|(.+/)?(\w+_)?config|validate\w*|ranges|recipe|changes|cli|commands)\.py"
)
"""Where settings, their ranges and the parsing of arguments stand, in the layout of packages and in the one before."""
GOALS = {
    "largest folder, modules": "<= 20",
    "largest folder of tests, modules": "",
    "calls from command to loss, grpo": "<= 6",
    "calls from command to loss, sft": "<= 6",
    "calls from command to loss, stpo": "<= 6",
    "calls from command to loss, tdm": "<= 6",
    "calls from command to loss, gdpo": "<= 6, TRL's aside",
    "files to touch for a new method": "<= 5",
    "lines for settings, ranges, parsing": "<= 700",
    "product lines": "<= 25,000",
    "comprehensions per 100 lines": "<= 3",
    "comments per 100 lines": ">= 4",
    "functions over 60 lines": "<= 1 %",
    "definitions with a docstring": "",
    "modules named almost alike": "none",
}
NOTES = {
    "calls from command to loss": "functions of posttrain on the stack when the loss is computed, less one",
    "files to touch for a new method": f"files, but for nano/, whose code names {', '.join(METHODS)} alike; and"
    f" {OWN_FILES} of its own: package, recipe, page, test",
    "lines for settings, ranges, parsing": "without blank lines, comments and docstrings",
    "modules named almost alike": "names in the product that one letter tells apart, or a plural s",
}


@dataclass
class Counts:
    """Of one or more files."""

    lines: int = 0
    code: int = 0
    """Lines that are neither blank, nor a comment, nor of a docstring."""
    comprehensions: int = 0
    comments: int = 0
    """With #, but for directives to tools."""
    functions: int = 0
    long: int = 0
    definitions: int = 0
    """Modules, classes and functions."""
    documented: int = 0
    words: set[str] = field(default_factory=set)
    """Those of METHODS that the code names."""

    def __add__(self, other: Counts) -> Counts:
        numbers = [name for name, value in vars(self).items() if isinstance(value, int)]
        summed = {name: getattr(self, name) + getattr(other, name) for name in numbers}
        return Counts(**summed)


def count(text: str) -> Counts:
    """Of one file's text."""
    tree = ast.parse(text)
    found = Counts(lines=len(text.splitlines()))
    strings: set[int] = set()  # lines of docstrings, those of attributes too
    for node in ast.walk(tree):
        if isinstance(node, COMPREHENSIONS):
            found.comprehensions += 1
        if isinstance(node, FUNCTIONS):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found.functions += 1
            found.long += (node.end_lineno or first) - first + 1 > LONG
        if isinstance(node, (*FUNCTIONS, ast.ClassDef, ast.Module)) and (node.body or not isinstance(node, ast.Module)):
            found.definitions += 1
            found.documented += ast.get_docstring(node, clean=False) is not None
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            strings.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        lines = range(token.start[0], token.end[0] + 1)
        if token.type == tokenize.COMMENT:
            found.comments += re.match(r"#\s*(noqa|type:|pyright:|fmt:)", token.string) is None
        elif token.string.strip():  # neither a line's end nor its indentation
            code.update(lines)
        if token.type in (tokenize.NAME, tokenize.STRING) and not strings.issuperset(lines):
            found.words.update(name for name in METHODS if name in token.string.lower())
    found.code = len(code - strings)
    return found


def alike(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Pairs of names that one letter tells apart: another one, one more, or a plural's ending."""
    for a, b in itertools.combinations(sorted(set(names)), 2):
        short, long = sorted((a, b), key=len)
        other_letter = len(a) == len(b) and sum(x != y for x, y in zip(a, b)) == 1
        one_more = any(long[:i] + long[i + 1 :] == short for i in range(len(long)))
        is_alike = other_letter or one_more or long == short + "es"
        if len(short) > 2 and is_alike and {a, b} != PUBLISHED:
            yield short, long


def files_of(root: Path, tops: Iterable[str]) -> list[Path]:
    """Python files below these folders, as paths from the root."""
    found: list[Path] = []
    for top in tops:
        found += [path.relative_to(root) for path in (root / top).rglob("*.py")]
    return sorted(found)


def largest(paths: Iterable[Path]) -> str:
    """The folder with the most modules, and how many."""
    modules: dict[str, int] = {}
    for path in paths:
        if path.name != "__init__.py":
            modules[str(path.parent)] = modules.get(str(path.parent), 0) + 1
    folder = max(modules, key=modules.__getitem__)
    return f"{modules[folder]} ({folder})"


def measure(root: Path, trace: bool) -> dict[str, str]:
    """What GOALS lists, of the tree there."""
    product = files_of(root, PRODUCT)
    by_file = {path: count((root / path).read_text(encoding="utf-8")) for path in product}
    total = sum(by_file.values(), Counts())
    settings = [path for path in product if SETTINGS.fullmatch(str(path))]
    shared = [path for path, counts in by_file.items() if counts.words == set(METHODS) and "nano" not in path.parts]
    similar = [f"{a}/{b}" for a, b in alike(path.stem for path in product if path.name != "__init__.py")]
    found = {
        "largest folder, modules": largest(product),
        "largest folder of tests, modules": largest(files_of(root, ["tests"])),
        "files to touch for a new method": _to_touch(shared),
        "lines for settings, ranges, parsing": f"{sum(by_file[path].code for path in settings):,}",
        "product lines": f"{total.lines:,}",
        "comprehensions per 100 lines": f"{100 * total.comprehensions / total.lines:.1f}",
        "comments per 100 lines": f"{100 * total.comments / total.lines:.1f}",
        "functions over 60 lines": f"{100 * total.long / total.functions:.1f} % ({total.long})",
        "definitions with a docstring": f"{100 * total.documented / total.definitions:.0f} %",
        "modules named almost alike": ", ".join(similar) or "none",
    }
    for method in LOSSES if trace else ():
        found[f"calls from command to loss, {method}"] = calls_to_loss(root, method)
    return found


def _to_touch(shared: Sequence[Path]) -> str:
    timed = [path.stem for path in shared if path.parent == BENCH]
    needed = [path.stem for path in shared if path.parent != BENCH]
    optional = f"; to have posttrain bench time it, also {', '.join(timed)}" if timed else ""
    return f"{OWN_FILES + len(needed)} (its own {OWN_FILES}, {', '.join(needed)}{optional})"


# ---- calls ------------------------------------------------------------------------------------------------

LOSSES = {
    "grpo": "clipped_policy",
    "sft": "flow_loss",
    "stpo": "preference_terms",
    "tdm": "fake_loss",
    "gdpo": "compute_loss",
}
"""The function that computes a method's loss; for gdpo that of TRL's trainer, which calls none of ours."""
RUNS = {
    "grpo": ["--config", "recipes/nano/demo.yaml", "--sampling.steps", "3", "--sampling.window", "1",
             "--groups.prompts_per_step", "1", "--groups.group_size", "2", "--groups.micro_batch", "2",
             "--eval.prompts", "1", "--eval.groups", "0", "--eval.steps", "1"],
    "sft": ["--config", "recipes/nano/sft.yaml", "--images.train", "{images}", "--images.cache", "{images}-cache",
            "--images.columns.captions", "{{caption: 1}}", "--images.heldout", "0.5", "--heldout", "null",
            "--rewards", "[]", "--batch", "2", "--micro_batch", "2", "--eval.prompts", "1", "--eval.groups", "0",
            "--eval.steps", "1"],
    "tdm": ["--config", "recipes/nano/tdm.yaml", "--student.steps", "[2]", "--batch", "2", "--micro_batch", "2",
            "--eval.prompts", "1", "--eval.groups", "0", "--fake.warmup", "1"],
    "stpo": ["--config", "recipes/nano/stpo_synthetic.yaml", "--pairs.train", "{pairs}", "--batch", "2",
             "--micro_batch", "2", "--eval.prompts", "1", "--eval.groups", "0", "--eval.steps", "1"],
    "gdpo": ["--config", "recipes/nano/expander_gdpo.yaml", "--renderer.steps", "1",
             "--model.path", "posttrain/nano/weights/expander-nano", "--eval.group_size", "3",
             "--groups.prompts_per_step", "1", "--groups.group_size", "3", "--groups.micro_batch", "3",
             "--eval.prompts", "1"],
}  # fmt: skip
TRACER = """
import sys
from pathlib import Path
root, name, arguments = Path.cwd() / "posttrain", sys.argv[1], sys.argv[2:]
from posttrain.cli import main

def own(frame):
    # Comprehensions and lambdas are frames too; a lambda that carries the method is a call, a comprehension is none.
    code = frame.f_code
    return str(root) in code.co_filename and not code.co_name.endswith("comp>") and code.co_name != "<module>"

def look(frame, event, argument):
    # With gradients: evaluations compute the same losses, by another way.
    if event == "call" and frame.f_code.co_name == name and sys.modules["torch"].is_grad_enabled():
        sys.setprofile(None)
        names = [] if own(frame) else [name]
        while frame is not None:
            if own(frame):
                names.append(frame.f_code.co_name)
            frame = frame.f_back
        print("CALLS", " > ".join(reversed(names)), flush=True)
        import os
        os._exit(0)

sys.argv = ["posttrain", *arguments]
sys.setprofile(look)
sys.exit(main())
"""


def calls_to_loss(root: Path, method: str) -> str:
    """Runs the command in that tree until its loss is computed for the first time."""
    command = ["expander", "gdpo"] if method == "gdpo" else [method]
    with tempfile.TemporaryDirectory() as folder:
        options = [word.format(pairs=f"{folder}/pairs.jsonl", images=f"{folder}/images") for word in RUNS[method]]
        if method == "stpo":
            _write_pairs(Path(folder))
        if method == "sft":
            _write_images(Path(folder) / "images")
        options += ["--output", f"{folder}/run"]
        done = subprocess.run(
            [sys.executable, "-c", TRACER, LOSSES[method], *command, *options],
            cwd=root, env=_environment(root), capture_output=True, text=True,
        )  # fmt: skip
    for line in done.stdout.splitlines():
        if line.startswith("CALLS "):
            names = line.removeprefix("CALLS ").split(" > ")
            return f"{len(names) - 1} ({' > '.join(names)})"
    last = (done.stderr.strip().splitlines() or ["no output"])[-1]
    return f"not reached: {last}"


def _environment(root: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def _write_pairs(folder: Path) -> None:
    """A few pairs of plain images, of the size that K2-nano draws."""
    rows = []
    for i in range(8):
        for name, shade in (("chosen", 200), ("rejected", 60)):
            Image.new("RGB", (64, 64), (shade, 30 * i, 90)).save(folder / f"{name}{i}.png")
        rows.append({"prompt": f"a red square {i}", "chosen": f"chosen{i}.png", "rejected": f"rejected{i}.png"})
    lines = [json.dumps(row) for row in rows]
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")


def _write_images(folder: Path) -> None:
    """A few plain images with captions beside them."""
    folder.mkdir()
    for i in range(8):
        Image.new("RGB", (64, 64), (30 * i, 60, 90)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a red square {i}")


# ---- the command ------------------------------------------------------------------------------------------


def tree_of(revision: str, folder: Path) -> Path:
    """The files of a commit, written below `folder`."""
    archive = subprocess.run(["git", "archive", revision], cwd=ROOT, capture_output=True, check=True).stdout
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive, check=True)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--revision", help="a commit to count too")
    parser.add_argument("--no-trace", dest="trace", action="store_false", help="count no calls, which takes runs")
    args = parser.parse_args()
    columns = {}
    if args.revision:
        with tempfile.TemporaryDirectory() as folder:
            columns[args.revision] = measure(tree_of(args.revision, Path(folder)), args.trace)
    columns["this tree"] = measure(ROOT, args.trace)
    print("| | " + " | ".join([*columns, "goal"]) + " |\n|---" + "|---" * (len(columns) + 1) + "|")
    for name, goal in GOALS.items():
        cells = [found.get(name, "not counted") for found in columns.values()]
        print(f"| {name} | " + " | ".join([*cells, goal]) + " |")
    for name, note in NOTES.items():
        print(f"\n{name}: {note}.")


if __name__ == "__main__":
    main()
