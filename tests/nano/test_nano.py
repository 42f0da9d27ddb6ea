"""The nano world: what is drawn is read back, and what is changed is noticed."""

import hashlib
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from posttrain.nano.world import damage, oracles, scenes, statements
from posttrain.nano.world.scenes import SIZE, Object, Scene

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
            found[statements.parse(statement)[0]].append(statements.meets(percept, statement))
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
    ("scene_kind", "statement_kind", "change", "where"),
    CORRUPTIONS,
    ids=[f"{c[0]}-{c[2].__name__}" for c in CORRUPTIONS],
)
def test_corruptions_are_caught(scene_kind, statement_kind, change, where):
    """The statement about the true graph fails on a picture of the changed one."""
    rng = np.random.default_rng(2)
    drawn = draw(40, 3, scene_kind, where)
    wanted = [
        next(s for s in scenes.describe(scene, rng).requirements if statements.parse(s)[0] == statement_kind)
        for scene in drawn
    ]
    caught = [not statements.meets(p, s) for p, s in zip(read([change(scene, rng) for scene in drawn]), wanted)]
    assert np.mean(caught) >= 0.97


@pytest.mark.parametrize(
    ("kind", "share", "count"),
    [("broken", 0.85, 60), ("doubled", 0.5, 100), ("smeared", 0.5, 100), ("garbled", 0.9, 60)],
)
def test_damage_is_an_artifact(kind, share, count):
    rng = np.random.default_rng(4)
    drawn = draw(count, 6, "text" if kind == "garbled" else None)
    damaged = [damage.damage(scenes.render(scene), scene, rng, kind) for scene in drawn]
    scores = oracles.artifact_free([Image.fromarray(image) for image in damaged], [""] * count)
    assert set(scores) <= {0.0, 1.0}
    assert 1 - np.mean(scores) >= share


def test_damage_leaves_its_input_alone():
    rng = np.random.default_rng(7)
    for scene in draw(20, 8, "text"):
        for kind in damage.ARTIFACTS:
            image = scenes.render(scene)
            damaged = damage.damage(image, scene, rng, kind)
            assert np.array_equal(image, scenes.render(scene)) and damaged.shape == image.shape
            assert damaged.dtype == np.uint8 and not np.array_equal(image, damaged)


# statements


def seen(*objects, style="flat", background="white", text=""):
    return oracles.Percept(Scene("", tuple(objects), style, background, text), 0.0, 0)


RED = Object("circle", "red", "small", 10.0, 10.0, 7.5)
BLUE = Object("star", "blue", "large", 50.0, 12.0, 12.0)


@pytest.mark.parametrize(
    ("statement", "true"),
    [
        ("there is a red circle", True),
        ("there is an orange circle", False),
        ("there are exactly one red circles", True),
        ("there are exactly two red circles", False),
        ("there are exactly zero pink crosses", True),
        ("there are exactly two shapes", True),
        ("there is exactly one shape", False),
        ("the red circle is small", True),
        ("the blue star is small", False),
        ("the green star is small", False),
        ("the red circle is at the top left", True),
        ("the red circle is at the top", False),
        ("the red circle is left of the blue star", True),
        ("the blue star is right of the red circle", True),
        ("the blue star is below the red circle", False),
        ("the style is flat", True),
        ("the background is black", False),
        ('the text reads "HI"', True),
        ('the text reads "H"', False),
    ],
)
def test_meaning_of_statements(statement, true):
    assert statements.meets(seen(RED, BLUE, text="HI"), statement) is true


def test_all_shapes_of_a_name_must_have_the_size_and_one_the_place():
    two = seen(RED, replace(RED, size="large", x=50.0))
    assert not statements.meets(two, "the red circle is small") and not statements.meets(two, "the red circle is large")
    assert statements.meets(two, "the red circle is at the top left")
    assert statements.meets(two, "the red circle is at the top right")


def test_relations_and_places():
    assert scenes.place_of(0, 0) == "top left" and scenes.place_of(32, 32) == "center"
    assert scenes.place_of(63, 63) == "bottom right" and scenes.place_of(21.4, 40) == "center"
    assert scenes.holds("left of", (10, 10), (30, 20)) and not scenes.holds("left of", (10, 10), (14, 10))
    assert not scenes.holds("left of", (10, 10), (20, 40))  # rather above it
    assert scenes.holds("above", (10, 10), (20, 40)) and scenes.holds("below", (20, 40), (10, 10))


@pytest.mark.parametrize(
    "statement",
    [
        "",
        "there is a mauve circle",
        "there is a red circle.",
        "the red circle is at the middle",
        "there are exactly six shapes",
        'the text reads "hi"',
    ],
)
def test_unknown_statements_are_refused(statement):
    with pytest.raises(ValueError, match="cannot read the statement"):
        statements.parse(statement)


def test_every_statement_that_is_written_can_be_read():
    """Also about graphs that were changed, whose relations need not hold."""
    rng, kinds = np.random.default_rng(9), Counter()
    for scene in draw(300, 10):
        for graph in (scene, scenes.mutate(scene, rng, 0.5)):
            for detail in (0.0, 0.5, 1.0):
                said = scenes.describe(graph, rng, detail)
                kinds.update(statements.parse(statement)[0] for statement in said.requirements)
                assert said.requirements and said.texts == ([graph.text] if graph.text else [])
    assert set(kinds) == set(KINDS)


# drawing


def test_scenes_keep_their_promises():
    assert sum(scenes.KINDS.values()) == pytest.approx(1)
    seen_kinds = Counter()
    for scene in draw(300, 15):
        seen_kinds[scene.kind] += 1
        assert 1 <= len(scene.objects) <= 5
        for i, o in enumerate(scene.objects):
            assert o.radius == pytest.approx(scenes.SIZES[o.size], rel=0.06)
            assert all(o.radius <= v <= SIZE - 1 - o.radius for v in (o.x, o.y))
            for other_object in scene.objects[:i]:
                apart = np.hypot(o.x - other_object.x, o.y - other_object.y)
                assert apart >= o.radius + other_object.radius + 3
        names = {o.name for o in scene.objects}
        assert len(names) == (1 if scene.kind == "count" else len(scene.objects))
        if scene.kind == "text":
            assert 1 <= len(scene.text) <= 4 and scene.text_x >= 0
            assert scene.text_x + scenes.GLYPH_W * len(scene.text) <= SIZE + 2  # two pixels of space behind the last
    assert set(seen_kinds) == set(scenes.KINDS)


def test_rendering_is_deterministic():
    for scene in draw(40, 16):
        image = scenes.render(scene)
        assert image.shape == (SIZE, SIZE, 3) and image.dtype == np.uint8
        assert np.array_equal(image, scenes.render(replace(scene)))
    assert draw(5, 17) == draw(5, 17) != draw(5, 18)
    grainy = replace(draw(1, 19)[0], style="grainy", grain_seed=1)
    digests = {hashlib.sha1(scenes.render(replace(grainy, grain_seed=s)).tobytes()).digest() for s in (1, 2, 1)}
    assert len(digests) == 2


def test_perception_does_not_depend_on_the_batch():
    drawn = draw(4, 20)
    together = read(drawn)
    for scene, percept in zip(drawn, together):
        assert read([scene]) == [percept]
    assert oracles.perceive([Image.fromarray(scenes.render(drawn[0])).convert("RGBA")]) == together[:1]
    assert oracles.perceive([]) == []


# rewards


def test_rewards_say_nothing_where_nothing_is_asked():
    pictures = [Image.fromarray(scenes.render(scene)) for scene in draw(2, 21, "text")]
    assert oracles.rubric(pictures, ["", ""], [[], ["there is exactly one shape"]]) == [None, 1.0]
    assert oracles.text(pictures, ["", ""], [[], ["QQQQQ"]]) == [None, 0.0]


def test_rewards():
    (scene,) = draw(1, 22, "text")
    picture = Image.fromarray(scenes.render(scene))
    true = scenes.describe(scene, np.random.default_rng(0)).requirements
    false = ["there are exactly five shapes", 'the text reads "NOT"']
    assert oracles.rubric([picture], [""], [true], tags=[[]]) == [1.0]
    assert oracles.rubric([picture], [""], [[true[0], *false, true[-1]]]) == [0.5]
    assert oracles.text([picture] * 2, ["", ""], [[scene.text], [scene.text[:-1] or "NO"]]) == [1.0, 0.0]
    noise = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    assert oracles.artifact_free([picture, Image.fromarray(noise)], ["", ""], texts=[[], []]) == [1.0, 0.0]


@pytest.mark.parametrize("size", [(32, 32), (64, 128)])
def test_wrong_size(size):
    with pytest.raises(ValueError, match=f"64 x 64 pixels, got {size[0]} x {size[1]}"):
        oracles.perceive([Image.new("RGB", size)])
