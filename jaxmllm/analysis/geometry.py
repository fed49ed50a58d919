"""Which pixels of the original image each image token saw, through padding, resizing and cropping."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxmllm.errors import InputError


@dataclasses.dataclass(frozen=True)
class TokenBoxes:
    """Pixel boxes of the image tokens of one image.

    Attributes:
      boxes: ``[N, 4]`` as (left, top, right, bottom) in pixels of the original image, clipped to it. A token that saw
        padding alone has a box of no area. A class token's box is the whole of what the tower saw.
      grid: rows and columns of the patch tokens, which come last and row by row.
      image_size: width and height of the original image in pixels.
    """

    boxes: Float[np.ndarray, "N 4"]
    grid: tuple[int, int]
    image_size: tuple[int, int]

    @property
    def areas(self) -> Float[np.ndarray, " N"]:
        """Pixels of the original image that each token saw."""
        return box_areas(self.boxes)


def box_areas(boxes: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, " n"]:
    """Areas of boxes (left, top, right, bottom); empty boxes have none."""
    return np.maximum(boxes[:, 2] - boxes[:, 0], 0) * np.maximum(boxes[:, 3] - boxes[:, 1], 0)


def token_boxes(model: Any, image_sizes: Sequence[tuple[int, int]]) -> list[TokenBoxes]:
    """The box of every image token, for images of these sizes (width, height) in pixels.

    Follows the checkpoint's image processor: padding to a square, resizing (shortest edge or exact size), centre crop
    (which pads where the image is smaller than the crop).

    Raises:
      InputError: a size without pixels, or a processor whose output is not what the vision tower takes.
    """
    vision = model.config.vision
    processor = model.processor.image_processor
    results = []
    for width, height in image_sizes:
        if width <= 0 or height <= 0:
            raise InputError(f"an image of {width} x {height} pixels has no token boxes")
        across = _Axis(float(width))
        down = _Axis(float(height))
        _follow(processor, across, down)
        if (round(down.size), round(across.size)) != (vision.image_size, vision.image_size):
            raise InputError(
                f"the image processor makes {across.size:g} x {down.size:g} pixels of a {width} x {height} image; the "
                f"vision tower takes {vision.image_size} x {vision.image_size}"
            )
        edges = np.arange(vision.grid + 1) * vision.patch_size
        xs = np.clip(across.original(edges), 0, width)
        ys = np.clip(down.original(edges), 0, height)
        left, top = np.meshgrid(xs[:-1], ys[:-1])
        right, bottom = np.meshgrid(xs[1:], ys[1:])
        boxes = np.stack([left, top, right, bottom], axis=-1).reshape(-1, 4)
        if model.config.keep_class_token:
            boxes = np.concatenate([[[xs[0], ys[0], xs[-1], ys[-1]]], boxes])
        results.append(TokenBoxes(boxes, (vision.grid, vision.grid), (width, height)))
    return results


@dataclasses.dataclass
class _Axis:
    """One axis of an image on its way through the processor: original = (processed + offset) * scale."""

    size: float
    offset: float = 0.0
    scale: float = 1.0

    def original(self, processed: np.ndarray) -> np.ndarray:
        return (processed + self.offset) * self.scale

    def resize(self, size: int) -> None:
        # (p * old/new + offset) * scale, with p the new coordinate
        factor = self.size / size
        self.offset, self.scale, self.size = self.offset / factor, self.scale * factor, float(size)

    def crop(self, size: int) -> None:
        """Centre crop; where the image is smaller this is padding and the origin is negative."""
        self.offset, self.size = self.offset + (int(self.size) - size) // 2, float(size)


def _follow(processor: Any, across: _Axis, down: _Axis) -> None:
    if getattr(processor, "do_pad", None) and "Llava" in type(processor).__name__:
        # The longer side stays; the shorter is centred in a square.
        side = max(across.size, down.size)
        for axis in (across, down):
            axis.offset -= (side - axis.size) // 2
            axis.size = side
    if processor.do_resize:
        width, height = _resized(processor.size, across.size, down.size)
        across.resize(width)
        down.resize(height)
    if processor.do_center_crop:
        across.crop(int(processor.crop_size["width"]))
        down.crop(int(processor.crop_size["height"]))


def _resized(size: Any, width: float, height: float) -> tuple[int, int]:
    """Size after resizing, as transformers' ``get_resize_output_image_size`` computes it."""
    fields = {name: size[name] for name in ("shortest_edge", "longest_edge", "height", "width") if size.get(name)}
    if set(fields) == {"height", "width"}:
        return int(fields["width"]), int(fields["height"])
    if set(fields) == {"shortest_edge"}:
        short = int(fields["shortest_edge"])
        long = int(short * max(width, height) / min(width, height))
        return (short, long) if width <= height else (long, short)
    raise InputError(f"image processor: resizing by {fields} is not supported; expected shortest_edge or height, width")
