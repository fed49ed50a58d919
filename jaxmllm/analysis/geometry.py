"""Which pixels of the original image each image token saw, and where in the sequence that token stands."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from jaxmllm.errors import InputError
from jaxmllm.models import forward as pure
from jaxmllm.models.boxes import TokenBoxes
from jaxmllm.models.images import Images
from jaxmllm.models.sharding import context, put_rows, to_host


@dataclasses.dataclass(frozen=True)
class ImageTokens:
    """The tokens of one image of a batch.

    Attributes:
      row: the prompt that shows it.
      positions ``[N]``: sequence positions of its tokens, in order.
      tokens: what each of them saw, and of which tile.
      patches: the boxes of the vision tower's patches, where image tokens are no patches but look at them by
        cross-attention (query tokens of a Q-Former).
      looks ``[N, P]``: there, how much each image token looked at each patch, averaged over heads and layers with
        cross-attention. Rows sum to 1 less what went to the class token.
    """

    row: int
    positions: Int[np.ndarray, " N"]
    tokens: TokenBoxes
    patches: TokenBoxes | None = None
    looks: Float[np.ndarray, "N P"] | None = None


def token_boxes(model: Any, image_sizes: Sequence[tuple[int, int]]) -> list[TokenBoxes]:
    """What every image token saw, for images of these sizes (width, height) in pixels.

    Follows the checkpoint's image processor through padding, resizing, cropping, tiling and merging of patches.

    Raises:
      InputError: a size without pixels, or a processor whose output is not what the vision tower takes.
    """
    return _boxes(model, model.family.token_boxes, image_sizes)


def _boxes(model: Any, boxes_of: Callable, image_sizes: Sequence[tuple[int, int]]) -> list[TokenBoxes]:
    boxes = []
    for width, height in image_sizes:
        if width <= 0 or height <= 0:
            raise InputError(f"an image of {width} x {height} pixels has no token boxes")
        boxes.append(boxes_of(model.config, model.processor.image_processor, (width, height)))
    return boxes


# Images that are encoded together to learn where their tokens looked.
LOOKS_AT_ONCE = 16


def looks_of(
    model: Any, images: Images, nth: int | None = None, params: pure.Params | None = None
) -> list[Float[np.ndarray, "N P"]]:
    """How much each image token looked at each patch, for a family whose image tokens look by cross-attention; in the
    mean, or in the ``nth`` cross-attention alone; by ``params`` instead of the model's own where they are given."""
    params = model.params if params is None else params
    found: list[np.ndarray] = []
    host = jax.tree.map(np.asarray, images)
    for start in range(0, len(images), LOOKS_AT_ONCE):
        numbers = np.arange(start, start + min(LOOKS_AT_ONCE, len(images)))
        arrays = host.take(np.minimum(numbers, len(images) - 1).tolist()).arrays
        with context(model.mesh):
            found += [*to_host(pure.looks(model.graphdef, params, put_rows(arrays, model.mesh), nth))]
    return found[: len(images)]


def patch_boxes(model: Any, image_sizes: Sequence[tuple[int, int]]) -> list[TokenBoxes]:
    """As ``token_boxes``, of the patches that a map over image tokens can be laid on: what these look at by
    cross-attention, or the image tokens themselves."""
    return _boxes(model, model.family.patch_boxes or model.family.token_boxes, image_sizes)


def geometry(
    model: Any, inputs: Mapping[str, Any], image_sizes: Sequence[tuple[int, int]] | None = None
) -> list[ImageTokens]:
    """Where each image's tokens stand in the sequences, and what they saw of the original image.

    Where image tokens look at the image by cross-attention, the images are encoded to learn where they looked.

    Args:
      model: a loaded model.
      inputs: from ``model.prepare``, or a Hugging Face processor's arrays.
      image_sizes: (width, height) of every original image in pixels, upright; ``model.prepare`` remembers them, and
        LLaVA-NeXT's processor gives them.

    Raises:
      InputError: sizes that are not known, are not one an image, or do not lead to the tokens that the inputs have.
    """
    sizes = image_sizes if image_sizes is not None else getattr(inputs, "image_sizes", None)
    if sizes is None and inputs.get("image_sizes") is not None:  # a processor's own are (height, width)
        sizes = [(int(width), int(height)) for height, width in np.asarray(inputs["image_sizes"])]
    ids = np.asarray(inputs["input_ids"])
    images = model.as_inputs(inputs).images
    many = 0 if images is None else len(images)
    if sizes is None:
        raise InputError(
            "the sizes of the original images are not known; give image_sizes, (width, height) of each, or the result "
            "of model.prepare as it is"
        )
    if len(sizes) != many:
        raise InputError(f"{len(sizes)} image size(s) for {many} image(s)")
    rows, places = np.nonzero(ids == model.config.image_token_id)
    patches: list[TokenBoxes | None] = [None] * many
    looks: Sequence[np.ndarray | None] = [None] * many
    if model.family.patch_boxes is not None and images is not None:
        patches = [*patch_boxes(model, sizes)]
        looks = looks_of(model, images)
    found, start = [], 0
    for number, boxes in enumerate(token_boxes(model, sizes)):
        count = int(images.counts[number])
        if len(boxes.boxes) != count:
            raise InputError(
                f"image {number} has {count} tokens, but one of {sizes[number][0]} x {sizes[number][1]} pixels makes "
                f"{len(boxes.boxes)}; give the sizes of the images these inputs were made from"
            )
        here = slice(start, start + count)
        found.append(ImageTokens(int(rows[start]), places[here], boxes, patches[number], looks[number]))
        start += count
    return found
