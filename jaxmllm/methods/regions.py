"""From maps over patches to parts of the picture: boxes, windows and masks, all in pixels of the original image."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image
from scipy import ndimage

from jaxmllm.errors import InputError
from jaxmllm.models.boxes import TokenBoxes

Edge = float | int
Box = tuple[Edge, Edge, Edge, Edge]  # left, top, right, bottom in pixels

# Sides of the windows that are tried, as shares of the base side. Source: ViCrop, ``bbox_from_att_image_adaptive``.
RATIOS = (1, 1.2, 1.4, 1.6, 1.8, 2)


@dataclasses.dataclass(frozen=True)
class ImageMap:
    """A map over what a model saw of one image, for ``jaxmllm.report.figures.overlay``.

    Attributes:
      values ``[N]``: one a patch (or image token), in the order of ``tokens``.
      tokens: the pixel box of each.
    """

    values: Float[np.ndarray, " N"]
    tokens: TokenBoxes


@dataclasses.dataclass(frozen=True)
class PatchMap:
    """A map over a grid of patches.

    Attributes:
      values ``[rows, columns]``.
      xs ``[columns + 1]``, ys ``[rows + 1]``: edges of the patches in pixels of the original image.
    """

    values: Float[np.ndarray, "rows columns"]
    xs: Float[np.ndarray, " x"]
    ys: Float[np.ndarray, " y"]

    @property
    def box(self) -> Box:
        """What the patches cover together."""
        return float(self.xs[0]), float(self.ys[0]), float(self.xs[-1]), float(self.ys[-1])


def as_patch_map(image_map: ImageMap) -> PatchMap:
    """A map on the grid of its patches.

    Rows and columns of patches that saw padding alone are left out. Where a model sees an image as a whole and again in
    tiles (LLaVA-NeXT), the grid is that of the whole, and what a tile's patch has is spread evenly over its box.

    Raises:
      InputError: the tokens have no grid: they saw the whole image each.
    """
    tokens, values = image_map.tokens, np.asarray(image_map.values, float)
    first_view = tokens.boxes[tokens.tile == 0]
    tiled = bool((tokens.tile != 0).any())
    rows, columns = (round(len(first_view) ** 0.5),) * 2 if tiled else tokens.grid
    if tiled and rows * columns != len(first_view):
        first_view = first_view[1:]  # a class token stands before the patches
    boxes = first_view[-rows * columns :].reshape(rows, columns, 4)
    xs, ys = np.append(boxes[0, :, 0], boxes[0, -1, 2]), np.append(boxes[:, 0, 1], boxes[-1, 0, 3])
    same = rows * columns > 1 and (boxes == boxes[0, 0]).all()
    if same or not (xs[-1] > xs[0] and ys[-1] > ys[0]):
        raise InputError("the image tokens have no places of their own in the image; a map over patches is needed")
    in_order = values[-rows * columns :].reshape(rows, columns)
    return _without_padding(_spread(values, tokens.boxes, xs, ys) if tiled else in_order, xs, ys)


def _spread(values: np.ndarray, boxes: np.ndarray, xs: np.ndarray, ys: np.ndarray) -> Float[np.ndarray, "rows columns"]:
    """The mass of boxes on the cells of a grid; a box without area has none."""
    across = np.minimum(boxes[:, 2:3], xs[1:]) - np.maximum(boxes[:, 0:1], xs[:-1])
    down = np.minimum(boxes[:, 3:4], ys[1:]) - np.maximum(boxes[:, 1:2], ys[:-1])
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    density = np.where(areas > 0, values / np.where(areas > 0, areas, 1.0), 0.0)
    return np.einsum("n,ny,nx->yx", density, np.maximum(down, 0.0), np.maximum(across, 0.0))


def _without_padding(values: np.ndarray, xs: np.ndarray, ys: np.ndarray) -> PatchMap:
    columns, rows = np.flatnonzero(np.diff(xs) > 0), np.flatnonzero(np.diff(ys) > 0)
    return PatchMap(values[np.ix_(rows, columns)], np.append(xs[columns], xs[-1]), np.append(ys[rows], ys[-1]))


def kept_patches(patches: PatchMap, threshold: Edge, connected: bool = False) -> Bool[np.ndarray, "rows columns"]:
    """Patches of at least ``threshold`` times the highest value; all of them where nothing is positive.

    With ``connected``, only those that hang together (by sides) with the highest one, the first of equals.
    """
    highest = patches.values.max()
    if highest <= 0:
        return np.ones(patches.values.shape, bool)
    kept = patches.values >= threshold * highest
    if not connected:
        return kept
    regions, _ = ndimage.label(kept)
    return regions == regions.flat[np.argmax(patches.values)]


def box_around(patches: PatchMap, kept: Bool[np.ndarray, "rows columns"], margin: Edge = 0.0) -> Box:
    """The smallest box around the kept patches, widened on every side by ``margin`` patches."""
    rows, columns = np.flatnonzero(kept.any(axis=1)), np.flatnonzero(kept.any(axis=0))
    wide, high = np.diff(patches.xs).mean() * margin, np.diff(patches.ys).mean() * margin
    return (
        float(patches.xs[columns[0]] - wide),
        float(patches.ys[rows[0]] - high),
        float(patches.xs[columns[-1] + 1] + wide),
        float(patches.ys[rows[-1] + 1] + high),
    )


def squared(box: Box, image_size: tuple[int, int], smallest: Edge = 0.0) -> Box:
    """A square box with the same centre where there is room, else moved into the image; as large as fits at most.

    Args:
      box: what it should hold.
      image_size: width and height.
      smallest: its side at least, in pixels.
    """
    side = min(max(box[2] - box[0], box[3] - box[1], smallest), *image_size)
    corner = [
        min(max((low + high - side) / 2, 0.0), whole - side)
        for low, high, whole in ((box[0], box[2], image_size[0]), (box[1], box[3], image_size[1]))
    ]
    return corner[0], corner[1], corner[0] + side, corner[1] + side


def inside(box: Box, image_size: tuple[int, int]) -> tuple[int, int, int, int]:
    """A box in whole pixels within the image, at least one pixel wide and high."""
    left, top, right, bottom = (round(edge) for edge in box)
    left, top = min(max(left, 0), image_size[0] - 1), min(max(top, 0), image_size[1] - 1)
    return left, top, max(min(right, image_size[0]), left + 1), max(min(bottom, image_size[1]), top + 1)


def blacked_out(image: Image.Image, patches: PatchMap, kept: Bool[np.ndarray, "rows columns"]) -> Image.Image:
    """The image with everything but the kept patches in black."""
    pixels = np.zeros((image.height, image.width, 3), np.uint8)
    source = np.asarray(image.convert("RGB"))
    xs, ys = np.rint(patches.xs).astype(int), np.rint(patches.ys).astype(int)
    for row, column in np.argwhere(kept):
        here = slice(ys[row], ys[row + 1]), slice(xs[column], xs[column + 1])
        pixels[here] = source[here]
    return Image.fromarray(pixels)


def enlarged(image: Image.Image, scale: Edge) -> Image.Image:
    """An image so many times as wide and high."""
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)


def search_window(values: Float[np.ndarray, "rows columns"], image_size: tuple[Edge, Edge], base: Edge) -> Box:
    """The window whose attention stands out most from that of its neighbours.

    Windows of several sizes slide over the map, a cell at a time. Of each size the one with the largest sum counts (the
    first of equals, x outermost), less the mean of the up to four windows beside it, per cell; the best size wins.
    The box is that size in pixels around the window's centre, moved into the image.

    Args:
      values: a map that covers the whole image.
      image_size: width and height in pixels.
      base: side of the smallest window in pixels.

    Source: saccharomycetes/mllms_know@a64c5d5, ``bbox_from_att_image_adaptive``, whose rounding is kept.
    """
    rows, columns = values.shape
    cell = image_size[0] / columns, image_size[1] / rows
    best: tuple[float, float, int, int, int, int] | None = None
    for ratio in RATIOS:
        wide, high = min(int(base * ratio / cell[0]), columns), min(int(base * ratio / cell[1]), rows)
        if wide >= columns and high >= rows:
            if ratio == 1:
                return 0.0, 0.0, float(image_size[0]), float(image_size[1])
            continue
        if not wide or not high:
            continue
        sums = np.lib.stride_tricks.sliding_window_view(values, (high, wide)).sum(axis=(2, 3))
        x, y = divmod(int(np.argmax(sums.T)), sums.shape[0])
        beside = [
            sums[row, column]
            for row, column in ((y, x - 1), (y, x + 1), (y - 1, x), (y + 1, x))
            if 0 <= row < sums.shape[0] and 0 <= column < sums.shape[1]
        ]
        sharpness = (sums[y, x] - float(np.mean(beside))) / (wide * high)
        if best is None or sharpness > best[0]:
            best = (sharpness, ratio, x, y, wide, high)
    if best is None:
        raise InputError(f"a window of {base:g} pixels is smaller than a cell of the map ({cell[0]:g} x {cell[1]:g})")
    _, ratio, x, y, wide, high = best
    half = base * ratio // 2
    edges: list[tuple[Edge, Edge]] = []
    for place, count, size, whole in ((x, wide, cell[0], image_size[0]), (y, high, cell[1], image_size[1])):
        centre: Edge = int(place * size + size * count / 2)
        centre = min(half if centre < half else centre, whole - half) if whole - half >= half else whole - half
        edges.append((max(0.0, centre - half), min(float(whole), centre + half)))
    (left, right), (top, bottom) = edges
    return left, top, right, bottom


def within(box: Box, part: Sequence[Edge]) -> Box:
    """A box that was found in a part of the image, in the image."""
    return box[0] + part[0], box[1] + part[1], box[2] + part[0], box[3] + part[1]
