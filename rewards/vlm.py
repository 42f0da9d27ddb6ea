"""A Qwen3-VL in this process, asked as a server would be: image, then text, in one user turn of its chat template.

    vlm = VLM.load("posttrain/nano/weights/judge-nano")
    vlm.p_yes([image], [load_template("rubric").render(requirement="there is a red circle")])

Judges are trained with it, and it gives the scores that vLLM gives. B is a batch of (image, text) questions.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration, Qwen3VLVisionModel

# The one that needs no torchvision; AutoImageProcessor may pick another.
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

from posttrain.errors import UserError
from posttrain.image_reader import to_rgb
from posttrain.loading import load_model, local, model_type, reading, without_revision
from posttrain.tokenizer import load_tokenizer
from prompts.templates import spelled

Inputs = dict[str, Tensor]
KEPT_BYTES = 1 << 28
"""Of features of images that are kept for other judges."""


@dataclass
class SeenImages:
    """What a vision tower has made of images, for all judges that share it."""

    features: dict[str, list[Tensor]] = field(default_factory=dict)
    """By the image's name: those of its last layer, then of the deeper ones, (tokens, C) each."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def keep(self, new: dict[str, list[Tensor]]) -> None:
        for name, parts in new.items():
            # Copies, since parts of a batch would keep all of it.
            self.features[name] = [part.clone() for part in parts]

    def trim(self) -> None:
        """Forgets the oldest beyond KEPT_BYTES."""
        sizes = {}
        for name, parts in self.features.items():
            sizes[name] = sum(part.nbytes for part in parts)
        left = sum(sizes.values())
        for name, size in sizes.items():
            if left <= KEPT_BYTES:
                return
            del self.features[name]
            left -= size


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
        """From a directory or a hub id. Raises UserError for anything but a Qwen3-VL."""
        folder = local(path)
        kind = model_type(folder, path)
        if kind != "qwen3_vl":
            raise UserError(f"model: {path} is a {kind}: judges are Qwen3-VL models (qwen3_vl)")
        model = load_model(Qwen3VLForConditionalGeneration, folder, path, device, dtype=dtype)
        model.name_or_path = model.config.name_or_path = without_revision(path)  # what adapters are said to be of
        tokenizer = load_tokenizer(folder, path, model.get_input_embeddings().num_embeddings)
        if tokenizer.chat_template is None:
            raise UserError(f"model: {path}: its tokenizer has no chat template: add chat_template.jinja")
        texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])  # one token each
        spellings: dict[str, list[int]] = {"yes": [], "no": []}
        for token, text in enumerate(texts):
            if (word := spelled(text)) in spellings:
                spellings[word].append(token)
        for word, tokens in spellings.items():
            if not tokens:
                raise UserError(f"model: {path}: its tokenizer has no token {word!r}, which judges answer with")
        with reading(path, "an image processor"):
            processor = Qwen2VLImageProcessorPil.from_pretrained(str(folder))
        _positions_on_cpu(model.model)
        return cls(model.eval(), tokenizer, processor, spellings["yes"], spellings["no"])

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def inputs(self, images: Sequence[Image.Image], texts: Sequence[str]) -> Inputs:
        """One question for each image as model inputs, padded on the left: the answer comes after the last token."""
        first, row = distinct(images)
        pixels = self.processor(images=[to_rgb(images[i]) for i in first], return_tensors="pt")
        grids = pixels["image_grid_thw"]  # (distinct images, 3): frames, rows and columns of patches
        patches = pixels["pixel_values"].split(grids.prod(-1).tolist())
        turns = []
        for text, grid in zip(texts, grids[row], strict=True):
            content = [{"type": "image"}, {"type": "text", "text": text}]
            turn = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
            # The vision tower merges merge_size x merge_size patches into one token.
            tokens = int(grid.prod()) // self.processor.merge_size**2
            turns.append(turn.replace("<|image_pad|>", "<|image_pad|>" * tokens, 1))
        different = list(dict.fromkeys(turns))  # a group's images are asked the same
        self.tokenizer.padding_side = "left"
        tokens = self.tokenizer(different, padding=True, return_tensors="pt", add_special_tokens=False)
        which = [different.index(turn) for turn in turns]
        ids = tokens.input_ids[which]
        return {
            "input_ids": ids,
            "attention_mask": tokens.attention_mask[which],
            "mm_token_type_ids": (ids == self.tokenizer.convert_tokens_to_ids("<|image_pad|>")).int(),
            "pixel_values": _joined(patches, row),
            "image_grid_thw": grids[row],
        }

    def answers(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """(B,) fp32 each: logit(yes) - logit(no), summed over spellings; log of the probability both have together."""
        return self.yes_no(self.logits(inputs))

    def logits(self, inputs: Inputs) -> Tensor:
        """(B, vocabulary) fp32, of the first answer token."""
        inputs = self._on_device(inputs)
        return self.model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1].float()

    def yes_no(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """What `answers` gives, of `logits`."""
        yes, no = logits[:, self.yes].logsumexp(-1), logits[:, self.no].logsumexp(-1)
        return yes - no, torch.logaddexp(yes, no) - logits.logsumexp(-1)

    def _on_device(self, inputs: Inputs) -> Inputs:
        return {name: value.to(self.device) for name, value in inputs.items()}

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
        self,
        images: Sequence[Image.Image],
        texts: Sequence[str],
        max_tokens: int,
        batch: int = 32,
        names: Sequence[str] = (),
        shared: SeenImages | None = None,
    ) -> list[str]:
        """The most probable answers, token by token. Names as in `seeing_once`."""
        answers: list[str] = []
        for i in range(0, len(images), batch):
            inputs = self._on_device(self.inputs(images[i : i + batch], texts[i : i + batch]))
            with self.seeing_once(images[i : i + batch], names[i : i + batch], shared):
                out = self.model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
            new = out[:, inputs["input_ids"].shape[1] :]  # generate gives the question back before the answer
            answers += self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return answers

    @contextlib.contextmanager
    def seeing_once(
        self, images: Sequence[Image.Image], names: Sequence[str] = (), shared: SeenImages | None = None
    ) -> Iterator[None]:
        """Inside the block an image object that is in a batch several times goes through the vision tower once.

        With a name for each image, one that is in `shared` does not go through it at all, and the others are put there.
        """
        first, row = distinct(images)
        shared = shared or SeenImages()
        names = names or list(map(str, range(len(images))))
        own = [names[i] for i in first]
        # PEFT and the training's own wrappers put the tower at different depths, so it is found by its class.
        visual = next(module for module in self.model.modules() if isinstance(module, Qwen3VLVisionModel))
        whole, merged = visual.forward, self.processor.merge_size**2

        def forward(hidden_states: Tensor, grid_thw: Tensor, **options: Any) -> Any:
            sizes = grid_thw.prod(-1).tolist()
            patches = hidden_states.split(sizes)
            # One at a time: judges that are asked about the same images at once would all miss them.
            with shared.lock:
                new = [place for place, name in zip(first, own) if name not in shared.features]
                if new:
                    seen: Any = whole(_joined(patches, new), grid_thw=grid_thw[new], **options)
                    lengths = [sizes[i] // merged for i in new]
                    parts = [part.split(lengths) for part in (seen.pooler_output, *seen.deepstack_features)]
                    shared.keep({own[first.index(place)]: part for place, *part in zip(new, *parts)})
                known = [shared.features[name] for name in own]
                shared.trim()
            pooled, *deep = (_joined(part, row) for part in zip(*known))
            return BaseModelOutputWithDeepstackFeatures(pooler_output=pooled, deepstack_features=deep)

        visual.forward = forward
        try:
            yield
        finally:
            del visual.forward  # the instance's own; the class's is there again


def own_device(device: str | None) -> str:
    """`device`, or the GPU if there is one, with the number of this process's own: rewards are asked in threads, in
    which plain cuda would be the first GPU."""
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return f"cuda:{torch.cuda.current_device()}" if name == "cuda" else name


def distinct(images: Sequence[Image.Image]) -> tuple[list[int], list[int]]:
    """Where each image object stands first, and for every place which of these it is."""
    first: list[int] = []
    row: list[int] = []
    order: dict[int, int] = {}  # by identity: comparing pixels would cost more than it saves
    for place, image in enumerate(images):
        if id(image) not in order:
            order[id(image)] = len(first)
            first.append(place)
        row.append(order[id(image)])
    return first, row


def _joined(parts: Sequence[Tensor], order: Sequence[int]) -> Tensor:
    return torch.cat([parts[i] for i in order])


def _positions_on_cpu(model: Any) -> None:
    """Rotary positions of rows of one image each, computed on the CPU, and once for rows that are laid out alike.

    transformers' own goes through the rows one by one where they are, and on a GPU waits for each.
    """
    whole = model.get_rope_index

    def index(input_ids: Tensor, mm_token_type_ids: Tensor, image_grid_thw: Tensor, video_grid_thw: Any = None,
              attention_mask: Tensor | None = None, **_: Any) -> tuple[Tensor, Tensor]:  # fmt: skip
        assert attention_mask is not None and len(image_grid_thw) == len(input_ids)
        rows = [input_ids.cpu(), mm_token_type_ids.cpu(), image_grid_thw.cpu(), attention_mask.cpu()]
        # Positions depend on where image tokens and padding stand and on the image's size, not on which tokens.
        layouts = torch.cat(rows[1:], 1)
        _, which = torch.unique(layouts, dim=0, return_inverse=True)
        which_list = which.tolist()
        first = [which_list.index(n) for n in range(max(which_list) + 1)]
        ids, kinds, grids, mask = (part[first] for part in rows)
        positions, deltas = whole(ids, kinds, image_grid_thw=grids, attention_mask=mask)
        return positions[:, which].to(input_ids.device), deltas[which].to(input_ids.device)

    model.get_rope_index = index
