"""Rewards: callables `(images, prompts, **columns) -> list[float | None]`. Never imports `posttrain`."""
