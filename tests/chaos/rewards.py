"""Rewards that go wrong."""

import os
import random

import numpy as np
import torch
from PIL import ImageDraw


def nan(images, prompts):
    """The second score is no number."""
    return [0.5, float("nan"), *[0.5] * len(images)][: len(images)]


def looks(images, prompts, **columns):
    """As `ruins`, which touches all that it is given and what it can of the process."""
    return [0.5] * len(images)


def ruins(images, prompts, **columns):
    scores = [0.5] * len(images)
    for image in images:
        ImageDraw.Draw(image).rectangle((0, 0, *image.size), fill=(255, 0, 255))
        image.thumbnail((4, 4))
    for column in columns.values():
        for value in column:
            if isinstance(value, list | dict):
                value.clear()
        column.clear()
    images.clear()
    prompts.clear()
    os.chdir("/")
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    return scores
