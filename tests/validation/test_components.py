"""Names of components, the rows that are kept of them, and what padding has made."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxmllm.errors import InputError
from jaxmllm.validation import components
from tests.support.validation_reports import names

VALID = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], bool)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("decoder.3.mlp_out", ("decoder", 3, "mlp_out")),
        ("decoder.31.attn_in~faint", ("decoder", 31, "attn_in~faint")),
        ("vision.0.resid_pre", ("vision", 0, "resid_pre")),
        ("vision.embed", ("vision", None, "embed")),
        ("qformer.11.cross_out", ("qformer", 11, "cross_out")),
        ("logits", ("logits", None, "logits")),
        ("edit.erase.logits", ("edit", None, "erase.logits")),
    ],
)
def test_names_are_split(name, parts):
    assert components.split(name) == parts


def test_each_component_belongs_to_a_phase_and_phases_are_in_order():
    phases = [components.phase_of(name) for name in names(2, 2, qformer=2)]
    assert list(dict.fromkeys(phases)) == ["vision", "connector", "embedding", "decoder", "logits"]
    assert components.phase_of("edit.erase.logits") == "edits"


@given(st.integers(1, 600), st.lists(st.integers(0, 599), max_size=4))
def test_rows_hold_both_ends_the_last_token_and_what_is_asked_for(length, also):
    also = [place for place in also if place < length]
    valid = np.zeros((2, length), bool)
    valid[0, : length // 2 + 1] = True  # padded behind
    valid[1, length // 2 :] = True  # padded before
    rows = components.sequence_rows(valid, also)
    if length <= components.ALL_ROWS:
        assert rows is None
        return
    assert list(rows) == sorted(set(rows)) and len(rows) <= components.SOME_ROWS + len(also) + 2
    assert {0, length - 1, length // 2, *also} <= set(rows)


@given(st.lists(st.integers(1, 3000), min_size=2, max_size=4))
def test_large_arrays_keep_about_as_many_numbers_as_they_may(shape):
    rows = components.other_rows(shape)
    size = int(np.prod(shape))
    if size <= components.MOST_VALUES:
        assert rows is None
    elif rows is not None:
        assert rows[0] == 0 and rows[-1] == shape[-2] - 1
        assert len(rows) <= max(8, shape[-2] * components.MOST_VALUES // size)


@pytest.mark.parametrize(
    ("name", "shape", "axis"),
    [
        ("decoder.0.mlp_out", (2, 5, 4), 1),
        ("decoder.0.keys", (2, 5, 3, 4), 1),
        ("decoder.0.attn_probs", (2, 3, 5, 5), 2),
        ("vision.0.mlp_out", (2, 5, 4), 1),
        ("image_tokens", (5, 4), 0),
    ],
)
def test_rows_are_taken_along_the_axis_of_tokens(name, shape, axis):
    array = np.arange(np.prod(shape)).reshape(shape)
    np.testing.assert_array_equal(components.keep(name, array, (1, 4)), array.take([1, 4], axis=axis))
    assert components.keep(name, array, None) is array


@pytest.mark.parametrize("rows", [None, (0, 2, 4)])
def test_padding_is_left_out_along_the_sequence(rows):
    inputs, kept = {"attention_mask": VALID.astype(int)}, VALID if rows is None else VALID[:, list(rows)]
    np.testing.assert_array_equal(components.meaningful("logits", (*kept.shape, 7), rows, inputs), kept)
    probs = components.meaningful("decoder.0.attn_probs", (2, 3, kept.shape[1], 5), rows, inputs)
    assert probs.shape == (2, 3, kept.shape[1], 5)
    for head in range(3):
        np.testing.assert_array_equal(probs[:, head], kept[:, :, None] & VALID[:, None, :])


@pytest.mark.parametrize("rows", [None, (0, 3, 6)])
def test_padded_words_of_a_qformer_are_left_out_behind_its_queries(rows):
    inputs = {"qformer_attention_mask": np.array([[1, 1, 0], [1, 1, 1]])}
    whole = np.array([[1, 1, 1, 1, 1, 1, 0], [1] * 7], bool)
    kept = whole if rows is None else whole[:, list(rows)]
    np.testing.assert_array_equal(components.meaningful("qformer.0.attn_out", (*kept.shape, 8), rows, inputs), kept)
    assert components.meaningful("qformer.0.cross_out", (2, 4, 8), None, inputs).all()


@pytest.mark.parametrize(("name", "shape"), [("logits", (2, 6, 7)), ("decoder.0.attn_probs", (2, 3, 5, 6))])
def test_an_array_that_does_not_fit_the_inputs_is_refused(name, shape):
    with pytest.raises(InputError, match="does not fit inputs of shape"):
        components.meaningful(name, shape, None, {"attention_mask": VALID})
