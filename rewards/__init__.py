"""Rewards: callables `(images, prompts, **columns)` that return one score for each image."""
