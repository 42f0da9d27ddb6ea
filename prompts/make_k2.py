"""Writes the starter prompts of recipes/k2: prompts/k2/train.jsonl, heldout.jsonl, short.jsonl and open.jsonl.

    python -m prompts.make_k2

Composed of the lists below, with requirements and texts of the same parts, so that recipes can be tried and judges be
asked at once. They are narrow: put your users' prompts in their place before a run that counts. Training and held-out
prompts share no prompt, no subject and no text to draw. `short.jsonl` and `open.jsonl` are to the expander what the
other two are to K2: they leave medium, light and place open.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prompts.parse import json_line

FOLDER = Path(__file__).parent / "k2"
LIVING = [
    ("an old fisherman", "mending a net"), ("a girl in a yellow raincoat", "jumping over a puddle"),
    ("a baker", "dusting loaves with flour"), ("two chess players", "leaning over a board"),
    ("a cellist", "playing with closed eyes"), ("a street vendor", "pouring tea"),
    ("a welder in a leather apron", "bending over sparks"), ("a red fox", "crossing a stream"),
    ("a grey heron", "standing on one leg"), ("three goats", "climbing a cliff"),
    ("a tabby cat", "sleeping in a bookshelf"), ("a white horse", "shaking its mane"),
    ("an octopus", "opening a glass jar"), ("a hummingbird", "hovering at a flower"),
    ("a grandmother and a boy", "shelling peas"), ("a mountaineer", "pitching a tent"),
    ("a dancer in a long skirt", "turning"), ("a potter", "shaping a bowl"),
    ("an astronaut", "watering a plant"), ("a black dog", "carrying a newspaper"),
]  # fmt: skip
THINGS = [
    "a brass telescope", "a bowl of persimmons", "a rusty bicycle", "a paper boat", "a grandfather clock",
    "a cracked porcelain teapot", "a stack of old suitcases", "a pair of red boots", "a typewriter", "a birdcage",
    "a violin without strings", "a globe", "a lantern", "a wooden rocking horse", "a jar of fireflies", "a silver key",
]  # fmt: skip
COUNTED = ["paper lanterns", "green apples", "sailing boats", "stone steps", "candles", "blue doors", "origami cranes",
           "hot-air balloons"]  # fmt: skip
NUMBERS = ("two", "three", "four", "five", "six")
RELATIONS = ("to the left of", "to the right of", "on top of", "behind", "in front of")
PLACES = [
    "on a pier at low tide", "in a greenhouse", "in an empty theatre", "on a rooftop above a city",
    "in a birch forest", "in a narrow kitchen", "at a night market", "in a railway carriage", "on a salt flat",
    "in a flooded street", "in a library with tall windows", "on a dune", "in a courtyard with orange trees",
    "in a workshop full of tools", "at the edge of a glacier", "under a bridge",
]  # fmt: skip
MEDIA = [
    "a 35 mm photograph", "a watercolour painting", "a linocut print", "an oil painting with thick strokes",
    "a pencil drawing", "a children's book illustration", "a stop-motion still", "a woodblock print",
    "an ink wash painting", "a low-poly rendering", "a pastel drawing", "a poster in flat colours",
    "a large-format black and white photograph", "a collage of torn paper", "a risograph print", "a fresco",
]  # fmt: skip
LIGHTS = ["soft morning light", "hard noon light", "the blue light of dusk", "candlelight", "light from one window",
          "neon light", "fog that swallows the distance", "light through leaves"]  # fmt: skip
BEARERS = ["a shop sign", "a chalkboard", "a book cover", "a neon sign", "a banner", "a ticket", "a mural"]
TEXTS = [
    "OPEN LATE", "Fresh Bread", "No Entry", "The Long Way Home", "Platform 9", "Sold Out", "Bonne Chance",
    "Mind the Cat", "SALT & SMOKE", "Last Orders", "Room 204", "Hello, Stranger", "Encore", "Made by Hand",
    "Tomorrow", "Quiet Please",
]  # fmt: skip


def main() -> None:
    taken: set[str] = set()  # across all files, so that no prompt is in two
    for name, count, seed, heldout in (("train", 1024, 0, False), ("heldout", 128, 1, True)):
        _write(name, _records(count, np.random.default_rng(seed), heldout, taken, short=False))
    for name, count, seed, heldout in (("short", 256, 2, False), ("open", 64, 3, True)):
        _write(name, _records(count, np.random.default_rng(seed), heldout, taken, short=True))


def _records(count: int, rng: np.random.Generator, heldout: bool, taken: set[str], short: bool) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    while len(records) < count:
        record = _record(rng, heldout, short)
        if record["prompt"] not in taken:
            taken.add(record["prompt"])
            records.append(record)
    return records


def _record(rng: np.random.Generator, heldout: bool, short: bool) -> dict[str, Any]:
    def one(words: Sequence[Any]) -> Any:
        return words[int(rng.integers(len(words)))]

    # Every fourth word is held out: training and held-out prompts share no subject and no text to draw.
    def own(words: Sequence[Any]) -> Any:
        return one([word for i, word in enumerate(words) if (i % 4 == 0) is heldout])

    texts: list[str] = []
    tag = one(("living", "thing", "count", "relation", "text"))
    if tag == "living":
        who, does = own(LIVING)
        subject, required = f"{who} {does}", [f"there is {who}", f"the picture shows {who} {does}"]
    elif tag == "thing":
        subject = own(THINGS)
        required = [f"there is {subject}"]
    elif tag == "count":
        subject = f"{one(NUMBERS)} {own(COUNTED)}"
        required = [f"there are exactly {subject}"]
    elif tag == "relation":
        first, second = own(THINGS), own(THINGS)
        while second == first:
            second = own(THINGS)
        subject = f"{first} {one(RELATIONS)} {second}"
        required = [f"there is {first}", f"there is {second}", f"there is {subject}"]
    else:
        texts = [own(TEXTS)]
        bearer = one(BEARERS)
        subject = f'{bearer} that reads "{texts[0]}"'
        required = [f"there is {bearer}", f'the text reads "{texts[0]}"']
    if not short:
        place, medium, light = one(PLACES), one(MEDIA), one(LIGHTS)
        required += [f"the scene is {place}", f"the picture looks like {medium}"]
        subject = f"{medium[0].upper()}{medium[1:]} of {subject}, {place}, in {light}."
    return {"prompt": subject, "requirements": required, "texts": texts, "tags": [tag]}


def _write(name: str, records: list[dict[str, Any]]) -> None:
    (FOLDER / f"{name}.jsonl").write_text("".join(map(json_line, records)), encoding="utf-8")


if __name__ == "__main__":
    main()
