"""Greedy tokens are those of transformers' ``generate``, for every family, padding side and edit."""

import numpy as np
import pytest

import jaxmllm
from jaxmllm.analysis import blind_image, compose, erase_image, knockout, scale_heads
from tests.support import generation, reference, tiny
from tests.support.families import VARIANTS

LIMIT = 6
# What differs between variants while decoding is positions, windows and image tokens: these stand for all of it.
CHOSEN = (
    "class_token_biases", "dynamic_rope", "instructblip_cross_seldom", "next_mistral_window", "next_qwen2_windows",
    "qwen2_5_vl", "qwen2_vl_tied_yarn_windows", "vip_one_layer",
)  # fmt: skip
EVERY = [pytest.param(name, marks=() if name in CHOSEN else pytest.mark.slow) for name in sorted(VARIANTS)]
# One of each kind of position; edits act in the decoder that all families share.
EDITED = ("instructblip_cross_seldom", "next_mistral_window", "qwen2_vl_tied_yarn_windows")


@pytest.mark.parametrize("pair", EVERY, indirect=True)
def test_tokens_are_those_of_transformers(pair):
    layout = [[2, 7], [5, 3], [1, 1]]
    left = tiny.make_inputs(pair, layout, "left")
    for side in ("left", "right"):
        inputs = tiny.make_inputs(pair, layout, side)
        found = jaxmllm.generate(pair.jax, inputs, max_new_tokens=LIMIT, stop_tokens=())
        np.testing.assert_array_equal(found.tokens, generation.hugging_face(pair, left, LIMIT))
        assert (found.lengths == LIMIT).all() and not found.stopped.any()
    stop = int(found.tokens[0, 2])
    wanted = generation.hugging_face(pair, left, LIMIT, stop)
    stopped = jaxmllm.generate(pair.jax, inputs, max_new_tokens=LIMIT, stop_tokens=[stop])
    assert stopped.tokens.shape == wanted.shape
    for row, length in enumerate(stopped.lengths):
        np.testing.assert_array_equal(stopped.tokens[row, :length], wanted[row, :length])
        assert stopped.stopped[row] == (stop in wanted[row])
        assert stop not in stopped.tokens[row, : length - 1]
        assert (stopped.tokens[row, length:] == pair.jax.endings.pad_token).all()
        assert (stopped.log_probabilities[row, length:] == 0).all()


@pytest.mark.parametrize("pair", EDITED, indirect=True)
def test_edits_hold_while_decoding(pair):
    layout = [[2, 4], [4, 1]]
    left = tiny.make_inputs(pair, layout, "left")
    scale = np.linspace(0.2, 1.4, pair.jax.num_heads).astype(np.float32)

    def torch_edits(image, question, last):
        heads = reference.scale_heads([3], scale)
        return (
            reference.erase([2], image), reference.blind([0], image), reference.knockout([0, 1], question, image),
            reference.knockout([2], question, last), heads,
        )  # fmt: skip

    edits = compose(
        erase_image(2), blind_image(0), knockout([0, 1]), knockout(2, "question", "last"), scale_heads(3, scale)
    )
    tokens, log_probabilities = generation.without_cache(pair, left, LIMIT, torch_edits)
    clean = generation.hugging_face(pair, left, LIMIT)
    assert (tokens != clean).any(), "the edits change nothing, so this test shows nothing"
    for side in ("left", "right"):
        inputs = tiny.make_inputs(pair, layout, side)
        found = jaxmllm.generate(pair.jax, inputs, max_new_tokens=LIMIT, stop_tokens=(), edits=edits)
        np.testing.assert_array_equal(found.tokens, tokens)
        np.testing.assert_allclose(found.log_probabilities, log_probabilities, atol=1e-4, rtol=0)
