"""ViCrop against a rendering of the official code: the search, the high-pass filter, and maps on PyTorch's models."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jaxmllm.errors import InputError
from jaxmllm.methods import ViCrop
from jaxmllm.methods.gradients import gradient_attention, gradient_looks, pixel_gradient
from jaxmllm.methods.regions import search_window
from jaxmllm.methods.vicrop import high_pass
from tests.support import reference, tiny
from tests.support.rivals import vicrop as rival


@settings(deadline=None, max_examples=150)
@given(
    st.integers(0, 10_000), st.integers(2, 16), st.integers(2, 16), st.integers(30, 700), st.integers(30, 700),
    st.sampled_from([30, 56, 112, 224, 336]), st.booleans(),
)  # fmt: skip
def test_the_window_is_the_official_one(seed, rows, columns, wide, high, base, coarse):
    """On maps of few values too, where the first of equal windows counts; maps with windows below a cell apart."""
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 3, (rows, columns)).astype(float) if coarse else rng.random((rows, columns))
    if base < max(wide / columns, high / rows):
        return  # the official code has no window there, and takes one without an area
    assert search_window(values, (wide, high), base) == tuple(map(float, rival.crop_box(values, (wide, high), base)))


def test_a_map_coarser_than_the_window_is_refused():
    with pytest.raises(InputError, match="smaller than a cell"):
        search_window(np.ones((2, 2)), (1000, 1000), 50)


@pytest.mark.parametrize("size", [(60, 40), (300, 500)])
def test_high_pass(size):
    rng = np.random.default_rng(1)
    image = Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), np.uint8))
    np.testing.assert_allclose(high_pass(image, 56), rival.high_pass(image, 56), atol=1e-5)


def alone(pair, length):
    """One prompt with one image: what the rendering takes, and ours padded to a bucket."""
    inputs = tiny.make_inputs(pair, [[3, length]], "left", seed=length)
    return inputs, reference.tensors(inputs), pair.jax.as_inputs(inputs, bucketed=True)


def test_gradient_attention(plain_pair):
    _, theirs, ours = alone(plain_pair, 6)
    for layer in range(plain_pair.jax.num_layers):
        expected = rival.gradient_attention(plain_pair.torch, theirs, layer, plain_pair.image_token)
        found = gradient_attention(plain_pair.jax.graphdef, plain_pair.jax.params, ours, None, np.int32(layer))
        np.testing.assert_allclose(found[0], expected, atol=1e-6, rtol=1e-3)


def test_gradients_by_pixels(plain_pair):
    _, theirs, ours = alone(plain_pair, 6)
    found = pixel_gradient(plain_pair.jax.graphdef, plain_pair.jax.params, ours, None, "pixel_values")
    np.testing.assert_allclose(found[0], rival.pixel_gradient(plain_pair.torch, theirs), atol=1e-6, rtol=1e-3)


@pytest.fixture(scope="module")
def qformer_pair(tmp_path_factory):
    from tests.support.families import instructblip

    return tiny.make_pair(next(iter(instructblip.VARIANTS)), tmp_path_factory.mktemp("qformer"))


@pytest.mark.slow
def test_gradients_through_the_qformer(qformer_pair):
    _, theirs, ours = alone(qformer_pair, 5)
    crosses = len(qformer_pair.jax.config.qformer.cross_layers)
    for layer, nth in ((0, crosses - 1), (1, crosses - 1)):
        expected = rival.qformer_gradient_attention(qformer_pair.torch, theirs, layer, nth, qformer_pair.image_token)
        found = gradient_looks(qformer_pair.jax.graphdef, qformer_pair.jax.params, ours, None, np.int32(layer), nth)
        np.testing.assert_allclose(found[0], expected, atol=1e-7, rtol=1e-3)


@pytest.mark.slow
def test_attention_to_patches_through_one_cross_attention(qformer_pair):
    from jaxmllm.analysis.geometry import looks_of
    from jaxmllm.models.capture import ATTENTION, Capture

    inputs, theirs, _ = alone(qformer_pair, 5)
    general, others, _ = alone(qformer_pair, 4)
    others["pixel_values"] = theirs["pixel_values"]
    general["pixel_values"] = inputs["pixel_values"]
    expected = rival.qformer_relative_attention(qformer_pair.torch, theirs, others, 1, 0, qformer_pair.image_token)
    on_patches = []
    for asked in (inputs, general):
        model = qformer_pair.jax
        out = model.forward(model.params, asked, capture=Capture.attention(rows="last", keys="image"))
        looks = looks_of(model, model.as_inputs(asked).images, nth=0)[0]
        on_patches.append(np.asarray(out.captured[ATTENTION])[1, 0, 0] @ looks)
    np.testing.assert_allclose(on_patches[0] / on_patches[1], expected, rtol=1e-4)


def test_options_out_of_range():
    for options in ({"map": "nowhere"}, {"geometry": "round"}, {"base": 0}):
        with pytest.raises(InputError, match=next(iter(options))):
            ViCrop(**options)
    assert dataclasses.replace(ViCrop(), layer=3).layer == 3
