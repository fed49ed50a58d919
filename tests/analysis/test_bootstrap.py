import numpy as np
import pytest

from jaxmllm.analysis.bootstrap import mean_interval


def test_the_interval_of_constant_values_is_a_point():
    np.testing.assert_allclose(mean_interval(np.full((3, 10), 0.25)), 0.25)


def test_it_covers_the_true_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    draws = rng.normal(1.0, 2.0, size=(400, 60))
    low, high = mean_interval(draws, confidence=0.9)
    covered = np.mean((low <= 1.0) & (high >= 1.0))
    assert 0.83 < covered < 0.95


def test_it_agrees_with_the_normal_approximation():
    values = np.random.default_rng(1).normal(size=500)
    low, high = mean_interval(values)
    half = 1.96 * values.std() / np.sqrt(len(values))
    np.testing.assert_allclose([low, high], [values.mean() - half, values.mean() + half], atol=0.1 * half)


def test_questions_of_one_cluster_are_drawn_together():
    # ten copies of each value are no more evidence than one
    values = np.random.default_rng(2).normal(size=30)
    once = mean_interval(values)
    copies = mean_interval(values.repeat(10), [f"image {number}" for number in range(30) for _ in range(10)])
    np.testing.assert_allclose(copies[1] - copies[0], once[1] - once[0], rtol=0.05)
    apart = mean_interval(values.repeat(10))
    assert apart[1] - apart[0] < 0.5 * (once[1] - once[0])


def test_the_same_seed_gives_the_same_interval():
    values = np.random.default_rng(3).normal(size=40)
    np.testing.assert_array_equal(mean_interval(values, seed=3), mean_interval(values, seed=3))
    assert not np.array_equal(mean_interval(values, seed=3), mean_interval(values, seed=4))


@pytest.mark.parametrize("shape", [(5,), (2, 5), (4, 3, 5)])
def test_leading_axes_are_kept(shape):
    assert mean_interval(np.ones(shape)).shape == (2, *shape[:-1])
