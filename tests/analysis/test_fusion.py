import numpy as np
import pytest

from jaxmllm import InputError
from jaxmllm.analysis import fusion_layers, review_layer


def test_fusion_layers_are_where_the_erase_curve_rises():
    # layer 1 gains 30 points, layer 3 gains 40, the others little
    erased = np.array([0.2, 0.22, 0.52, 0.53, 0.93])
    assert fusion_layers(erased, 0.95) == [1, 3]
    assert fusion_layers(erased, 0.95, share=0.5) == [3]


def test_the_last_layer_can_be_a_fusion_layer():
    assert fusion_layers(np.array([0.1, 0.1]), 0.9) == [1]


def test_no_fusion_layer_where_erasing_costs_nothing():
    assert fusion_layers(np.full(4, 0.5), 0.5) == []


def test_fusion_needs_a_layer():
    with pytest.raises(InputError):
        fusion_layers(np.array([]), 0.5)


def test_a_review_layer_is_a_late_return():
    blinded = np.full(32, 0.80)
    blinded[[2, 11]] = 0.5
    assert review_layer(blinded, 0.80) is None
    blinded[29] = 0.70
    assert review_layer(blinded, 0.80) == 29


def test_a_tail_is_no_return():
    # the drop only fades out: nothing comes back
    blinded = 0.9 - np.linspace(0.5, 0.02, 16)
    assert review_layer(blinded, 0.9) is None


def test_a_model_too_shallow_for_late_layers_has_no_review_layer():
    assert review_layer(np.array([0.1]), 0.9) is None
