"""Differences as distributions: ulps, masks, numbers that are not finite, JSON; agreement of output distributions."""

import json

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from jaxmllm.validation.distributions import DTYPES, Errors, agreement, measure, spacing

NUMBERS = st.floats(-1e4, 1e4, width=32)
ARRAYS = arrays.arrays(np.float32, arrays.array_shapes(min_dims=1, max_dims=3, max_side=6), elements=NUMBERS)


def everything(array):
    return np.ones(array.shape[:1], bool)


@given(ARRAYS, st.sampled_from(sorted(DTYPES)))
def test_equal_arrays_do_not_differ(array, dtype):
    errors = measure(array, array.copy(), everything(array), dtype)
    assert errors.count == array.size and errors.cosine == pytest.approx(1.0)
    assert (errors.mean, errors.p99, errors.max, errors.ulp_max, errors.relative) == (0, 0, 0, 0, 0)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@given(value=st.floats(0.01, 1e4), sign=st.sampled_from([-1, 1]))
def test_neighbours_are_one_ulp_apart(dtype, value, sign):
    number = (np.array([value]) * sign).astype(DTYPES[dtype])
    away = ml_dtypes.finfo(DTYPES[dtype]).max * np.sign(number)
    neighbour = np.nextafter(number, away.astype(DTYPES[dtype]))
    errors = measure(neighbour.astype(np.float32), number.astype(np.float32), np.ones(1, bool), dtype)
    assert errors.ulp_max == errors.ulp_mean == errors.ulp_p99 == 1


@pytest.mark.parametrize(("dtype", "of_one"), [("float32", 2.0**-23), ("bfloat16", 2.0**-7), ("float16", 2.0**-10)])
def test_spacing_is_that_of_the_type(dtype, of_one):
    values = np.array([1.0, -1.999, 2.0, 0.5])
    np.testing.assert_array_equal(spacing(values, DTYPES[dtype]), of_one * np.array([1, 1, 2, 0.5]))
    info = ml_dtypes.finfo(DTYPES[dtype])
    assert spacing(0.0, DTYPES[dtype]) == float(info.tiny) * of_one


def test_small_numbers_are_measured_in_ulps_of_the_scale():
    expected = np.array([0.0, 1.0, -1.0, 1.0, -1.0], np.float32)
    got = expected + np.array([2.0**-23, 0, 0, 0, 0], np.float32)
    errors = measure(got, expected, np.ones(5, bool), "float32")
    assert errors.scale == pytest.approx(0.8**0.5) and errors.ulp_max == 2 and errors.worst == (0,)


@given(ARRAYS, st.data())
def test_masked_numbers_do_not_count(array, data):
    mask = data.draw(arrays.arrays(bool, array.shape[: data.draw(st.integers(1, array.ndim))]))
    got = array.copy()
    got[~mask] = np.nan
    errors = measure(got, array, mask, "float32")
    assert errors.count == array[mask].size and errors.max == 0
    if mask.any():
        place = tuple(np.argwhere(mask)[-1])
        got[place] += 1e6
        errors = measure(got, array, mask, "float32")
        assert errors.worst[: mask.ndim] == place and len(errors.worst) == array.ndim
        assert errors.max == np.abs(got[errors.worst].astype(float) - array[errors.worst])


def test_the_distribution_is_that_of_the_differences():
    expected = np.zeros(200)
    got = np.zeros(200)
    got[:3] = 5.0, -2.0, 1.0
    errors = measure(got, expected, np.ones(200, bool), "float32")
    assert (errors.mean, errors.p99, errors.max) == (8 / 200, 1.0, 5.0)
    assert errors.relative == float("inf") and errors.cosine == 0.0


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_differ_from_all_others(broken):
    expected = np.ones((2, 3), np.float32)
    got = expected.copy()
    got[1, 2] = broken
    for a, b in ((got, expected), (expected, got), (got, -got + 0 * expected)):
        errors = measure(a, b, np.ones((2, 3), bool), "float32")
        assert errors.max == float("inf") or np.isnan(broken)
    errors = measure(got, expected, np.ones((2,), bool), "float32")
    assert errors.max == errors.mean == errors.ulp_max == float("inf") and errors.worst == (1, 2)
    assert np.isnan(errors.cosine)
    same = measure(got, got, np.ones((2,), bool), "float32")
    assert same.max == 0 and same.cosine == 1.0 and same.scale == pytest.approx((5 / 6) ** 0.5)


def test_nothing_to_compare_is_no_difference_and_other_shapes_are_refused():
    assert measure(np.ones((2, 3)), np.zeros((2, 3)), np.zeros(2, bool), "float32").count == 0
    with pytest.raises(ValueError, match=r"shape \(2, 1\) cannot be compared with one of shape \(2, 3\)"):
        measure(np.ones((2, 1)), np.ones((2, 3)), np.ones(2, bool), "float32")


@given(st.tuples(*[st.floats(min_value=0)] * 8), st.floats(-1, 1) | st.just(float("nan")), st.lists(st.integers(0, 9)))
def test_errors_go_through_json(figures, cosine, worst):
    errors = Errors(7, *figures[:7], cosine=cosine, worst=tuple(worst))
    back = Errors.from_json(json.loads(json.dumps(errors.to_json(), allow_nan=False)))
    assert repr(back) == repr(errors)


def test_agreement_of_distributions():
    expected = np.log(np.array([[0.5, 0.25, 0.25], [0.4, 0.35, 0.25], [0.7, 0.2, 0.1]]))
    got = np.log(np.array([[0.5, 0.25, 0.25], [0.35, 0.4, 0.25], [0.1, 0.2, 0.7]]))
    found = agreement(got + 3.0, expected, noise=0.1)
    assert found.rows == 3 and found.top1 == pytest.approx(1 / 3) and found.undecided == pytest.approx(1 / 3)
    divergence = [0.0, 0.05 * np.log(0.4 / 0.35), 0.6 * np.log(7)]
    assert found.kl_mean == pytest.approx(np.mean(divergence)) and found.kl_max == pytest.approx(max(divergence))


def test_tokens_that_are_impossible_on_both_sides_add_no_divergence():
    logits = np.array([[1.0, 2.0, -np.inf]])
    assert agreement(logits, logits, noise=0.0).kl_max == 0
    assert agreement(logits, np.zeros((1, 3)), noise=0.0).kl_max == float("inf")
