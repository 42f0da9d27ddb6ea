"""Rewards that go wrong."""

import numpy as np


def some_nan(images, prompts):
    """Every third is no number."""
    scores = [float(np.asarray(image).mean()) / 255 for image in images]
    return [[score, score, float("nan"), score, float("inf"), score][i % 6] for i, score in enumerate(scores)]


def all_nan(images, prompts):
    return [float("nan")] * len(images)
