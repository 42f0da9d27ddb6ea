"""Views of an image that keep its style."""

import numpy as np
import pytest

from posttrain.style import views


def numbered(height, width):
    """An image in which each pixel is its own number."""
    return np.arange(height * width * 3, dtype=np.int64).reshape(height, width, 3)


def test_tiles_are_the_same_pixels_elsewhere():
    image = numbered(12, 16)
    view = views.tiles(image, np.random.default_rng(0), 4)
    assert view.shape == image.shape and sorted(view.ravel()) == sorted(image.ravel())
    assert not np.array_equal(view, image)
    tile = view[:3, :4]  # upright, and mirrored or not: rows stay rows
    rows = [set(row[:, 0] // (16 * 3)) for row in tile]
    assert [len(row) for row in rows] == [1, 1, 1]
    first = [min(row) for row in rows]
    assert first == [first[0], first[0] + 1, first[0] + 2]


def test_half_of_the_tiles_are_mirrored():
    image, mirrored = numbered(64, 64), 0
    for seed in range(20):
        view = views.tiles(image, np.random.default_rng(seed), 8)
        mirrored += sum(view[8 * r, 8 * c, 0] > view[8 * r, 8 * c + 1, 0] for r in range(8) for c in range(8))
    assert 0.45 < mirrored / (20 * 64) < 0.55


def test_a_remainder_is_left_out():
    assert views.tiles(numbered(13, 18), np.random.default_rng(0), 4).shape == (12, 16, 3)
    with pytest.raises(ValueError, match="3 x 3"):
        views.tiles(numbered(3, 3), np.random.default_rng(0), 4)


def test_a_crop_takes_what_is_varied():
    image = np.zeros((32, 32, 3), np.uint8)
    image[:, 16:] = np.random.default_rng(1).integers(0, 255, (32, 16, 3))
    for seed in range(10):
        assert views.crop(image, np.random.default_rng(seed), 8).std() > 0


def test_a_crop_leaves_out_most_of_the_subject():
    image, subject = numbered(64, 64), (20, 20, 44, 44)
    for seed in range(20):
        part = views.crop(image, np.random.default_rng(seed), 16, subject)
        top, left = divmod(int(part[0, 0, 0]) // 3, 64)
        assert views._overlap((top, left, top + 16, left + 16), subject) <= views.MOST_OF_SUBJECT
    with pytest.raises(ValueError, match="larger than the image"):
        views.crop(image, np.random.default_rng(0), 65)


def test_a_square_is_repeated_with_its_mirror_image():
    part = numbered(2, 2)
    whole = views.repeated(part, 5, 7)
    assert whole.shape == (5, 7, 3)
    assert np.array_equal(whole[:2, :2], part) and np.array_equal(whole[2:4, 2:4], part[:, ::-1])
