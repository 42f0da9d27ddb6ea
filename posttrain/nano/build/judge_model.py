"""judge-nano itself: its words, its weights, and the layout of a row that asks an image many questions at once.

See build_judge.py, which trains it, also for the shapes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationConfig, Qwen2Tokenizer, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from posttrain.nano.build import parts
from posttrain.nano.world import questions, scenes
from prompts.templates import load_template

PATCH, MERGE, TEMPORAL = 4, 2, 2
GRID = scenes.SIZE // (PATCH * MERGE)
"""Image tokens along a side."""
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
"""A placeholder for a statement, where only the text around it matters."""


# ---- words ------------------------------------------------------------------------------------------------


def make_tokenizer(seed: int = 0) -> Qwen2Tokenizer:
    """A tokenizer like the text encoder's, trained on the judges' templates and answers too."""
    rng = np.random.default_rng(seed)
    drawn = [scenes.random_scene(rng) for _ in range(3000)]
    corpus = [scenes.describe(scene, rng).prompt for scene in drawn]
    corpus += [rubric(questions.ask(scene, rng)[0]) for scene in drawn[:1000]]
    fixed = [load_template(name).text for name in ("aesthetic", "artifact", "transcribe", "rubric")]
    fixed += [DESCRIBE, *questions.FAULTS.values(), questions.transcript(""), questions.transcript("A")]
    # Repeated, since BPE merges what is frequent.
    tokenizer = parts.make_tokenizer(corpus + fixed * 100 + ["yes", "no"] * 5000)
    # P(yes) is read from the first token of the answer.
    if len(token_ids(tokenizer, "yes")) != 1 or len(token_ids(tokenizer, "no")) != 1:
        raise RuntimeError("yes and no must be one token each")
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = CHAT
    return tokenizer


_template = cache(load_template)


def rubric(statement: str) -> str:
    return _template("rubric").render(requirement=statement)


# ---- the model --------------------------------------------------------------------------------------------


def make_model(tokenizer: Qwen2Tokenizer) -> Qwen3VLForConditionalGeneration:
    end, pad = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])  # type: ignore[misc]
    config = Qwen3VLConfig(
        text_config={
            **parts.LANGUAGE,
            "vocab_size": len(tokenizer),
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
        **parts.vision_ids(tokenizer),
    )
    model = Qwen3VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=pad, do_sample=False)
    return model


def save(model: Qwen3VLForConditionalGeneration, tokenizer: Qwen2Tokenizer, folder: Path) -> None:
    """Writes all files that transformers and vLLM need, with weights in bfloat16."""
    # A copy, because `to` would change the model that is still being trained.
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
    """(B,3,64,64) in [-1,1] -> (B,256,96) in the order of the image processor: four patches of a token are
    neighbours."""
    b = len(pixels)
    x = pixels.view(b, 3, GRID, MERGE, PATCH, GRID, MERGE, PATCH).permute(0, 2, 5, 3, 6, 1, 4, 7)
    # The encoder takes videos: an image is repeated for each frame of a patch.
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
    """A vision layer over images of one size (B,P,D), where the library's loops over images."""
    attention: Any = block.attn
    b, p, d = x.shape
    qkv = attention.qkv(block.norm1(x)).view(b, p, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    # In fp32, as the library rotates them.
    q = q.float() * cos + _rotate_half(q.float()) * sin
    k = k.float() * cos + _rotate_half(k.float()) * sin
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
    q = (q * cos + _rotate_half(q) * sin).to(v)
    k = (k * cos + _rotate_half(k) * sin).to(v)
    out = attend(q, k, v, shared, spans)
    h = h + attention.o_proj(out.transpose(1, 2).flatten(2))
    return h + layer.mlp(layer.post_attention_layernorm(h))


Span = tuple[int, int, int, int]
"""(start, n, length, seen): n tasks of one length side by side; each sees the row's first `seen` tokens and itself."""


def attend(q: Tensor, k: Tensor, v: Tensor, shared: int, spans: tuple[Span, ...]) -> Tensor:
    """Causal attention (B,heads,L,d) in which tasks do not see each other; the first `shared` tokens are one text."""
    beginning = slice(None, shared)
    first = F.scaled_dot_product_attention(q[:, :, beginning], k[:, :, beginning], v[:, :, beginning], is_causal=True)
    parts = [first]
    for start, n, length, seen in spans:

        def own(x: Tensor, at: int = start, n: int = n, size: int = length) -> Tensor:
            return x[:, :, at : at + n * size].unflatten(2, (n, size)).transpose(1, 2).flatten(0, 1)

        def with_seen(x: Tensor, n: int = n, seen: int = seen, own=own) -> Tensor:
            before = x[:, None, :, :seen].expand(-1, n, -1, -1, -1).flatten(0, 1)
            return torch.cat([before, own(x)], dim=2)

        # Everything that was seen before, and the task's own tokens causally.
        mask = torch.ones(length, seen + length, dtype=torch.bool, device=q.device).tril(seen)
        out = F.scaled_dot_product_attention(own(q), with_seen(k), with_seen(v), attn_mask=mask)
        parts.append(out.unflatten(0, (-1, n)).transpose(1, 2).flatten(2, 3))
    return torch.cat(parts, dim=2)


class JudgeNetwork:
    """The vision half and the language half as functions of whole batches, compiled where that pays."""

    def __init__(self, model: Qwen3VLForConditionalGeneration, compiled: bool):
        self.visual: Any = model.model.visual
        self.language: Any = model.model.language_model
        self.vision_block = torch.compile(_vision_block, dynamic=False) if compiled else _vision_block
        self.layer = torch.compile(_layer, dynamic=False) if compiled else _layer

    def see(self, pixels: Tensor) -> Tensor:
        """(B,3,64,64) in [-1,1] -> image tokens (B,64,D)."""
        v = self.visual
        rows, columns = _patch_places()
        rows, columns = rows.to(pixels.device), columns.to(pixels.device)
        # A patch is seen by one position of the convolution, which is then a linear layer.
        proj = v.patch_embed.proj
        x = F.linear(patches(pixels), proj.weight.flatten(1), proj.bias)
        x = x + v.pos_embed(rows * GRID * MERGE + columns)
        cos, sin = v.rotary_pos_emb(x, torch.stack([rows, columns], dim=1))
        for block in v.blocks:
            x = self.vision_block(block, x, cos, sin)
        return v.merger(x.flatten(0, 1)).view(len(pixels), GRID * GRID, -1)

    def read(self, ids: Tensor, image: Tensor, layout: Layout) -> Tensor:
        """Hidden states (B,L,D) of rows (B,L) in which the image tokens stand for an image."""
        h = self.language.embed_tokens(ids)
        a, b = layout.image
        h = torch.cat([h[:, :a], image.to(h.dtype), h[:, b:]], dim=1)
        cos, sin = self.language.rotary_emb(h, layout.positions[:, None])
        for layer in self.language.layers:
            h = self.layer(layer, h, cos[:, None], sin[:, None], layout.shared, layout.spans)
        return self.language.norm(h)


# ---- the layout of a row ----------------------------------------------------------------------------------


@dataclass
class Batch:
    """What one step asks of B images."""

    rubric: Tensor
    """(B,Q,R)"""
    length: Tensor
    yes: Tensor
    transcribe: Tensor
    describe: Tensor
    opinion: Tensor
    """(B,) which of OPINIONS is asked"""


@dataclass
class Layout:
    """Where things stand in a row, the same in every row: image, rubric's beginning, questions, other tasks."""

    image: tuple[int, int]
    trunk: list[int]
    """Ids of the image's turn."""
    before: list[int]
    """Ids of the rubric up to the statement."""
    after: dict[str, list[int]]
    """Ids of each other task's question, from the image to the answer."""
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
        head = token_ids(tokenizer, HEAD)
        trunk = head + token_ids(tokenizer, "<|image_pad|>") * GRID**2
        image = (len(head), len(trunk))
        trunk += token_ids(tokenizer, "<|vision_end|>")
        before = rubric_beginning(tokenizer)
        after = {
            "transcribe": token_ids(tokenizer, load_template("transcribe").render() + SUFFIX),
            "describe": token_ids(tokenizer, DESCRIBE + SUFFIX),
        }
        opinions = {name: token_ids(tokenizer, load_template(name).render() + SUFFIX) for name in OPINIONS}
        # The last token of an answer is only said, never read.
        length = {name: len(ids) + room[name] - 1 for name, ids in after.items()}
        length["opinion"] = max(map(len, opinions.values()))
        length["rubric"] = room["rubric"]
        start, place = {"rubric": len(trunk) + len(before)}, len(trunk) + len(before) + n * length["rubric"]
        spans = [(start["rubric"], n, length["rubric"], start["rubric"])]
        for name in ("transcribe", "describe", "opinion"):
            # They see the image alone: the rubric's beginning is not theirs.
            spans.append((place, 1, length[name], len(trunk)))
            start[name], place = place, place + length[name]

        cells = torch.arange(GRID**2)
        places = image[0] + torch.stack([0 * cells, cells // GRID, cells % GRID])
        # An image takes as many positions as it has rows, so text after it comes nearer than it stands.
        text = torch.arange(start["rubric"]).expand(3, -1) - (GRID**2 - GRID)
        positions = torch.cat([torch.arange(image[0]).expand(3, -1), places, text[:, image[1] :]], dim=1)
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
        # Padding of an answer, -1 in the labels, is token 0 here: what comes after an answer is in no loss.
        for name, answer in (("transcribe", batch.transcribe), ("describe", batch.describe)):
            put(self.start[name], self.after[name])
            put(self.start[name] + len(self.after[name]), answer[:, :-1].clamp_min(0))
        put(self.start["opinion"], self.opinions(device)[batch.opinion])
        put(len(self.trunk), self.before)
        put(self.start["rubric"], batch.rubric.flatten(1))
        return ids

    def opinions(self, device: torch.device) -> Tensor:
        """The questions of OPINIONS, padded to one length."""
        rows = torch.zeros(len(OPINIONS), self.length["opinion"], dtype=torch.long, device=device)
        for row, name in zip(rows, OPINIONS):
            row[: len(self.after[name])] = torch.tensor(self.after[name])
        return rows

    def answers(self, h: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The states from which each task's answer is said."""
        device = h.device
        span = self.n * self.length["rubric"]
        asked = h[:, self.start["rubric"] : self.start["rubric"] + span].unflatten(1, (self.n, -1))
        # The last token of a question is that after which the answer comes.
        last = (batch.length - 1)[..., None, None].expand(-1, -1, 1, h.shape[-1])
        states = {"rubric": asked.gather(2, last).squeeze(2)}
        for name, answer in (("transcribe", batch.transcribe), ("describe", batch.describe)):
            first = self.start[name] + len(self.after[name]) - 1
            states[name] = h[:, first : first + answer.shape[1]]
        ends = torch.tensor([len(self.after[name]) for name in OPINIONS], device=device)[batch.opinion]
        states["opinion"] = h[torch.arange(len(h), device=device), self.start["opinion"] + ends - 1]
        return states


OPINIONS = ("aesthetic", "artifact")


def token_ids(tokenizer: Qwen2Tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def rubric_beginning(tokenizer: Qwen2Tokenizer) -> list[int]:
    """What all rubric questions begin with."""
    # Up to the first token in which two questions differ: a token may reach over the template's end.
    one, other = token_ids(tokenizer, rubric(SHARED)), token_ids(tokenizer, rubric("a"))
    same = 0
    while one[same] == other[same]:
        same += 1
    return one[:same]
