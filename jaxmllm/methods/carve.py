"""CARVE: what a question draws attention to beyond a general prompt, over all decoding steps, cut out and shown again.

Source: Ge et al., "Focusing by Contrastive Attention" (arXiv 2509.06461); YuyaoGe/CARVE@a1f0442: ``attention.py``,
``masking.py``, ``pipeline.py`` (version v4, its default).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import numpy as np
from jaxtyping import Bool, Float
from PIL import Image
from scipy import ndimage

from jaxmllm.decoding.rules import Decoded
from jaxmllm.errors import InputError
from jaxmllm.methods.base import Method, Number, Second
from jaxmllm.methods.first import First, one_image
from jaxmllm.methods.regions import Box, ImageMap, as_patch_map, inside
from jaxmllm.methods.vicrop import GENERAL
from jaxmllm.models.capture import ATTENTION, Capture

# The layers of the official code; a model of fewer takes them at the same depth of 28.
LAYERS = range(20, 26)
DEPTH = 28
STEPS = 32
ROWS = Capture.attention(rows="last", keys="image")


@dataclasses.dataclass(frozen=True)
class Carve(Method):
    """Answers from the image and its most attended regions, everything else in black.

    The answers to the question and to a general prompt are decoded first; ``S = sum over steps t of (t + 1) * sum over
    layers of A_question / (A_general + lam)``, brought to the size of the image. Of what is above a quantile of S the
    connected regions with the largest sums are kept.

    Attributes:
      layers: decoder layers that count; by default 20 to 25.
      lam: keeps the quotient finite.
      top: share of the pixels that is above the threshold, and of the regions that is kept.
      fewest: regions that are kept at least.
      steps: tokens that are decoded for the map.
      general: the general prompt, asked as the question is.
      geometry: ``true`` lays the map where the patches saw the image, ``stretched`` over the whole image, as the
        official code does.
    """

    name: ClassVar[str] = "carve"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {"geometry": "true"},
        "code": {"geometry": "stretched"},
    }

    layers: Sequence[int] = ()
    lam: Number = 1e-8
    top: Number = 0.2
    fewest: int = 3
    steps: int = STEPS
    general: str = GENERAL
    geometry: str = "true"

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(int(layer) for layer in self.layers))
        if not 0 < self.top <= 1 or self.fewest < 1 or self.steps < 1 or self.lam < 0:
            raise InputError(
                f"top={self.top}, fewest={self.fewest}, steps={self.steps}, lam={self.lam}; expected 0 < top <= 1, at "
                "least one region and one step, lam from 0"
            )
        if self.geometry not in ("true", "stretched"):
            raise InputError(f"geometry is {self.geometry!r}; expected 'true' or 'stretched'")

    @property
    def weight(self) -> int:
        return 3

    @property
    def decodes(self) -> int:
        return self.steps

    def capture(self, num_layers: int) -> Capture:
        return ROWS

    def read_layers(self, num_layers: int) -> list[int]:
        """The layers that count.

        Raises:
          InputError: the model has no such layer.
        """
        deep = num_layers > LAYERS[-1]
        scaled = LAYERS if deep else sorted({layer * num_layers // DEPTH for layer in LAYERS})
        layers = list(self.layers or scaled)
        outside = [layer for layer in layers if not 0 <= layer < num_layers]
        if outside:
            raise InputError(f"no layers {outside}: the model has decoder layers 0..{num_layers - 1}")
        return layers

    def second(self, first: First) -> Second:
        one_image(first.inputs, self.name)
        prompts, cache, inputs = first.ask(self.general, ROWS, max_new_tokens=self.steps)
        general = first.decode(prompts, cache, ROWS, self.steps)
        asked = first.decode(first.prompts, first.cache, ROWS, self.steps)
        first.cache = asked.cache
        layers = self.read_layers(first.num_layers)
        both = [first.on_patches(attention_of(done, layers), of) for done, of in ((asked, None), (general, inputs))]
        steps = np.minimum(np.asarray(asked.lengths), np.asarray(general.lengths))
        contrasts = map(self.fuse, *both, steps.tolist())
        maps = first.maps(list(contrasts))
        refined = [self.refine(picture, found) for picture, found in zip(first.pictures, maps, strict=True)]
        return Second(
            pictures=tuple(picture for picture, _ in refined), boxes=tuple(box for _, box in refined), maps=maps
        )

    def fuse(
        self, asked: Float[np.ndarray, "T layers P"], general: Float[np.ndarray, "G layers P"], steps: int
    ) -> Float[np.ndarray, " P"]:
        """Contrast of the first steps, later ones with more weight."""
        contrast = (asked[:steps] / (general[:steps] + self.lam)).sum(axis=1)
        return np.einsum("t,tp->p", np.arange(1, steps + 1), contrast)

    def refine(self, picture: Image.Image, found: ImageMap) -> tuple[Image.Image, Box]:
        """The kept regions of a picture, cut to their box and enlarged to the picture's size, and that box."""
        kept = kept_regions(self.at_pixels(found, picture.size), self.top, self.fewest)
        rows, columns = np.flatnonzero(kept.any(axis=1)), np.flatnonzero(kept.any(axis=0))
        box = int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
        part = Image.fromarray(np.asarray(picture) * kept[..., None].astype(np.uint8)).crop(box)
        scale = max(picture.width / part.width, picture.height / part.height)
        size = int(part.width * scale), int(part.height * scale)
        return part.resize(size, Image.Resampling.LANCZOS), box

    def at_pixels(self, found: ImageMap, size: tuple[int, int]) -> Float[np.ndarray, "Y X"]:
        """A map at the resolution of the image; where nothing was seen it is at its lowest."""
        patches = as_patch_map(found)
        left, top, right, bottom = (0, 0, *size) if self.geometry == "stretched" else inside(patches.box, size)
        values = Image.fromarray(patches.values.astype(np.float32))
        seen = np.asarray(values.resize((right - left, bottom - top), Image.Resampling.BILINEAR), float)
        whole = np.full((size[1], size[0]), seen.min())
        whole[top:bottom, left:right] = seen
        return whole


def attention_of(done: Decoded, layers: list[int]) -> Float[np.ndarray, "T layers B N"]:
    """Attention to the image tokens of every position that predicted a token, at some layers."""
    recorded = jax.tree.map(np.asarray, done.recorded[ATTENTION][: int(done.steps)])
    return recorded[:, layers][..., 0, :]


def kept_regions(values: Float[np.ndarray, "Y X"], top: float, fewest: int) -> Bool[np.ndarray, "Y X"]:
    """Of the pixels above the quantile ``1 - top``, the connected regions (by sides) with the largest sums: the share
    ``top`` of them, and ``fewest`` at least. Of equals the first in reading order."""
    regions, number = ndimage.label(values >= np.percentile(values, (1.0 - top) * 100))
    sums = np.asarray(ndimage.sum(values, regions, range(1, number + 1)))
    ranked = np.argsort(-sums, kind="stable")[: max(fewest, int(number * top))]
    return np.isin(regions, ranked + 1)
