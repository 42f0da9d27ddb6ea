"""Writes the nano prompt sets: prompts/nano/train.jsonl, heldout.jsonl and open.jsonl.

    python -m posttrain.nano.prompts

Training and held-out prompts come from different seeds and share no prompt and no word to draw. `open.jsonl` leaves
style, background, size and place open, to measure diversity.
"""

import json
from pathlib import Path

import numpy as np

from posttrain.nano import scenes
from posttrain.nano.font import WORDS

FOLDER = Path(__file__).parents[2] / "prompts" / "nano"
HELDOUT_WORDS = sorted(WORDS)[::5]
TRAIN_WORDS = sorted(set(WORDS) - set(HELDOUT_WORDS))


def make(n: int, seed: int, words: list[str], details: tuple[float, ...], taken: set[str]) -> list[dict]:
    """n prompt records with no prompt twice and none that is in `taken`, to which they are added."""
    rng, records = np.random.default_rng(seed), []
    while len(records) < n:
        scene = scenes.random_scene(rng, words)
        said = scenes.describe(scene, rng, float(rng.choice(details)))
        if said.prompt not in taken:
            taken.add(said.prompt)
            records.append({"prompt": said.prompt, "requirements": said.requirements, "texts": said.texts,
                            "tags": [scene.kind]})  # fmt: skip
    return records


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    taken: set[str] = set()
    for name, n, seed, words, details in (
        ("heldout", 500, 1001, HELDOUT_WORDS, (0.2, 0.6, 1.0)),
        ("open", 40, 1002, HELDOUT_WORDS, (0.0,)),
        ("train", 2000, 1003, TRAIN_WORDS, (0.2, 0.6, 1.0)),
    ):
        rows = make(n, seed, words, details, taken)
        (FOLDER / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


if __name__ == "__main__":
    main()
