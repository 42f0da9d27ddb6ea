"""Recipes of runs that take seconds on the tiny pipeline, and what tests look at in a run directory."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from posttrain.config import metrics
from posttrain.config.groups import GroupsConfig
from posttrain.config.sections import ModelConfig, PromptsConfig
from posttrain.grpo.config import GRPOConfig
from posttrain.model.fingerprint import fingerprint
from posttrain.model.k2 import K2
from posttrain.mopd.config import MOPDConfig, TeacherConfig
from posttrain.nft.config import NFTConfig
from posttrain.sft.config import ImageSetConfig, SFTConfig
from posttrain.stpo.config import PairSetConfig, STPOConfig
from posttrain.tdm.config import FakeConfig, TDMConfig
from posttrain.training import checkpoint
from posttrain.training.policy import POLICY, described, saved_tensors
from rewards.base import RewardSpec
from tests.helpers import tiny

ROOT = Path(__file__).parents[2]


def brightness(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    """Mean of all pixels, in [0, 1]."""
    return [float(np.asarray(image).mean()) / 255 for image in images]


def contrast(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    """A group reward: how far each is from the group's mean picture; needs two of one prompt."""
    assert len(images) > 1 and len(set(prompts)) == 1
    pixels = np.stack([np.asarray(image, float) for image in images]) / 255
    return np.abs(pixels - pixels.mean(0)).mean((1, 2, 3)).tolist()


def constant(images, prompts):
    return [0.5] * len(images)


def nothing(images, prompts):
    return [None] * len(images)


def script(name: str, values: list[float]) -> RewardSpec:
    function = {"class_path": "tests.helpers.warm.Script", "init_args": {"values": values}}
    return RewardSpec(name, function, heldout_only=True)


def config(folder: Path, model: Path, reward: str = "brightness") -> GRPOConfig:
    """A recipe whose run goes into folder/run: two groups of four pictures of 32 x 32, two SDE steps of four."""
    for name, prompts in (("train", tiny.PROMPTS[:3]), ("heldout", tiny.PROMPTS[2:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    made = GRPOConfig(
        output=str(folder / "run"),
        model=ModelConfig(path=str(model), dtype="float32"),
        prompts=PromptsConfig(str(folder / "train.jsonl"), str(folder / "heldout.jsonl"), max_tokens=64),
        rewards=[RewardSpec(name=reward, function=f"tests.helpers.runs:{reward}")],
        steps=2,
    )
    made.lora.rank, made.lora.alpha = 4, 8.0
    made.sampling.sizes, made.sampling.steps = [[32, 32]], 4
    made.groups.prompts_per_step, made.groups.group_size, made.groups.micro_batch = 2, 4, 4
    made.optim.lr = 3e-3
    made.eval.every, made.eval.prompts, made.eval.steps = 0, 2, 2
    made.eval.groups = 0
    made.checkpoint.every = 0
    made.track.tensorboard = False
    return made


def nft_config(folder: Path, model: Path, reward: str = "brightness") -> NFTConfig:
    """A recipe whose run goes into folder/run: two groups of four images of 32 x 32 in four steps, at two noise
    levels; the old policy lags from the first update on."""
    base = config(folder, model, reward)
    made = NFTConfig(
        output=base.output, model=base.model, prompts=base.prompts, rewards=base.rewards, steps=2,
        groups=GroupsConfig(2, 4, 4), lora=base.lora, optim=base.optim, eval=base.eval, checkpoint=base.checkpoint,
        track=base.track,
    )  # fmt: skip
    made.sampling.sizes, made.sampling.steps, made.loss.times = [[32, 32]], 4, 2
    made.old.ramp = 0.2
    return made


def pairs(folder: Path, count: int = 20, *sizes: tuple[int, int]) -> Path:
    """JSONL: of each pair the brighter picture is preferred; four prompts of four lengths. Sizes, (32, 32) if there are
    none, take turns."""
    rng, rows = np.random.default_rng(0), []
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for i in range(count):
        size = sizes[i % len(sizes)] if sizes else (32, 32)
        for name, base in (("chosen", 160), ("rejected", 40)):
            pixels = base + rng.integers(0, 60, (size[0] // 8, size[1] // 8, 3), dtype=np.uint8)
            image = Image.fromarray(pixels).resize(size[::-1], Image.Resampling.NEAREST)
            image.save(folder / f"images/{i}-{name}.png")
        row = {name: f"images/{i}-{name}.png" for name in ("chosen", "rejected")}
        rows.append({"prompt": tiny.PROMPTS[i % 4], **row, "source": "synthetic"})
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def stpo_config(folder: Path, model: Path) -> STPOConfig:
    """A recipe whose run goes into folder/run: six pairs an update, of twenty, a quarter of them held out."""
    (folder / "heldout.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in tiny.PROMPTS[2:]))
    made = STPOConfig(
        output=str(folder / "run"),
        model=ModelConfig(path=str(model), dtype="float32"),
        pairs=PairSetConfig(str(pairs(folder)), max_tokens=64, heldout=0.25, cache=str(folder / "cache"), measured=5),
        heldout=str(folder / "heldout.jsonl"),
        rewards=[RewardSpec(name="brightness", function="tests.helpers.runs:brightness")],
        steps=2,
        batch=6,
        micro_batch=4,
    )
    assert made.lora is not None
    made.lora.rank, made.lora.alpha = 4, 8.0
    made.optim.lr = 3e-3
    made.eval.every, made.eval.prompts, made.eval.steps, made.eval.groups = 0, 2, 2, 0
    made.checkpoint.every = 0
    made.track.tensorboard = False
    return made


def captioned(folder: Path, count: int = 20, *sizes: tuple[int, int]) -> Path:
    """A folder of bright images with a caption beside each, four of four lengths. Sizes, (32, 32) if there are none,
    take turns."""
    rng, place = np.random.default_rng(1), folder / "captioned"
    place.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        height, width = sizes[i % len(sizes)] if sizes else (32, 32)
        pixels = 160 + rng.integers(0, 60, (max(1, height // 8), max(1, width // 8), 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
        image.save(place / f"{i:03d}.png")
        (place / f"{i:03d}.txt").write_text(tiny.PROMPTS[i % 4])
    return place


def sft_config(folder: Path, model: Path) -> SFTConfig:
    """A recipe whose run goes into folder/run: six images an update, of twenty, a quarter of them held out."""
    (folder / "heldout.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in tiny.PROMPTS[2:]))
    made = SFTConfig(
        output=str(folder / "run"),
        model=ModelConfig(path=str(model), dtype="float32"),
        images=ImageSetConfig(
            str(captioned(folder)), resolutions=[32], multiple=8, max_tokens=64, heldout=0.25, measured=5,
            cache=str(folder / "cache"), max_bad=0.1,
        ),
        heldout=str(folder / "heldout.jsonl"),
        rewards=[RewardSpec(name="brightness", function="tests.helpers.runs:brightness")],
        steps=2,
        batch=6,
        micro_batch=4,
    )  # fmt: skip
    assert made.lora is not None
    made.lora.rank, made.lora.alpha = 4, 8.0
    made.optim.lr = 3e-3
    made.eval.every, made.eval.prompts, made.eval.steps, made.eval.groups, made.eval.guidance = 0, 2, 2, 0, [0.0]
    made.checkpoint.every = 0
    made.track.tensorboard = False
    return made


def tdm_config(folder: Path, model: Path) -> TDMConfig:
    """A recipe whose run goes into folder/run: six pictures of 32 x 32 a step, of prompts of four lengths."""
    more = [f"{prompt}, again" for prompt in tiny.PROMPTS]
    for name, prompts in (("train", [*tiny.PROMPTS, *more]), ("heldout", tiny.PROMPTS[1:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    made = TDMConfig(
        output=str(folder / "run"),
        model=ModelConfig(path=str(model), dtype="float32"),
        prompts=PromptsConfig(str(folder / "train.jsonl"), str(folder / "heldout.jsonl"), max_tokens=64),
        rewards=[RewardSpec(name="brightness", function="tests.helpers.runs:brightness")],
        steps=3,
        batch=6,
        micro_batch=4,
        sizes=[[32, 32]],
        fake=FakeConfig(warmup=1),
    )
    assert made.lora is not None
    made.lora.rank, made.lora.alpha = 4, 8.0
    made.student.steps, made.teacher.guidance = [4], 1.5
    made.optim.lr, made.optim.ema = 3e-3, 0.0
    made.eval.every, made.eval.prompts, made.eval.steps, made.eval.groups, made.eval.group_size = 0, 2, 3, 1, 2
    made.checkpoint.every = 0
    made.track.tensorboard = False
    return made


def mopd_config(folder: Path, model: Path) -> MOPDConfig:
    """A recipe whose run goes into folder/run: two teachers with random adapters in folder/light and folder/dark, the
    first with guidance, of two prompts each; one prompt is the anchor's."""
    tags = [["light"], ["light"], ["dark"], ["dark"], []]
    rows = [{"prompt": f"{tiny.PROMPTS[i % 4]} {i}", "tags": own} for i, own in enumerate(tags)]
    for name in ("train", "heldout"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for seed, name in enumerate(("light", "dark")):
        teacher(folder / name, model, seed)
    made = MOPDConfig(
        output=str(folder / "run"),
        model=ModelConfig(path=str(model), dtype="float32"),
        prompts=PromptsConfig(str(folder / "train.jsonl"), str(folder / "heldout.jsonl"), max_tokens=64),
        rewards=[RewardSpec(name="brightness", function="tests.helpers.runs:brightness")],
        teachers={
            "light": TeacherConfig(run=str(folder / "light"), guidance=1.5, tags=["light"]),
            "dark": TeacherConfig(run=str(folder / "dark"), tags=["dark"], share=0.5),
        },
        steps=2,
        images=4,
        micro_batch=4,
    )
    assert made.lora is not None
    made.lora.rank, made.lora.alpha = 4, 8.0
    made.sampling.sizes, made.sampling.steps, made.sampling.states = [[32, 32]], 4, 2
    made.optim.lr = 3e-3
    made.eval.every, made.eval.prompts, made.eval.steps, made.eval.groups = 0, 5, 2, 0
    made.checkpoint.every = 0
    made.track.tensorboard = False
    return made


def teacher(folder: Path, model: Path, seed: int, size: float = 0.1) -> Path:
    """A run directory with one checkpoint, whose adapter of rank 2 on the attention is random."""
    k2 = K2.load(model)
    k2.origin["base"] = fingerprint(k2.base_state_dict())
    k2.add_role(POLICY, 2, 4.0, ("to_q", "to_v"), seed)
    for i, (key, parameter) in enumerate(k2.role_named_parameters(POLICY).items()):
        if "lora_B" in key:
            noise = torch.Generator().manual_seed(100 * seed + i)
            torch.nn.init.normal_(parameter, std=size, generator=noise)
    state = {"method": "grpo", "model": dataclasses.asdict(ModelConfig(path=str(model), dtype="float32"))}
    state |= {"origin": k2.origin, "lora": described(k2)}
    checkpoint.save(folder / "checkpoints", 1, saved_tensors(k2), state, keep=1)
    return folder


def trained(folder: Path, model: Path) -> Path:
    """The directory of a GRPO run of one step."""
    from posttrain.grpo import train as grpo

    made = config(folder, model)
    made.steps, made.optim.lr = 1, 0.02
    grpo.train(made)
    return Path(made.output)


def recipe(made: Any, path: Path) -> Path:
    path.write_text(json.dumps(dataclasses.asdict(made)))  # JSON is YAML
    return path


def rows(run: str | Path) -> list[dict]:
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


def untimed(run: str | Path) -> list[dict]:
    """The metrics without what a clock said."""
    clock = ("time", "score_hidden", "score_wait", "muon_seconds")
    return [{k: v for k, v in row.items() if k not in clock and not k.startswith("seconds/")} for row in rows(run)]


def training_rows(run: str | Path) -> list[dict]:
    return [row for row in rows(run) if "loss" in row]


def flat(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """All values of a file of a checkpoint, one after another."""
    return torch.cat([value.flatten() for value in tensors.values()])


def latest(run: str | Path) -> checkpoint.Checkpoint:
    """The newest checkpoint, which need not be what the run hands on."""
    found = checkpoint.load_latest(Path(run) / "checkpoints")
    assert found is not None
    return found


def assert_equal(a: dict, b: dict) -> None:
    """The same tensors, bit for bit."""
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].equal(b[key]), key


def assert_metrics_are_defined(run: str | Path, *rewards: str) -> None:
    """All that a run logged has a definition; any other metric of an evaluation is the score of one of `rewards`."""
    names = {name for row in rows(run) for name in row} - {"step", "time"}
    for name in sorted(names):
        metric = metrics.find(name)
        assert metric is not None, name
        assert metric is not metrics.SCORE or name.partition("/")[2].partition("@")[0] in rewards, name


def watch_loading(method: Any, monkeypatch: Any) -> list:
    """Gets each K2 that a method loads, with a copy of its weights as they were."""
    seen, load = [], method.load_model

    def load_model(*arguments):
        k2 = load(*arguments)
        seen.append((k2, {key: value.clone() for key, value in k2.base_state_dict().items()}))
        return k2

    monkeypatch.setattr(method, "load_model", load_model)
    return seen
