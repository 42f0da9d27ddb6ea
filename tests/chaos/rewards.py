"""Rewards that go wrong."""


def nan(images, prompts):
    """The second score is no number."""
    return [0.5, float("nan"), *[0.5] * len(images)][: len(images)]
