"""Writes the nano prompt sets: prompts/nano/{train,heldout,open,mixed,short,short_heldout}.jsonl.

    python -m posttrain.nano.world.prompts

Training and held-out prompts come from different seeds and share no prompt and no word to draw. `open.jsonl` leaves
style, background, size and place open, to measure diversity. Two thirds of `mixed.jsonl` teach K2-nano nothing: it
always meets what the easy ones require, and cannot spell what the hard ones do. The expander trains on `short.jsonl`
and is measured on `short_heldout.jsonl`, which leaves open what `open.jsonl` does.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.nano.world import scenes
from posttrain.nano.world.font import WORDS
from posttrain.resources import ROOT
from prompts.parse import read_lines

FOLDER = ROOT / "prompts/nano"
HELDOUT_WORDS = sorted(WORDS)[::5]
TRAIN_WORDS = sorted(set(WORDS) - set(HELDOUT_WORDS))


def read(name: str) -> list[dict[str, Any]]:
    """The rows of a set."""
    return read_lines(FOLDER / f"{name}.jsonl")


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """A JSONL file of these rows."""
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")


def make(n: int, seed: int, words: list[str], details: tuple[float, ...], taken: set[str]) -> list[dict]:
    """n prompt records with no prompt twice and none that is in `taken`, to which they are added."""
    rng, records = np.random.default_rng(seed), []
    while len(records) < n:
        scene = scenes.random_scene(rng, words)
        description = scenes.describe(scene, rng, float(rng.choice(details)))
        if description.prompt not in taken:
            taken.add(description.prompt)
            records.append({"prompt": description.prompt, "requirements": description.requirements,
                            "texts": description.texts, "tags": [scene.kind]})  # fmt: skip
    return records


def make_mixed(n: int, seed: int, words: list[str], taken: set[str]) -> list[dict]:
    """n prompts that teach, n too easy and n too hard (words of twice the length that it knows), by tag, shuffled."""
    rng = np.random.default_rng(seed)
    # Both ends for the adaptive pool to find: every image meets the one, none the other.
    easy, hard = [], []
    while len(easy) < n:
        scene = scenes.random_scene(rng, words)
        prompt = scenes.describe(scene, rng, float(rng.choice((0.2, 0.6, 1.0)))).prompt
        if scene.kind == "single" and prompt not in taken:
            taken.add(prompt)
            easy.append({"prompt": prompt, "requirements": ["there is exactly one shape"], "texts": []})
    while len(hard) < n:
        word = "".join(rng.choice(words, 2, replace=False))
        if (prompt := f'the word "{word}"') not in taken and len(word) > 5:
            taken.add(prompt)
            hard.append({"prompt": prompt, "requirements": [f'the text reads "{word}"'], "texts": [word]})
    tagged = {"mixed": make(n, seed, words, (0.2, 0.6, 1.0), taken), "easy": easy, "hard": hard}
    rows = []
    for tag, group in tagged.items():
        rows += [{**row, "tags": [tag]} for row in group]
    return [rows[i] for i in rng.permutation(len(rows))]


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    taken: set[str] = set()
    for name, n, seed, words, details in (
        ("heldout", 500, 1001, HELDOUT_WORDS, (0.2, 0.6, 1.0)),
        ("open", 40, 1002, HELDOUT_WORDS, (0.0,)),
        ("train", 2000, 1003, TRAIN_WORDS, (0.2, 0.6, 1.0)),
    ):
        write_lines(FOLDER / f"{name}.jsonl", make(n, seed, words, details, taken))
    # After those above, whose prompts they must not repeat.
    write_lines(FOLDER / "mixed.jsonl", make_mixed(64, 1004, TRAIN_WORDS, taken))
    write_lines(FOLDER / "short.jsonl", make(500, 1005, TRAIN_WORDS, (0.0, 0.0, 0.2), taken))
    write_lines(FOLDER / "short_heldout.jsonl", make(160, 1006, HELDOUT_WORDS, (0.0,), taken))


if __name__ == "__main__":
    main()
