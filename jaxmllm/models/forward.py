"""The forward pass of any family, as a pure function."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxmllm.models.capture import Capture, row_index
from jaxmllm.models.edits import Edits
from jaxmllm.models.images import place_images
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
        inputs.bucketed,
    )


def embed(module: Any, inputs: Inputs, **nudges: Array) -> Float[Array, "B S D"]:
    """Token embeddings with the image features in place: what enters decoder layer 0; ``nudges`` are for the encoder
    of images."""
    embedded = module.decoder.embed(inputs.input_ids)
    if inputs.images is None:
        return embedded
    placeholders = inputs.input_ids == module.config.image_token_id
    features = module.encode_images(inputs.images.arrays, **nudges)
    return place_images(embedded, features, placeholders, inputs.images.counts)


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


@functools.partial(jax.jit, static_argnames=("graphdef", "nth"))
def looks(
    graphdef: nnx.GraphDef, params: Params, arrays: dict[str, Array], nth: int | None = None
) -> Float[Array, "I N P"]:
    """Compiled ``looks`` of a family that has it: how much each image token looked at each patch."""
    return merge(graphdef, params).looks(arrays, nth)


@functools.partial(jax.jit, static_argnames=("graphdef",))
def encode_images(graphdef: nnx.GraphDef, params: Params, arrays: dict[str, Array]) -> Float[Array, "I N D"]:
    """Compiled ``encode_images`` of the family: image tokens as the decoder receives them."""
    return merge(graphdef, params).encode_images(arrays)
