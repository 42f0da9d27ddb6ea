"""Builds judge-nano from nothing: a real Qwen3-VL directory, trained to judge and read pictures of scenes.

    python -m posttrain.nano.build_judge OUT --device cuda --minutes 3

It learns what the rewards ask, worded by the same templates: yes/no on a statement (rubric) and the text in the
picture as JSON (transcribe). Captions and labels of the picture's cells are learnt besides, because they teach the
eye sooner; the heads that read the labels are thrown away. The questions of taste and of faults are answered one half
each: what they mean is for adapters to learn.

A picture is encoded once for all its questions. One row is [picture | rubric's beginning | questions ... | others],
and each question sees the picture, the beginning and itself, at the positions it would have if asked alone; so training
sees what serving sees (tests/test_judge_nano.py compares the logits).

Shapes: images (N,64,64,3) uint8, B pictures of a step, Q questions of a picture, L tokens of a row, D width.
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
from transformers import GenerationConfig, Qwen2Tokenizer, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from posttrain.nano import build, damage, evaluate_judge, questions, scenes
from posttrain.nano.prompts import TRAIN_WORDS
from prompts.templates import load_template
from rewards.vlm import VLM

PATCH, MERGE, TEMPORAL = 4, 2, 2
GRID = scenes.SIZE // (PATCH * MERGE)
"""Image tokens along a side."""
QUESTIONS = 24
"""Questions drawn for a picture; each step asks some of them."""
DAMAGED, WORDY = 0.15, 0.25
"""Shares of pictures with a fault, and of further pictures with a word."""
DESCRIBE = "Describe this picture."
HEAD = "<|im_start|>user\n<|vision_start|>"
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n"
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}"
    "{% else %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHARED = "the shapes"
"""Stands for any statement where only what surrounds it matters."""


# ---- words ------------------------------------------------------------------------------------------------


def make_tokenizer(seed: int = 0) -> Qwen2Tokenizer:
    """The text encoder's kind of tokenizer, which knows the judges' templates and answers besides."""
    rng = np.random.default_rng(seed)
    drawn = [scenes.random_scene(rng) for _ in range(3000)]
    corpus = [scenes.describe(s, rng).prompt for s in drawn]
    corpus += [rubric(questions.ask(s, rng)[0]) for s in drawn[:1000]]
    names = ("aesthetic", "artifact", "transcribe", "rubric")
    fixed = [load_template(name).text for name in names] + [DESCRIBE, *questions.FAULTS.values()]
    fixed += [transcript(""), transcript("A")]
    tokenizer = build.make_tokenizer(corpus + fixed * 100 + ["yes", "no"] * 5000)
    if any(len(_ids(tokenizer, word)) != 1 for word in ("yes", "no")):
        raise RuntimeError("yes and no must be one token each")
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = CHAT
    return tokenizer


_template = cache(load_template)


def rubric(statement: str) -> str:
    return _template("rubric").render(requirement=statement)


def transcript(word: str) -> str:
    return json.dumps({"lines": [word] if word else []})


# ---- the model --------------------------------------------------------------------------------------------


def make_model(tokenizer: Qwen2Tokenizer) -> Qwen3VLForConditionalGeneration:
    special = {k: tokenizer.convert_tokens_to_ids(f"<|{v}|>") for k, v in build._VISION_TOKENS.items()}
    end, pad = (tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>"))
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "head_dim": 32,
            "initializer_range": 0.06,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
            "eos_token_id": end,
            "pad_token_id": pad,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": 4,
            "hidden_size": 96,
            "intermediate_size": 160,
            "num_heads": 3,
            "out_hidden_size": 96,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": TEMPORAL,
            "num_position_embeddings": (scenes.SIZE // PATCH) ** 2,
            "deepstack_visual_indexes": [],
            "initializer_range": 0.06,
        },
        tie_word_embeddings=True,
        **special,  # type: ignore[arg-type]
    )
    model = Qwen3VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=pad, do_sample=False)
    return model


def save(model: Qwen3VLForConditionalGeneration, tokenizer: Qwen2Tokenizer, folder: Path) -> None:
    """Writes all that transformers and vLLM need; weights in bfloat16."""
    copy: Any = make_model(tokenizer)
    copy.load_state_dict(model.state_dict())
    copy.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    pixels = {
        "size": {"shortest_edge": scenes.SIZE**2, "longest_edge": scenes.SIZE**2},
        "patch_size": PATCH,
        "merge_size": MERGE,
        "temporal_patch_size": TEMPORAL,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    for name, kind in {
        "preprocessor_config.json": {"image_processor_type": "Qwen2VLImageProcessor"},
        "video_preprocessor_config.json": {"video_processor_type": "Qwen3VLVideoProcessor"},
    }.items():
        text = json.dumps(pixels | kind | {"processor_class": "Qwen3VLProcessor"}, indent=1)
        (folder / name).write_text(text + "\n")


def patches(pixels: Tensor) -> Tensor:
    """(B,3,64,64) in [-1,1] -> (B,256,96) as the image processor lays them out: merged fours together."""
    b = len(pixels)
    x = pixels.view(b, 3, GRID, MERGE, PATCH, GRID, MERGE, PATCH).permute(0, 2, 5, 3, 6, 1, 4, 7)
    x = x.unsqueeze(6).expand(*x.shape[:6], TEMPORAL, PATCH, PATCH)
    return x.reshape(b, (GRID * MERGE) ** 2, 3 * TEMPORAL * PATCH * PATCH)


@cache
def _patch_places() -> tuple[Tensor, Tensor]:
    """Row and column of each patch, in the order of `patches`."""
    side = torch.arange(GRID * MERGE).view(GRID, MERGE)
    rows = side[:, None, :, None].expand(GRID, GRID, MERGE, MERGE).reshape(-1)
    columns = side[None, :, None, :].expand(GRID, GRID, MERGE, MERGE).reshape(-1)
    return rows, columns


def _vision_block(block: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """A vision layer over pictures of one size (B,P,D), where the library's loops over pictures."""
    attention: Any = block.attn
    b, p, d = x.shape
    qkv = attention.qkv(block.norm1(x)).view(b, p, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    q, k = (y.float() * cos + _rotate_half(y.float()) * sin for y in (q, k))
    out = F.scaled_dot_product_attention(q.to(v), k.to(v), v)
    x = x + attention.proj(out.transpose(1, 2).reshape(b, p, d))
    return x + block.mlp(block.norm2(x))


def _rotate_half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([-b, a], dim=-1)


def _layer(layer: Any, h: Tensor, cos: Tensor, sin: Tensor, shared: int, spans: tuple[Span, ...]) -> Tensor:
    """A language layer over packed rows (B,L,D)."""
    attention = layer.self_attn
    x = layer.input_layernorm(h)
    heads = (*x.shape[:2], -1, attention.head_dim)
    q = attention.q_norm(attention.q_proj(x).view(heads)).transpose(1, 2)
    k = attention.k_norm(attention.k_proj(x).view(heads)).transpose(1, 2)
    v = attention.v_proj(x).view(heads).transpose(1, 2)
    q, k = ((y * cos + _rotate_half(y) * sin).to(v) for y in (q, k))
    out = attend(q, k, v, shared, spans)
    h = h + attention.o_proj(out.transpose(1, 2).flatten(2))
    return h + layer.mlp(layer.post_attention_layernorm(h))


Span = tuple[int, int, int, int]
"""(start, n, length, seen): n tasks of one length side by side; each sees the row's first `seen` tokens and itself."""


def attend(q: Tensor, k: Tensor, v: Tensor, shared: int, spans: tuple[Span, ...]) -> Tensor:
    """Causal attention (B,heads,L,d) in which tasks do not see each other; the first `shared` tokens are one text."""
    first = [x[:, :, :shared] for x in (q, k, v)]
    parts = [F.scaled_dot_product_attention(first[0], first[1], first[2], is_causal=True)]
    for start, n, length, seen in spans:

        def own(x: Tensor, at: int = start, n: int = n, size: int = length) -> Tensor:
            return x[:, :, at : at + n * size].unflatten(2, (n, size)).transpose(1, 2).flatten(0, 1)

        def with_seen(x: Tensor, n: int = n, seen: int = seen, own=own) -> Tensor:
            before = x[:, None, :, :seen].expand(-1, n, -1, -1, -1).flatten(0, 1)
            return torch.cat([before, own(x)], dim=2)

        mask = torch.ones(length, seen + length, dtype=torch.bool, device=q.device).tril(seen)
        out = F.scaled_dot_product_attention(own(q), with_seen(k), with_seen(v), attn_mask=mask)
        parts.append(out.unflatten(0, (-1, n)).transpose(1, 2).flatten(2, 3))
    return torch.cat(parts, dim=2)


class Eye:
    """The vision half and the language half as functions of whole batches, compiled where that pays."""

    def __init__(self, model: Qwen3VLForConditionalGeneration, compiled: bool):
        self.visual: Any = model.model.visual
        self.language: Any = model.model.language_model
        self.vision_block = torch.compile(_vision_block, dynamic=False) if compiled else _vision_block
        self.layer = torch.compile(_layer, dynamic=False) if compiled else _layer

    def see(self, pixels: Tensor) -> Tensor:
        """(B,3,64,64) in [-1,1] -> image tokens (B,64,D)."""
        v = self.visual
        rows, columns = (p.to(pixels.device) for p in _patch_places())
        proj = v.patch_embed.proj
        x = F.linear(patches(pixels), proj.weight.flatten(1), proj.bias)
        x = x + v.pos_embed(rows * GRID * MERGE + columns)
        cos, sin = v.rotary_pos_emb(x, torch.stack([rows, columns], dim=1))
        for block in v.blocks:
            x = self.vision_block(block, x, cos, sin)
        return v.merger(x.flatten(0, 1)).view(len(pixels), GRID * GRID, -1)

    def read(self, ids: Tensor, image: Tensor, layout: Layout) -> Tensor:
        """Hidden states (B,L,D) of rows (B,L) in which the image tokens stand for a picture."""
        h = self.language.embed_tokens(ids)
        a, b = layout.image
        h = torch.cat([h[:, :a], image.to(h.dtype), h[:, b:]], dim=1)
        cos, sin = self.language.rotary_emb(h, layout.positions[:, None])
        for layer in self.language.layers:
            h = self.layer(layer, h, cos[:, None], sin[:, None], layout.shared, layout.spans)
        return self.language.norm(h)


# ---- the layout of a row ----------------------------------------------------------------------------------


@dataclass
class Layout:
    """Where things stand in a row, the same in every row: picture, rubric's beginning, questions, other tasks."""

    image: tuple[int, int]
    trunk: list[int]
    """Ids of the picture's turn."""
    before: list[int]
    """Ids of the rubric up to the statement."""
    after: dict[str, list[int]]
    """Ids of each other task's question, from the picture to the answer."""
    start: dict[str, int]
    """Where each task begins in a row; `rubric` is the first question."""
    length: dict[str, int]
    """Room of each task; of one question for `rubric`."""
    n: int
    """Questions in a row."""
    positions: Tensor
    """(3,L) time, height and width."""
    spans: tuple[Span, ...]

    @property
    def shared(self) -> int:
        """Tokens that all questions see."""
        return self.start["rubric"]

    @classmethod
    def of(cls, tokenizer: Qwen2Tokenizer, n: int, room: dict[str, int]) -> Layout:
        """`room` is the longest answer of transcribe and describe, and the longest rubric question."""
        head = _ids(tokenizer, HEAD)
        trunk = head + _ids(tokenizer, "<|image_pad|>") * GRID**2
        image = (len(head), len(trunk))
        trunk += _ids(tokenizer, "<|vision_end|>")
        before = rubric_beginning(tokenizer)
        after = {
            "transcribe": _ids(tokenizer, load_template("transcribe").render() + SUFFIX),
            "describe": _ids(tokenizer, DESCRIBE + SUFFIX),
        }
        opinions = {name: _ids(tokenizer, load_template(name).render() + SUFFIX) for name in OPINIONS}
        length = {name: len(ids) + room[name] - 1 for name, ids in after.items()}
        length["opinion"] = max(map(len, opinions.values()))
        length["rubric"] = room["rubric"]
        start, place = {"rubric": len(trunk) + len(before)}, len(trunk) + len(before) + n * length["rubric"]
        spans = [(start["rubric"], n, length["rubric"], start["rubric"])]
        for name in ("transcribe", "describe", "opinion"):
            spans.append((place, 1, length[name], len(trunk)))
            start[name], place = place, place + length[name]

        cells = torch.arange(GRID**2)
        picture = image[0] + torch.stack([0 * cells, cells // GRID, cells % GRID])
        # A picture takes as many positions as it has rows, so text after it comes nearer than it stands.
        text = torch.arange(start["rubric"]).expand(3, -1) - (GRID**2 - GRID)
        positions = torch.cat([torch.arange(image[0]).expand(3, -1), picture, text[:, image[1] :]], dim=1)
        for _, count, size, seen in spans:
            own = seen - (GRID**2 - GRID) + torch.arange(size)
            positions = torch.cat([positions, own.repeat(count).expand(3, -1)], dim=1)
        return cls(image, trunk, before, after | opinions, start, length, n, positions, tuple(spans))

    def to(self, device: torch.device) -> Layout:
        self.positions = self.positions.to(device)
        return self

    def row(self, batch: Batch) -> Tensor:
        """Token ids (B,L)."""
        b, device = len(batch.rubric), batch.rubric.device
        ids = torch.zeros(b, self.positions.shape[-1], dtype=torch.long, device=device)

        def put(at: int, tokens: Tensor | list[int]) -> None:
            tokens = torch.as_tensor(tokens, device=device)
            ids[:, at : at + tokens.shape[-1]] = tokens

        put(0, self.trunk)
        for name, answer in (("transcribe", batch.transcribe), ("describe", batch.describe)):
            put(self.start[name], self.after[name])
            put(self.start[name] + len(self.after[name]), answer[:, :-1].clamp_min(0))
        put(self.start["opinion"], self.opinions(device)[batch.opinion])
        put(len(self.trunk), self.before)
        put(self.start["rubric"], batch.rubric.flatten(1))
        return ids

    def opinions(self, device: torch.device) -> Tensor:
        """The questions of OPINIONS, padded to one length."""
        rows = [self.after[name] + [0] * (self.length["opinion"] - len(self.after[name])) for name in OPINIONS]
        return torch.tensor(rows, device=device)

    def answers(self, h: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The states from which each task's answer is said."""
        device = h.device
        span = self.n * self.length["rubric"]
        asked = h[:, self.start["rubric"] : self.start["rubric"] + span].unflatten(1, (self.n, -1))
        last = (batch.length - 1)[..., None, None].expand(-1, -1, 1, h.shape[-1])
        states = {"rubric": asked.gather(2, last).squeeze(2)}
        for name, answer in (("transcribe", batch.transcribe), ("describe", batch.describe)):
            first = self.start[name] + len(self.after[name]) - 1
            states[name] = h[:, first : first + answer.shape[1]]
        ends = torch.tensor([len(self.after[name]) for name in OPINIONS], device=device)[batch.opinion]
        states["opinion"] = h[torch.arange(len(h), device=device), self.start["opinion"] + ends - 1]
        return states


OPINIONS = ("aesthetic", "artifact")


def _ids(tokenizer: Qwen2Tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def rubric_beginning(tokenizer: Qwen2Tokenizer) -> list[int]:
    """What all rubric questions begin with."""
    a, b = (_ids(tokenizer, rubric(s)) for s in (SHARED, "a"))
    same = [x == y for x, y in zip(a, b)]
    return a[: same.index(False)]


# ---- data -------------------------------------------------------------------------------------------------


@dataclass
class Data:
    """M pictures; -1 in ids means nothing there."""

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


@dataclass
class Batch:
    """What one step asks of B pictures."""

    rubric: Tensor
    """(B,Q,R)"""
    length: Tensor
    yes: Tensor
    transcribe: Tensor
    describe: Tensor
    opinion: Tensor
    """(B,) which of OPINIONS is asked"""


ROOM = {"rubric": 48, "transcribe": 14, "describe": 72}
"""Tokens that are kept for each while data are made; then cut to the longest."""


def _make_chunk(tokenizer: Qwen2Tokenizer, job: tuple[int, int]) -> Data:
    seed, m = job
    rng = np.random.default_rng(seed)
    skip = len(rubric_beginning(tokenizer))

    @cache
    def question(statement: str) -> list[int]:
        return _ids(tokenizer, rubric(statement) + SUFFIX)[skip:]

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
        if fault != "garbled":
            for array, text in (
                (data.transcribe, transcript(scene.text)),
                (data.describe, scenes.describe(scene, rng).prompt),
            ):
                tokens = _ids(tokenizer, text + "<|im_end|>")
                array[i, : len(tokens)] = tokens
        data.cells[i], data.whole[i] = questions.labels(scene, fault)
    return data


def make_data(m: int, seed: int, workers: int, tokenizer: Qwen2Tokenizer) -> Data:
    """m pictures and their tasks."""
    chunk = min(2000, -(-m // workers))
    jobs = [(seed * 100_003 + i, min(chunk, m - i * chunk)) for i in range((m + chunk - 1) // chunk)]
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        parts = pool.map(partial(_make_chunk, tokenizer), jobs, chunksize=1)
    data = Data(**{name: np.concatenate([getattr(p, name) for p in parts]) for name in vars(parts[0])})
    data.rubric = data.rubric[..., : data.length.max()]
    for name in ("transcribe", "describe"):
        array = getattr(data, name)
        setattr(data, name, array[:, : (array >= 0).any(0).sum()])
    return data


def blemish(images: Tensor) -> Tensor:
    """uint8 (B,64,64,3) -> (B,3,64,64) in [-1,1]; most of them blurred, noisy or dimmed, as generated pictures are."""
    x = images.permute(0, 3, 1, 2).float() / 255
    b = len(x)

    def some(share: float, most: float) -> Tensor:
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
    """Images, tasks and labels of b pictures drawn at random."""
    device = data.images.device
    i = torch.randint(len(data.images), (b,), device=device)
    q = torch.rand(b, data.yes.shape[1], device=device).topk(n).indices
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
        parts = self.cells(image).float().split(list(questions.LABELS.values()), -1)
        each = [F.cross_entropy(p.flatten(0, 1), c) for p, c in zip(parts, cells.flatten(0, 1).unbind(-1))]
        parts = self.whole(image.mean(1)).float().split(list(questions.WHOLE.values()), -1)
        return torch.stack(each + [F.cross_entropy(p, c) for p, c in zip(parts, whole.unbind(-1))]).sum()


def losses(eye: Eye, head: nn.Module, pixels: Tensor, batch: Batch, layout: Layout, words: tuple[int, int]):
    """(image tokens, each task's loss, share of right answers); words are the ids of yes and no."""
    image = eye.see(pixels)
    states = layout.answers(eye.read(layout.row(batch), image, layout), batch)
    logits = {name: head(state).float() for name, state in states.items()}
    yes, no = words
    target = torch.where(batch.yes, yes, no)
    parts = {"rubric": F.cross_entropy(logits["rubric"].flatten(0, 1), target.flatten())}
    for name, answer in (("transcribe", batch.transcribe), ("describe", batch.describe)):
        parts[name] = F.cross_entropy(logits[name].flatten(0, 1), answer.flatten(), ignore_index=-1)
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
    words = _ids(tokenizer, "yes")[0], _ids(tokenizer, "no")[0]
    eye, labels = Eye(model, compiled), Labels(model.lm_head.in_features).to(device)
    learnt = [p for p in model.parameters() if p.requires_grad]
    params = [*learnt, *labels.parameters()]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in params if p.ndim > 1], "weight_decay": 0.02},
            {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=peak, betas=(0.9, 0.98), fused=device.type == "cuda",
    )  # fmt: skip
    averages = [p.detach().clone() for p in learnt]
    start, step = time.time(), 0
    while True:
        if step == 1:
            start = time.time()  # the first step compiles: it is not counted
        elapsed = step / steps if steps else (time.time() - start) / (60 * minutes) if step else 0.0
        if elapsed >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = build._rate(elapsed, peak)
        images, asked, cells, whole = draw(data, batch, n)
        with torch.autocast(device.type, torch.bfloat16):
            image, parts, right = losses(eye, model.lm_head, blemish(images), asked, layout, words)
            parts["labels"] = labels.loss(image, cells, whole)
        loss = torch.stack([WEIGHTS[name] * value for name, value in parts.items()]).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        torch._foreach_lerp_(averages, [p.detach() for p in learnt], max(0.003, 1 / (step + 1)))
        if step % 200 == 0:
            values = {name: round(value.item(), 4) for name, value in parts.items()}
            log(step=step, seconds=time.time() - start, right=right.item(), norm=norm.item(), **values)
        step += 1
    with torch.no_grad():
        torch._foreach_copy_([p.data for p in learnt], averages)
    model.eval()
    log(step=step, seconds=time.time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="directory to write judge-nano, figures.json and log.jsonl to")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--scenes", type=int, default=120_000, help="pictures to train on")
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--batch", type=int, default=256, help="pictures in a step")
    parser.add_argument("--questions", type=int, default=12, help="questions on a picture in a step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--heldout", type=int, default=500, help="pictures of a kind to measure on")
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
    size = sum(p.numel() for p in model.parameters())
    log(stage="data", vocabulary=len(tokenizer), parameters=size, **shapes)
    train(model, tokenizer, data, args.minutes, args.batch, args.questions, args.lr, log, not args.no_compile)
    save(model, tokenizer, args.out / "judge-nano")
    vlm = VLM.load(str(args.out / "judge-nano"), device=device)
    figures = evaluate_judge.on_scenes(vlm, args.heldout)
    (args.out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    log(stage="figures", **figures)


if __name__ == "__main__":
    main()
