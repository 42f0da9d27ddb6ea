"""Every method on the tiny models: its recipe, the command, and what a finished run comes to."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from posttrain.config.sections import CheckpointConfig, LoraConfig, OptimConfig, TrackConfig
from posttrain.expander.config import ExpanderSFTConfig
from posttrain.judge.config import JudgeConfig
from posttrain.pairs.config import DeltaConfig, DrawConfig, JudgedConfig, PairsConfig, PairSource
from posttrain.preferences.dataset import read_preferences
from tests.helpers import chat, expander_runs, runs, tiny
from tests.helpers.commands import TRAINING

PREPARE = (
    TRAINING
    + "import posttrain.pairs.make, posttrain.expander.gdpo, posttrain.expander.sft, posttrain.judge.train\n"
    + "import tests.helpers.expander_runs\n"
)


def training(folder: Path, parts: Path, method: str) -> Any:
    makers = {
        "sft": runs.sft_config, "stpo": runs.stpo_config, "grpo": runs.config, "nft": runs.nft_config,
        "mopd": runs.mopd_config, "tdm": runs.tdm_config,
    }  # fmt: skip
    made = makers[method](folder, parts / "k2")
    made.steps, made.checkpoint.every, made.checkpoint.keep, made.eval.every, made.optim.ema = 5, 1, 3, 2, 0.7
    if method in ("grpo", "nft"):
        made.pool.kind = "adaptive"
    return made


def pairs(folder: Path, parts: Path, _: str) -> PairsConfig:
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in tiny.PROMPTS))
    base = runs.config(folder, parts / "k2")
    return PairsConfig(
        output=str(folder / "run"), model=base.model, prompts=str(folder / "prompts.jsonl"), rewards=base.rewards,
        sources=[PairSource("steps", delta=DeltaConfig(DrawConfig(), DrawConfig(steps=1), screen=False)),
                 PairSource("judged", judged=JudgedConfig(group_size=3))],
        pairs=16, min_distance=0, min_margin=0.0, steps=2, sizes=[[32, 32]], block=2, shard=4, max_tokens=64,
    )  # fmt: skip


def expander(folder: Path, parts: Path, _: str) -> Any:
    made = expander_runs.config(folder, parts)
    made.steps, made.checkpoint.keep = 3, 3
    return made


def sft(folder: Path, parts: Path, _: str) -> ExpanderSFTConfig:
    pairs = [{"prompt": user, "completion": caption} for user in chat.USERS for caption in chat.captions(user)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return ExpanderSFTConfig(
        output=str(folder / "run"), model=str(parts / "chat"), data=str(folder / "pairs.jsonl"), heldout=0.3, steps=12,
        batch=4, micro_batch=2, measured=4, eval_every=4, dtype="float32", lora=LoraConfig(4, 8),
        optim=OptimConfig(lr=1e-3), checkpoint=CheckpointConfig(every=1, keep=3), track=TrackConfig(tensorboard=False),
    )  # fmt: skip


def of_training(run: Path) -> tuple:
    last = runs.latest(run)
    tensors = {f"{file}/{name}": value for file, group in last.tensors.items() for name, value in group.items()}
    kept = {k: v for k, v in last.state.items() if k not in ("history", "model", "pairs", "images")}
    summary = json.loads((run / "summary.json").read_text())
    return tensors, (last.step, kept, runs.untimed(run), summary["before"], summary["after"])


def of_pairs(run: Path) -> tuple:
    found = [(p.id, p.margin, p.share, p.seed, p.chosen_policy) for p in read_preferences(run)]
    return {}, (found, (run / "preferences.json").read_text())


def of_expander(run: Path) -> tuple:
    left_out = ("num_tokens",)  # TRL counts them from where it resumes
    rows = [{k: v for k, v in row.items() if k not in left_out} for row in runs.untimed(run)]
    return load_file(run / "adapter/adapter_model.safetensors"), rows


def judge(folder: Path, parts: Path, _: str) -> JudgeConfig:
    pictures = runs.pairs(folder, 24, (64, 64))
    return JudgeConfig(
        output=str(folder / "run"), model=str(parts / "judge"), data=str(pictures), mode="preference", heldout=0.3,
        steps=8, batch=2, micro_batch=2, dtype="float32", lora=LoraConfig(4, 8), optim=OptimConfig(lr=1e-3, ema=0.7),
        checkpoint=CheckpointConfig(every=1, keep=3), track=TrackConfig(tensorboard=False),
    )  # fmt: skip


def of_judge(run: Path) -> tuple:
    figures = json.loads((run / "adapter/figures.json").read_text())
    return load_file(run / "adapter/adapter_model.safetensors"), (runs.untimed(run), figures)


METHODS: dict[str, tuple[Callable[[Path, Path, str], Any], Callable[[Path], tuple]]] = {
    "sft": (training, of_training),
    "stpo": (training, of_training),
    "grpo": (training, of_training),
    "nft": (training, of_training),
    "mopd": (training, of_training),
    "tdm": (training, of_training),
    "pairs": (pairs, of_pairs),
    "expander gdpo": (expander, of_expander),
    "expander sft": (sft, of_expander),
    "judge": (judge, of_judge),
}
SCORING = [method for method in METHODS if method not in ("expander sft", "judge")]
"""Those that ask rewards."""


def assert_same(a: tuple, b: tuple) -> None:
    """Tensors bit for bit, and all else."""
    runs.assert_equal(a[0], b[0])
    assert a[1] == b[1]
