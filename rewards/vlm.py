"""A Qwen3-VL in this process, asked as a server would be: image, then text, in one user turn of its chat template.

    vlm = VLM.load("posttrain/nano/weights/judge-nano")
    vlm.p_yes([picture], [load_template("rubric").render(requirement="there is a red circle")])

Judges are trained with it, and it gives the scores that vLLM gives. B is a batch of (image, text) questions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, Qwen3VLForConditionalGeneration, Qwen3VLVisionModel

# The one that needs no torchvision; AutoImageProcessor may pick another.
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import logging

from posttrain.errors import UserError
from prompts.templates import spelled

Inputs = dict[str, Tensor]


@dataclass
class VLM:
    model: Any
    """Qwen3VLForConditionalGeneration, or a PEFT model around one."""
    tokenizer: Any
    processor: Any
    yes: list[int]
    """Every token that spells 'yes'."""
    no: list[int]

    @classmethod
    def load(cls, path: str, dtype: torch.dtype = torch.float32, device: Any = "cpu") -> VLM:
        """From a directory or a hub id. Raises UserError if it is none, or no Qwen3-VL."""
        if path.startswith((".", "/")) and not Path(path).is_dir():
            raise UserError(f"model: {path} is no directory: correct the path")
        try:
            kind = AutoConfig.from_pretrained(path).model_type
        except (OSError, ValueError) as error:
            raise UserError(f"model: {path} cannot be loaded: {error}") from error
        if kind != "qwen3_vl":
            raise UserError(f"model: {path} is a {kind}: judges are Qwen3-VL models (qwen3_vl)")
        with _quiet():
            model: Any = Qwen3VLForConditionalGeneration.from_pretrained(path, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(path)
        if tokenizer.chat_template is None:
            raise UserError(f"model: {path}: its tokenizer has no chat template: add chat_template.jinja")
        words = [spelled(text) for text in tokenizer.batch_decode([[i] for i in range(len(tokenizer))])]
        yes, no = ([i for i, word in enumerate(words) if word == wanted] for wanted in ("yes", "no"))
        processor = Qwen2VLImageProcessorPil.from_pretrained(path)
        _positions_on_cpu(model.model)
        return cls(model.to(device).eval(), tokenizer, processor, yes, no)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def inputs(self, images: Sequence[Image.Image], texts: Sequence[str]) -> Inputs:
        """One question for each image as model inputs, padded on the left: the answer comes after the last token."""
        first, row = distinct(images)
        pixels = self.processor(images=[images[i].convert("RGB") for i in first], return_tensors="pt")
        grids = pixels["image_grid_thw"]
        patches = pixels["pixel_values"].split(grids.prod(-1).tolist())
        turns = []
        for text, grid in zip(texts, grids[row], strict=True):
            content = [{"type": "image"}, {"type": "text", "text": text}]
            turn = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
            tokens = int(grid.prod()) // self.processor.merge_size**2
            turns.append(turn.replace("<|image_pad|>", "<|image_pad|>" * tokens, 1))
        said = list(dict.fromkeys(turns))  # a group's images are asked the same
        self.tokenizer.padding_side = "left"
        tokens = self.tokenizer(said, padding=True, return_tensors="pt", add_special_tokens=False)
        which = [said.index(turn) for turn in turns]
        ids = tokens.input_ids[which]
        return {
            "input_ids": ids,
            "attention_mask": tokens.attention_mask[which],
            "mm_token_type_ids": (ids == self.tokenizer.convert_tokens_to_ids("<|image_pad|>")).int(),
            "pixel_values": torch.cat([patches[r] for r in row]),
            "image_grid_thw": grids[row],
        }

    def answers(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """(B,) fp32 each: logit(yes) - logit(no), summed over spellings; log of the probability both have together."""
        inputs = {name: value.to(self.device) for name, value in inputs.items()}
        logits = self.model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1].float()
        yes, no = logits[:, self.yes].logsumexp(-1), logits[:, self.no].logsumexp(-1)
        return yes - no, torch.logaddexp(yes, no) - logits.logsumexp(-1)

    @torch.no_grad()
    def margins(self, images: Sequence[Image.Image], texts: Sequence[str], batch: int = 32) -> Tensor:
        """(B,) logit(yes) - logit(no)."""
        parts = []
        for i in range(0, len(images), batch):
            with self.seeing_once(images[i : i + batch]):
                parts.append(self.answers(self.inputs(images[i : i + batch], texts[i : i + batch]))[0].cpu())
        return torch.cat(parts)

    def p_yes(self, images: Sequence[Image.Image], texts: Sequence[str], batch: int = 32) -> list[float]:
        """P(yes) / (P(yes) + P(no)) at the first answer token."""
        return self.margins(images, texts, batch).sigmoid().tolist()

    @torch.no_grad()
    def complete(
        self, images: Sequence[Image.Image], texts: Sequence[str], max_tokens: int, batch: int = 32
    ) -> list[str]:
        """The most probable answers, token by token."""
        answers: list[str] = []
        for i in range(0, len(images), batch):
            inputs = self.inputs(images[i : i + batch], texts[i : i + batch])
            inputs = {name: value.to(self.device) for name, value in inputs.items()}
            with self.seeing_once(images[i : i + batch]):
                out = self.model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
            new = out[:, inputs["input_ids"].shape[1] :]
            answers += self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return answers

    @contextlib.contextmanager
    def seeing_once(self, images: Sequence[Image.Image]) -> Iterator[None]:
        """Inside the block an image object that is in a batch several times goes through the vision tower once."""
        first, row = distinct(images)
        visual = next(m for m in self.model.modules() if isinstance(m, Qwen3VLVisionModel))
        whole, merged = visual.forward, self.processor.merge_size**2

        def forward(hidden_states: Tensor, grid_thw: Tensor, **options: Any) -> Any:
            sizes = grid_thw.prod(-1).tolist()
            patches = hidden_states.split(sizes)
            seen: Any = whole(torch.cat([patches[i] for i in first]), grid_thw=grid_thw[first], **options)

            def spread(features: Tensor) -> Tensor:
                parts = features.split([sizes[i] // merged for i in first])
                return torch.cat([parts[r] for r in row])

            seen.pooler_output = spread(seen.pooler_output)
            seen.deepstack_features = [spread(features) for features in seen.deepstack_features]
            return seen

        visual.forward = forward
        try:
            yield
        finally:
            del visual.forward


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the bar for reading files, between which a message to the user is lost."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def distinct(images: Sequence[Image.Image]) -> tuple[list[int], list[int]]:
    """Where each image object stands first, and for every place which of these it is."""
    order = {key: n for n, key in enumerate(dict.fromkeys(map(id, images)))}
    row = [order[id(image)] for image in images]
    return [row.index(n) for n in range(len(order))], row


def _positions_on_cpu(model: Any) -> None:
    """Rotary positions of rows of one image each, computed on the CPU, and once for rows that are laid out alike.

    transformers' own goes through the rows one by one where they are, and on a GPU waits for each.
    """
    whole = model.get_rope_index

    def index(input_ids: Tensor, mm_token_type_ids: Tensor, image_grid_thw: Tensor, video_grid_thw: Any = None,
              attention_mask: Tensor | None = None, **_: Any) -> tuple[Tensor, Tensor]:  # fmt: skip
        assert attention_mask is not None and len(image_grid_thw) == len(input_ids)
        rows = [input_ids.cpu(), mm_token_type_ids.cpu(), image_grid_thw.cpu(), attention_mask.cpu()]
        layouts = torch.cat(rows[1:], 1).tolist()
        keys = [tuple(layout) for layout in layouts]
        order = list(dict.fromkeys(keys))
        first, which = [keys.index(key) for key in order], [order.index(key) for key in keys]
        ids, kinds, grids, mask = (part[first] for part in rows)
        positions, deltas = whole(ids, kinds, image_grid_thw=grids, attention_mask=mask)
        return positions[:, which].to(input_ids.device), deltas[which].to(input_ids.device)

    model.get_rope_index = index
