"""Gradients of the answer's first token: by attention weights, and by pixels.

Attention weights are nowhere stored, so the gradient by them follows from that by what they mix: a head's output is
``sum_j A_j v_j``, hence ``dL/dA_j = dL/dz . v_j``.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxmllm.analysis.edits import at_site, compose
from jaxmllm.decoding.cache import prefill
from jaxmllm.models import forward as pure
from jaxmllm.models.capture import ATTENTION, Capture
from jaxmllm.models.edits import Edits
from jaxmllm.models.inputs import Inputs


def _log_probability(logits: Float[Array, "B V"]) -> Float[Array, ""]:
    """Sum over the batch of the most probable token's log-probability; examples do not touch each other."""
    return jax.nn.log_softmax(logits, axis=-1).max(axis=-1).sum()


@functools.partial(jax.jit, static_argnames=("graphdef",))
def gradient_attention(
    graphdef: nnx.GraphDef, params: pure.Params, inputs: Inputs, edits: Edits | None, layer: Int[Array, ""]
) -> Float[Array, "B N"]:
    """``mean over heads of A * relu(dL/dA)``, of the last prompt token to the image tokens at one decoder layer, with L
    the log-probability of the most probable next token."""
    return _through_decoder(pure.merge(graphdef, params), inputs, edits, layer)


@functools.partial(jax.jit, static_argnames=("graphdef", "nth"))
def gradient_looks(
    graphdef: nnx.GraphDef,
    params: pure.Params,
    inputs: Inputs,
    edits: Edits | None,
    layer: Int[Array, ""],
    nth: int,
) -> Float[Array, "B P"]:
    """``gradient_attention`` handed on to patches by ``mean over heads of C * relu(dL/dC)``, C the weights of the nth
    cross-attention, for a family whose image tokens look at patches."""
    module = pure.merge(graphdef, params)
    assert inputs.images is not None
    weights = module.cross_weights(inputs.images.arrays)

    def objective(nudge: Array) -> Array:
        return _log_probability(_forward(module, inputs, edits, Capture(), nudge=nudge)[0])

    gradient = jax.grad(objective)(jnp.zeros_like(weights))
    looks = (weights[nth] * jax.nn.relu(gradient[nth]))[..., 1:].mean(axis=1)
    return jnp.einsum("bn,bnp->bp", _through_decoder(module, inputs, edits, layer), looks)


@functools.partial(jax.jit, static_argnames=("graphdef", "pixels"))
def pixel_gradient(
    graphdef: nnx.GraphDef, params: pure.Params, inputs: Inputs, edits: Edits | None, pixels: str
) -> Float[Array, "I ..."]:
    """Gradient of the most probable next token's log-probability by the array of normalised pixels."""
    module = pure.merge(graphdef, params)
    assert inputs.images is not None
    images = inputs.images

    def objective(values: Array) -> Array:
        shown = dataclasses.replace(images, arrays=images.arrays | {pixels: values})
        return _log_probability(_forward(module, dataclasses.replace(inputs, images=shown), edits, Capture())[0])

    return jax.grad(objective)(images.arrays[pixels])


def _forward(
    module: Any, inputs: Inputs, edits: Edits | None, capture: Capture, **nudges: Array
) -> tuple[Float[Array, "B V"], Any, dict[str, Array]]:
    layout = pure.layout_of(inputs, module.config.image_token_id)
    return prefill(module, pure.embed(module, inputs, **nudges), layout, edits, capture)


def _through_decoder(module: Any, inputs: Inputs, edits: Edits | None, layer: Int[Array, ""]) -> Float[Array, "B N"]:
    config = module.decoder.config
    layout = pure.layout_of(inputs, module.config.image_token_id)
    batch = jnp.arange(len(inputs.input_ids))

    def objective(nudge: Array) -> tuple[Array, Any]:
        def add(mixed: Array, index: Array) -> Array:
            added = jnp.where(index == layer, nudge, 0.0).astype(mixed.dtype)
            return mixed.at[batch, layout.last].add(added)

        nudged = compose(edits, at_site("z", add))
        rows = Capture.attention(rows="last", keys="image", heads="each")
        logits, cache, captured = _forward(module, inputs, nudged, rows)
        return _log_probability(logits), (cache, captured)

    zeros = jnp.zeros((len(batch), config.num_heads, config.head_dim))
    of_mixed, (cache, captured) = jax.grad(objective, has_aux=True)(zeros)
    values = jnp.moveaxis(cache.value[layer], 1, 0).astype(jnp.float32)  # [B, K, S, E]
    index, filled = layout.image_index()
    of_images = jnp.take_along_axis(values, index[:, None, :, None], axis=2)
    of_images = jnp.repeat(of_images, config.num_heads // config.num_kv_heads, axis=1)
    gradient = jnp.einsum("bhe,bhne->bhn", of_mixed, of_images)
    return (captured[ATTENTION][layer][:, :, 0] * jax.nn.relu(gradient)).mean(axis=1) * filled
