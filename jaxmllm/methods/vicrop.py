"""ViCrop: the window that a relative attention map, or a gradient, points at is shown beside the whole image.

Source: Zhang et al., "MLLMs Know Where to Look" (arXiv 2502.17422); saccharomycetes/mllms_know@a64c5d5:
``llava_methods.py``, ``blip_methods.py``, ``qwen2_5_methods.py``, ``utils.py``. Its high-resolution mode, which cuts
large images up first, is not here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float
from PIL import Image
from scipy import ndimage

from jaxmllm.errors import InputError
from jaxmllm.methods.base import Method, Second
from jaxmllm.methods.first import First, one_image
from jaxmllm.methods.gradients import gradient_attention, gradient_looks, pixel_gradient
from jaxmllm.methods.regions import Box, ImageMap, as_patch_map, inside, search_window, within
from jaxmllm.models.capture import ATTENTION, Capture
from jaxmllm.models.inputs import Inputs
from jaxmllm.models.sharding import to_host
from jaxmllm.processing import prepare

MAPS = ("rel-att", "grad-att", "pure-grad")
GENERAL = "Write a general description of the image."
# Layer whose attention is read and layers of the checkpoint for which it was chosen, by family; others are read at the
# depth of LLaVA's.
LAYERS = {"llava": (14, 32), "instructblip": (15, 32), "qwen2_5_vl": (22, 36), "qwen2_vl": (22, 36)}
CROSS_ATTENTION = 2
# Side of the smallest window in pixels, where the vision tower takes images of any size.
BASE = 224
# Width of the Gaussian of three pixels, as torchvision derives it from the kernel's size; side of the median's window.
BLUR = 0.3 * ((3 - 1) * 0.5 - 1) + 0.8
MEDIAN = 7


@dataclasses.dataclass(frozen=True)
class ViCrop(Method):
    """Answers from the image and a window of it, from 1 to 2 times as large as what the vision tower takes.

    Attributes:
      map: ``rel-att`` divides the attention for the question by that for a general prompt; ``grad-att`` weighs it by
        its positive gradient; ``pure-grad`` divides the gradients by pixels, where the image has edges.
      layer: decoder layer that is read; by default as the official code chose it, at the same depth.
      general: the general prompt, asked as the question is.
      base: side of the smallest window in pixels; by default that of the vision tower's input, or 224.
      geometry: ``true`` lays the map where the patches saw the image; ``stretched`` over the whole image, as the
        official code does although CLIP's preprocessing cuts the edges off.
    """

    name: ClassVar[str] = "vicrop"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"geometry": "true"},
        "code": {"geometry": "stretched"},
    }

    map: str = "rel-att"
    layer: int | None = None
    general: str = GENERAL
    base: int | None = None
    geometry: str = "true"

    def __post_init__(self) -> None:
        if self.map not in MAPS:
            raise InputError(f"map is {self.map!r}; expected one of {', '.join(MAPS)}")
        if self.geometry not in ("true", "stretched"):
            raise InputError(f"geometry is {self.geometry!r}; expected 'true' or 'stretched'")
        if self.base is not None and self.base < 1:
            raise InputError(f"base is {self.base}; expected a side in pixels")

    @property
    def weight(self) -> int:
        return 2 if self.map == "rel-att" else 4

    def capture(self, num_layers: int) -> Capture:
        return Capture.attention(rows="last", keys="image") if self.map == "rel-att" else Capture()

    def second(self, first: First) -> Second:
        one_image(first.inputs, self.name)
        find = {"rel-att": self.relative, "grad-att": self.weighted, "pure-grad": self.by_pixels}[self.map]
        maps = first.maps(find(first))
        base = self.base
        if base is None:
            base = int(getattr(first.model.config.vision, "image_size", BASE))
        boxes = [
            inside(self.window(found, picture.size, base), picture.size)
            for found, picture in zip(maps, first.pictures, strict=True)
        ]
        pictures = tuple(picture.crop(box) for picture, box in zip(first.pictures, boxes, strict=True))
        return Second(pictures=pictures, boxes=tuple(boxes), maps=maps)

    def window(self, found: ImageMap, image_size: tuple[int, int], base: int) -> Box:
        """The window of an image that a map points at, in pixels."""
        patches = as_patch_map(found)
        if self.geometry == "stretched":
            return search_window(patches.values, image_size, base)
        left, top, right, bottom = patches.box
        return within(search_window(patches.values, (right - left, bottom - top), base), (left, top))

    def read_layer(self, first: First) -> int:
        """The decoder layer that is read.

        Raises:
          InputError: the model has no such layer.
        """
        layer, depth = LAYERS.get(first.model.config.model_type, LAYERS["llava"])
        layer = round(layer / depth * first.num_layers) if self.layer is None else self.layer
        if not 0 <= layer < first.num_layers:
            raise InputError(f"no layer {layer}: the model has decoder layers 0..{first.num_layers - 1}")
        return layer

    def cross(self, first: First) -> int:
        """The cross-attention that is read, of models that have any."""
        layers = first.model.config.qformer.cross_layers
        return min(CROSS_ATTENTION, len(layers) - 1)

    def relative(self, first: First) -> list[Float[np.ndarray, " _"]]:
        """Attention for the question over attention for the general prompt, a map an example."""
        layer = self.read_layer(first)
        nth = self.cross(first) if first.model.family.patch_boxes else None
        passed, _, inputs = first.ask(self.general, self.capture(first.num_layers))
        asked = first.on_patches(first.attention()[layer], nth=nth)
        general = first.on_patches(to_host(passed.captured[ATTENTION])[layer, :, 0], inputs, nth)
        return [_ratio(one, other) for one, other in zip(asked, general, strict=True)]

    def weighted(self, first: First) -> list[Float[np.ndarray, " _"]]:
        """Attention times its positive gradient."""
        layer = np.int32(self.read_layer(first))
        arguments = first.model.graphdef, first.params, first.inputs, first.edits, layer
        first.count.prompts += 1
        first.count.backward += 1
        if first.model.family.patch_boxes:
            return [*to_host(gradient_looks(*arguments, self.cross(first)))]
        return first.on_patches(to_host(gradient_attention(*arguments)))

    def by_pixels(self, first: First) -> list[Float[np.ndarray, " _"]]:
        """Gradient by pixels for the question over that for the general prompt, at edges, averaged over patches.

        Raises:
          InputError: a model that does not see an image as one square view.
        """
        vision = first.model.config.vision
        if first.model.family.tokens_vary or first.model.family.pixels != "pixel_values":
            raise InputError(
                f"method {self.name!r} with map=pure-grad needs a model that sees an image as one square view; "
                f"{first.model.config.model_type} does not: take map=rel-att or grad-att"
            )
        texts = [first.ask_in(self.general, row) for row in range(len(first.pictures))]
        other = first.model.as_inputs(prepare(first.model.processor, first.pictures, texts), bucketed=True)
        gradients = [self._lengths(first, inputs) for inputs in (first.inputs, other)]
        views = [as_patch_map(blank).box for blank in first.maps([np.zeros(vision.num_patches)] * len(texts))]
        found = []
        for picture, view, asked, general in zip(first.pictures, views, *gradients, strict=True):
            seen = picture if self.geometry == "stretched" else picture.crop(inside(view, picture.size))
            edges = high_pass(seen, vision.image_size)
            shown = _ratio(asked, general) * (edges > np.median(edges))
            patch, side = vision.patch_size, vision.image_size // vision.patch_size
            cut = shown[: side * patch, : side * patch]
            found.append(cut.reshape(side, patch, side, patch).mean(axis=(1, 3)).ravel())
        return found

    def _lengths(self, first: First, inputs: Inputs) -> Float[np.ndarray, "B Y X"]:
        """Gradients by pixels as lengths over the channels."""
        first.count.prompts += 1
        first.count.backward += 1
        gradient = pixel_gradient(first.model.graphdef, first.params, inputs, first.edits, first.model.family.pixels)
        return np.linalg.norm(to_host(gradient).astype(np.float32), axis=1)


def _ratio(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """A quotient that is 0, rather than undefined, where both are 0 (a token that padding blocks)."""
    return np.divide(one, other, out=np.zeros_like(one), where=(other != 0) | (one != 0))


def high_pass(image: Image.Image, side: int) -> Float[np.ndarray, "side side"]:
    """What a slight blur takes from an image: how much, as a length over the channels, smoothed by a median of 7 x 7.

    The image is brought to ``side`` x ``side`` pixels first. Source: ``high_pass_filter`` of the official code.
    """
    pixels = np.asarray(image.convert("RGB").resize((side, side), Image.Resampling.BILINEAR), np.float32) / 255
    kernel = np.exp(-0.5 * (np.arange(-1, 2) / BLUR) ** 2).astype(np.float32)
    kernel /= kernel.sum()
    blurred = pixels
    for axis in (0, 1):
        blurred = ndimage.correlate1d(blurred, kernel, axis=axis, mode="mirror")
    return ndimage.median_filter(np.sqrt(np.square(pixels - blurred).sum(axis=-1)), size=MEDIAN)
