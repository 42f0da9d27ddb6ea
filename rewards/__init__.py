"""Rewards: callables `(images, prompts, **columns) -> list[float | None]`.

Imports `prompts`, never `posttrain`.
"""
