"""The forward pass of any family, as a pure function."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxmllm.models.capture import Capture, row_index
from jaxmllm.models.edits import Edits
from jaxmllm.models.inputs import Inputs
from jaxmllm.models.layers import Leaf
from jaxmllm.models.layout import Layout, gather_rows, make_layout

Params = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """What a forward pass returns.

    Attributes:
      logits ``[B, R, V]``: next-token logits in float32, at the positions asked for.
      captured: site name -> array with a leading layer axis; see ``Capture``.
    """

    logits: Leaf
    captured: dict[str, Leaf]


LogitsAt = str | Int[Array, "B R"]  # "all", "last", "answer", or positions


def split(module: nnx.Module) -> tuple[nnx.GraphDef, Params]:
    """A module as its static structure and a plain nested dict of arrays. From here on everything is functions."""
    graphdef, state = nnx.split(module)
    return graphdef, nnx.to_pure_dict(state)


def merge(graphdef: nnx.GraphDef, params: Params) -> Any:
    """The module again, holding these parameters (arrays or tracers)."""
    return nnx.merge(graphdef, nnx.State(params))


def layout_of(inputs: Inputs, image_token_id: int) -> Layout:
    """The parts that the positions of a batch play."""
    return make_layout(
        inputs.input_ids,
        inputs.attention_mask,
        image_token_id,
        inputs.position_ids,
        inputs.answer_positions,
        inputs.max_image_tokens,
    )


def place_images(
    embedded: Float[Array, "B S D"], features: Float[Array, "I N D"], image: Bool[Array, "B S"]
) -> Float[Array, "B S D"]:
    """Puts image features at the placeholders, in order, over the whole batch (torch's ``masked_scatter``).

    ``image`` marks every placeholder, also one that the attention mask hides: it still takes its feature.
    """
    flat = features.reshape(-1, features.shape[-1])
    order = jnp.cumsum(image.reshape(-1)).reshape(image.shape) - 1
    placed = flat[jnp.clip(order, 0, flat.shape[0] - 1)].astype(embedded.dtype)
    return jnp.where(image[..., None], placed, embedded)


def embed(module: Any, inputs: Inputs) -> Float[Array, "B S D"]:
    """Token embeddings with the image features in place: what enters decoder layer 0."""
    embedded = module.decoder.embed(inputs.input_ids)
    if inputs.pixel_values is None:
        return embedded
    placeholders = inputs.input_ids == module.config.image_token_id
    return place_images(embedded, module.encode_images(inputs.pixel_values), placeholders)


def run(module: Any, inputs: Inputs, edits: Edits | None, capture: Capture, logits_at: LogitsAt) -> Output:
    """Forward pass of a merged module: encode the images, run the decoder, read the logits."""
    layout = layout_of(inputs, module.config.image_token_id)
    hidden, captured = module.decoder(embed(module, inputs), layout, edits, capture)
    if not isinstance(logits_at, str) or logits_at != "all":
        hidden = gather_rows(hidden, row_index(logits_at, layout) if isinstance(logits_at, str) else logits_at)
    return Output(module.decoder.logits(hidden), captured)


@functools.partial(jax.jit, static_argnames=("graphdef", "capture", "logits_at"))
def forward_named(
    graphdef: nnx.GraphDef, params: Params, inputs: Inputs, edits: Edits | None, capture: Capture, logits_at: str
) -> Output:
    """Compiled ``run`` with logits at named positions."""
    return run(merge(graphdef, params), inputs, edits, capture, logits_at)


@functools.partial(jax.jit, static_argnames=("graphdef", "capture"))
def forward_at(
    graphdef: nnx.GraphDef,
    params: Params,
    inputs: Inputs,
    edits: Edits | None,
    capture: Capture,
    logits_at: Int[Array, "B R"],
) -> Output:
    """Compiled ``run`` with logits at given positions."""
    return run(merge(graphdef, params), inputs, edits, capture, logits_at)


@functools.partial(jax.jit, static_argnames=("graphdef",))
def encode_images(graphdef: nnx.GraphDef, params: Params, pixel_values: Float[Array, "I C Y X"]) -> Array:
    """Compiled ``encode_images`` of the family."""
    return merge(graphdef, params).encode_images(pixel_values)
