"""Preprocessed images in the form that a family's ``encode_images`` reads, and the sizes they are padded to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxmllm.errors import InputError
from jaxmllm.models.layers import Leaf

# Rounds a number of image tokens up to what arrays are padded to; the identity where every size keeps its own program.
Room = Callable[[int], int]

# Image tokens a sequence (or an image) are padded to one of these; beyond the last, to a multiple of it.
IMAGE_BUCKETS = (256, 512, 1024, 2048, 3072, 4096, 6144, 8192, 12288, 16384)
# So is what a sequence holds besides its image tokens.
TEXT_BUCKETS = (64, 128, 256, 512, 1024, 2048, 4096)


def bucket_of(size: int, buckets: Sequence[int] = IMAGE_BUCKETS) -> int:
    """The smallest bucket that holds ``size``; 0 stays 0."""
    if size <= 0:
        return 0
    return next((bucket for bucket in buckets if bucket >= size), -(-size // buckets[-1]) * buckets[-1])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Images:
    """The images of a batch, in the order of their placeholders.

    Attributes:
      arrays: what ``encode_images`` of the family reads, by name; every array has a leading axis of I images.
      counts ``[I]``: image tokens of each image.
      tokens: N, the image tokens that ``encode_images`` makes of every image; those past its count are padding.
    """

    arrays: dict[str, Leaf]
    counts: Leaf
    tokens: int = dataclasses.field(metadata={"static": True})

    def __len__(self) -> int:
        return self.counts.shape[0]

    def take(self, numbers: Sequence[int]) -> Images:
        """Some of the images, in any number and order."""
        chosen = np.asarray(numbers, np.int32)
        arrays = {name: array[chosen] for name, array in self.arrays.items()}
        return Images(arrays, self.counts[chosen], self.tokens)


def place_images(
    embedded: Float[Array, "B S D"],
    features: Float[Array, "I N D"],
    placeholders: Bool[Array, "B S"],
    counts: Int[Array | np.ndarray, " I"],
) -> Float[Array, "B S D"]:
    """Puts image features at the placeholders, in order, over the whole batch (torch's ``masked_scatter``).

    ``placeholders`` marks every one, also one that the attention mask hides: it still takes its feature.
    """
    flat = features.reshape(-1, features.shape[-1])
    number = jnp.cumsum(placeholders.reshape(-1)) - 1
    ends = jnp.cumsum(jnp.asarray(counts))
    image = jnp.minimum(jnp.searchsorted(ends, number, side="right"), len(counts) - 1)
    row = image * features.shape[1] + number - (ends - counts)[image]
    placed = flat[jnp.clip(row, 0, flat.shape[0] - 1)].astype(embedded.dtype).reshape(embedded.shape)
    return jnp.where(placeholders[..., None], placed, embedded)


def read_array(inputs: Mapping[str, Any], name: str, ndim: int | tuple[int, ...], axes: str) -> Any:
    """One array of a processor's, as NumPy unless it is JAX's; ``None`` where it is absent.

    Raises:
      InputError: it has not as many axes as ``axes`` names.
    """
    value = inputs.get(name)
    if value is None:
        return None
    value = value if isinstance(value, jax.Array) else np.asarray(value)
    allowed = ndim if isinstance(ndim, tuple) else (ndim,)
    if value.ndim not in allowed:
        raise InputError(f"{name} has shape {tuple(value.shape)}; expected axes {axes}")
    return value


def read_known(inputs: Mapping[str, Any], name: str, ndim: int | tuple[int, ...], axes: str) -> Any:
    """``read_array`` of whole numbers that decide shapes, so that their values must be known.

    Raises:
      InputError: as ``read_array``; not whole numbers; or traced.
    """
    value = inputs.get(name)
    if isinstance(value, jax.core.Tracer):
        raise InputError(
            f"{name} is traced, but it decides shapes; call model.as_inputs(inputs) outside of jit and pass its result"
        )
    value = read_array(inputs, name, ndim, axes)
    if value is not None and not np.issubdtype(np.asarray(value).dtype, np.integer):
        raise InputError(f"{name} is of type {np.asarray(value).dtype}; expected whole numbers")
    return None if value is None else np.asarray(value)


def read_square_pixels(inputs: Mapping[str, Any], shape: tuple[int, int, int]) -> Any:
    """``pixel_values`` of a vision tower that takes images of one size; ``None`` where there are no images.

    Args:
      inputs: a processor's arrays.
      shape: channels, height and width of a preprocessed image.

    Raises:
      InputError: another shape.
    """
    pixels = read_array(inputs, "pixel_values", 4, "(images, channels, height, width)")
    if pixels is not None and tuple(pixels.shape[1:]) != shape:
        wanted = ", ".join(map(str, shape))
        raise InputError(f"pixel_values have shape {tuple(pixels.shape)}; this model takes (images, {wanted})")
    return pixels if pixels is not None and pixels.shape[0] else None


def pad_rows(rows: Sequence[np.ndarray], length: int, fill: float | int = 0) -> np.ndarray:
    """Arrays of unlike length as one, each filled up to ``length``."""
    out = np.full((len(rows), length, *rows[0].shape[1:]), fill, rows[0].dtype)
    for number, row in enumerate(rows):
        out[number, : len(row)] = row
    return out
