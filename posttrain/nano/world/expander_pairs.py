"""Pairs for the prompt expander from scenes: a short prompt and the dense caption of one graph."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from posttrain.expander.config import ExpanderDataConfig
from posttrain.expander.data import Candidate, problem
from posttrain.nano.world import scenes
from posttrain.nano.world.captions import REGISTERS, reworded, statements
from posttrain.nano.world.font import GLYPHS
from posttrain.nano.world.prompts import FOLDER, TRAIN_WORDS
from prompts.records import read_prompts

DETAILS = (0.0, 0.0, 0.2, 0.6)
"""Shares of the optional details that a short prompt mentions; each is equally likely."""
SHARES = (0.6, 0.2, 0.2)
"""Shares of the registers."""
HELDOUT = ("heldout", "open", "short_heldout")
"""Sets of prompts that must not occur in a pair."""


@dataclass(frozen=True)
class NanoPair:
    prompt: str
    requirements: tuple[str, ...]
    """What the prompt says."""
    register: str
    completion: str
    texts: tuple[str, ...]
    """Words to draw, which prompt and completion both contain."""
    thought: str
    """What is asked, in keywords, and the style and background that are chosen: at most 24 tokens of expander-nano."""


def caption(rng: np.random.Generator) -> tuple[scenes.Scene, str]:
    """A scene and its dense caption. No word to draw is held out; half of them are random letters, to be copied."""
    letters = "".join(rng.choice(list(GLYPHS), size=rng.integers(1, 5)))
    scene = scenes.random_scene(rng, TRAIN_WORDS if rng.random() < 0.5 else [letters])
    return scene, scenes.describe(scene, rng, 1.0).prompt


@cache
def heldout() -> frozenset[str]:
    """The prompts of evaluations."""
    found: set[str] = set()
    for name in HELDOUT:
        found.update(record.prompt for record in read_prompts(FOLDER / f"{name}.jsonl"))
    return frozenset(found)


def short(scene: scenes.Scene, completion: str, rng: np.random.Generator) -> NanoPair:
    """A short prompt for a scene's dense caption, in a register drawn by SHARES."""
    description = scenes.describe(scene, rng, float(rng.choice(DETAILS)))
    register = str(rng.choice(REGISTERS, p=SHARES))
    prompt = reworded(description.prompt, register, rng)
    thought = thought_of(scene, description, rng)
    return NanoPair(prompt, tuple(description.requirements), register, completion, tuple(description.texts), thought)


def thought_of(scene: scenes.Scene, description: scenes.Description, rng: np.random.Generator) -> str:
    """What stands before the caption of a scene: the prompt's own words as keywords, then what it leaves open."""
    asked = reworded(description.prompt, "keywords", rng)
    chosen = []
    for kind, value in (("background", scene.background), ("style", scene.style)):
        if f"the {kind} is {value}" not in description.requirements:
            chosen.append(f"{value} {kind}")
    return f"{asked}; {', '.join(chosen)}" if chosen else asked


def candidates(config: ExpanderDataConfig, index: int) -> list[Candidate]:
    """The candidates of one scene, for `posttrain expander data`; the check reads the caption back."""
    rng = np.random.default_rng([config.seed, index])
    scene, completion = caption(rng)
    # Read back from the caption, and not taken from the scene: so faults of `describe` would show too.
    stated = statements(completion) or set()
    found: list[Candidate] = []
    for _ in range(config.per_caption):
        pair = short(scene, completion, rng)
        candidate = Candidate(pair.prompt, completion, "quoted" if pair.texts else "short", pair.register)
        if config.thoughts and rng.random() >= config.direct_share:
            candidate.thought = pair.thought
        candidate.dropped = problem(candidate, found)
        if candidate.dropped is None and not stated.issuperset(pair.requirements):
            candidate.dropped = "not in the caption"
        found.append(candidate)
    if rng.random() < config.long_share:
        found.append(Candidate(completion, completion, "long", "caption"))
    for candidate in found:
        # Whatever else is wrong with it: a prompt of an evaluation must never be trained on.
        if candidate.prompt in heldout():
            candidate.dropped = "a prompt of the evaluations"
    return found
