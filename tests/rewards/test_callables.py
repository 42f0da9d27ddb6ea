"""Rewards as people write them: every callable is taken, or refused in one line before anything is loaded."""

import asyncio
import functools
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from posttrain.errors import UserError
from prompts.records import columns, read_prompts
from rewards.base import RewardError, RewardSpec, score_all
from rewards.load import check_columns, check_rewards, load_rewards

HERE = "tests.rewards.test_callables"
IMAGES = [Image.new("RGB", (8, 8))] * 2
COLUMNS = {"requirements": [None] * 2, "texts": [[]] * 2, "tags": [[]] * 2, "id": ["a", "b"]}


def plain(images, prompts, strength=1.0, **columns):
    return [strength * 0.5] * len(images)


async def awaited(images, prompts, strength=1.0, **columns):
    return [strength * 0.5] * len(images)


def logged(function):
    @functools.wraps(function)
    def inner(*arguments, **keywords):
        return function(*arguments, **keywords)

    return inner


def hidden(function):
    def inner(*arguments, **keywords):
        return function(*arguments, **keywords)

    return inner


class Module(torch.nn.Module):
    def forward(self, images, prompts):
        return torch.full((len(images),), 0.5)


class Awaited:
    async def __call__(self, images, prompts):
        return [0.5] * len(images)


class Scorer:
    def score(self, images, prompts):
        return [0.5] * len(images)


class Broken:
    def __init__(self):
        raise RuntimeError("out of memory\nwhile loading")

    def __call__(self, images, prompts):
        return [0.5] * len(images)


def swapped(prompts, images):
    return [0.5 if isinstance(prompt, str) else 0.0 for prompt in prompts]


def by_keyword(*, images, prompts, **columns):
    return [0.5 if isinstance(prompt, str) else 0.0 for prompt in prompts]


def by_place(texts_or_images, captions, /):
    return [0.5 if isinstance(image, Image.Image) else 0.0 for image in texts_or_images]


def tensors(images, prompts):
    return list(torch.full((len(images),), 0.5))


def booleans(images, prompts):
    return [np.bool_(True), np.bool_(False)]


def answers(images, prompts, answer):
    return [None if value is None else float(value) for value in answer]


def only_images(images):
    return [0.5] * len(images)


def prompts_first(prompts, pictures):
    return [0.5] * len(pictures)


def images_second(texts, images):
    return [0.5] * len(images)


@logged
async def decorated_async(images, prompts):
    return [0.5] * len(images)


def raises(images, prompts):
    raise KeyError("weights")


partial, partial_async = functools.partial(plain, strength=1.0), functools.partial(awaited, strength=1.0)
partial_of_object = functools.partial(Awaited())
concealed, cached = hidden(Module()), functools.lru_cache(plain)
module, scorer = Module(), Scorer()


def scores_of(function, **columns):
    [reward] = load_rewards([RewardSpec("r", function, max_failures=1)])
    return asyncio.run(score_all([reward], IMAGES, ["a", "b"], COLUMNS | columns))


@pytest.mark.parametrize(
    "name",
    "plain awaited partial partial_async partial_of_object decorated_async module scorer.score swapped by_keyword"
    " by_place tensors".split(),
)
def test_taken(name):
    check_rewards([RewardSpec("r", f"{HERE}:{name}")])
    scores = scores_of(f"{HERE}:{name}")
    assert scores.values_NK.tolist() == [[0.5], [0.5]] and scores.valid_NK.all()


@pytest.mark.parametrize("name", ["Module", "Awaited"])
def test_objects_made_by_the_recipe(name):
    function = {"class_path": f"{HERE}.{name}", "init_args": None}
    check_rewards([RewardSpec("r", function)])
    assert scores_of(function).values_NK.tolist() == [[0.5], [0.5]]


def test_booleans_of_numpy():
    assert scores_of(f"{HERE}:booleans").values_NK.tolist() == [[1], [0]]


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (f"{HERE}:concealed", "takes *arguments, **keywords, so its columns are not known; if it is decorated, use"),
        (f"{HERE}:cached", "has a cache"),
        (f"{HERE}:only_images", "takes images; it is called with images and prompts"),
        (f"{HERE}:prompts_first", "takes prompts, pictures: call its parameters images and prompts"),
        (f"{HERE}:images_second", "takes texts, images: call its parameters images and prompts"),
        (f"{HERE}:Awaited", "is a class: write {class_path: tests.rewards.test_callables.Awaited,"),
        ("builtins:max", "does not say what it takes"),
        (
            "./tests/rewards/test_callables.py:plain",
            "names a file: write its module, tests.rewards.test_callables:plain",
        ),
        ({"class_path": f"{HERE}.Scorer"}, "cannot be called"),
    ],
)
def test_refused_by_the_check(function, words):
    with pytest.raises(UserError, match=r"^reward r: ") as raised:
        check_rewards([RewardSpec("r", function)])
    assert words in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def f(images, prompts)\n    return []\n", "SyntaxError: expected ':' (file_0.py, line 1)"),
        ("X = undefined\n", "NameError: name 'undefined' is not defined (file_1.py:1)"),
        ("import ctypes\nctypes.CDLL('libnothere.so.1')\n", "OSError: libnothere.so.1"),
        ("import sys\nsys.exit('usage: x')\n", "SystemExit: usage: x (file_3.py:2)"),
        ("import numpy as np\nKIND = np.float\n", "AttributeError: module 'numpy' has no attribute 'float'."),
    ],
)
def test_a_file_that_cannot_be_read(text, words, tmp_path, monkeypatch, request):
    place = request.node.callspec.indices["text"]
    (tmp_path / f"file_{place}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(UserError) as raised:
        check_rewards([RewardSpec("r", f"file_{place}:f")])
    message = str(raised.value)
    assert message.startswith(f"reward r: function: cannot import file_{place}: {words}") and "\n" not in message


def test_a_constructor_that_raises():
    with pytest.raises(UserError, match="Broken cannot be made: RuntimeError: out of memory while loading ") as raised:
        load_rewards([RewardSpec("r", {"class_path": f"{HERE}.Broken"})])
    assert "tests/rewards/test_callables.py:" in str(raised.value)


def test_a_failure_keeps_type_file_and_line():
    [message] = scores_of(f"{HERE}:raises").failures["r"]
    line = raises.__code__.co_firstlineno + 1
    assert message == f"KeyError: 'weights' (tests/rewards/test_callables.py:{line})"


def test_a_column_that_the_prompts_lack_is_said_with_those_that_exist(tmp_path):
    """And one that some prompts have is None for the others, whichever of them are scored together."""
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b", "answer": 3}\n')
    records = read_prompts(path)
    rewards = load_rewards([RewardSpec("r", f"{HERE}:answers")])
    check_columns(rewards, columns(records))
    scores = asyncio.run(score_all(rewards, IMAGES[:1], ["a"], dict(columns(records[:1]))))
    assert scores.valid_NK.tolist() == [[False]] and not scores.failed_NK.any()
    words = "takes answer, but the prompts' columns are: requirements, texts, tags, id"
    with pytest.raises(UserError, match=words):
        check_columns(rewards, COLUMNS)
    with pytest.raises(RewardError, match=words):
        scores_of(f"{HERE}:answers")


@pytest.mark.parametrize("name", ["images", "prompts"])
def test_a_column_may_not_be_named_as_an_argument(name, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "a"}}\n{{"prompt": "b", "{name}": 3}}\n')
    with pytest.raises(UserError, match=f"prompts.jsonl:2: {name}: .*rename the field"):
        read_prompts(path)
