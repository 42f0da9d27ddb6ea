"""2,000 malformed inputs, and some of them given to the commands themselves."""

import random
from pathlib import Path

import pytest

from tests.helpers import fuzz, runs

COUNT = 2000


@pytest.mark.parametrize(("kind", "share"), [(kind, share) for kind, (_, share) in fuzz.KINDS.items()])
def test_malformed_inputs_end_in_one_line(kind, share, tmp_path):
    found = dict(fuzz.inputs(kind, round(COUNT * share), tmp_path))
    wrong = {number: error for number, error in found.items() if isinstance(error, BaseException)}
    assert not wrong, f"python -m tests.helpers.fuzz {kind} {next(iter(wrong))}: {next(iter(wrong.values()))!r}"
    assert sum(outcome is True for outcome in found.values()) == round(COUNT * share)


def spoiled_file(file: Path, number: int) -> None:
    """Until nothing in it can be read as what it is."""
    rng = random.Random(number)
    lines = file.read_bytes().splitlines(keepends=True)
    lines[rng.randrange(len(lines))] = rng.choice(
        [b'{"prompt": 3}\n', b'{"prompt": "a"\n', b"[]\n", b"\xff\xfe\n", b"[" * 100_000 + b"\n", b'{"prompt": ""}\n',
         b'{"prompt": "\\ud800"}\n', b"\0\n", b'{"prompt": "a", "tags": "b"}\n', b'{"prompt": null}\n', b"{}\n"]
    )  # fmt: skip
    file.write_bytes(b"".join(lines))


@pytest.mark.parametrize("number", range(12))
@pytest.mark.parametrize("method", ["grpo", "nft", "stpo", "tdm"])
def test_a_command_writes_nothing(command, model, tmp_path, method, number):
    make = {"grpo": runs.config, "nft": runs.nft_config, "stpo": runs.stpo_config, "tdm": runs.tdm_config}[method]
    made = make(tmp_path, model)
    recipe = runs.recipe(made, tmp_path / "recipe.yaml")
    name = random.Random(number).choice(["pairs", "heldout"] if method == "stpo" else ["train", "heldout"])
    spoiled_file(tmp_path / f"{name}.jsonl", number)
    before = sorted(tmp_path.rglob("*"))
    result = command(method, "--config", recipe)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr and result.stdout == ""
    fuzz.check_line(result.stderr)
    assert f"{name}.jsonl" in result.stderr
    left = sorted(path for path in tmp_path.rglob("*") if "cache" not in path.relative_to(tmp_path).parts)
    assert left == before  # rows of a set are read while they are encoded, into a cache of whole files
