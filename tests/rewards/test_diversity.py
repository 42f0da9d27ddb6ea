"""Group diversity: d_j, its equality with what leaving one out takes away, and the features."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from posttrain.errors import UserError
from posttrain.nano.world import scenes
from posttrain.training import advantages
from rewards.base import RewardSpec
from rewards.diversity import Diversity, Features, contributions
from rewards.load import load_rewards
from rewards.vlm import own_device
from tests.helpers import expander_runs
from tests.helpers.runs import ROOT

NANO = str(ROOT / "posttrain/nano/weights/judge-nano")
ALL = [True] * 4


@pytest.fixture(scope="module")
def dinov3(tmp_path_factory):
    return str(expander_runs.dinov3(tmp_path_factory.mktemp("dinov3")))


def pictures(n, seed=0):
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(n)]


def d(rows, present=None, safe=None):
    rows = torch.tensor(rows)
    return contributions(rows, present or [True] * len(rows), safe or [True] * len(rows))


def test_golden_values():
    """Self-check 35. Lengths do not matter: features are brought to unit length."""
    assert d(torch.eye(4).tolist()) == pytest.approx([1.0] * 4)
    assert d([[2.0, 1.0]] * 3) == pytest.approx([0.0] * 3, abs=1e-12)
    assert d([[1.0, 0.0], [-3.0, 0.0]]) == pytest.approx([2.0, 2.0])
    # a, a, b: a is 0 from the other a and 1 from b, so (0 + 1) / 2; b is 1 from both.
    assert d([[1.0, 0.0], [1.0, 0.0], [0.0, 5.0]]) == pytest.approx([0.5, 0.5, 1.0])


def test_what_leaving_one_out_takes_away_gives_the_same_advantages():
    unit = torch.nn.functional.normalize(torch.randn(6, 9, generator=torch.Generator().manual_seed(0)).double(), dim=-1)

    def mean_distance(rows):
        n = len(rows)
        return float((1 - rows @ rows.T)[~torch.eye(n, dtype=torch.bool)].mean())

    taken = [mean_distance(unit) - mean_distance(unit[[i for i in range(6) if i != j]]) for j in range(6)]
    found = contributions(unit, [True] * 6, [True] * 6)
    # D - D without j = 2 (d_j - D) / (n - 2)
    total = mean_distance(unit)
    assert taken == pytest.approx([2 * (dj - total) / 4 for dj in found if dj is not None])
    valid, weights = torch.ones(1, 6, 1, dtype=torch.bool), torch.ones(1)
    # The added 1e-4 weighs more beside the smaller numbers, so they are brought to one size.
    a, b = (advantages.gdpo(1e6 * torch.tensor(v).view(1, 6, 1), valid, weights) for v in (found, taken))
    assert torch.allclose(a, b, atol=1e-6)


def test_the_unsafe_get_zero_and_are_not_compared_with():
    rows = [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]
    assert d(rows, safe=[True, True, False, True]) == pytest.approx([0.5, 0.5, 0.0, 1.0])


def test_a_missing_picture_is_missing_and_so_is_the_diversity_of_one():
    rows = [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]
    assert d(rows, present=[True, True, False]) == [1.0, 1.0, None]
    assert d(rows, present=[True, False, False]) == [None] * 3
    assert d(rows, safe=[True, False, False]) == [None, 0.0, 0.0]


def test_dinov3_sees_pictures_as_its_directory_says(dinov3):
    shown = pictures(3)
    found = Features(dinov3, batch=2, device="cpu")(shown)
    from transformers import AutoModel

    model = AutoModel.from_pretrained(dinov3).eval()
    small = np.stack([np.asarray(p.resize((32, 32), Image.Resampling.BILINEAR), np.float32) / 255 for p in shown])
    pixels = torch.from_numpy((small - 0.5) / 0.25).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = model(pixel_values=pixels).pooler_output
    assert found.shape == (3, 32)
    assert torch.allclose(found, expected, atol=1e-5)


def test_the_image_tower_of_a_judge_tells_styles_apart():
    """It sees style before place: the same scene in two styles is further apart than moved by three pixels."""
    scene = scenes.random_scene(np.random.default_rng(0), ["CAT"], "single")
    moved = replace(scene, objects=tuple(replace(o, x=o.x + 3) for o in scene.objects))
    other = replace(scene, style="dark" if scene.style != "dark" else "flat")
    features = Features(NANO, batch=2, device="cpu")
    found = features([Image.fromarray(scenes.render(s)) for s in (scene, moved, scene, other)])
    assert found.shape == (4, 96)
    assert torch.allclose(found[0], found[2], atol=1e-5)
    near, far = (1 - torch.cosine_similarity(found[0], found[i], dim=0).item() for i in (1, 3))
    assert far > 5 * near


def test_it_is_a_group_reward_of_any_recipe(dinov3):
    function = {"class_path": "rewards.diversity.Diversity", "init_args": {"path": dinov3, "device": "cpu"}}
    [reward] = load_rewards([RewardSpec("diversity", function, group=True)])
    shown = pictures(3)
    values = reward.function(shown, ["a cat"] * 3)
    assert values == contributions(Features(dinov3, device="cpu")(shown), ALL[:3], ALL[:3])
    assert isinstance(reward.function, Diversity) and reward.function.record() == {"model": dinov3}


def test_what_has_no_features_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"/nowhere: no such directory"):
        Features("/nowhere")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match=r"is a bert: features come from DINOv3 or a Qwen3-VL"):
        Features(str(tmp_path))


def test_a_process_keeps_to_its_own_gpu(monkeypatch):
    """In a reward's thread plain cuda is the first GPU."""
    assert own_device("cpu") == "cpu" and own_device("cuda:1") == "cuda:1"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert own_device(None) == own_device("cuda") == "cuda:3"
