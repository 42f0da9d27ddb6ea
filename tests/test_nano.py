"""The nano world: what is drawn is read back, what is changed is noticed, and prompt sets keep apart."""

import dataclasses
import hashlib
import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from posttrain.nano import oracles, prompts, scenes
from posttrain.nano.font import WORDS
from posttrain.nano.scenes import SIZE, Object, Scene
from prompts.records import columns, read_prompts

KINDS = ("exists", "count", "total", "size", "place", "relation", "style", "background", "text")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small convolutions gain nothing from more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def draw(n, seed, kind=None, where=lambda scene: True):
    """n scenes (of a kind, that meet a condition)."""
    rng, found = np.random.default_rng(seed), []
    while len(found) < n:
        scene = scenes.random_scene(rng, kind=kind)
        if where(scene):
            found.append(scene)
    return found


def read(drawn):
    return oracles.perceive([scenes.render(scene) for scene in drawn])


# reading true scenes


@pytest.fixture(scope="module")
def true():
    """300 scenes as they were drawn and as the oracle sees them."""
    drawn = draw(300, 0)
    return drawn, read(drawn)


@pytest.fixture(scope="module")
def marks(true):
    """Kind of statement -> whether the oracle agrees, over all statements about the true scenes."""
    rng, found = np.random.default_rng(1), {kind: [] for kind in KINDS}
    for scene, percept in zip(*true):
        for statement in scenes.describe(scene, rng).requirements:
            found[oracles.parse(statement)[0]].append(oracles.meets(percept, statement))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_true_statements_are_met(marks, kind):
    assert len(marks[kind]) >= 40
    assert np.mean(marks[kind]) >= 0.97


def test_true_scenes_are_free_of_artifacts(true):
    assert np.mean([percept.clean for percept in true[1]]) >= 0.97


def test_every_style_and_background_is_told_apart(true):
    seen = {name: {value: [] for value in values} for name, values in
            (("style", scenes.STYLES), ("background", scenes.BACKGROUNDS))}  # fmt: skip
    for scene, percept in zip(*true):
        for name in seen:
            seen[name][getattr(scene, name)].append(getattr(percept.scene, name) == getattr(scene, name))
    assert all(len(right) >= 15 and np.mean(right) >= 0.9 for values in seen.values() for right in values.values())


# deliberate corruptions


def other(options, value, rng):
    return str(rng.choice([option for option in options if option != value]))


def turned(scene):
    """Every object at the opposite place: right is left and top is bottom, the center stays."""
    return replace(scene, objects=tuple(replace(o, x=SIZE - 1 - o.x, y=SIZE - 1 - o.y) for o in scene.objects))


def with_first(scene, **changes):
    return replace(scene, objects=(replace(scene.objects[0], **changes), *scene.objects[1:]))


def wrong_colour(scene, rng):
    return with_first(scene, colour=other(scenes.COLOURS, scene.objects[0].colour, rng))


def wrong_shape(scene, rng):
    return with_first(scene, shape=other(scenes.SHAPES, scene.objects[0].shape, rng))


def one_less(scene, rng):
    return replace(scene, objects=scene.objects[:-1])


def wrong_place(scene, rng):
    return turned(scene)


def wrong_size(scene, rng):
    o = scene.objects[0]
    size = other(scenes.SIZES, o.size, rng)
    radius = scenes.SIZES[size]
    x, y = (min(max(v, radius + 2), SIZE - 3 - radius) for v in (o.x, o.y))
    return with_first(scene, size=size, radius=radius, x=x, y=y)


def wrong_style(scene, rng):
    return replace(scene, style=other(scenes.STYLES, scene.style, rng))


def wrong_background(scene, rng):
    return replace(scene, background=other(scenes.BACKGROUNDS, scene.background, rng))


def missing_word(scene, rng):
    return replace(scene, text="")


def changed_word(scene, rng):
    letters, i = list(scene.text), int(rng.integers(len(scene.text)))
    letters[i] = other(scenes.GLYPHS, letters[i], rng)
    return replace(scene, text="".join(letters))


def shorter_word(scene, rng):
    return replace(scene, text=scene.text[:-1])


def anything(scene):
    return True


CORRUPTIONS = [
    # (kind of scene, kind of statement that must fail, change, scenes to which it is one)
    ("single", "exists", wrong_colour, anything),
    ("single", "exists", wrong_shape, anything),
    ("trio", "exists", wrong_colour, anything),
    ("count", "count", one_less, anything),
    ("pair", "total", one_less, anything),
    ("pair", "relation", wrong_place, anything),
    ("single", "place", wrong_place, lambda scene: scene.objects[0].place != "center"),
    ("single", "size", wrong_size, anything),
    ("single", "style", wrong_style, anything),
    ("pair", "background", wrong_background, anything),
    ("text", "text", missing_word, anything),
    ("text", "text", changed_word, anything),
    ("text", "text", shorter_word, anything),
]


@pytest.mark.parametrize(
    ("scene_kind", "statement_kind", "change", "where"), CORRUPTIONS, ids=[f"{c[0]}-{c[2].__name__}" for c in CORRUPTIONS]
)
def test_corruptions_are_caught(scene_kind, statement_kind, change, where):
    """The statement about the true graph fails on a picture of the changed one."""
    rng = np.random.default_rng(2)
    drawn = draw(N, 3, scene_kind, where)
    statements = [
        next(s for s in scenes.describe(scene, rng).requirements if oracles.parse(s)[0] == statement_kind)
        for scene in drawn
    ]
    caught = [not oracles.meets(p, s) for p, s in zip(read([change(scene, rng) for scene in drawn]), statements)]
    print(change.__name__, np.mean(caught), [ (s.style, s.background, t) for s, t,c in zip(drawn,statements,caught) if not c][:4])
    assert np.mean(caught) >= 0.97


@pytest.mark.parametrize(("kind", "share"), [("broken", 0.85), ("doubled", 0.5), ("smeared", 0.5), ("garbled", 0.9)])
def test_damage_is_an_artifact(kind, share):
    rng = np.random.default_rng(4)
    drawn = draw(N, 5, "text" if kind == "garbled" else None)
    damaged = [scenes.damage(scenes.render(scene), scene, rng, kind) for scene in drawn]
    scores = oracles.artifact_free([Image.fromarray(image) for image in damaged], [""] * len(damaged))
    print(kind, 1-np.mean(scores))
    assert set(scores) <= {0.0, 1.0}
    assert 1 - np.mean(scores) >= share
N = 400
