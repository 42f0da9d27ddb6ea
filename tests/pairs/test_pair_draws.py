"""The ways to draw the images of a pair: checkpoints and the base, noise, degradation."""

from pathlib import Path

import pytest
import torch

from posttrain.config.sections import ModelConfig
from posttrain.errors import UserError
from posttrain.model import sampler
from posttrain.model.k2 import K2
from posttrain.pairs.config import DeltaConfig, DrawConfig, PairsConfig, PairSource
from posttrain.pairs.draw import Drawer
from posttrain.pairs.select import degrade
from posttrain.training import checkpoint
from posttrain.training.policy import POLICY, described, load_model, saved_tensors
from tests.helpers import tiny
from tests.helpers.pair_runs import recipe


def trained(model: Path, run: Path, seed: int, lora: bool = True, **state) -> Path:
    """A run directory with an adapter (or weights) that changes what is drawn."""
    k2 = K2.load(model)
    if lora:
        k2.add_role(POLICY, 4, 8.0, seed=seed)
    else:
        k2.add_full_role(POLICY)
    torch.manual_seed(seed)
    for parameter in k2.role_parameters(POLICY):
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return checkpoint.save(run / "checkpoints", 1, saved_tensors(k2), {"lora": described(k2), **state}, 1)


def drawn(config: PairsConfig, *draws: DrawConfig) -> tuple[list[torch.Tensor], dict[str, int]]:
    """One image of the longest prompt in each way, by the same noise; and the model's work."""
    drawer, found = Drawer(config, torch.device("cpu")), []
    drawer.begin()
    for draw in draws:
        drawer.draw(draw, [tiny.PROMPTS[3]], [7], (32, 32), lambda rows, images: found.append(images[0]))
    return found, dict(drawer.end(measure=False)[0].images)


def test_checkpoints_and_the_base_draw_differently(tmp_path, model):
    policy, earlier = (trained(model, tmp_path / name, seed) for seed, name in enumerate(("policy", "earlier")))
    config = recipe(tmp_path, model, policy=str(tmp_path / "policy"))
    ways = [DrawConfig(), DrawConfig("base"), DrawConfig(str(tmp_path / "earlier")), DrawConfig(str(policy))]
    config.sources = [PairSource("x", delta=DeltaConfig(ways[0], way)) for way in ways[1:3]]
    config.sources[1].delta = DeltaConfig(ways[3], ways[2])
    (own, base, other, same), _ = drawn(config, *ways)
    assert torch.equal(own, same)
    k2 = K2.load(model)
    noise = sampler.noise([7], (k2.image_tokens(32, 32), k2.latent_channels))
    for role, image in ((None, base), ("policy", own), ("earlier", other)):
        if role is not None:
            k2.add_role(role, 4, 8.0)
            k2.load_role_state_dict(role, checkpoint.load(policy if role == "policy" else earlier).tensors["adapter"])
        with k2.role(role):
            expected = k2.decode(k2.sample(k2.text([tiny.PROMPTS[3]]), noise, 2, 32, 32), 32, 32)[0]
        assert torch.equal(image, expected)
    assert not torch.equal(own, base) and not torch.equal(own, other)
    drawer = Drawer(config, torch.device("cpu"))
    assert drawer.describe(ways[0]) == str(policy) and drawer.describe(ways[1]) == str(model)
    assert drawer.describe(DrawConfig("base", 1.5, 3, 0.5)) == f"{model}, guidance 1.5, steps 3, drop 0.5"


def test_noised_and_degraded(tmp_path, model):
    """Noised latents are (1 - t) x0 + t eps, and what comes before is drawn once for both."""
    config = recipe(tmp_path, model)
    (plain, noisy, degraded), work = drawn(config, DrawConfig(), DrawConfig(noise=0.4), DrawConfig(drop=0.5))
    assert work == {"forward": 2 + 0 + 2, "decode": 3}
    k2 = K2.load(model)
    shape, text = (k2.image_tokens(32, 32), k2.latent_channels), k2.text([tiny.PROMPTS[3]])
    x0 = k2.sample(text, sampler.noise([7], shape), 2, 32, 32)
    x = 0.6 * x0 + 0.4 * sampler.noise([sampler.seed_for(7, -1)], shape)
    short = k2.sample(k2.text([degrade(tiny.PROMPTS[3], 0.5, 7)]), sampler.noise([7], shape), 2, 32, 32)
    for image, latents in ((plain, x0), (noisy, x), (degraded, short)):
        assert torch.equal(image, k2.decode(latents, 32, 32)[0])
    assert len({image.numpy().tobytes() for image in (plain, noisy, degraded)}) == 3


def test_checkpoints_that_cannot_be_used(tmp_path, model):
    config = recipe(tmp_path, model, policy=str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"^policy: .*none: holds no whole checkpoint; give a run directory"):
        Drawer(config, torch.device("cpu"))
    trained(model, tmp_path / "full", 0, lora=False)
    config = recipe(tmp_path, model)
    full, adapter = tmp_path / "full", trained(model, tmp_path / "adapter", 1)
    config.sources[0].delta = DeltaConfig(DrawConfig(), DrawConfig(str(full)))
    with pytest.raises(UserError, match=r"^checkpoint: .*full has trained all weights, so nothing can be drawn beside"):
        Drawer(config, torch.device("cpu"))
    config.policy, config.sources = str(full), config.sources[1:]
    assert Drawer(config, torch.device("cpu")).names[config.policy].endswith("full/checkpoints/step-000001")

    saved = checkpoint.load(adapter)
    checkpoint.save(tmp_path / "turbo/checkpoints", 1, saved.tensors, saved.state | {"method": "tdm"}, keep=1)
    config.policy = str(tmp_path / "turbo")
    with pytest.raises(UserError, match=r"^policy: .*turbo: is a distilled student; pairs are for training Raw"):
        Drawer(config, torch.device("cpu"))

    config.policy, config.model.start = None, str(adapter)
    config.sources = [PairSource("x", delta=DeltaConfig(DrawConfig(), DrawConfig(str(adapter))))]
    with pytest.raises(UserError, match=r"^checkpoint: .* was trained on another base than what is drawn here"):
        Drawer(config, torch.device("cpu"))


def test_policy_that_goes_on_from_an_earlier_run(tmp_path, model):
    """Base is then what it began as: the model with the earlier run's adapter beside its weights."""
    first = trained(model, tmp_path / "first", 0)
    k2 = load_model(ModelConfig(str(model), start=str(first), dtype="float32"), "cpu")
    second = trained(model, tmp_path / "second", 1, origin=k2.origin)
    config = recipe(tmp_path, model, policy=str(second))
    config.sources = [PairSource("x", delta=DeltaConfig(DrawConfig(), DrawConfig("base")))]
    (_, base), _ = drawn(config, DrawConfig(), DrawConfig("base"))
    config = recipe(tmp_path, model, policy=str(first))
    (first_policy,), _ = drawn(config, DrawConfig())
    assert (base.int() - first_policy.int()).abs().max() <= 1  # stacked or the policy itself: only rounding differs
