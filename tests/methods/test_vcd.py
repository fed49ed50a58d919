"""VCD against a rendering of the official code, and on PyTorch's model with the same noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxmllm.decoding.generate import ending_of, room_for, row_keys, run_prompts, run_tokens
from jaxmllm.decoding.sampling import Sampling
from jaxmllm.errors import InputError
from jaxmllm.methods import Vcd, vcd
from tests.support import reference
from tests.support.rivals import vcd as rival
from tests.support.tiny import LAYOUTS, make_inputs

LIMIT = 6


def test_the_schedule_of_the_noise():
    for ours, theirs in zip(vcd.noise_schedule(), rival.noise_schedule(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 0.1), (1.0, 0.2), (0.0, 1.0)])
def test_contrasted_logits(alpha, beta):
    rng = np.random.default_rng(0)
    for _ in range(20):
        clean, noisy = rng.normal(size=(2, 30)).astype(np.float32) * 3
        ours = np.asarray(vcd.contrasted(jnp.asarray(clean), jnp.asarray(noisy), alpha, beta))
        theirs = rival.vcd_logits(clean, noisy, alpha, beta)
        np.testing.assert_array_equal(np.isinf(ours), np.isinf(theirs))
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def decode(pair, inputs, method, sampling=None, key=None):
    model, room = pair.jax, room_for(LIMIT)
    checked = model.as_inputs(inputs, bucketed=True)
    batch = len(checked.input_ids)
    views = method.views(model, checked, range(batch))
    prompts, cache = run_prompts(model.graphdef, model.params, views, None, method.capture(2), room)
    done = run_tokens(
        model.graphdef, model.params, prompts, cache, None, method.rule(2, sampling),
        row_keys(batch, sampling, key, None), ending_of(model, ()), np.int32(LIMIT), room,
    )  # fmt: skip
    return np.asarray(done.tokens)[:, :LIMIT], views


def test_greedy_tokens_with_the_same_noise(plain_pair):
    """The noised pixels as PyTorch's second view; both views without a cache, token by token."""
    inputs = make_inputs(plain_pair, LAYOUTS["one_image"], "left")
    method = Vcd(alpha=1.0, beta=0.2, step=700)
    found, views = decode(plain_pair, inputs, method)
    pixels = np.array(views.images.arrays["pixel_values"])
    clean, noisy = np.split(pixels, 2)
    np.testing.assert_array_equal(clean, np.asarray(inputs["pixel_values"]))
    image, noise = rival.noise_schedule()
    drawn = (noisy - image[700] * clean) / noise[700]
    assert abs(drawn.mean()) < 0.05 and abs(drawn.std() - 1) < 0.05
    so_far = dict(inputs)
    for step in range(LIMIT):
        logits = []
        for shown in (clean, noisy):
            with torch.no_grad():
                out = plain_pair.torch(**reference.tensors(so_far | {"pixel_values": shown}))
            logits.append(out.logits[:, -1].numpy())
        tokens = [int(np.argmax(rival.vcd_logits(*pair, 1.0, 0.2))) for pair in zip(*logits, strict=True)]
        assert found[:, step].tolist() == tokens
        so_far["input_ids"] = np.concatenate([so_far["input_ids"], np.array(tokens)[:, None]], axis=1)
        so_far["attention_mask"] = np.concatenate(
            [so_far["attention_mask"], np.ones((len(tokens), 1), np.int64)], axis=1
        )


def test_noise_belongs_to_the_example_and_not_to_the_batch(plain_pair):
    inputs = make_inputs(plain_pair, LAYOUTS["one_image"], "left")
    checked = plain_pair.jax.as_inputs(inputs, bucketed=True)
    numbers = [5, 3]
    half = len(checked.images)
    one = np.asarray(Vcd().views(plain_pair.jax, checked, numbers).images.arrays["pixel_values"])[half:]
    other = np.asarray(Vcd().views(plain_pair.jax, checked, [7, *numbers[1:]]).images.arrays["pixel_values"])[half:]
    changed = (one != other).any(axis=(1, 2, 3))
    assert changed[0] and not changed[-1]


def test_drawn_tokens_follow_the_contrasted_distribution(plain_pair):
    """With beta 1 only the model's best token is left, whatever is drawn."""
    inputs = make_inputs(plain_pair, LAYOUTS["one_image"], "left")
    greedy, _ = decode(plain_pair, inputs, Vcd(alpha=0.0, beta=1.0))
    drawn, _ = decode(plain_pair, inputs, Vcd(alpha=3.0, beta=1.0), Sampling(5.0), jax.random.key(0))
    np.testing.assert_array_equal(greedy, drawn)


def test_options_out_of_range():
    for options in ({"step": 1000}, {"beta": 0.0}):
        with pytest.raises(InputError, match=next(iter(options))):
            Vcd(**options)
