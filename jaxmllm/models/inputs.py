"""Model inputs: the dict of arrays that a Hugging Face processor returns, checked at the border."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmllm.errors import InputError
from jaxmllm.models.layers import Leaf

# What processors may add that these models do not read.
UNREAD = frozenset({"mm_token_type_ids", "token_type_ids", "image_sizes", "answer_ids"})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inputs:
    """One batch, ready for a model.

    Attributes:
      input_ids ``[B, S]``: token ids, with one image placeholder for every image feature.
      attention_mask ``[B, S]``: 0 at padding, on either side; or ``[B, 1, S, S]``, which query may attend to which key.
      pixel_values ``[I, C, Y, X]``: preprocessed images, in the order of their placeholders; ``None`` for text alone.
      position_ids ``[B, S]``: rotary positions; ``None`` counts the tokens.
      answer_positions ``[B, A]``: where answer tokens follow the prompt, the positions that predict them, the last
        prompt token first (see ``jaxmllm.processing.append_answers``); ``None`` where the prompt stands alone.
      max_image_tokens: bound on the number of image tokens in a sequence (exact where the ids are known).
    """

    input_ids: Leaf
    attention_mask: Leaf
    pixel_values: Leaf | None
    position_ids: Leaf | None
    answer_positions: Leaf | None
    max_image_tokens: int = dataclasses.field(metadata={"static": True})


def as_inputs(
    inputs: Mapping[str, Any],
    *,
    image_token_id: int,
    tokens_per_image: int,
    pixel_shape: tuple[int, int, int],
    vocab_size: int,
) -> Inputs:
    """Checks a processor's arrays and names them. NumPy, JAX arrays and tracers are all welcome.

    Args:
      inputs: ``input_ids`` and, where there are any, ``attention_mask``, ``pixel_values``, ``position_ids``,
        ``answer_positions``.
      image_token_id: id of the image placeholder.
      tokens_per_image: placeholders that one image takes.
      pixel_shape: channels, height and width of a preprocessed image.
      vocab_size: token ids are below it.

    Raises:
      InputError: naming the array, what it is and what was expected. Values (rather than shapes) are checked only
        where they are known, that is outside of ``jit``.
    """
    unknown = sorted(set(inputs) - {f.name for f in dataclasses.fields(Inputs)} - UNREAD)
    if unknown:
        raise InputError(f"inputs hold {', '.join(unknown)}, which the model does not read; drop them")
    if "input_ids" not in inputs:
        raise InputError(f"inputs hold no input_ids (only {', '.join(sorted(inputs)) or 'nothing'})")
    ids = _array(inputs, "input_ids", 2, "(batch, sequence)")
    batch, length = ids.shape
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise InputError(f"input_ids are of type {ids.dtype}; expected whole numbers")
    mask = _array(inputs, "attention_mask", (2, 4), "(batch, sequence) or (batch, 1, sequence, sequence)")
    mask = np.ones((batch, length), np.int32) if mask is None else mask
    if mask.shape not in ((batch, length), (batch, 1, length, length)):
        raise InputError(f"attention_mask has shape {mask.shape}; input_ids have shape {ids.shape}")
    if mask.ndim == 4 and not (mask.dtype == bool or jnp.issubdtype(mask.dtype, jnp.floating)):
        raise InputError(f"attention_mask over pairs is of type {mask.dtype}; expected booleans or additive floats")
    positions = _array(inputs, "position_ids", 2, "(batch, sequence)")
    if positions is not None and positions.shape != ids.shape:
        raise InputError(f"position_ids have shape {positions.shape}; input_ids have shape {ids.shape}")
    answers = _answer_positions(inputs, batch, length)
    pixels = _array(inputs, "pixel_values", 4, "(images, channels, height, width)")
    if pixels is not None and tuple(pixels.shape[1:]) != pixel_shape:
        wanted = ", ".join(map(str, pixel_shape))
        raise InputError(f"pixel_values have shape {tuple(pixels.shape)}; this model takes (images, {wanted})")
    images = 0 if pixels is None else pixels.shape[0]
    pixels = pixels if images else None
    max_image_tokens = min(length, images * tokens_per_image)
    if not isinstance(ids, jax.core.Tracer):
        known = np.asarray(ids)
        if known.size and not (known.min() >= 0 and known.max() < vocab_size):
            raise InputError(
                f"input_ids run from {known.min()} to {known.max()}; the vocabulary has {vocab_size} entries"
            )
        counts = (known == image_token_id).sum(axis=-1)
        if counts.sum() != images * tokens_per_image:
            raise InputError(
                f"input_ids hold {counts.sum()} image placeholders (id {image_token_id}); {images} image(s) of "
                f"{tokens_per_image} tokens need {images * tokens_per_image}. Was a prompt cut, or an <image> left out?"
            )
        max_image_tokens = int(counts.max(initial=0))
    return Inputs(
        input_ids=jnp.asarray(ids, jnp.int32),
        attention_mask=jnp.asarray(mask),
        pixel_values=None if pixels is None else jnp.asarray(pixels),
        position_ids=None if positions is None else jnp.asarray(positions, jnp.int32),
        answer_positions=None if answers is None else jnp.asarray(answers, jnp.int32),
        max_image_tokens=max_image_tokens,
    )


def _answer_positions(inputs: Mapping[str, Any], batch: int, length: int) -> Any:
    positions = _array(inputs, "answer_positions", 2, "(batch, answer tokens)")
    if positions is None:
        return None
    if positions.shape[0] != batch:
        raise InputError(f"answer_positions have shape {positions.shape}; there are {batch} sequences")
    if not isinstance(positions, jax.core.Tracer) and positions.size:
        low, high = int(np.asarray(positions).min()), int(np.asarray(positions).max())
        if low < 0 or high >= length:
            raise InputError(f"answer_positions run from {low} to {high}; the sequence has {length} positions")
    return positions


def _array(inputs: Mapping[str, Any], name: str, ndim: int | tuple[int, ...], axes: str) -> Any:
    value = inputs.get(name)
    if value is None:
        return None
    value = value if isinstance(value, jax.Array) else np.asarray(value)
    allowed = ndim if isinstance(ndim, tuple) else (ndim,)
    if value.ndim not in allowed:
        raise InputError(f"{name} has shape {tuple(value.shape)}; expected axes {axes}")
    return value
