"""Model inputs: the dict of arrays that a Hugging Face processor returns, checked at the border."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmllm.errors import InputError
from jaxmllm.models.images import TEXT_BUCKETS, Images, bucket_of, read_array
from jaxmllm.models.layers import Leaf
from jaxmllm.models.layout import allowed_pairs
from jaxmllm.models.registry import family_named

# What processors may add that these models do not read.
UNREAD = frozenset({"mm_token_type_ids", "token_type_ids", "image_sizes", "answer_ids"})
# What every family reads beside its images.
SEQUENCES = ("input_ids", "attention_mask", "position_ids", "answer_positions")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inputs:
    """One batch, ready for a model.

    Attributes:
      input_ids ``[B, S]``: token ids, with one image placeholder for every image feature.
      attention_mask ``[B, S]``: 0 at padding, on either side; or ``[B, 1, S, S]``, which query may attend to which key.
      images: the preprocessed images; ``None`` for text alone.
      position_ids ``[B, S]``, or ``[B, S, 3]`` for multimodal rotary positions (time, height, width): rotary positions;
        ``None`` counts the tokens.
      answer_positions ``[B, A]``: where answer tokens follow the prompt, the positions that predict them, the last
        prompt token first (see ``jaxmllm.processing.append_answers``); ``None`` where the prompt stands alone.
      max_image_tokens: bound on the number of image tokens in a sequence (exact where the ids are known and nothing is
        padded to a bucket).
      bucketed: whether sequences and images are padded to buckets.
    """

    input_ids: Leaf
    attention_mask: Leaf
    images: Images | None
    position_ids: Leaf | None
    answer_positions: Leaf | None
    max_image_tokens: int = dataclasses.field(metadata={"static": True})
    bucketed: bool = dataclasses.field(default=False, metadata={"static": True})


def as_inputs(
    inputs: Mapping[str, Any], config: Any, bucketed: bool = False, text_buckets: Sequence[int] = TEXT_BUCKETS
) -> Inputs:
    """Checks a processor's arrays and names them. NumPy, JAX arrays and tracers are all welcome.

    Args:
      inputs: ``input_ids`` and, where there are any, ``attention_mask``, ``position_ids``, ``answer_positions`` and
        what the family reads of images. Where images take unlike numbers of tokens, what decides these numbers
        (``image_sizes``, ``image_grid_thw``) must be known, not traced.
      config: the family's config.
      bucketed: pad to a few sizes, so that unlike inputs share programs: what a sequence holds of image tokens to one
        of ``IMAGE_BUCKETS`` (unless all images of the model take equally many), the rest of it to one of
        ``text_buckets``, images likewise. Padding is added on the right and changes no number.
      text_buckets: see there.

    Raises:
      InputError: naming the array, what it is and what was expected. Values (rather than shapes) are checked only
        where they are known, that is outside of ``jit``.
    """
    family = family_named(config.model_type)
    unknown = sorted(set(inputs) - {*SEQUENCES, *family.image_inputs} - UNREAD)
    if unknown:
        raise InputError(f"inputs hold {', '.join(unknown)}, which the model does not read; drop them")
    if "input_ids" not in inputs:
        raise InputError(f"inputs hold no input_ids (only {', '.join(sorted(inputs)) or 'nothing'})")
    ids = read_array(inputs, "input_ids", 2, "(batch, sequence)")
    batch, length = ids.shape
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise InputError(f"input_ids are of type {ids.dtype}; expected whole numbers")
    mask = read_array(inputs, "attention_mask", (2, 4), "(batch, sequence) or (batch, 1, sequence, sequence)")
    mask = np.ones((batch, length), np.int32) if mask is None else mask
    if mask.shape not in ((batch, length), (batch, 1, length, length)):
        raise InputError(f"attention_mask has shape {mask.shape}; input_ids have shape {ids.shape}")
    if mask.ndim == 4 and not (mask.dtype == bool or jnp.issubdtype(mask.dtype, jnp.floating)):
        raise InputError(f"attention_mask over pairs is of type {mask.dtype}; expected booleans or additive floats")
    answers = _answer_positions(inputs, batch, length)
    images = family.pack_images(config, inputs, bucket_of if bucketed else _exactly)
    max_image_tokens = _image_tokens(ids, images, config)
    positions = _positions(inputs, ids, mask, images, config)
    bucketed = bucketed and not isinstance(ids, jax.core.Tracer)
    if bucketed:
        room = bucket_of(max_image_tokens) if family.tokens_vary else max_image_tokens
        added = room + bucket_of(length - max_image_tokens, text_buckets) - length
        max_image_tokens = room
        filler = int(config.image_token_id == 0)  # any id but the placeholder's
        ids = np.pad(ids, ((0, 0), (0, added)), constant_values=filler)
        mask = _pad_mask(np.asarray(mask), added)
        if positions is not None:
            positions = np.pad(positions, ((0, 0), (0, added), (0, 0))[: np.ndim(positions)])
    return Inputs(
        input_ids=_place(ids, np.int32),
        attention_mask=_place(mask),
        images=jax.tree.map(_place, images),
        position_ids=_place(positions, np.int32),
        answer_positions=_place(answers, np.int32),
        max_image_tokens=max_image_tokens,
        bucketed=bucketed,
    )


def _place(value: Any, dtype: Any = None) -> Any:
    """An array on the device; one of the host's without a program compiled for its shape."""
    if value is None:
        return None
    if isinstance(value, jax.Array):
        return value if dtype is None else value.astype(dtype)
    return jax.device_put(np.asarray(value, dtype))


def _exactly(size: int) -> int:
    return size


def _image_tokens(ids: Any, images: Images | None, config: Any) -> int:
    """The image tokens of the fullest sequence; a bound of it where the ids are traced.

    Raises:
      InputError: ids outside the vocabulary, or not one placeholder a feature.
    """
    needed = 0 if images is None else int(np.sum(images.counts))
    if isinstance(ids, jax.core.Tracer):
        return min(ids.shape[1], needed)
    known = np.asarray(ids)
    if known.size and not (known.min() >= 0 and known.max() < config.text.vocab_size):
        raise InputError(
            f"input_ids run from {known.min()} to {known.max()}; the vocabulary has {config.text.vocab_size} entries"
        )
    counts = (known == config.image_token_id).sum(axis=-1)
    if counts.sum() != needed:
        sizes = [] if images is None else sorted(set(np.asarray(images.counts).tolist()))
        each = f" of {' or '.join(map(str, sizes[:3]))} tokens" if sizes else ""
        raise InputError(
            f"input_ids hold {counts.sum()} image placeholders (id {config.image_token_id}); "
            f"{0 if images is None else len(images)} image(s){each} need {needed}. "
            "Was a prompt cut, or an <image> left out?"
        )
    return int(counts.max(initial=0))


def _positions(inputs: Mapping[str, Any], ids: Any, mask: Any, images: Images | None, config: Any) -> Any:
    """Rotary positions ``[B, S]`` or ``[B, S, 3]``: the caller's, or by the family's rule; ``None`` counts tokens."""
    family = family_named(config.model_type)
    if family.positions is None:
        given = read_array(inputs, "position_ids", 2, "(batch, sequence)")
        if given is not None and given.shape != ids.shape:
            raise InputError(f"position_ids have shape {given.shape}; input_ids have shape {ids.shape}")
        return given
    given = read_array(inputs, "position_ids", (2, 3), "(3, batch, sequence) or (batch, sequence)")
    if given is not None:
        if given.shape not in (ids.shape, (3, *ids.shape)):
            raise InputError(f"position_ids have shape {given.shape}; input_ids have shape {ids.shape}")
        return jnp.moveaxis(given, 0, -1) if given.ndim == 3 else given
    if images is None:
        return None  # text alone: every axis counts the tokens
    if isinstance(ids, jax.core.Tracer):
        raise InputError(
            "input_ids are traced, but rotary positions follow from where the images stand; call "
            "model.as_inputs(inputs) outside of jit and pass its result, or give position_ids"
        )
    mask = np.asarray(mask)
    valid = mask.astype(bool) if mask.ndim == 2 else allowed_pairs(mask).any(axis=-1)
    return family.positions(config, np.asarray(ids), valid, images)


def _pad_mask(mask: np.ndarray, added: int) -> np.ndarray:
    if mask.ndim == 2:
        return np.pad(mask, ((0, 0), (0, added)))
    blocked = False if mask.dtype == bool else float(np.finfo(mask.dtype).min)
    return np.pad(mask, ((0, 0), (0, 0), (0, added), (0, added)), constant_values=blocked)


def _answer_positions(inputs: Mapping[str, Any], batch: int, length: int) -> Any:
    positions = read_array(inputs, "answer_positions", 2, "(batch, answer tokens)")
    if positions is None:
        return None
    if positions.shape[0] != batch:
        raise InputError(f"answer_positions have shape {positions.shape}; there are {batch} sequences")
    if not isinstance(positions, jax.core.Tracer) and positions.size:
        low, high = int(np.asarray(positions).min()), int(np.asarray(positions).max())
        if low < 0 or high >= length:
            raise InputError(f"answer_positions run from {low} to {high}; the sequence has {length} positions")
    return positions
