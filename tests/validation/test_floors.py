"""Verdicts follow from what PyTorch differs from itself by, and from nothing else."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxmllm.validation import floors
from jaxmllm.validation.distributions import measure
from jaxmllm.validation.report import Floor


def errors(mean, p99, top, scale=1.0):
    ones = np.full(10, scale)
    return dataclasses.replace(measure(ones, ones, np.ones(10), "float32"), mean=mean, p99=p99, max=top)


FLOOR = Floor({"float64": errors(1e-6, 2e-6, 4e-6), "other order": errors(2e-6, 1e-6, 3e-6)})


def test_the_largest_of_all_ways_is_the_floor_statistic_by_statistic():
    allowed = floors.tolerance(FLOOR, 1.0, "float32")
    assert allowed == {
        "mean": floors.ALLOWED["mean"] * 2e-6,
        "p99": floors.ALLOWED["p99"] * 2e-6,
        "max": floors.ALLOWED["max"] * 4e-6,
    }


@pytest.mark.parametrize("name", floors.ALLOWED)
def test_each_statistic_alone_makes_a_component_depart(name):
    sound = errors(1e-6, 1e-6, 1e-6)
    assert floors.ratio(sound, FLOOR, "float32") <= 1
    worse = dataclasses.replace(sound, **{name: 1.01 * floors.tolerance(FLOOR, 1.0, "float32")[name]})
    assert 1 < floors.ratio(worse, FLOOR, "float32") < 1.02


def test_where_torch_agrees_with_itself_to_the_bit_one_step_of_the_type_is_let_pass():
    exact = Floor({"float64": errors(0.0, 0.0, 0.0)})
    allowed = floors.tolerance(exact, 1.0, "bfloat16")
    assert allowed["max"] == floors.ALLOWED["max"] * 2**-7
    assert floors.tolerance(exact, 1.0, "float16")["max"] == floors.ALLOWED["max"] * 2**-10
    assert floors.tolerance(exact, 0.25, "float32")["max"] == floors.ALLOWED["max"] * 2**-25


def test_rounded_products_count_only_where_the_backend_rounds_them():
    rounded = Floor({**FLOOR.of, "tf32 products": errors(1e-3, 1e-3, 1e-3), "bf16 products": errors(1e-2, 1e-2, 1e-2)})
    of_tf32 = errors(1e-3, 1e-3, 1e-3)
    departs = {
        (backend, precision): floors.ratio(
            of_tf32, rounded, "float32", floors.ways_that_count(backend, precision)
        ) > 1
        for backend in ("cpu", "gpu", "tpu")
        for precision in ("default", "high", "highest")
    }  # fmt: skip
    assert departs == {
        ("cpu", "default"): True, ("cpu", "high"): True, ("cpu", "highest"): True,
        ("gpu", "default"): False, ("gpu", "high"): False, ("gpu", "highest"): True,
        # three products of bfloat16 halves are nearly float32, and the recording has none of these here
        ("tpu", "default"): False, ("tpu", "high"): True, ("tpu", "highest"): True,
    }  # fmt: skip


@given(st.floats(1e-8, 1e3), st.floats(0.01, 0.99))
def test_ratios_do_not_depend_on_units(unit, share):
    floor = Floor({"float64": errors(unit * 1e-4, unit * 1e-4, unit * 1e-4, unit)})
    found = errors(*(share * unit * 1e-4 * factor for factor in floors.ALLOWED.values()), unit)
    assert floors.ratio(found, floor, "float32") == pytest.approx(share)


def test_what_is_not_finite_departs():
    got, expected = np.array([1.0, np.nan]), np.array([1.0, 2.0])
    found = measure(got, expected, np.ones(2), "float32")
    assert floors.ratio(found, FLOOR, "float32") == float("inf")


def test_what_rows_have_in_common_shows_below_the_rounding_of_a_narrow_type():
    """A thousandth on every row is less than half a step of bfloat16, in which each number is rounded anyway."""
    rng = np.random.default_rng(0)
    exact = rng.normal(size=(32, 2048))

    def rounded(values):
        return values.astype(ml_dtypes.bfloat16).astype(np.float64)

    everywhere = np.ones(32)
    floor = Floor({"float32": measure(exact, rounded(exact), everywhere, "bfloat16")})
    sound = measure(rounded(exact), rounded(exact), everywhere, "bfloat16")
    scaled = measure(rounded(1.001 * exact), rounded(exact), everywhere, "bfloat16")
    assert floors.ratio(sound, floor, "bfloat16") < 0.1
    assert floors.ratio(scaled, floor, "bfloat16") > 1
    assert scaled.gain == pytest.approx(1e-3, rel=0.05)
    # the three other statistics do not see it
    limits = floors.tolerance(floor, scaled.scale, "bfloat16")
    assert all(getattr(scaled, name) < limit for name, limit in limits.items())
