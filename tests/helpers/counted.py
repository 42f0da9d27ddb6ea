"""A reward whose import counts the bytes that its process sends to single others, and not to all of them."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch.distributed import distributed_c10d

COUNTED = "POSTTRAIN_TEST_COUNTED"
"""Names a directory, in which each process keeps RANK.json: the bytes of each message that it sent so."""
sent: list[int] = []
send = distributed_c10d.send


def _send(tensor, *arguments, **options):
    sent.append(tensor.nbytes)
    (Path(os.environ[COUNTED]) / f"{distributed_c10d.get_rank()}.json").write_text(json.dumps(sent))
    return send(tensor, *arguments, **options)


if COUNTED in os.environ:
    distributed_c10d.send = _send


def constant(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    return [0.5] * len(images)
