"""ImageReward's file read into transformers' BLIP: scores are those of its parts, and of its own library."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from posttrain.errors import UserError
from rewards.ready import ImageReward
from tests.helpers import scorers

PROMPTS = ["a red circle", "two blue squares above a small green triangle, flat style", "the sea at dusk", "a fox"]


def shown(n=4):
    rng = np.random.default_rng(1)
    return [Image.fromarray(rng.integers(0, 256, (40 + 9 * i, 64, 3), np.uint8)) for i in range(n)]


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imagereward")
    return folder, scorers.imagereward(folder)


def scorer(folder, **settings):
    return ImageReward(str(folder), tokenizer=str(folder / "bert"), device="cpu", **settings)


@torch.no_grad()
def test_it_is_the_formula_of_its_authors(release):
    """(head([CLS] of the text that has seen the image) - 0.167...) / 1.033..., one image at a time."""
    folder, (vision, text, head) = release
    tokens = AutoTokenizer.from_pretrained(folder / "bert")
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    expected = []
    for image, prompt in zip(shown(), PROMPTS):
        patches = vision(pixel_values=processor(images=[image], return_tensors="pt")["pixel_values"]).last_hidden_state
        # Its authors pad to 35 tokens; the mask hides them.
        read = tokens(prompt, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
        hidden = text(input_ids=read.input_ids, attention_mask=read.attention_mask, encoder_hidden_states=patches,
                      encoder_attention_mask=torch.ones(1, patches.shape[1])).last_hidden_state  # fmt: skip
        expected.append((head(hidden[:, 0]).item() - 0.16717362830052426) / 1.0333394966054072)
    scores = scorer(folder)(shown(), PROMPTS)
    assert scores == pytest.approx(expected, abs=1e-6) and np.ptp(expected) > 0.01


def test_batches_and_order_do_not_matter(release):
    whole = scorer(release[0], batch=4)(shown(), PROMPTS)
    assert scorer(release[0], batch=1)(shown(), PROMPTS) == pytest.approx(whole, abs=1e-6)
    assert scorer(release[0], batch=3)(shown()[::-1], PROMPTS[::-1]) == pytest.approx(whole[::-1], abs=1e-6)


def test_mistakes(release, tmp_path):
    folder = release[0]
    with pytest.raises(UserError, match=r"no ImageReward.pt in it"):
        ImageReward(str(tmp_path), tokenizer=str(folder / "bert"))
    torch.save({"a": torch.zeros(1)}, tmp_path / "ImageReward.pt")
    with pytest.raises(UserError, match="holds no ImageReward"):
        ImageReward(str(tmp_path), tokenizer=str(folder / "bert"), device="cpu")
    state = torch.load(folder / "ImageReward.pt", weights_only=True)
    torch.save({key: value for key, value in state.items() if "crossattention" not in key}, tmp_path / "ImageReward.pt")
    with pytest.raises(UserError, match=r"missing.*crossattention"):
        ImageReward(str(tmp_path), tokenizer=str(folder / "bert"), device="cpu")
    with pytest.raises(UserError, match="no such directory"):
        ImageReward(str(folder), tokenizer=str(tmp_path / "bert"), device="cpu")
