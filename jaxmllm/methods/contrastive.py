"""Contrastive attention: what gained attention between two depths is looked at again, or kept while the rest fades.

Source: arXiv 2601.08151, part 2. The published rule stands beside named alternatives for all that the paper leaves
open; ``docs/methods.md`` says what each did where it could be measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from PIL import Image

from jaxmllm.analysis.attention import candidate_layers, hellinger, image_distribution
from jaxmllm.analysis.edits import review_mask
from jaxmllm.decoding.generate import Reader
from jaxmllm.errors import InputError
from jaxmllm.methods.base import Method, Number, Second
from jaxmllm.methods.first import First, one_image
from jaxmllm.methods.regions import (
    Box,
    ImageMap,
    as_patch_map,
    blacked_out,
    box_around,
    enlarged,
    inside,
    kept_patches,
    search_window,
    squared,
    within,
)
from jaxmllm.models.capture import ATTENTION, Capture
from jaxmllm.models.layers import Leaf
from jaxmllm.models.layout import Layout
from jaxmllm.models.sharding import to_host

CANDIDATES = ("fusion", "all", "deep", "shallow")
POSTS = ("last", "mean", "fusion")
# The review layer of the 32 layers of a LLaVA-1.5.
REVIEW_SHARE = 29 / 32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ContrastReader:
    """Reads contrastive attention from captured rows, inside the pass that captures them.

    Attributes:
      post ``[L]``: weights of the layers whose attention counts.
      candidates ``[L]``: layers among which the one that is subtracted is chosen.
      subtracted ``[]``: how much of it is subtracted.
    """

    post: Leaf
    candidates: Leaf
    subtracted: Leaf

    def __call__(self, captured: dict[str, Array], layout: Layout) -> dict[str, Array]:
        """``contrast [B, N]``, ``pre [B]`` (i*) and ``distances [L, B]`` (Hellinger to the last layer)."""
        distribution = image_distribution(captured[ATTENTION][:, :, 0])
        distances = hellinger(distribution, distribution[-1:])
        pre = jnp.argmax(jnp.where(jnp.asarray(self.candidates)[:, None], distances, -1.0), axis=0)
        before = jnp.take_along_axis(distribution, pre[None, :, None], axis=0)[0]
        after = jnp.einsum("l,lbn->bn", jnp.asarray(self.post), distribution)
        return {"contrast": after - self.subtracted * before, "pre": pre, "distances": distances}


@dataclasses.dataclass(frozen=True)
class Contrast(Method):
    """What both uses of contrastive attention have in common: ``I_A = A(post) - subtract * A(pre)``.

    Attributes:
      fusion_layers: layers at which the image is read, as a masking sweep finds them.
      candidates: layers among which the pre-fusion layer i* is the one whose attention is furthest from the last
        layer's: ``fusion``, ``all``, ``deep``, ``shallow`` (the paper's sets).
      pre: a fixed layer instead of i*.
      post: ``last`` (the paper's), the ``mean`` over all layers, the mean over the ``fusion`` layers, or a layer.
      subtract: 1 subtracts the pre-fusion layer, 0 leaves plain attention.
    """

    fusion_layers: Sequence[int] = ()
    candidates: str = "fusion"
    pre: int | None = None
    post: str | int = "last"
    subtract: Number = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "fusion_layers", tuple(int(layer) for layer in self.fusion_layers))
        if self.candidates not in CANDIDATES:
            raise InputError(f"candidates is {self.candidates!r}; expected one of {', '.join(CANDIDATES)}")
        if not isinstance(self.post, int) and self.post not in POSTS:
            raise InputError(f"post is {self.post!r}; expected {', '.join(POSTS)} or a layer")

    def capture(self, num_layers: int) -> Capture:
        return Capture.attention(rows="last", keys="image")

    def reader(self, num_layers: int) -> Reader | None:
        candidates = np.zeros(num_layers, bool)
        candidates[self._pre(num_layers)] = True
        post = np.zeros(num_layers, np.float32)
        post[self._post(num_layers)] = 1
        return ContrastReader(post / post.sum(), candidates, np.float32(self.subtract))

    def _pre(self, num_layers: int) -> list[int]:
        if self.pre is not None:
            return candidate_layers([self.pre], num_layers)
        return candidate_layers(self._fusion() if self.candidates == "fusion" else self.candidates, num_layers)

    def _post(self, num_layers: int) -> list[int]:
        if self.post == "last":
            return [num_layers - 1]
        if self.post == "mean":
            return list(range(num_layers))
        return candidate_layers(self._fusion() if self.post == "fusion" else [int(self.post)], num_layers)

    def _fusion(self) -> Sequence[int]:
        if not self.fusion_layers:
            raise InputError(
                f"method {self.name!r} needs the model's fusion layers: give fusion_layers (--fusion-layers, by hand "
                "or the file that `jaxmllm sweep` writes), or choose candidates=all, deep or shallow"
            )
        return self.fusion_layers


@dataclasses.dataclass(frozen=True)
class ContrastiveReinput(Contrast):
    """Answers from the image and, behind it, the part of it that gained attention.

    Attributes:
      refined: ``crop`` cuts that part out; ``segment`` blacks out everything else in it first.
      region: ``patches`` takes the smallest square around the patches of at least ``threshold`` times the highest
        contrast, widened on every side by ``margin`` patches; ``connected`` only around those of them that hang
        together with the highest; ``window`` the window that stands out most (ViCrop's search).
      threshold, margin: see there.
      smallest: the square's side at least, as a share of the image's shorter side.
      scale: how many times the part is enlarged; towers with a fixed input size resize it anyway.
    """

    name: ClassVar[str] = "contrastive"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"candidates": "fusion", "post": "last"},
        "layer0": {"pre": 0, "post": "fusion"},
        "mean": {"pre": 0, "post": "mean"},
    }

    refined: str = "crop"
    region: str = "patches"
    threshold: Number = 0.5
    margin: Number = 0.5
    smallest: Number = 0.25
    scale: Number = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.refined not in ("crop", "segment"):
            raise InputError(f"refined is {self.refined!r}; expected 'crop' or 'segment'")
        if self.region not in ("patches", "connected", "window"):
            raise InputError(f"region is {self.region!r}; expected 'patches', 'connected' or 'window'")
        if not 0 < self.threshold <= 1 or not 0 <= self.smallest <= 1 or self.scale <= 0 or self.margin < 0:
            raise InputError(
                f"threshold={self.threshold}, margin={self.margin}, smallest={self.smallest}, scale={self.scale}; "
                "expected 0 < threshold <= 1, margin from 0, smallest from 0 to 1, scale above 0"
            )

    @property
    def weight(self) -> int:
        return 2

    def second(self, first: First) -> Second:
        one_image(first.inputs, self.name)
        contrast = to_host(first.prompts.findings["contrast"])
        maps = first.maps(first.on_patches(contrast))
        refined = [self.refine(picture, found) for picture, found in zip(first.pictures, maps, strict=True)]
        return Second(
            pictures=tuple(picture for picture, _ in refined), boxes=tuple(box for _, box in refined), maps=maps
        )

    def refine(self, picture: Image.Image, found: ImageMap) -> tuple[Image.Image, Box]:
        """The part of a picture that a map points at, and its box."""
        patches = as_patch_map(found)
        kept = kept_patches(patches, self.threshold, self.region == "connected")
        least = self.smallest * min(picture.size)
        if self.region == "window":
            left, top, right, bottom = patches.box
            positive = np.maximum(patches.values, 0.0)
            cell = max(np.diff(patches.xs).max(), np.diff(patches.ys).max())
            box = within(search_window(positive, (right - left, bottom - top), float(max(least, cell))), (left, top))
        else:
            box = squared(box_around(patches, kept, self.margin), picture.size, least)
        part = inside(box, picture.size)
        shown = blacked_out(picture, patches, kept) if self.refined == "segment" else picture
        return enlarged(shown.crop(part), self.scale), part


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ReviewReader:
    """Contrastive attention, and from it what is kept of the attention to each image token.

    Attributes:
      contrast: reads it.
      quantile, strength: see ``ReviewMask``.
    """

    contrast: ContrastReader
    quantile: Leaf
    strength: Leaf

    def __call__(self, captured: dict[str, Array], layout: Layout) -> dict[str, Array]:
        """As ``ContrastReader``, and ``weights [B, N]``."""
        found = self.contrast(captured, layout)
        filled = layout.image_index()[1]
        return found | {"weights": soft_weights(found["contrast"], filled, self.quantile, self.strength)}


def soft_weights(contrast: Float[Array, "B N"], filled: Array, quantile: Leaf, strength: Leaf) -> Float[Array, "B N"]:
    """What is kept of each image token: 1 from the quantile of the contrast on, falling linearly to ``1 - strength`` at
    the lowest contrast."""
    known = jnp.where(filled, contrast, jnp.nan)
    level = jnp.nanquantile(known, quantile, axis=-1, keepdims=True)
    lowest = jnp.nanmin(known, axis=-1, keepdims=True)
    fall = jnp.where(level > lowest, (level - contrast) / jnp.where(level > lowest, level - lowest, 1.0), 0.0)
    return jnp.where(filled, 1.0 - strength * jnp.clip(fall, 0.0, 1.0), 1.0)


@dataclasses.dataclass(frozen=True)
class ReviewMask(Contrast):
    """At the review layer, attention to image tokens that gained none is weakened.

    The pass over the prompt gives the contrast; only the last prompt token (or the question) is then run again, and
    what is generated runs under the mask.

    Attributes:
      layer: the review layer; by default the one at 29/32 of the depth.
      quantile: image tokens whose contrast is below this quantile are weakened.
      strength: how much of the attention to the token with the lowest contrast goes.
      again: what is run under the mask beside the answer: the ``last`` prompt token, or the whole ``question``.
    """

    name: ClassVar[str] = "review-mask"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = ContrastiveReinput.presets

    layer: int | None = None
    quantile: Number = 0.5
    strength: Number = 0.5
    again: str = "last"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.again not in ("last", "question"):
            raise InputError(f"again is {self.again!r}; expected 'last' or 'question'")
        if not 0 <= self.quantile <= 1 or not 0 <= self.strength <= 1:
            raise InputError(f"quantile={self.quantile}, strength={self.strength}; expected numbers from 0 to 1")

    def reader(self, num_layers: int) -> Reader | None:
        contrast = super().reader(num_layers)
        assert isinstance(contrast, ContrastReader)
        return ReviewReader(contrast, np.float32(self.quantile), np.float32(self.strength))

    def second(self, first: First) -> Second:
        one_image(first.inputs, self.name)
        layers = first.num_layers
        layer = min(round(REVIEW_SHARE * layers), layers - 1) if self.layer is None else self.layer
        edits = review_mask(layer, first.prompts.findings["weights"])
        edits.check(layers)
        maps = first.maps(first.on_patches(to_host(first.prompts.findings["contrast"])))
        return Second(edits=edits, again=self.again, maps=maps)
