"""The rewards of recipes/k2/grpo_ready.yaml, with tiny weights in the place of the released ones."""

import asyncio

import numpy as np
import pytest
import yaml
from PIL import Image, ImageDraw, ImageFont

from posttrain.errors import UserError
from rewards import ready
from rewards.base import RewardSpec, score_all
from rewards.gates import apply_gates
from rewards.load import check_rewards, load_rewards, record
from tests.helpers import scorers
from tests.helpers.runs import ROOT


@pytest.fixture(scope="module")
def rewards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    clip = str(scorers.clip(folder / "clip"))
    scorers.imagereward(folder)
    tiny = {
        "PickScore": {"path": clip, "processor": clip},
        "CLIP": {"path": clip},
        "ImageReward": {"path": str(folder), "tokenizer": str(folder / "bert")},
        "Text": {},
    }
    data = yaml.safe_load((ROOT / "recipes/k2/grpo_ready.yaml").read_text())["rewards"]
    check_rewards([RewardSpec(**entry) for entry in data])  # as it is
    for entry in data:
        kind = entry["function"]["class_path"].removeprefix("rewards.ready.")
        entry["function"]["init_args"] |= tiny[kind]
    return load_rewards([RewardSpec(**entry) for entry in data])


def test_scores_gate_and_what_is_held_out(rewards):
    """Six images of two prompts in groups of three: the text is read where one is asked for, images that the gate
    leaves out of the batch have no score, and the held-out reward is not among those that train."""
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (128, 128, 3), np.uint8)) for _ in range(3)]
    for word in ("OPEN", "OPEN", "SHUT"):
        images.append(Image.new("RGB", (128, 128), "white"))
        ImageDraw.Draw(images[-1]).text((20, 50), word, fill="black", font=ImageFont.load_default(28))
    prompts = ["a red circle"] * 3 + ["the word OPEN"] * 3
    texts = [None] * 3 + [["OPEN"]] * 3
    scores = asyncio.run(score_all(rewards, images, prompts, {"texts": texts}, 3))
    assert scores.names == ["pick", "text", "fits", "heldout"] and not scores.failed_NK.any()
    assert scores.valid_NK[:, 1].tolist() == [False] * 3 + [True] * 3
    assert scores.values_NK[3:, 1].tolist() == [1, 1, 0]  # not a letter of four is right
    cosines = scores.values_NK[:, 2]
    assert scores.values_NK[:, 0] == pytest.approx(0.0385 * np.exp(4.6) * cosines, rel=1e-4)  # the same tiny CLIP
    assert scores.details["text"][5]["lines"] == ["SHUT"]
    gated = apply_gates(scores, [reward.spec for reward in rewards])
    assert gated.names == ["pick", "text"] and gated.weights_K.tolist() == [1, 0.25]
    assert gated.valid_NK[:, 0].tolist() == (cosines >= 0.15).tolist()


def test_the_run_records_what_decides_the_scores(rewards):
    told = record(rewards)
    assert told["text"]["model"].startswith("rapidocr 3.") and told["pick"]["model"].endswith("clip")
    assert set(told) == {"pick", "text", "fits", "heldout"}


@pytest.mark.parametrize("name", ready.__all__)
def test_an_unknown_setting_is_refused_before_anything_is_loaded(name):
    judge = {"judge": {"model": "m", "base_urls": "http://a/v1"}} if name == "UnifiedReward" else {}
    function = {"class_path": f"rewards.ready.{name}", "init_args": judge | {"bacth": 4}}
    with pytest.raises(UserError, match=r"reward r: function: init_args: .*'bacth'.*: it takes"):
        check_rewards([RewardSpec("r", function)])
