"""Rendered text, read by RapidOCR: PP-OCR's detector and recogniser as ONNX, with their weights in the package.

    function: {class_path: rewards.ready.Text}

It needs the extra `ready` (pip install 'posttrain[ready]'), and neither a server nor a download.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from posttrain.errors import UserError
from posttrain.image_reader import to_rgb
from rewards.base import Score, Scored
from rewards.ocr import edit_distances, folded, score_text


class Text:
    """How well the text that RapidOCR reads matches the column `texts`, in [0, 1], by the measure of rewards.image.OCR;
    None where a prompt asks for no text.

    The engine reads Chinese, Japanese and English with other languages of Latin letters (PP-OCRv6, Apache-2.0). Lines
    that it is less sure of than `sure` are left out, as in its own defaults.
    """

    def __init__(self, device: str = "cpu", threads: int = 4, sure: float = 0.5):
        """`device` cuda needs onnxruntime-gpu. `threads` are the CPU's, of this process."""
        if device not in ("cpu", "cuda"):
            raise UserError(f"device: {device}: use cpu or cuda")
        if threads < 1:
            raise UserError(f"threads: {threads}: use 1 or more")
        if not 0 <= sure <= 1:
            raise UserError(f"sure: {sure}: use a number from 0 to 1")
        for package in ("rapidocr", "onnxruntime"):
            if importlib.util.find_spec(package) is None:
                raise UserError(f"{package} is not installed: pip install 'posttrain[ready]'")
        import onnxruntime
        from rapidocr import RapidOCR

        if device == "cuda" and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise UserError("device: cuda: this onnxruntime knows no GPU: pip install onnxruntime-gpu in its place")
        self._engine = RapidOCR(
            params={
                "Global.log_level": "critical",
                "Global.text_score": sure,
                "EngineConfig.onnxruntime.use_cuda": device == "cuda",
                "EngineConfig.onnxruntime.intra_op_num_threads": threads,
            }
        )

    def __call__(
        self, images: Sequence[Image.Image], prompts: Sequence[str], texts: Sequence[list[str] | None]
    ) -> list[Score]:
        return [self._score(image, prompt, asked) for image, prompt, asked in zip(images, prompts, texts, strict=True)]

    def _score(self, image: Image.Image, prompt: str, texts: list[str] | None) -> Score:
        if not texts:
            return None
        lines = self.read(image)
        try:
            result = score_text(texts, lines)
        except ValueError as error:
            raise UserError(f"prompt {prompt!r}: texts: {error}: join or drop some") from error
        if result is None:
            return None
        details = {"lines": lines, "missing": result.missing, "extra": result.extra}
        return Scored(result.score, details | {"character_errors": character_error_rate(texts, lines)})

    def read(self, image: Image.Image) -> list[str]:
        """The lines of text in an image, from top to bottom."""
        pixels = np.ascontiguousarray(np.asarray(to_rgb(image))[:, :, ::-1])  # blue first, as OpenCV has it
        return list(self._engine(pixels).txts or ())

    def record(self) -> dict[str, Any]:
        return {"model": f"rapidocr {importlib.metadata.version('rapidocr')}"}


def character_error_rate(texts: Sequence[str], lines: Sequence[str]) -> float:
    """Edit distance of all characters in order over the number asked for, of `folded` texts without spaces; above 1
    where more is read than was asked for."""
    asked, read = ("".join(folded("".join(part)).split()) for part in (texts, lines))
    if not asked:
        raise ValueError("no text was asked for")
    return int(edit_distances(asked, [read])[0]) / len(asked) if read else 1.0
