"""Cases of edits: for decoders of every depth, and what the port makes of them."""

import jax
import numpy as np
import pytest

from jaxmllm.validation.edit_cases import EditCase, Step, edit_cases, head_scales, image_weights, port_edits

KINDS = {"erase", "blind", "knockout", "review", "scale_heads", "at_site"}


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 28, 80])
def test_cases_name_layers_of_the_model(depth):
    cases = edit_cases(depth)
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        assert all(step.layers and set(step.layers) <= set(range(depth)) for step in case.steps)
        port_edits(case, 4, 7).check(depth)


def test_every_kind_is_asked_for_whole_in_part_and_together():
    cases = edit_cases(32)
    assert {step.kind for step in cases[-1].steps} == KINDS
    for kind in KINDS:
        strengths = {step.strength for case in cases[:-1] for step in case.steps if step.kind == kind}
        assert any(strength < 1 for strength in strengths)
        assert kind == "at_site" or 1 in strengths


def test_weights_and_scales_hold_zero_one_and_what_lies_between():
    np.testing.assert_array_equal(image_weights(6), [0, 0.25, 0.5, 0.75, 1, 0])
    np.testing.assert_array_equal(head_scales(5), [0, 0.5, 1, 1.5, 0])


def test_the_port_s_edits_hold_a_case_s_numbers():
    case = EditCase("some", (Step("erase", (1, 3), 0.25, weighted=True), Step("review", (2,), 0.5)))
    edits = port_edits(case, 4, 5)
    (mask,), (review,) = edits.erase, edits.knockout
    np.testing.assert_allclose(np.asarray(mask.layers.gate(4)), [0, 0.25, 0, 0.25])
    np.testing.assert_allclose(mask.positions.weights, image_weights(5))
    np.testing.assert_allclose(review.keys.weights, 1 - image_weights(5))
    assert jax.tree.structure(edits) == jax.tree.structure(port_edits(case, 4, 5))


def test_hooks_of_a_case_are_compiled_once():
    case = edit_cases(8)[-1]
    assert port_edits(case, 4, 5).hooks == port_edits(case, 4, 5).hooks
