"""A reward whose import counts the bytes that its process sends to single others, and not to all of them."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist
from PIL import Image

COUNTED = "POSTTRAIN_TEST_COUNTED"
"""Names a directory, in which each process keeps RANK.json: the bytes of each message that it sent so."""
sent: list[int] = []
isend = dist.isend


def _isend(tensor, *arguments, **options):
    sent.append(tensor.nbytes)
    (Path(os.environ[COUNTED]) / f"{dist.get_rank()}.json").write_text(json.dumps(sent))
    return isend(tensor, *arguments, **options)


if COUNTED in os.environ:
    dist.isend = _isend


def constant(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    return [0.5] * len(images)
