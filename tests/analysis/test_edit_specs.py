"""Edits in words mean what the constructors make."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxmllm.analysis import blind_image, compose, erase_image, from_layer, knockout, window
from jaxmllm.analysis.edit_specs import normal_spec, parse_edits
from jaxmllm.errors import InputError

SPECS = {
    "erase:12": lambda: erase_image(12),
    "blind:3-7": lambda: blind_image(window(3, 8)),
    "knockout:8-": lambda: knockout(from_layer(8)),
    " erase : 012 + knockout:0-3 ": lambda: compose(erase_image(12), knockout(window(0, 4))),
    "erase:1+erase:3": lambda: compose(erase_image(1), erase_image(3)),
}


@pytest.mark.parametrize("spec", SPECS)
def test_a_spec_is_what_the_constructors_make(spec):
    parsed, expected = parse_edits(spec), SPECS[spec]()
    assert jax.tree.structure(parsed) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(parsed), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)


TERMS = st.tuples(
    st.sampled_from(["erase", "blind", "knockout"]),
    st.integers(0, 99),
    st.one_of(st.none(), st.integers(0, 9)),
)


@given(terms=st.lists(TERMS, min_size=1, max_size=3))
def test_the_normal_form_is_stable_and_names_the_same_layers(terms):
    spec = " + ".join(f"{name}:0{first}-{'' if more is None else first + more}" for name, first, more in terms)
    normal = normal_spec(spec)
    assert normal_spec(normal) == normal
    assert " " not in normal
    for ours, theirs in zip(jax.tree.leaves(parse_edits(normal)), jax.tree.leaves(parse_edits(spec)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("smudge:1", "no edit 'smudge'; expected one of erase, blind, knockout"),
        ("", "no edit ''"),
        ("erase:1+", "no edit ''"),
        ("erase", "the layers of erase are ''"),
        ("erase:", "the layers of erase are ''"),
        ("erase:-3", "the layers of erase are '-3'"),
        ("erase:1.5", "the layers of erase are '1.5'"),
        ("erase:1,2", "the layers of erase are '1,2'"),
        ("erase:³", "the layers of erase are '³'"),
        ("erase:7-3", "layers 7-3 run backwards; expected 3-7"),
    ],
)
def test_what_cannot_be_read_is_named(spec, message):
    with pytest.raises(InputError) as error:
        parse_edits(spec)
    assert message in str(error.value) and repr(spec) in str(error.value)


def test_layers_that_the_model_has_not_are_found_by_the_edits_themselves():
    with pytest.raises(InputError, match="no layer 12"):
        parse_edits("blind:12-").check(12)
    parse_edits("blind:11-").check(12)
