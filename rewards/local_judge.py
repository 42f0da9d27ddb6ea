"""A judge in this process: a small Qwen3-VL that needs no server.

    function: {class_path: rewards.image.Rubric, init_args: {judge: {path: posttrain/nano/weights/judge-nano}}}

It answers as the same weights behind vLLM do, but it takes the training's own processor or GPU and its memory, so it
is for judges that are small beside the model, such as judge-nano. What is asked at one time is answered in one batch.
"""

from __future__ import annotations

import asyncio
import base64
import io
import threading
from functools import lru_cache
from typing import Any

import torch
from PIL import Image

from posttrain.errors import UserError
from posttrain.loading import load_adapter
from rewards.encode import EncodedImage
from rewards.endpoints import JudgeError
from rewards.judge import Judge
from rewards.vlm import VLM, SeenImages, own_device

GATHER = 0.002
"""Seconds for which the first question waits for others to share its batch."""
LIKELY = 20
"""Tokens of an answer whose log-probs are given, as a server is asked for."""


class LocalJudge(Judge):
    """`Judge` without a server: `path` is a Qwen3-VL directory or hub id, `adapter` a LoRA directory on it,
    or a run of posttrain judge."""

    def __init__(
        self,
        path: str,
        adapter: str | None = None,
        max_text_tokens: int = 64,
        min_mass: float = 0.5,
        batch: int = 128,
        device: str | None = None,
    ):
        super().__init__(adapter or path, "this process", max_text_tokens=max_text_tokens, min_mass=min_mass)
        if batch < 1:
            raise UserError(f"batch: {batch}: use 1 or more")
        self.batch = batch
        self._vlm, self._lock, self._seen = _load(path, adapter, own_device(device))
        self._waiting: list[tuple[EncodedImage, str, dict[str, Any], asyncio.Future[Any]]] = []
        self._draining: asyncio.Task[None] | None = None
        self._spellings: dict[int, str] = {}

    async def silent(self) -> list[str]:
        return []

    async def _chat(self, text: str, encoded: EncodedImage | None, **options: Any) -> Any:
        if encoded is None:
            raise JudgeError("a judge in this process is asked about images only; give the prompt its requirements")
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append((encoded, text, options, answer))
        if self._draining is None or self._draining.done():
            self._draining = asyncio.create_task(self._drain())
        return await answer

    async def _drain(self) -> None:
        await asyncio.sleep(GATHER)
        while self._waiting:
            # Short answers first: a batch of transcriptions is many forwards, a batch of yes or no is one.
            self._waiting.sort(key=lambda row: "logprobs" not in row[2])
            kind = "logprobs" in self._waiting[0][2]
            rows = [row for row in self._waiting[: self.batch] if ("logprobs" in row[2]) is kind]
            del self._waiting[: len(rows)]
            try:
                answers = await asyncio.to_thread(self._answer, rows)
            except Exception as error:  # it belongs to those who asked
                for *_, future in rows:
                    if not future.cancelled():
                        future.set_exception(error)
                continue
            for (*_, future), answer in zip(rows, answers, strict=True):
                if not future.cancelled():
                    future.set_result(answer)

    def _answer(self, rows: list[tuple[EncodedImage, str, dict[str, Any], Any]]) -> list[dict[str, Any]]:
        """What a server would answer to each, as far as `Judge` reads it."""
        decoded = {row[0].hash: _decode(row[0]) for row in rows}
        # One object an image, so that the vision tower sees it once however many questions are about it.
        names = [row[0].hash for row in rows]
        images = [decoded[name] for name in names]
        texts = [row[1] for row in rows]
        with self._lock, torch.no_grad():
            if "logprobs" in rows[0][2]:
                with self._vlm.seeing_once(images, names, self._seen):
                    logits = self._vlm.logits(self._vlm.inputs(images, texts))
                margins, mass = self._vlm.yes_no(logits)
                # log P(yes) = log(P(yes) + P(no)) + log sigmoid(logit(yes) - logit(no)), and the same for no.
                yes = (mass + torch.nn.functional.logsigmoid(margins)).tolist()
                no = (mass + torch.nn.functional.logsigmoid(-margins)).tolist()
                return list(map(_first_token_response, yes, no, self._likely(logits)))
            completions = self._vlm.complete(images, texts, self.max_text_tokens, self.batch, names, self._seen)
            return list(map(self._text_response, completions))

    def _likely(self, logits: torch.Tensor) -> list[list[tuple[str, float]]]:
        """For each row, the most probable tokens that spell neither yes nor no, with their log-probs."""
        logprobs, tokens = logits.log_softmax(-1).topk(min(LIKELY, logits.shape[-1]))
        known = {*self._vlm.yes, *self._vlm.no}
        rows = []
        for row, values in zip(tokens.tolist(), logprobs.tolist()):
            pairs = zip(row, values)
            rows.append([(self._spelling(token), value) for token, value in pairs if token not in known])
        return rows

    def _spelling(self, token: int) -> str:
        if token not in self._spellings:
            self._spellings[token] = self._vlm.tokenizer.decode([token])
        return self._spellings[token]

    def _text_response(self, text: str) -> dict[str, Any]:
        tokens = len(self._vlm.tokenizer(text, add_special_tokens=False).input_ids)
        end = "length" if tokens >= self.max_text_tokens else "stop"
        return {"choices": [{"message": {"content": text}, "finish_reason": end}]}


def _first_token_response(yes: float, no: float, others: list[tuple[str, float]]) -> dict[str, Any]:
    pairs = [("yes", yes), ("no", no), *others]
    candidates = [{"token": token, "logprob": logprob} for token, logprob in pairs]
    return {"choices": [{"logprobs": {"content": [{"top_logprobs": candidates}]}}]}


def _decode(encoded: EncodedImage) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(encoded.url.partition(",")[2]))).convert("RGB")


@lru_cache(maxsize=8)
def _load(path: str, adapter: str | None, device: str) -> tuple[VLM, threading.Lock, SeenImages]:
    """Rewards that name the same judge share it, and take turns. Those on one base share what its tower has seen."""
    vlm, seen = VLM.load(path, device=device), _seen(path, device)
    if adapter is not None:
        before = {name for name, _ in vlm.model.named_parameters() if "visual." in name}
        adapted = load_adapter(vlm.model, adapter, f"adapter: {adapter} on {path}")
        # peft renames the layers that it adapts, and those that it replaces.
        after = {name.removeprefix("base_model.model.") for name, _ in adapted.named_parameters() if "visual." in name}
        if after != before:
            seen = SeenImages()
        vlm.model = adapted.merge_and_unload().eval()
    return vlm, threading.Lock(), seen


@lru_cache(maxsize=8)
def _seen(path: str, device: str) -> SeenImages:
    return SeenImages()
