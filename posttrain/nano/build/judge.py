"""Builds judge-nano from nothing: a real Qwen3-VL directory, trained to judge and read images of scenes.

    python -m posttrain.nano.build.judge OUT --device cuda --minutes 3

It learns what the rewards ask, worded by the same templates: yes/no on a statement (rubric) and the text in the
image as JSON (transcribe). Captions and labels of the image's cells are learnt besides, because they teach the
network sooner; the heads that read the labels are thrown away. The questions of taste and of faults are answered one
half each: what they mean is for adapters to learn.

An image is encoded once for all its questions. One row is [image | rubric's beginning | questions ... | others],
and each question sees the image, the beginning and itself, at the positions it would have if asked alone; so training
sees what serving sees (tests/judge/test_judge_nano.py compares the logits).

Shapes: images (N,64,64,3) uint8, B images of a step, Q questions of an image, L tokens of a row, D width.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen2Tokenizer, Qwen3VLForConditionalGeneration

from posttrain.nano.build import build, evaluate_judge
from posttrain.nano.build.judge_model import (
    GRID,
    OPINIONS,
    SUFFIX,
    Batch,
    JudgeNetwork,
    Layout,
    make_model,
    make_tokenizer,
    rubric,
    rubric_beginning,
    save,
    token_ids,
)
from posttrain.nano.world import damage, questions, scenes
from posttrain.nano.world.prompts import TRAIN_WORDS
from rewards.vlm import VLM

QUESTIONS = 24
"""Questions drawn for an image; each step asks some of them."""
DAMAGED, WORDY = 0.15, 0.25
"""Shares of images with a fault, and of further images with a word."""


# ---- data -------------------------------------------------------------------------------------------------


@dataclass
class Data:
    """M images; -1 in ids means nothing there."""

    images: Any
    """(M,64,64,3) uint8"""
    rubric: Any
    """(M,QUESTIONS,R) int16, 0 after the end"""
    length: Any
    """(M,QUESTIONS)"""
    yes: Any
    """(M,QUESTIONS)"""
    transcribe: Any
    """(M,A) int16"""
    describe: Any
    """(M,C) int16"""
    cells: Any
    """(M,64,labels) uint8"""
    whole: Any
    """(M,labels) uint8"""

    def map(self, function) -> Data:
        return Data(**{name: function(value) for name, value in vars(self).items()})


ROOM = {"rubric": 48, "transcribe": 14, "describe": 72}
"""Tokens that are kept for each while data are made; then cut to the longest."""


def _make_chunk(tokenizer: Qwen2Tokenizer, job: tuple[int, int]) -> Data:
    seed, m = job
    rng = np.random.default_rng(seed)
    skip = len(rubric_beginning(tokenizer))

    @cache
    def question(statement: str) -> list[int]:
        return token_ids(tokenizer, rubric(statement) + SUFFIX)[skip:]

    def empty(*shape: int, fill: int = 0, kind: Any = np.int16) -> np.ndarray:
        return np.full((m, *shape), fill, kind)

    data = Data(
        empty(scenes.SIZE, scenes.SIZE, 3, kind=np.uint8),
        empty(QUESTIONS, ROOM["rubric"]),
        empty(QUESTIONS, kind=np.uint8),
        empty(QUESTIONS, kind=bool),
        empty(ROOM["transcribe"], fill=-1),
        empty(ROOM["describe"], fill=-1),
        empty(GRID**2, len(questions.LABELS), kind=np.uint8),
        empty(len(questions.WHOLE), kind=np.uint8),
    )
    for i in range(m):
        words = TRAIN_WORDS if rng.random() < 0.3 else None
        scene = scenes.random_scene(rng, words, "text" if rng.random() < WORDY else None)
        data.images[i] = scenes.render(scene)
        fault = None
        if rng.random() < DAMAGED:
            fault = str(rng.choice(damage.ARTIFACTS if scene.text else damage.ARTIFACTS[:3]))
            data.images[i] = damage.damage(data.images[i], scene, rng, fault)
        for j in range(QUESTIONS):
            statement, data.yes[i, j] = questions.ask(scene, rng, fault, words)
            tokens = question(statement)
            data.rubric[i, j, : len(tokens)] = tokens
            data.length[i, j] = len(tokens)
        # Garbled letters have no right transcript.
        if fault != "garbled":
            for array, text in (
                (data.transcribe, questions.transcript(scene.text)),
                (data.describe, scenes.describe(scene, rng).prompt),
            ):
                tokens = token_ids(tokenizer, text + "<|im_end|>")
                array[i, : len(tokens)] = tokens
        data.cells[i], data.whole[i] = questions.labels(scene, fault)
    return data


def make_data(m: int, seed: int, workers: int, tokenizer: Qwen2Tokenizer) -> Data:
    """m images and their tasks."""
    jobs = build.chunks(m, min(2000, -(-m // workers)), seed)
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        parts = pool.map(partial(_make_chunk, tokenizer), jobs, chunksize=1)
    data = parts[0].map(lambda _: None)
    for name in vars(data):
        setattr(data, name, np.concatenate([getattr(part, name) for part in parts]))
    # Cut to the longest: padding would cost as much as text.
    data.rubric = data.rubric[..., : data.length.max()]
    for name in ("transcribe", "describe"):
        array = getattr(data, name)
        setattr(data, name, array[:, : (array >= 0).any(0).sum()])
    return data


def blemish(images: Tensor) -> Tensor:
    """uint8 (B,64,64,3) -> (B,3,64,64) in [-1,1]; most of them blurred, noisy or dimmed, as generated images are."""
    x = images.permute(0, 3, 1, 2).float() / 255
    b = len(x)

    def some(share: float, most: float) -> Tensor:
        """(B,1,1,1) strengths up to `most`, 0 for all but that share of the images."""
        strength = torch.rand(b, 1, 1, 1, device=x.device) * most
        return strength * (torch.rand(b, 1, 1, 1, device=x.device) < share)

    kernel = torch.tensor([0.25, 0.5, 0.25], device=x.device)
    blurred = F.conv2d(
        F.pad(x, (1, 1, 1, 1), mode="replicate"), (kernel[:, None] * kernel).expand(3, 1, 3, 3), groups=3
    )
    x = x + some(0.4, 1.0) * (blurred - x)
    x = x + some(0.3, 0.05) * torch.randn_like(x)
    coarse = F.interpolate(torch.randn(b, 3, 16, 16, device=x.device), scale_factor=4, mode="bilinear")
    x = x + some(0.4, 0.06) * coarse
    x = x * (1 + some(0.3, 0.1) - some(0.3, 0.1))
    return x.clamp(0, 1) * 2 - 1


def draw(data: Data, b: int, n: int) -> tuple[Tensor, Batch, Tensor, Tensor]:
    """Images, tasks and labels of b images drawn at random."""
    device = data.images.device
    i = torch.randint(len(data.images), (b,), device=device)
    q = torch.rand(b, data.yes.shape[1], device=device).topk(n).indices  # n different questions of each image
    rows = i[:, None]
    batch = Batch(
        data.rubric[rows, q].long(),
        data.length[rows, q].long(),
        data.yes[rows, q],
        data.transcribe[i].long(),
        data.describe[i].long(),
        torch.randint(len(OPINIONS), (b,), device=device),
    )
    return data.images[i], batch, data.cells[i].long(), data.whole[i].long()


# ---- training ---------------------------------------------------------------------------------------------


class Labels(nn.Module):
    """Linear heads from image tokens to labels, for training only."""

    def __init__(self, width: int):
        super().__init__()
        self.cells = nn.Linear(width, sum(questions.LABELS.values()))
        self.whole = nn.Linear(width, sum(questions.WHOLE.values()))

    def loss(self, image: Tensor, cells: Tensor, whole: Tensor) -> Tensor:
        """The sum over labels of a cell and of the whole image."""
        of_cells = _entropies(self.cells(image).flatten(0, 1), cells.flatten(0, 1), questions.LABELS)
        of_whole = _entropies(self.whole(image.mean(1)), whole, questions.WHOLE)
        return of_cells + of_whole


def _entropies(logits: Tensor, labels: Tensor, sizes: dict[str, int]) -> Tensor:
    """The sum of the cross-entropies of several labels (N, len(sizes)), whose logits stand side by side."""
    total = logits.new_zeros((), dtype=torch.float32)
    for part, label in zip(logits.float().split(list(sizes.values()), -1), labels.unbind(-1)):
        total = total + F.cross_entropy(part, label)
    return total


def losses(
    network: JudgeNetwork, head: nn.Module, pixels: Tensor, batch: Batch, layout: Layout, words: tuple[int, int]
):
    """(image tokens, each task's loss, share of right answers); words are the ids of yes and no."""
    image = network.see(pixels)
    states = layout.answers(network.read(layout.row(batch), image, layout), batch)
    logits = {name: head(state).float() for name, state in states.items()}
    yes, no = words
    target = torch.where(batch.yes, yes, no)
    parts = {"rubric": F.cross_entropy(logits["rubric"].flatten(0, 1), target.flatten())}
    for name, answer in (("transcribe", batch.transcribe), ("describe", batch.describe)):
        parts[name] = F.cross_entropy(logits[name].flatten(0, 1), answer.flatten(), ignore_index=-1)
    # Opinions are not taught, only that the answer is yes or no: adapters learn them later.
    parts["opinion"] = -logits["opinion"].log_softmax(-1)[:, [yes, no]].mean()
    right = (logits["rubric"][..., yes] > logits["rubric"][..., no]) == batch.yes
    return image, parts, right.float().mean()


WEIGHTS = {"rubric": 1.0, "transcribe": 1.0, "describe": 0.3, "opinion": 0.05, "labels": 0.3}


def train(
    model: Qwen3VLForConditionalGeneration,
    tokenizer: Qwen2Tokenizer,
    data: Data,
    minutes: float,
    batch: int,
    n: int,
    peak: float,
    log,
    compiled: bool = True,
    steps: int | None = None,
) -> None:
    """Until `minutes` are over, or for `steps`. Weights are averaged; `model` ends with the averages."""
    device = data.images.device
    model.to(device).train()
    room = {"rubric": data.rubric.shape[-1], "transcribe": data.transcribe.shape[1], "describe": data.describe.shape[1]}
    layout = Layout.of(tokenizer, n, room).to(device)
    words = token_ids(tokenizer, "yes")[0], token_ids(tokenizer, "no")[0]
    network, labels = JudgeNetwork(model, compiled), Labels(model.lm_head.in_features).to(device)
    learnt = [p for p in model.parameters() if p.requires_grad]
    params = [*learnt, *labels.parameters()]  # the averages are of `learnt` alone: the heads are thrown away
    optimizer = build.adamw(params, 0.02, lr=peak, betas=(0.9, 0.98), fused=device.type == "cuda")
    weights = [p.detach() for p in learnt]  # the same memory, so they follow the optimiser
    averages = [weight.clone() for weight in weights]
    start, step = time.time(), 0
    while True:
        if step == 1:
            start = time.time()  # the first step compiles: it is not counted
        elapsed = step / steps if steps else (time.time() - start) / (60 * minutes)
        # At least one step, however short the time.
        if elapsed >= 1 and step:
            break
        for group in optimizer.param_groups:
            group["lr"] = build.rate(elapsed, peak)
        images, asked, cells, whole = draw(data, batch, n)
        with torch.autocast(device.type, torch.bfloat16):
            image, parts, right = losses(network, model.lm_head, blemish(images), asked, layout, words)
            parts["labels"] = labels.loss(image, cells, whole)
        loss = torch.stack([WEIGHTS[name] * value for name, value in parts.items()]).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        # The mean of all steps at first, later of about the last 300.
        torch._foreach_lerp_(averages, weights, max(0.003, 1 / (step + 1)))
        if step % 200 == 0:
            values = {name: round(value.item(), 4) for name, value in parts.items()}
            log(step=step, seconds=time.time() - start, right=right.item(), norm=norm.item(), **values)
        step += 1
    torch._foreach_copy_(weights, averages)
    model.eval()
    log(step=step, seconds=time.time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="directory to write judge-nano, figures.json and log.jsonl to")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--scenes", type=int, default=120_000, help="images to train on")
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--batch", type=int, default=256, help="images in a step")
    parser.add_argument("--questions", type=int, default=12, help="questions on an image in a step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--heldout", type=int, default=500, help="images of a kind to measure on")
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are as many as the cores
    log, device = build.begin(args.out, args.device, args.seed)
    tokenizer = make_tokenizer(args.seed)
    model = make_model(tokenizer)
    data = make_data(args.scenes, args.seed, os.cpu_count() or 1, tokenizer).map(
        lambda array: torch.from_numpy(array).to(device)
    )
    shapes = {name: list(value.shape) for name, value in vars(data).items()}
    log(stage="data", vocabulary=len(tokenizer), parameters=model.num_parameters(), **shapes)
    train(model, tokenizer, data, args.minutes, args.batch, args.questions, args.lr, log, not args.no_compile)
    save(model, tokenizer, args.out / "judge-nano")
    vlm = VLM.load(str(args.out / "judge-nano"), device=device)
    figures = evaluate_judge.on_scenes(vlm, args.heldout)
    (args.out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    log(stage="figures", **figures)


if __name__ == "__main__":
    main()
