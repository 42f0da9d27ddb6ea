"""Figures of pictures and what follows from them, on pictures and series whose figures are known."""

import numpy as np
import pytest

from posttrain.config.metric_names import LOOK, names
from posttrain.config.sections import EvalConfig, StopConfig
from posttrain.training import early_stopping, image_metrics


def flat(*colours, size=32) -> np.ndarray:
    return np.stack([np.full((size, size, 3), colour, np.uint8) for colour in colours])


def wave(frequency: float, size=64) -> np.ndarray:
    """Grey stripes across, so many cycles a pixel."""
    grey = 127.5 + 100 * np.sin(2 * np.pi * frequency * np.arange(size))
    return np.broadcast_to(grey.round().astype(np.uint8)[None, None, :, None], (1, size, size, 3))


def test_brightness_and_saturation():
    red, grey = (255, 0, 0), (51, 51, 51)
    assert image_metrics.brightness(flat(0, 255)) == pytest.approx(0.5)
    assert image_metrics.brightness(flat(red)) == pytest.approx(0.2126)
    assert image_metrics.brightness(flat(grey)) == pytest.approx(0.2)
    assert image_metrics.saturation(flat(grey, 0, 255)) == 0
    assert image_metrics.saturation(flat(red, grey)) == pytest.approx(0.5)


@pytest.mark.parametrize(("frequency", "share"), [(0.03, 0), (0.2, 0), (0.3, 1), (0.45, 1)])
def test_high_frequency_of_a_wave(frequency, share):
    """Across as well as down, and whatever its strength. Rounding to uint8 adds a little noise."""
    picture = wave(frequency)
    assert image_metrics.high_frequency(picture) == pytest.approx(share, abs=2e-3)
    assert image_metrics.high_frequency(picture.swapaxes(1, 2)) == pytest.approx(share, abs=2e-3)
    assert image_metrics.high_frequency((picture // 4).astype(np.uint8)) == pytest.approx(share, abs=2e-2)


def test_high_frequency_of_noise_and_of_nothing():
    """Outside a circle of half the square's radius lies 1 - pi/16 of it. A flat picture has no energy to share."""
    noise = np.random.default_rng(0).integers(0, 256, (4, 128, 96, 3), dtype=np.uint8)
    assert image_metrics.high_frequency(noise) == pytest.approx(1 - np.pi / 16, abs=0.02)
    assert image_metrics.high_frequency(flat(7, (1, 200, 33))) == 0
    assert image_metrics.high_frequency(np.concatenate([wave(0.4), flat(9, size=64)])) == pytest.approx(0.5, abs=2e-3)


def test_high_energy():
    """A wave of amplitude 100 / 255 and half of it: a quarter. Unlike the share, what is below does not count."""
    fine, coarse = wave(0.3), wave(0.03)
    halved = (fine.astype(float) / 2 + 64).round().astype(np.uint8)
    assert image_metrics.high_energy(halved) / image_metrics.high_energy(fine) == pytest.approx(0.25, rel=0.02)
    mixed = ((fine.astype(float) + coarse) / 2).round().astype(np.uint8)
    assert image_metrics.high_energy(mixed) == pytest.approx(image_metrics.high_energy(halved), rel=0.02)
    assert image_metrics.high_frequency(mixed) == pytest.approx(0.5, abs=0.02)
    # (100 / 255)^2 / 2 times the window's mean square, (3 / 8)^2 for Hann in two directions
    assert image_metrics.high_energy(fine) == pytest.approx((100 / 255) ** 2 / 2 * (3 / 8) ** 2, rel=0.1)
    assert image_metrics.high_energy(coarse) < 1e-3 * image_metrics.high_energy(fine)


def test_contrast():
    """Half black, half white: .5. A sine of amplitude 100 / 255: that over the root of two."""
    assert image_metrics.contrast(np.concatenate([flat(0), flat(255)], axis=1)) == pytest.approx(0.5)
    assert image_metrics.contrast(wave(0.25)) == pytest.approx(100 / 255 / np.sqrt(2), rel=0.01)
    assert image_metrics.contrast(flat(0, 255)) == 0


def test_latent_norm():
    latents = np.array([[3.0, 4.0], [0.0, 5.0]])
    assert image_metrics.means([image_metrics.measure(flat(0)[0], latents)])["image/latent_norm"] == pytest.approx(
        np.sqrt(12.5)
    )


def test_diversity():
    noise = np.random.default_rng(0).integers(0, 256, (6, 32, 48, 3), dtype=np.uint8)
    assert image_metrics.diversity(np.repeat(noise, 4, axis=0), 4) == 0  # the groups differ and their pictures do not
    assert image_metrics.diversity(flat(0, 255), 2) == 1
    # Black, black, white: distances 0, 1, 1. A grey of 51 is 0.2 from black.
    assert image_metrics.diversity(flat(0, 0, 255), 3) == pytest.approx(2 / 3)
    assert image_metrics.diversity(flat(0, 51, 51, 51), 2) == pytest.approx(0.1)
    assert image_metrics.diversity(noise, 3) == pytest.approx(image_metrics.diversity(noise[[2, 0, 1, 4, 5, 3]], 3))
    with pytest.raises(ValueError, match="not groups of 4"):
        image_metrics.diversity(noise, 4)


def test_diversity_sees_composition_and_not_detail():
    """A checkerboard of single pixels and its negative are the same grey from afar; halves are not."""
    board = np.indices((32, 32)).sum(0) % 2
    halves = np.indices((32, 32))[0] // 16
    for pattern, expected in ((board, 0), (halves, 1)):
        picture = np.broadcast_to(pattern[..., None], (32, 32, 3)).astype(np.uint8) * 255
        assert image_metrics.diversity(np.stack([picture, 255 - picture]), 2) == expected


def test_names():
    assert names(["oracle"], [0.0], 0) == ["oracle", *LOOK]
    with_groups = [*LOOK, "image/diversity"]
    assert names(["a", "b"], [0.0, 1.5], 8) == [
        "a", "b", *with_groups, "a@1.5", "b@1.5", *(f"{name}@1.5" for name in with_groups),
    ]  # fmt: skip


# what follows


def series(*values, every=10):
    """As evaluations are saved: JSON makes a list of a pair."""
    return [[every * i, {"oracle": value}] for i, value in enumerate(values)]


def test_the_best_is_the_highest_and_the_first_of_equals():
    assert early_stopping.best(series(0.5, None, 0.8, 0.7, 0.8, float("nan")), "oracle") == (20, 0.8)
    assert early_stopping.best(series(-3, -2), "oracle") == (10, -2)
    assert early_stopping.best(series(None, None), "oracle") is None
    assert early_stopping.best(series(0.5), None) is None and early_stopping.best([], "oracle") is None
    assert [early_stopping.newest_is_best(series(*(0.5, 0.4, 0.6, 0.6)[:n]), "oracle") for n in range(5)] == [
        False, True, False, True, False,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("values", "stops"),
    [
        ([0.8, 0.5, 0.5], True),
        ([0.8, 0.5], False),  # not yet
        ([0.8, 0.5, 0.75, 0.5], False),  # not in a row
        ([0.8, 0.73, 0.73, 0.73], False),  # a tenth of 0.8 is let go
        ([0.8, 0.71, 0.71], True),
        ([0.6, 0.7, 0.8, 0.7, 0.6], True),  # the best is that so far
        ([0.8, 0.5, 0.5, 0.8], False),
        ([0.8, 0.5, None, 0.5], True),  # missing says nothing either way
        ([None, None, None], False),
        ([-1.0, -1.05, -1.2, -1.2], True),
        ([0.0, 0.0, 0.0], False),
        ([], False),
    ],
)
def test_regression(values, stops):
    """By more than a tenth, twice in a row; and the same of a figure that should be low."""
    stop = StopConfig("oracle", drop=0.1, patience=2)
    assert bool(early_stopping.regression(series(*values), stop)) == stops
    mirrored = [None if value is None else -value for value in values]
    assert bool(early_stopping.regression(series(*mirrored), StopConfig("oracle", "lower", 0.1, patience=2))) == stops
    assert early_stopping.regression(series(*values), StopConfig()) is None


@pytest.mark.parametrize(
    ("values", "stops"),
    [
        ([0.0, 0.02, 0.011], True),
        ([0.0, 0.02, 0.01], False),  # the limit itself is allowed
        ([0.0, 0.02, 0.0, 0.02], False),
        ([-0.5, -0.1, -0.1], False),  # however much better it has been
        ([0.02, 0.02], True),  # from the start
    ],
)
def test_a_limit(values, stops):
    """Above .01 twice in a row; and, mirrored, below -.01."""
    stop = StopConfig("oracle", "lower", limit=0.01, patience=2)
    assert bool(early_stopping.regression(series(*values), stop)) == stops
    mirrored = series(*(-value for value in values))
    assert bool(early_stopping.regression(mirrored, StopConfig("oracle", "higher", limit=-0.01, patience=2))) == stops
    said = early_stopping.regression(series(0.0, 0.02, 0.03), stop)
    assert said == "eval.stop: oracle is 0.03 (step 20), above the limit 0.01"


def test_what_a_run_says():
    config = EvalConfig(best="oracle", stop=StopConfig("oracle", patience=1))
    reason = "eval.stop: oracle fell from 0.8 (step 10) to 0.6 (step 20)"
    decided, lines = early_stopping.outcome(series(0.7, 0.8, 0.6), config)
    assert decided == {"stopped": reason, "best": {"metric": "oracle", "step": 10, "value": 0.8}}
    assert lines == [f"{reason}; the run has ended", "hands on its best step 10, whose oracle is 0.8"]
    handed_on = early_stopping.handed_on(series(0.7, 0.8, 0.6), decided)
    assert handed_on["oracle"] == 0.8 and early_stopping.handed_on(series(0.7, 0.8, 0.6), {})["oracle"] == 0.6
    config.stop.better = "lower"
    rose = "eval.stop: oracle rose from 0.6 (step 0) to 0.8 (step 10)"
    assert early_stopping.outcome(series(0.6, 0.8), config)[0]["stopped"] == rose
    assert early_stopping.outcome(series(0.8), config) == (
        {"best": {"metric": "oracle", "step": 0, "value": 0.8}},
        ["eval.best: oracle was never above its start (0.8), so no step is marked best"],
    )
    assert early_stopping.outcome(series(0.7, 0.8), EvalConfig()) == ({}, [])


def test_cells_of_any_size():
    """24 rows over 16 cells: the first cell is row 0 and half of row 1, the second the other half and row 2."""
    image = np.zeros((1, 24, 32, 3), np.uint8)
    image[:, 1] = 255
    small = image_metrics.cells(image).reshape(16, 16, 3)
    assert small[0] == pytest.approx(1 / 3) and small[1] == pytest.approx(1 / 3) and small[2:] == pytest.approx(0)
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (2, 32, 48, 3), dtype=np.uint8)
    by_shares = np.einsum(
        "yh,nhwc,xw->nyxc", image_metrics._shares_of_cells(32), image, image_metrics._shares_of_cells(48)
    )
    assert image_metrics.cells(image) == pytest.approx(by_shares.reshape(2, -1) / 255)
