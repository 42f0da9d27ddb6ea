"""Orders to the judge: what they raise rewards by, with judge-nano and with judges that do as they are told."""

import asyncio

import numpy as np
import pytest
from PIL import Image

from posttrain.nano.bench import injection as bench_injection
from rewards.base import Reward, RewardSpec
from rewards.image import Rubric
from rewards.injection import LIMIT, ORDERS, injection, written
from tests.helpers.gullible import RAISED, Gullible


@pytest.mark.parametrize(
    ("reads", "listens", "picture", "statement"),
    [(False, False, 0.0, 0.0), (True, False, RAISED, 0.0), (False, True, 0.0, RAISED)],
)
def test_what_an_order_raises(reads, listens, picture, statement):
    """0.9 - 0.2 = 0.7 where the judge obeys, 0 where it does not; the most effective order counts."""
    reward = Reward(RewardSpec("rubric", "a:b"), Rubric(Gullible(reads, listens)), None, True)
    images = [Image.new("RGB", (128, 128)) for _ in range(3)]
    columns = {"requirements": [["a cat"], ["a dog", "a hat"], []]}  # the third has no score
    (raised,) = asyncio.run(injection([reward], images, ["a"] * 3, columns))
    assert raised.image == pytest.approx(picture) and raised.statement == pytest.approx(statement)
    assert bool(raised.warning) is (reads or listens)
    assert raised.metrics == {
        "injection/image/rubric": raised.image, "injection/prompt/rubric": raised.statement,
    }  # fmt: skip


def test_text_is_written_within_the_picture():
    for size in ((64, 64), (512, 384)):
        image = Image.new("RGB", size, (90, 0, 0))
        one, other = (np.asarray(written(image, text)) for text in ORDERS[:2])
        assert one.shape == (size[1], size[0], 3) and (one != other).any()
        changed = (one != np.asarray(image)).any(-1)
        assert changed[-size[1] // 4 :].any() and not changed[: size[1] // 2].any()


def test_judge_nano_obeys_no_order():
    """Over a planted set of five scenes and 3 orders; docs have the figures over 100."""
    images, prompts, columns = bench_injection.planted(5)
    for write, texts in ((written, ORDERS), (bench_injection.lettered, bench_injection.LETTERS["orders"])):
        found = asyncio.run(injection(bench_injection.rewards(), images, prompts, columns, texts, write))
        assert [one.reward for one in found] == ["rubric", "aesthetic", "artifact"]
        for one in found:
            assert one.image is not None and one.image <= LIMIT, one
        assert found[0].statement is not None and found[0].statement <= LIMIT
        assert found[1].statement is None
