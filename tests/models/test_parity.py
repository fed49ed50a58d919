"""The port against PyTorch, float32, on tiny models: every component, padding, layout and edit."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxmllm import Capture
from jaxmllm.analysis import (
    at_site,
    blind_image,
    compose,
    erase_image,
    from_layer,
    knockout,
    scale_heads,
    up_to_layer,
    window,
)
from jaxmllm.models.forward import merge
from tests.support import reference, tiny

LOGITS, STATES, WEIGHTS = 1e-4, 1e-4, 1e-5  # largest difference allowed; logits and states are of size 1 to 10

EVERYTHING = (
    Capture.attention(rows="all", keys="all", heads="each")
    | Capture.residual("resid_pre")
    | Capture.residual("resid_post")
    | Capture.early_output(rows="all")
)


def compare(pair, inputs, edits, *torch_edits):
    """Logits, every layer's residual stream and attention at all positions that are not padding."""
    expected = reference.run(pair, inputs, *torch_edits)
    out = pair.jax.forward(pair.jax.params, inputs, edits=edits, capture=EVERYTHING)
    valid = inputs["attention_mask"].astype(bool)
    pairs = valid[:, :, None] & valid[:, None, :]
    np.testing.assert_allclose(np.asarray(out.logits)[valid], expected.logits[valid], atol=LOGITS, rtol=0)
    for site in ("resid_pre", "resid_post"):
        got = np.asarray(out.captured[site])
        np.testing.assert_allclose(got[:, valid], getattr(expected, site)[:, valid], atol=STATES, rtol=0)
    weights = np.moveaxis(np.asarray(out.captured["attn_probs"]), 2, -1)[:, pairs]
    np.testing.assert_allclose(weights, np.moveaxis(expected.attention, 2, -1)[:, pairs], atol=WEIGHTS, rtol=0)
    # the last layer's early output is the output
    early = np.asarray(out.captured["early_logits"])[-1]
    np.testing.assert_allclose(early[valid], expected.logits[valid], atol=LOGITS, rtol=0)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("layout", ["unlike_lengths", "several_images", "text_only"])
def test_forward(pair, layout, side):
    if layout == "text_only" and not pair.family.TEXT_ALONE:
        pytest.skip("PyTorch does not run this family without an image")
    compare(pair, tiny.make_inputs(pair, tiny.LAYOUTS[layout], side), None)


def test_image_tokens(pair):
    inputs = tiny.make_inputs(pair, [[1, 1, 1], [1, 1]])
    with torch.no_grad():
        expected = [image.numpy() for image in pair.family.features(pair.torch, reference.tensors(inputs))]
    got = np.asarray(pair.jax.encode_images(pair.jax.params, inputs))
    assert len(got) == len(expected) == 3
    for image, wanted in zip(got, expected, strict=True):
        np.testing.assert_allclose(image[: len(wanted)], wanted, atol=STATES, rtol=0)


def test_vision_tower(plain_pair):
    pair = plain_pair
    inputs = tiny.make_inputs(pair, [[1, 1, 1], [1, 1]])
    pixels = torch.from_numpy(inputs["pixel_values"])
    with torch.no_grad():
        states = pair.torch.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    wanted = pair.torch.config.vision_feature_layer
    wanted = [wanted] if isinstance(wanted, int) else wanted
    module = merge(pair.jax.graphdef, pair.jax.params)
    tower = np.concatenate([states[layer].numpy() for layer in wanted], axis=-1)
    np.testing.assert_allclose(
        np.asarray(module.vision(jnp.asarray(inputs["pixel_values"]))), tower, atol=STATES, rtol=0
    )


ALL = range(tiny.TEXT["num_hidden_layers"])
EDITS = {
    "erase_first": (erase_image(0), lambda i, q, z: [reference.erase([0], i)]),
    "erase_middle": (erase_image(2), lambda i, q, z: [reference.erase([2], i)]),
    "erase_from": (erase_image(from_layer(1)), lambda i, q, z: [reference.erase([1, 2, 3], i)]),
    "blind_one": (blind_image(1), lambda i, q, z: [reference.blind([1], i)]),
    "blind_all": (blind_image(slice(None)), lambda i, q, z: [reference.blind(ALL, i)]),
    "blind_some": (blind_image([0, 3]), lambda i, q, z: [reference.blind([0, 3], i)]),
    "knockout_one": (knockout(2), lambda i, q, z: [reference.knockout([2], q, i)]),
    "knockout_window": (knockout(window(1, 3)), lambda i, q, z: [reference.knockout([1, 2], q, i)]),
    "knockout_last": (
        knockout(up_to_layer(2), queries="last", keys="image"),
        lambda i, q, z: [reference.knockout([0, 1, 2], z, i)],
    ),
    "knockout_text": (
        knockout(from_layer(2), queries="last", keys="question"),
        # the last token may not look at the question, itself included
        lambda i, q, z: [reference.knockout([2, 3], z, q)],
    ),
    "composed": (
        compose(erase_image(3), blind_image(1), knockout(0), knockout(2, queries="last")),
        lambda i, q, z: [
            reference.erase([3], i),
            reference.blind([1], i),
            reference.knockout([0], q, i),
            reference.knockout([2], z, i),
        ],
    ),
}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", EDITS)
def test_edits(plain_pair, name, side):
    edits, torch_edits = EDITS[name]
    inputs = tiny.make_inputs(plain_pair, tiny.LAYOUTS["several_images"], side)
    compare(plain_pair, inputs, edits, *torch_edits(*tiny.roles(plain_pair, inputs)))


def test_edits_on_every_variant(pair):
    inputs = tiny.make_inputs(pair, tiny.LAYOUTS["several_images"], "left")
    edits, torch_edits = EDITS["composed"]
    compare(pair, inputs, edits, *torch_edits(*tiny.roles(pair, inputs)))


def test_weighted_positions_and_strength(plain_pair):
    inputs = tiny.make_inputs(plain_pair, tiny.LAYOUTS["unlike_lengths"])
    image, _, _ = tiny.roles(plain_pair, inputs)
    half = np.zeros((3, plain_pair.jax.config.tokens_per_image), np.float32)
    half[:, ::2] = 1.0
    chosen = np.zeros_like(image)
    for row in range(3):
        chosen[row, np.flatnonzero(image[row])[::2]] = True
    compare(plain_pair, inputs, erase_image(1, weights=half), reference.erase([1], chosen))
    compare(plain_pair, inputs, erase_image([0, 1], strength=np.eye(4)[1]), reference.erase([1], image))


def test_head_scale(plain_pair):
    inputs = tiny.make_inputs(plain_pair, tiny.LAYOUTS["one_image"])
    scale = np.array([0.0, 1.0, 2.0, -0.5], np.float32)
    compare(plain_pair, inputs, scale_heads(2, scale), reference.scale_heads([2], scale))


def test_hook_at_a_site(plain_pair):
    inputs = tiny.make_inputs(plain_pair, tiny.LAYOUTS["one_image"])

    def edit(layers):
        return [layers[1].mlp.register_forward_hook(lambda m, args, output: output * 0.25)]

    hook = at_site("mlp_out", lambda value, layer: jnp.where(layer == 1, value * 0.25, value))
    compare(plain_pair, inputs, hook, edit)
