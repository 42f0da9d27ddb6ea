"""Malformed inputs: real, valid ones with one structured mistake each, from fixed seeds.

`inputs(kind, count, folder)` hands inputs to the functions that the commands hand them to, until `count` of them were
refused. What a user may give wrong must end in one line; anything else that is raised passes through, with the input.

    python -m tests.helpers.fuzz KIND NUMBER      # shows one input, and what becomes of it
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import glob
import io
import json
import random
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from posttrain import cli, commands, preconditions
from posttrain.commands import CHECK
from posttrain.config.fields import field_types
from posttrain.preferences.config import ColumnMap
from posttrain.preferences.dataset import read_preferences
from posttrain.preferences.writer import PreferenceWriter
from prompts.records import read_prompts
from prompts.templates import load_template
from rewards.endpoints import JudgeError
from rewards.judge import Judge
from tests.helpers import fake_judge, runs
from tests.helpers.fuzz_files import (
    annotation_store,
    checkpoint_files,
    expander_pairs,
    judge_data,
    lora,
    requirements_file,
    run_directory,
)
from tests.helpers.fuzz_images import image_file, pair_directory, table_file
from tests.helpers.malformed import JUNK, jsonl, pictures, refused, spoiled, torn

SECONDS = 10
"""An input that takes longer hangs."""
# ---- recipes ------------------------------------------------------------------------------------------------------

COMMAND_OF = {
    "grpo": "grpo", "demo": "grpo", "nft": "nft", "mopd": "mopd", "sft": "sft", "style": "style", "stpo": "stpo",
    "tdm": "tdm", "pairs": "pairs", "evaluate": "evaluate", "pipeline": "run",
    "judge": "judge", "sample": "sample", "expander_data": "expander data", "expander_sft": "expander sft",
    "expander_gdpo": "expander gdpo", "expander_mine": "expander mine", "style_pairs": "pairs", "style_stpo": "stpo",
}  # fmt: skip
OTHERS: list[tuple[str, dict]] = [
    ("sample", {"output": "o", "model": {"path": "m"}, "prompt": "a red circle", "size": [64, 64], "guidance": 1.5}),
    ("export", {"source": "runs/a", "output": "o", "format": "diffusers", "private": True}),
    ("report", {"runs": ["runs/a"], "output": None}),
    ("serve", {"servers": [{"name": "judge", "model": "m", "port": 0}], "logs": "l"}),
    ("annotate", {"pairs": "p", "store": "s.jsonl", "port": 0, "repeats": 0.1}),
    ("annotations", {"store": "s.jsonl", "pairs": "p", "output": "o"}),
    ("expand", {"prompt": "a fox", "model": "m"}),
    ("bench", {"output": "o"}),
    ("preflight", {}),
    (CHECK, {"check": "runs/a", "turbo": "t"}),
]
YAML = [
    "steps: 5\nsteps: 6", "a: &a [*a]", "a: &a {b: *a}", "x: !!python/object/apply:os.system [id]", "!!set {a, b}",
    "steps: !!int five", "output: 2026-13-45", "output: 2026-01-01", "steps: !!binary '!'", "? [a, b]\n: 1", "- a\n- b",
    "steps: 0x", "steps: 1_000_000", "<<: 5", "<<: [1]", "output: *none", "--- a\n--- b", "%YAML 9.9\n---\na: 1",
    "\tsteps: 5", "steps: 5 # \x07", "null", "3", "'text'", "? {a: 1}\n: 2", "1: 2", "null: 3", "true: 4",
    "steps: 1:30", "output: !!timestamp x", "model: &m\n  <<: *m\n  path: x", "model: {path: [" * 300, "steps: .nan",
    "a: |", "a: &a [1,2,3,4,5,6,7,8,9]\n"
    + "".join(f"{y}: &{y} [{','.join([f'*{x}'] * 9)}]\n" for x, y in zip("abcdefgh", "bcdefghi")),
    "[" * 5000, "{" * 3000, "- " * 3000 + "a", "a: " + "[" * 400 + "]" * 400, "? " * 2000,
]  # fmt: skip
"""Put before a recipe, or in its place."""


@dataclasses.dataclass
class Accepted:
    """Stands in for the command's function: what passes the checks of settings is malformed no more."""

    configs: list = dataclasses.field(default_factory=list)

    def __call__(self, config: Any, **_: Any) -> None:
        self.configs.append(config)


ACCEPTED = Accepted()


def _command(path: str) -> str:
    stem = Path(path).stem
    return next(COMMAND_OF[name] for name in sorted(COMMAND_OF, key=len, reverse=True) if stem.startswith(name))


def recipes() -> list[tuple[str, dict]]:
    files = sorted(glob.glob(str(runs.ROOT / "recipes/*/*.yaml")))
    return [
        (_command(f), yaml.safe_load(Path(f).read_text()))
        for f in files
        if Path(f).parent.name != "launch" and "pair_sources" not in f
    ] + OTHERS


def _text(data: Any, rng: random.Random) -> bytes:
    """As JSON, which is YAML, or as YAML."""
    if rng.random() < 0.5:
        return json.dumps(data, ensure_ascii=rng.random() < 0.5).encode()
    return yaml.safe_dump(data, allow_unicode=True, sort_keys=False).encode()


def recipe(rng: random.Random, folder: Path) -> bool:
    command, data = rng.choice(recipes())
    file, how, more = folder / "recipe.yaml", rng.randrange(10), []
    if how < 5:
        file.write_bytes(_text(spoiled(data, rng) if data else {"x": rng.choice(JUNK)}, rng))
    elif how < 7:
        file.write_bytes(torn(_text(data, rng), rng))
    elif how == 7:
        text = rng.choice(YAML)
        file.write_bytes(text.encode() + (b"\n" + yaml.safe_dump(data).encode() if rng.random() < 0.3 else b""))
    elif how == 8:
        file.write_bytes(_text(data, rng))
        field = rng.choice([*field_types(commands.COMMANDS[command].settings()), "unknown", "", "steps.x", "rewards.0"])
        value = rng.choice(JUNK)
        word = value if isinstance(value, str) else json.dumps(value)
        more = [f"--{field}={word}"] if rng.random() < 0.7 else [f"--{field}", word]
    else:
        place = rng.choice(["", "\0", str(folder), "/nowhere/x.yaml", str(folder / ("x" * 300)), "recipe.yaml/", "-"])
        return _main(command, [f"--config={place}"] if rng.random() < 0.5 else ["--config", place])
    return _main(command, ["--config", str(file), *more])


def _main(command: str, options: list[str]) -> bool:
    """Whether a command line is refused as it should be, by the command itself."""
    words = ["export", "--check=x"] if command == CHECK else command.split()
    errors, held, check = io.StringIO(), commands.COMMANDS, preconditions.check
    preconditions.check = lambda *_: None  # which asks for files that are not there
    commands.COMMANDS = {n: dataclasses.replace(c, function="tests.helpers.fuzz:ACCEPTED") for n, c in held.items()}
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            try:
                code = cli.main([*words, *options])
            except SystemExit as exit:  # --help and --print_config, which a value may turn on
                code = exit.code
    finally:
        commands.COMMANDS, preconditions.check = held, check
    if code == 2:
        check_line(errors.getvalue())
    elif code != 0:
        raise AssertionError(f"exit code {code}: {errors.getvalue()}")
    return code == 2


def check_line(said: str) -> None:
    lines = said.strip("\n").split("\n")
    assert len(lines) == 1 and lines[0].startswith("posttrain: error: ") and lines[0].isprintable(), said
    assert len(lines[0]) > len("posttrain: error: ") + 5, said


# ---- prompts and pairs --------------------------------------------------------------------------------------------

PROMPTS = (runs.ROOT / "prompts/nano/heldout.jsonl").read_text().splitlines()[:6]


def prompt_file(rng: random.Random, folder: Path) -> bool:
    rows, file, how = [json.loads(line) for line in PROMPTS], folder / "prompts.jsonl", rng.randrange(10)
    if how < 6:
        i = rng.randrange(len(rows))
        rows[i] = spoiled(rows[i], rng)
        file.write_bytes(jsonl(rows, rng))
    elif how == 6:
        text = rng.choice(['{"prompt": "\\ud800"}', '{"prompt": "a", "prompt": 3}', '{"prompt": NaN}', "NaN", "3", "[]",
                           '{"prompt": "a", "id": "\\udfff"}', '{"prompt": "a", "n": ' + "9" * 5000 + "}", '"a"',
                           '{"prompt": ' + "[" * 100_000, '{"prompt": "a\\u0000b", "id": ""}', "{}",
                           "null"])  # fmt: skip
        file.write_text(f"{PROMPTS[0]}\n{text}\n")
    elif how < 9:
        file.write_bytes(torn(jsonl(rows, rng), rng))
    else:
        bad = [folder, "", "\0", "hf:", "hf::", folder / "none", "/dev/null", folder / ("x" * 300), f"{file}/"]
        return refused(lambda: read_prompts(rng.choice(bad)))
    return refused(lambda: read_prompts(file))


def _read_all(path: Path | str, columns: ColumnMap | None = None) -> None:
    pairs = read_preferences(path, columns, max_bad=0.0)
    for pair in pairs:
        assert pair.chosen.size == pair.rejected.size
    pairs.fingerprint()


def pair_set(rng: random.Random, folder: Path) -> bool:
    rows, how, file = pictures(folder), rng.randrange(10), folder / "pairs.jsonl"
    if how < 3:
        i = rng.randrange(len(rows))
        rows[i] = spoiled(rows[i], rng)
        file.write_bytes(jsonl(rows, rng))
    elif how < 5:
        file.write_bytes(torn(jsonl(rows, rng), rng))
    elif how == 5:
        file.write_bytes(jsonl(rows, rng))
        picture = folder / rows[rng.randrange(4)][rng.choice(["chosen", "rejected"])]
        data = torn(picture.read_bytes(), rng)
        picture.unlink()
        if rng.random() < 0.2:
            picture.mkdir()
        else:
            picture.write_bytes(data)
    elif how == 6:
        label = rng.choice([*JUNK, [1, 0], [0, 0], [1], [1, 2, 3]])
        rows = [row | {"label": label, "pair": [row["chosen"], row["rejected"]]} for row in rows]
        file.write_bytes(jsonl(rows, rng))
        names = rng.choice([{"first": "chosen", "second": "rejected", "label": "label"}, {},
                            {"pair": "pair", "label": "label"}, {"pair": "label", "label": "pair"},
                            {"chosen": "prompt", "rejected": "share"},
                            {"chosen": "chosen", "rejected": "rejected", "prompt": rng.choice(["seed", "none", ""])},
                            {"first": "chosen", "second": "rejected", "label": "share",
                             "label_second": "label"}])  # fmt: skip
        return refused(lambda: _read_all(file, ColumnMap(**names)))
    elif how < 9:
        made = folder / "set"
        file.write_bytes(jsonl(rows, rng))
        with PreferenceWriter(made, rows=2) as writer:
            for pair in read_preferences(file):
                writer.add(pair)
        victim = rng.choice(sorted(made.iterdir()))
        if victim.suffix == ".json" and rng.random() < 0.7:
            victim.write_bytes(jsonl([spoiled(json.loads(victim.read_text()), rng)], rng))
        elif rng.random() < 0.1:
            victim.unlink()
            victim.mkdir()
        else:
            victim.write_bytes(torn(victim.read_bytes(), rng))
        return refused(lambda: _read_all(made))
    else:
        bad = ["", "\0", "hf:", folder / "none", "/dev/null", folder, folder / ("x" * 300)]
        return refused(lambda: _read_all(rng.choice(bad)))
    return refused(lambda: _read_all(file))


# ---- judges -------------------------------------------------------------------------------------------------------

TEMPLATE = load_template("aesthetic")
STATUSES = ["200 OK"] * 12 + ["204 No Content", "301 Moved", "400 Bad Request", "404 Not Found", "418 Teapot", "600 X",
                              "100 Continue", "200", "abc"]  # fmt: skip


def judge_answer(rng: random.Random, folder: Path) -> bool:
    """A server's answer to a yes/no question or to one for a list: a right value or a JudgeError, never another."""
    yes_no = rng.random() < 0.7
    valid = json.loads(fake_judge.answer("x", None))
    if not yes_no:
        valid["choices"][0] |= {"finish_reason": "stop"}
        inner = {"requirements": ["a red circle", "a blue square"]}
        text = json.dumps(spoiled(inner, rng)).encode() if rng.random() < 0.5 else torn(json.dumps(inner).encode(), rng)
        valid["choices"][0]["message"]["content"] = text.decode(errors="replace")
        del valid["choices"][0]["logprobs"]
    how = rng.randrange(6)
    if how < 4:
        body = json.dumps(spoiled(valid, rng) if yes_no else valid).encode()
    elif how == 4:
        body = torn(json.dumps(valid).encode(), rng)
    else:
        odd = [b"", b"null", b"[]", b"NaN", b"3", b'"yes"', b'{"choices": null}', b'{"choices": [{}]}', b"[" * 100_000,
               b'{"choices": [{"logprobs": {"content": [{"top_logprobs": [{"token": "yes", "logprob": NaN}]}]}}]}',
               b'{"choices": [{"logprobs": {"content": [{"top_logprobs": [{"token": "yes", "logprob": Infinity}]}]}}]}',
               b'{"choices": [{"logprobs": {"content": [{"top_logprobs": [{"token": "yes", "logprob": 1e400}]}]}}]}',
               b'{"choices": [{"message": {"content": "\\ud800"}, "finish_reason": "stop"}]}',
               b"<html></html>"]  # fmt: skip
        body = rng.choice(odd)
    status = rng.choice(STATUSES)
    kind = rng.choice(
        ["application/json", "application/json", "text/html", "application/json; charset=utf-16", "", "\x01"]
    )
    more = rng.choice(
        ["", "", "", "Content-Encoding: gzip\r\n", "Transfer-Encoding: chunked\r\n", "Retry-After: never\r\n"]
    )
    length = rng.choice([len(body)] * 6 + [0, len(body) + 10, -1])
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\nConnection: close\r\n{more}\r\n"

    async def main() -> bool:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                await reader.readuntil(b"\r\n\r\n")
                writer.write(head.encode("latin-1") + body)
                await writer.drain()
            writer.close()

        async with await asyncio.start_server(handle, "127.0.0.1", 0) as server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
            asked = Judge("m", url, timeout=0.1, deadline=0.15, retries=0)
            try:
                if yes_no:
                    p = await asked.p_yes_text(TEMPLATE)
                    assert isinstance(p, float) and 0 <= p <= 1, p
                else:
                    found = await asked.write("requirements", TEMPLATE)
                    assert isinstance(found, list) and all(isinstance(text, str) for text in found), found
            except JudgeError as error:
                assert str(error).strip()
                return True
            finally:
                for endpoint in asked._endpoints.endpoints:
                    await endpoint.client.close()
        return False

    return asyncio.run(main())


# ---- run ----------------------------------------------------------------------------------------------------------

KINDS: dict[str, tuple[Callable[[random.Random, Path], bool], float]] = {
    "recipe": (recipe, 0.3),
    "prompt_file": (prompt_file, 0.17),
    "pair_set": (pair_set, 0.18),
    "judge_answer": (judge_answer, 0.12),
    "checkpoint_files": (checkpoint_files, 0.04),
    "annotation_store": (annotation_store, 0.04),
    "judge_data": (judge_data, 0.04),
    "expander_pairs": (expander_pairs, 0.03),
    "requirements_file": (requirements_file, 0.04),
    "run_directory": (run_directory, 0.03),
    "lora": (lora, 0.01),
}
"""What is spoiled, and its share of all inputs."""
FILES = {"image_file": image_file, "table_file": table_file, "pair_directory": pair_directory}
"""Files that are compared with what they held; `make fuzz` damages a thousand of each."""
MAKE = {kind: make for kind, (make, _) in KINDS.items()} | FILES


def outcome(kind: str, number: int, folder: Path) -> bool:
    """Whether input `number` of a kind was refused."""
    place = folder / f"{kind}{number}"
    place.mkdir()

    def late(*_: Any) -> None:
        raise TimeoutError(f"longer than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return MAKE[kind](random.Random(f"{kind} {number}"), place)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        shutil.rmtree(place)


def inputs(kind: str, count: int, folder: Path) -> Iterator[tuple[int, bool | BaseException]]:
    """Inputs of a kind until `count` were refused, with whether they were, or what went wrong."""
    left = count
    for number in range(4 * count + 10):
        if not left:
            return
        try:
            was_refused = outcome(kind, number, folder)
        except Exception as error:
            yield number, error
            left -= 1
            continue
        left -= was_refused
        yield number, was_refused
    raise AssertionError(f"{kind}: too few of its inputs are malformed")


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        print("refused" if outcome(sys.argv[1], int(sys.argv[2]), Path(scratch)) else "accepted")
