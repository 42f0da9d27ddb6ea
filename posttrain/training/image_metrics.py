"""Metrics of evaluation images besides the rewards: what drifts while a reward is being cheated.

| metric | what it is | range |
|---|---|---|
| image/brightness | mean luma | [0, 1] |
| image/saturation | mean of the largest less the smallest of a pixel's red, green and blue | [0, 1] |
| image/high_frequency | share of the luma's energy above half the finest frequency | [0, 1], noise has 0.8 |
| image/latent_norm | root mean square of the final latents | >= 0, about 1 |
| image/diversity | mean distance of two images of one prompt, see `diversity` | [0, 1] |

Images are uint8 (N, H, W, 3), and their values count as 0 to 1. Plain numpy, on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

LUMA = np.array([0.2126, 0.7152, 0.0722])  # Rec. 709
HIGH = 0.25
"""Cycles per pixel from which a frequency is high; an image's finest is 0.5."""
GRID = 16
"""Cells along each side of the small images that diversity compares."""


def measure(image: np.ndarray, latents: np.ndarray) -> dict[str, float]:
    """Metrics of one image, uint8 (H, W, 3), and its latents of any shape: numbers, so that no image has to travel."""
    images = image[None]
    high, total = next(_energies(images))
    latent_norm = float(np.sqrt(np.square(latents, dtype=np.float64).mean()))
    return {
        "image/brightness": brightness(images),
        "image/saturation": saturation(images),
        "image/high_frequency": _share(high, total),
        "image/latent_norm": latent_norm,
        "image/contrast": contrast(images),
        "image/high_energy": high,
    }


def means(measured: Sequence[dict[str, float]]) -> dict[str, float]:
    """Metrics of all images from what `measure` gave for each: their means."""
    metrics = {}
    for name in measured[0]:
        values = np.array([of_image[name] for of_image in measured])
        # A root mean square of all latents is the quadratic mean of those of each image.
        metrics[name] = float(np.sqrt((values**2).mean()) if name == "image/latent_norm" else values.mean())
    return metrics


def brightness(images: np.ndarray) -> float:
    return float((images.mean((0, 1, 2)) / 255 * LUMA).sum())


def saturation(images: np.ndarray) -> float:
    # Unlike that of HSV it is not divided by the brightness, which would make noise in the dark colourful.
    # Of uint8: the largest less the smallest is never negative.
    return float((images.max(-1) - images.min(-1)).mean() / 255)


def high_frequency(images: np.ndarray) -> float:
    """Mean over the images; grid textures and noise raise it, blur lowers it. A flat image has 0."""
    return float(np.mean([_share(high, total) for high, total in _energies(images)]))


def high_energy(images: np.ndarray) -> float:
    """Mean over the images of what `high_frequency` is a share of; in [0, 1]. Its ratio to that of other images of the
    same prompts and seeds tells whether detail was lost or texture gained, even if the rest of the spectrum changes.
    """
    return float(np.mean([high for high, _ in _energies(images)]))


def _share(high: float, total: float) -> float:
    return high / total if total >= 1e-16 else 0.0  # less is rounding


def _energies(images: np.ndarray) -> Iterator[tuple[float, float]]:
    """Mean square of each image's luma above HIGH, and of all of it but the mean."""
    # Faded out towards the edges (Hann), since the jump from one edge to the other is no detail.
    height, width = images.shape[1:3]
    window = np.hanning(height + 2)[1:-1, None] * np.hanning(width + 2)[None, 1:-1]
    high = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None]) > HIGH
    for image in images:
        luma = image @ LUMA / 255
        faded = (luma - (luma * window).sum() / window.sum()) * window
        # By Parseval the sum is the mean square of the faded luma, whatever the size.
        power = np.square(np.abs(np.fft.fft2(faded))) / (height * width) ** 2
        yield float(power[high].sum()), float(power.sum())


def contrast(images: np.ndarray) -> float:
    """Mean over the images of the standard deviation of luma, in [0, 0.5]."""
    return float(np.mean([(image @ LUMA / 255).std() for image in images]))


def diversity(images: np.ndarray, group_size: int) -> float:
    """Mean over groups of the mean distance of two of their images; every `group_size` neighbours are a group.

    The distance is the root mean square difference of the two images made small (16 x 16 means over cells): 0
    for the same image, 1 for black and white. It sees composition, colour and light, and so sees a policy
    that draws one image whatever the noise. It does not see details smaller than a cell, such as faces or
    words that differ in one place, and it takes an object that has moved for as new as another object.
    """
    return diversity_of_cells(cells(images), group_size)


def diversity_of_cells(small: np.ndarray, group_size: int) -> float:
    """`diversity` of images that are given as `cells` makes them."""
    if len(small) % group_size:
        raise ValueError(f"{len(small)} images are not groups of {group_size}")
    first, second = np.triu_indices(group_size, 1)  # each pair once
    groups = small.reshape(-1, group_size, small.shape[1])
    return float(np.mean([distances(g[first], g[second]).mean() for g in groups]))


def cells(images: np.ndarray) -> np.ndarray:
    """(N, 16 * 16 * 3) the images made small, values 0 to 1. A pixel on an edge counts in each cell by its share."""
    n, height, width = images.shape[:3]
    if height % GRID or width % GRID:
        small = np.einsum("yh,nhwc,xw->nyxc", _shares_of_cells(height), images, _shares_of_cells(width), optimize=True)
        return small.reshape(n, -1) / 255
    return images.reshape(n, GRID, height // GRID, GRID, width // GRID, 3).mean((2, 4)).reshape(n, -1) / 255


def _shares_of_cells(side: int) -> np.ndarray:
    """(16, side) the weight of each pixel of a side in the mean over each cell; rows sum to 1."""
    edges, pixels = np.arange(GRID + 1) * side / GRID, np.arange(side)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return overlap.clip(0) * GRID / side


def distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(N,) root mean square difference of images as `cells` gives them: `diversity`'s distance."""
    return np.sqrt(np.square(first - second).mean(1))
