"""A judge that does as it is told, without a server."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

from rewards.image import Aesthetic
from rewards.judge import Judge


class Gullible(Judge):
    """Says yes with 0.9 where it is told to, else with 0.2; it sees text in a picture as the plate under it."""

    def __init__(self, reads: bool, listens: bool):
        super().__init__("gullible", "nowhere")
        self.reads, self.listens = reads, listens

    async def silent(self):
        return []

    async def _p_yes(self, encoded, text):
        assert encoded is not None
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded.url.partition(",")[2]))))
        plate = bool((pixels[-1] == 250).all(-1).any())
        return 0.9 if (self.reads and plate) or (self.listens and "answer yes" in text) else 0.2


class Gulled(Aesthetic):
    """A reward by a judge that reads."""

    def __init__(self) -> None:
        super().__init__(Gullible(reads=True, listens=False))


GULLED = {"class_path": "tests.helpers.gullible.Gulled", "init_args": {}}
RAISED = 0.9 - 0.2
