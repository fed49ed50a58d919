"""Crops that no method chose, knockouts, and parts of pictures."""

import numpy as np
import pytest

from jaxmllm.errors import InputError
from jaxmllm.methods import AttentionKnockout, CentreCrop, EvidenceCrop, RandomCrop
from jaxmllm.methods.regions import ImageMap, as_patch_map, inside, squared
from jaxmllm.models.boxes import TokenBoxes


def test_the_centre():
    assert CentreCrop(share=0.5).box((100, 60), 0, None) == (35, 15, 65, 45)


def test_random_crops_depend_on_the_examples_number_alone():
    method = RandomCrop(share=0.25)
    size = (100, 80)
    assert method.box(size, 2, None) == method.box(size, 2, ((0, 0, 1, 1),)) != method.box(size, 7, None)
    boxes = np.array([method.box(size, number, None) for number in range(400)])
    np.testing.assert_allclose(boxes[:, 2:] - boxes[:, :2], 20)
    assert boxes.min() >= 0 and boxes[:, 2].max() <= 100 and boxes[:, 3].max() <= 80
    np.testing.assert_allclose(boxes[:, :2].mean(axis=0), [40, 30], atol=3)


def test_the_evidence():
    method = EvidenceCrop(share=0.1)
    boxes = ((10, 20, 20, 30), (40, 25, 50, 35))
    assert method.box((100, 100), 0, boxes) == (10, 7.5, 50, 47.5)
    assert method.box((100, 100), 0, ()) == (0, 0, 100, 100)
    with pytest.raises(InputError, match="no boxes"):
        method.box((100, 100), 0, None)


def test_knockout_windows():
    edits = AttentionKnockout(layer=1, layers=5).edits(32)
    assert edits.knockout[0].layers.spans.tolist() == [[0, 4]]
    assert AttentionKnockout(layer=14).edits(32).knockout[0].layers.spans.tolist() == [[10, 19]]
    assert AttentionKnockout(layer=31).edits(32).knockout[0].layers.spans.tolist() == [[27, 32]]
    with pytest.raises(InputError, match="no layer 32"):
        AttentionKnockout(layer=32).edits(32)
    with pytest.raises(InputError, match="odd"):
        AttentionKnockout(layers=8)


def test_squares_and_whole_pixels():
    assert squared((0, 0, 10, 4), (40, 30)) == (0, 0, 10, 10)
    assert squared((35, 28, 40, 30), (40, 30), 8) == (32, 22, 40, 30)
    assert squared((0, 0, 40, 5), (40, 30)) == (5, 0, 35, 30)  # as large as the shorter side allows
    assert inside((-3.2, 1.4, 9.6, 1.4), (8, 8)) == (0, 1, 8, 2)


def test_tiles_are_spread_over_the_whole_view():
    """A whole view of 2 x 2 patches and a tile over the right half: what the tile has goes to the right cells."""
    whole = [[0, 0, 10, 10], [10, 0, 20, 10], [0, 10, 10, 20], [10, 10, 20, 20]]
    tile = [[10, 0, 15, 10], [15, 0, 20, 10], [0, 0, 0, 0], [10, 10, 15, 20], [15, 10, 20, 20], [0, 0, 0, 0]]
    tokens = TokenBoxes(np.array(whole + tile, float), (2, 3), (20, 20), np.array([0] * 4 + [1, 1, -1, 1, 1, -1]))
    values = np.array([1, 2, 3, 4, 0.5, 0.25, 9, 1, 1, 9])
    np.testing.assert_allclose(as_patch_map(ImageMap(values, tokens)).values, [[1, 2.75], [3, 6]])


def test_padding_is_left_out_of_a_map():
    boxes = np.array([[0, 0, 10, 0], [10, 0, 20, 0], [0, 0, 10, 10], [10, 0, 20, 10]], float)
    patches = as_patch_map(ImageMap(np.arange(4.0), TokenBoxes(boxes, (2, 2), (20, 10))))
    assert patches.values.tolist() == [[2, 3]] and patches.box == (0, 0, 20, 10)


def test_query_tokens_have_no_places():
    boxes = np.tile([0.0, 0, 20, 10], (4, 1))
    with pytest.raises(InputError, match="no places"):
        as_patch_map(ImageMap(np.ones(4), TokenBoxes(boxes, (1, 4), (20, 10))))
