"""Rendered text, read by RapidOCR: PP-OCR's detector and recogniser as ONNX, with their weights in the package.

    function: {class_path: rewards.ready.Text}

It needs the extra `ready` (pip install 'posttrain[ready]'), and neither a server nor a download.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from posttrain.errors import UserError
from posttrain.image_reader import to_rgb
from posttrain.loading import reading
from rewards.base import Failure, Score, Scored
from rewards.ocr import edit_distances, folded, score_prompt


class Text:
    """How well the text that RapidOCR reads matches the column `texts`, in [0, 1], by the measure of rewards.image.OCR;
    None where a prompt asks for no text.

    The package's own weights (PP-OCRv6, Apache-2.0) read Chinese, Japanese and languages of Latin letters. A text with
    a letter that the recogniser does not have, such as a Cyrillic or a Korean one, is a failure and not a 0. Lines that
    it is less sure of than `sure` are left out, as by its own defaults.
    """

    def __init__(self, device: str = "cpu", threads: int = 4, sure: float = 0.5, recogniser: str | None = None):
        """`device` cuda needs onnxruntime-gpu. `threads` are the CPU's, of this process. `recogniser` is the .onnx file
        of another PP-OCR model with its characters in it, as RapidOCR's for other scripts are; null: the package's."""
        if device not in ("cpu", "cuda"):
            raise UserError(f"device: {device}: use cpu or cuda")
        if threads < 1:
            raise UserError(f"threads: {threads}: use 1 or more")
        if not 0 <= sure <= 1:
            raise UserError(f"sure: {sure}: use a number from 0 to 1")
        if recogniser is not None and not Path(recogniser).is_file():
            raise UserError(f"recogniser: {recogniser}: no such file; give the .onnx file of a PP-OCR recogniser")
        for package in ("rapidocr", "onnxruntime"):
            if importlib.util.find_spec(package) is None:
                raise UserError(f"{package} is not installed: pip install 'posttrain[ready]'")
        import onnxruntime
        from rapidocr import RapidOCR

        if device == "cuda" and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise UserError("device: cuda: this onnxruntime knows no GPU: pip install onnxruntime-gpu in its place")
        params = {
            "Global.log_level": "critical",
            "Global.text_score": sure,
            "EngineConfig.onnxruntime.use_cuda": device == "cuda",
            "EngineConfig.onnxruntime.intra_op_num_threads": threads,
        }
        self.recogniser = recogniser
        with reading(recogniser or "rapidocr", "a recogniser of PP-OCR"):
            self._engine: Any = RapidOCR(params=params | ({"Rec.model_path": recogniser} if recogniser else {}))
            blank = np.full((48, 96, 3), 255, np.uint8)
            self._engine(blank, use_det=False, use_cls=False, use_rec=True)  # loads it, which it does when first asked
            self._letters = set(self._engine.text_rec.postprocess_op.character)

    def __call__(
        self, images: Sequence[Image.Image], prompts: Sequence[str], texts: Sequence[list[str] | None]
    ) -> list[Score]:
        return [self._score(image, prompt, asked) for image, prompt, asked in zip(images, prompts, texts, strict=True)]

    def _score(self, image: Image.Image, prompt: str, texts: list[str] | None) -> Score:
        if not texts:
            return None
        if unknown := sorted(set(filter(str.isalnum, "".join(texts))) - self._letters):
            return Failure(
                f"the recogniser has no letter {' '.join(unknown[:5])}: name one of that script (recogniser)"
            )
        lines = self.read(image)
        result = score_prompt(prompt, texts, lines)
        if result is None:
            return None
        details = {"lines": lines, "missing": result.missing, "extra": result.extra}
        return Scored(result.score, details | {"character_errors": character_error_rate(texts, lines)})

    def read(self, image: Image.Image) -> list[str]:
        """The lines of text in an image, from top to bottom."""
        pixels = np.ascontiguousarray(np.asarray(to_rgb(image))[:, :, ::-1])  # blue first, as OpenCV has it
        # The engine keeps to what it was last told to leave out.
        return list(self._engine(pixels, use_det=True, use_cls=True, use_rec=True).txts or ())

    def record(self) -> dict[str, Any]:
        return {"model": f"rapidocr {importlib.metadata.version('rapidocr')}", "recogniser": self.recogniser}


def character_error_rate(texts: Sequence[str], lines: Sequence[str]) -> float:
    """Edit distance of all characters in order over the number asked for, of `folded` texts without spaces; above 1
    where more is read than was asked for."""
    asked, read = ("".join(folded("".join(part)).split()) for part in (texts, lines))
    if not asked:
        raise ValueError("no text was asked for")
    return int(edit_distances(asked, [read])[0]) / len(asked) if read else 1.0
