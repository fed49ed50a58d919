"""What is left to draw is what transformers leaves; what is drawn has those probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from jaxmllm import Sampling
from jaxmllm.decoding.sampling import choose, left_to_draw

VOCABULARY = 17


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    spread=st.sampled_from([0.01, 1.0, 8.0]),
    temperature=st.sampled_from([0.2, 1.0, 3.0]),
    top_k=st.sampled_from([None, 1, 5, 40]),
    top_p=st.sampled_from([None, 0.05, 0.5, 0.95, 1.0]),
)
def test_left_to_draw_is_transformers(seed, spread, temperature, top_k, top_p):
    logits = np.random.default_rng(seed).normal(size=(3, VOCABULARY), scale=spread).astype(np.float32)
    wanted = TemperatureLogitsWarper(temperature)(None, torch.from_numpy(logits))
    if top_k is not None:
        wanted = TopKLogitsWarper(top_k)(None, wanted)
    if top_p is not None and top_p < 1:  # transformers' generate leaves the warper of 1.0 out
        wanted = TopPLogitsWarper(top_p)(None, wanted)
    found = left_to_draw(jnp.asarray(logits), Sampling(temperature, top_k, top_p))
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-6)


def test_frequencies_are_probabilities():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(1, VOCABULARY), scale=1.5), jnp.float32)
    many, sampling = 20_000, Sampling(0.8, 8, 0.9)
    keys = jax.random.split(jax.random.key(0), many)
    drawn = choose(jnp.broadcast_to(logits, (many, VOCABULARY)), keys, jnp.int32(2), sampling)
    wanted = np.asarray(jax.nn.softmax(left_to_draw(logits, sampling)))[0]
    assert (wanted == 0).sum() >= VOCABULARY - 8
    found = np.bincount(np.asarray(drawn), minlength=VOCABULARY) / many
    assert (found[wanted == 0] == 0).all()
    np.testing.assert_allclose(found, wanted, atol=5 * 0.5 / many**0.5)


def test_greedy_takes_the_first_of_equals():
    assert choose(jnp.asarray([[1.0, 3.0, 3.0]]), None, jnp.int32(0), None).tolist() == [1]
