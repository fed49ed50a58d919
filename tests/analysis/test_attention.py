import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxmllm import InputError
from jaxmllm.analysis import (
    attention_evolution,
    contrastive_attention,
    hellinger,
    image_distribution,
    pre_fusion_layer,
)

weights = hnp.arrays(np.float32, (5, 3, 8), elements=st.floats(0, 1, width=32))


@settings(deadline=None, max_examples=40)
@given(weights)
def test_a_distribution_sums_to_one(attention):
    np.testing.assert_allclose(np.asarray(image_distribution(attention)).sum(-1), 1.0, atol=1e-5)


@settings(deadline=None, max_examples=40)
@given(weights)
def test_hellinger_is_a_distance_between_0_and_1(attention):
    p, q, r = np.asarray(image_distribution(attention))[:3]
    distance = np.asarray(hellinger(p, q))
    assert (distance >= 0).all() and (distance <= 1 + 1e-6).all()
    np.testing.assert_allclose(distance, np.asarray(hellinger(q, p)), atol=1e-6)
    assert (distance <= np.asarray(hellinger(p, r)) + np.asarray(hellinger(r, q)) + 1e-5).all()


def test_hellinger_by_hand():
    p, q = np.array([0.5, 0.5, 0.0]), np.array([0.0, 0.5, 0.5])
    expected = np.sqrt(((np.sqrt(p) - np.sqrt(q)) ** 2).sum()) / np.sqrt(2)
    np.testing.assert_allclose(np.asarray(hellinger(p, q)), expected, rtol=1e-6)
    assert float(hellinger(np.array([1.0, 0.0]), np.array([0.0, 1.0]))) == pytest.approx(1.0)
    assert float(hellinger(p, p)) == 0.0


def scripted() -> np.ndarray:
    """Six layers, two examples, four image tokens; example 0 is furthest from its last layer at 1, example 1 at 4."""
    attention = np.full((6, 2, 4), 0.25, np.float32)
    attention[1, 0] = [1.0, 0.0, 0.0, 0.0]
    attention[4, 1] = [0.0, 0.0, 2.0, 0.0]
    return attention


def test_the_pre_fusion_layer_is_the_furthest_from_the_last_layer():
    attention = scripted()
    assert np.asarray(pre_fusion_layer(attention)).tolist() == [1, 4]
    assert np.asarray(pre_fusion_layer(attention, [0, 4])).tolist() == [0, 4]
    # above 17/32 of six layers: 4; below half: 0, 1, 2
    assert np.asarray(pre_fusion_layer(attention, "deep")).tolist() == [4, 4]
    assert np.asarray(pre_fusion_layer(attention, "shallow"))[0] == 1


def test_deep_and_shallow_are_the_papers_sets_at_32_layers():
    from jaxmllm.analysis.attention import candidate_layers

    assert candidate_layers("deep", 32) == list(range(18, 31))
    assert candidate_layers("shallow", 32) == list(range(16))
    assert candidate_layers("all", 32) == list(range(31))


@pytest.mark.parametrize("candidates", ["middle", [], [7], [-1]])
def test_bad_candidates_are_refused(candidates):
    with pytest.raises(InputError):
        pre_fusion_layer(scripted(), candidates)


def test_contrastive_attention_subtracts_each_examples_own_layer():
    attention = scripted()
    got = np.asarray(contrastive_attention(attention))
    np.testing.assert_allclose(got[0], 0.25 - np.array([1.0, 0, 0, 0]), atol=1e-6)
    np.testing.assert_allclose(got[1], 0.25 - np.array([0, 0, 1.0, 0]), atol=1e-6)
    np.testing.assert_allclose(got.sum(-1), 0, atol=1e-6)
    np.testing.assert_allclose(np.asarray(contrastive_attention(attention, pre=0, post=1))[0], [0.75] + [-0.25] * 3)


def test_noise_that_both_layers_share_cancels():
    rng = np.random.default_rng(0)
    noise, signal = rng.random((1, 2, 9)), np.zeros((1, 2, 9))
    signal[..., 4] = noise.sum(-1)
    attention = np.concatenate([noise, noise + signal]).astype(np.float32)
    contrast = np.asarray(contrastive_attention(attention))
    assert (contrast.argmax(-1) == 4).all()
    assert (np.delete(contrast, 4, axis=-1) <= 0).all()


def test_the_measures_run_under_jit_and_grad():
    attention = jnp.asarray(scripted() + 0.01)
    np.testing.assert_allclose(
        np.asarray(jax.jit(attention_evolution)(attention)), np.asarray(attention_evolution(attention)), atol=1e-7
    )
    gradient = jax.grad(lambda a: attention_evolution(a)[:-1].sum())(attention)
    assert np.isfinite(np.asarray(gradient)[:-1]).all()
