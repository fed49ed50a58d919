"""CARVE against a rendering of the official code that was written apart from it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jaxmllm.errors import InputError
from jaxmllm.methods import Carve
from jaxmllm.methods.carve import kept_regions
from jaxmllm.methods.regions import ImageMap
from jaxmllm.models.boxes import TokenBoxes
from tests.support.rivals import carve as rival


def whole_view(rows, columns, size):
    """Patches that lie evenly over an image."""
    xs, ys = np.linspace(0, size[0], columns + 1), np.linspace(0, size[1], rows + 1)
    left, top = np.meshgrid(xs[:-1], ys[:-1])
    right, bottom = np.meshgrid(xs[1:], ys[1:])
    return TokenBoxes(np.stack([left, top, right, bottom], axis=-1).reshape(-1, 4), (rows, columns), size)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.sampled_from([0.05, 0.2, 0.5]), st.integers(1, 4))
def test_regions(seed, top, fewest):
    values = np.random.default_rng(seed).random((13, 17)) ** 3
    np.testing.assert_array_equal(kept_regions(values, top, fewest), rival.keep_mask(values, top, fewest) == 1)


@pytest.mark.parametrize("seed", range(3))
def test_the_map_and_the_refined_image(seed):
    """Whole answers of unlike lengths, several layers, up to the picture that is shown."""
    rng = np.random.default_rng(seed)
    rows, columns, size = 5, 6, (61, 43)
    asked, general = (rng.uniform(0.001, 0.1, (steps, 4, rows * columns)).astype(np.float32) for steps in (5, 3))
    picture = Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), np.uint8))
    theirs = rival.fuse(asked, general, (rows, columns), size, layers=[1, 2])
    method = Carve(geometry="stretched")
    fused = method.fuse(asked[:, 1:3], general[:, 1:3], steps=3)
    found = ImageMap(fused, whole_view(rows, columns, size))
    np.testing.assert_allclose(method.at_pixels(found, size), theirs, rtol=1e-5)
    refined, box = method.refine(picture, found)
    expected, expected_box = rival.refine(picture, rival.keep_mask(theirs))
    assert box == tuple(expected_box)
    np.testing.assert_array_equal(np.asarray(refined), np.asarray(expected))


def test_true_geometry_lays_the_map_where_it_was_seen():
    tokens = whole_view(2, 2, (20, 20))
    cut = TokenBoxes(tokens.boxes + np.array([10, 0, 10, 0]), tokens.grid, (40, 20))
    laid = Carve().at_pixels(ImageMap(np.array([1.0, 5.0, 2.0, 3.0]), cut), (40, 20))
    assert (laid[:, :10] == 1).all() and (laid[:, 30:] == 1).all() and laid[:, 10:30].max() == 5


def test_layers():
    assert Carve().read_layers(32) == [20, 21, 22, 23, 24, 25]
    assert Carve().read_layers(28) == [20, 21, 22, 23, 24, 25]
    assert Carve().read_layers(8) == [5, 6, 7]
    assert Carve(layers=(1, 2)).read_layers(8) == [1, 2]
    with pytest.raises(InputError, match="no layers"):
        Carve(layers=(8,)).read_layers(8)
