"""Procedural scenes: a few coloured shapes and handwritten digits on a textured background.

A `Scene` is a description in unit coordinates: x runs from 0 at the left edge of the image to 1 at the right edge, y
from 0 at the top to 1 at the bottom, and a box is (x0, y0, x1, y1). `render` draws the same scene at any size.
Everything random comes from the `numpy.random.Generator` a caller passes in, so a seed fixes the scene, and the scene
alone fixes its pixels. The questions asked of a scene are in `jaxmllm.data.scene_questions`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from jaxmllm.data.digits import BITMAP_SIDE, DigitBitmaps
from jaxmllm.errors import InputError

Box = tuple[float, float, float, float]
Colour = tuple[float, float, float]
_Reals = NDArray[np.floating[Any]]

COLOURS: dict[str, Colour] = {
    "red": (0.90, 0.10, 0.12),
    "green": (0.10, 0.68, 0.16),
    "blue": (0.12, 0.28, 0.96),
    "yellow": (0.97, 0.90, 0.12),
    "purple": (0.62, 0.16, 0.80),
    "cyan": (0.12, 0.84, 0.90),
    "orange": (0.99, 0.50, 0.06),
    "white": (0.96, 0.96, 0.96),
}
"""RGB of every colour name, components from 0 to 1, before the jitter of the single object."""

SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star", "cross", "ring")
DIGITS: tuple[str, ...] = tuple("0123456789")
KINDS: tuple[str, ...] = SHAPES + DIGITS
COLOUR_NAMES: tuple[str, ...] = tuple(COLOURS)

MAX_OBJECTS = 7
DIGIT_SHARE = 0.45

# Layout lengths are stated in pixels of an 84-pixel image, the size the defaults are made for.
REFERENCE_SIZE = 84
_LARGEST_SIDE = 28 / REFERENCE_SIZE
_SMALLEST_SIDE = 14 / REFERENCE_SIZE
_SMALLEST_DIGIT_SIDE = 18 / REFERENCE_SIZE  # below this, closed loops of an 8 or a 6 fill up
_GAP = 1.5 / REFERENCE_SIZE
_PLACES_TRIED = 32

# A thinner box than this can slip through every patch of a coarse grid; a narrow 1 is widened to it.
_SMALLEST_ASPECT = 0.4
_STROKE_LEVEL = 0.42


@dataclass(frozen=True)
class Glyph:
    """How a digit is written.

    `bitmap` is the 8x8 ink row by row, `rotation` in radians (clockwise on screen), `shear` the x shift per unit of y,
    `level` the ink above which a stroke is opaque (lower is bolder). `ink` is the tight box of the opaque ink after
    rotation and shear, in bitmap pixels from the bitmap's centre.
    """

    bitmap: tuple[float, ...]
    ink: Box
    rotation: float
    shear: float
    level: float


@dataclass(frozen=True)
class SceneObject:
    """One object: its `kind` (a shape word or a digit), `colour` name, tight `box` in unit coordinates.

    `rgb` is the jittered colour it is drawn in. A digit also has its `glyph` and `digit_index`, its place in the
    `DigitBitmaps` it was drawn from; both are None for a shape.
    """

    kind: str
    colour: str
    box: Box
    rgb: Colour
    digit_index: int | None = None
    glyph: Glyph | None = None

    @property
    def is_digit(self) -> bool:
        return self.glyph is not None

    @property
    def centre(self) -> tuple[float, float]:
        """The (x, y) centre of the box in unit coordinates."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclass(frozen=True)
class Scene:
    """Objects whose boxes do not overlap, on a background of base colour `tint` with the texture of `texture_seed`."""

    objects: tuple[SceneObject, ...]
    tint: Colour
    texture_seed: int


def scale_box(box: Box, size: int) -> Box:
    """A unit box in pixels of a `size` by `size` image (not rounded)."""
    return box[0] * size, box[1] * size, box[2] * size, box[3] * size


def sample_scene(
    rng: np.random.Generator,
    digits: DigitBitmaps,
    objects: tuple[int, int] = (2, 5),
    augment: bool = False,
    scale: float = 1.0,
) -> Scene:
    """Draw a scene with between objects[0] and objects[1] objects, both inclusive, at most `MAX_OBJECTS`.

    With `augment` the digits are rotated, sheared and written bolder or finer at random, as a guard against learning
    the few bitmaps by heart. `scale` makes all objects smaller, as a share of their usual size. Raises InputError for
    an impossible range, or a scale that is not above 0 and at most 1.
    """
    if not 0 < scale <= 1:
        raise InputError(f"scale must be above 0 and at most 1, got {scale}")
    fewest, most = objects
    if not 1 <= fewest <= most <= MAX_OBJECTS:
        raise InputError(f"objects must satisfy 1 <= fewest <= most <= {MAX_OBJECTS}, got {objects}")
    count = int(rng.integers(fewest, most + 1))
    kinds: list[str] = []
    glyphs: list[tuple[int, Glyph] | None] = []
    extents = np.ones((count, 2))  # width and height as a fraction of the longer side
    for position in range(count):
        if rng.random() < DIGIT_SHARE:
            label = int(rng.integers(10))
            index, glyph = _sample_glyph(rng, digits, label, augment)
            aspect = max(_SMALLEST_ASPECT, (glyph.ink[2] - glyph.ink[0]) / (glyph.ink[3] - glyph.ink[1]))
            extents[position] = min(1.0, aspect), min(1.0, 1 / aspect)
            kinds.append(DIGITS[label])
            glyphs.append((index, glyph))
        else:
            kinds.append(SHAPES[int(rng.integers(len(SHAPES)))])
            glyphs.append(None)
    smallest = np.array([_SMALLEST_SIDE if glyph is None else _SMALLEST_DIGIT_SIDE for glyph in glyphs])
    boxes = _place(rng, extents, scale * smallest, scale * _LARGEST_SIDE)
    made = []
    for kind, drawn, box in zip(kinds, glyphs, boxes, strict=True):
        colour = COLOUR_NAMES[int(rng.integers(len(COLOUR_NAMES)))]
        jittered = np.clip(np.array(COLOURS[colour]) * rng.uniform(0.9, 1.0) + rng.uniform(-0.03, 0.03, 3), 0, 1)
        red, green, blue = jittered.tolist()
        index_or_none, glyph_or_none = (None, None) if drawn is None else drawn
        made.append(SceneObject(kind, colour, box, (red, green, blue), index_or_none, glyph_or_none))
    # Darker than every object colour and nearly grey, so that no tint can be mistaken for an object.
    red, green, blue = (rng.uniform(0.14, 0.38) + rng.uniform(-0.04, 0.04, 3)).tolist()
    return Scene(tuple(made), (red, green, blue), int(rng.integers(2**31)))


def _place(rng: np.random.Generator, extents: _Reals, smallest: _Reals, largest: float) -> list[Box]:
    """Boxes of random size and place, a gap apart; `extents` [n, 2] is width and height per unit of the longer side."""
    count = len(extents)
    sides = rng.uniform(smallest, largest)
    while True:
        sizes = extents * sides[:, None]
        placed = np.empty((count, 4))
        done: list[int] = []
        for item in np.argsort(-sides):  # the largest first: they fit only while there is room
            low = rng.uniform(_GAP, 1 - _GAP - sizes[item], (_PLACES_TRIED, 2))
            high = low + sizes[item]
            others = placed[done]
            apart = (low[:, None] >= others[None, :, 2:] + _GAP) | (high[:, None] + _GAP <= others[None, :, :2])
            free = np.flatnonzero(apart.any(axis=-1).all(axis=-1))
            if not free.size:
                break
            placed[item] = np.concatenate([low[free[0]], high[free[0]]])
            done.append(int(item))
        if len(done) == count:
            return [(x0, y0, x1, y1) for x0, y0, x1, y1 in placed.tolist()]
        # Too crowded: MAX_OBJECTS of the smallest size fill less than a third of the image, so shrinking ends.
        sides = np.maximum(smallest, 0.9 * sides)


def _sample_glyph(rng: np.random.Generator, digits: DigitBitmaps, label: int, augment: bool) -> tuple[int, Glyph]:
    indices = np.flatnonzero(digits.labels == label)
    index = int(indices[rng.integers(len(indices))])
    rotation, shear, level = 0.0, 0.0, _STROKE_LEVEL
    if augment:
        # Small enough that no digit turns into another one.
        rotation, shear = float(rng.uniform(-0.2, 0.2)), float(rng.uniform(-0.2, 0.2))
        level = float(rng.uniform(0.35, 0.5))
    bitmap = digits.images[index]
    level *= float(bitmap.max())
    samples, half_side = 4, 6.5  # per bitmap pixel; the bitmap's corners stay within 6 pixels of its centre
    side = int(2 * half_side * samples)
    field = _write(bitmap, rotation, shear, (-half_side, -half_side), 1 / samples, 1 / samples, side, side)
    x0, x1 = (edge / samples - half_side for edge in _extent(field.max(axis=0), level))
    y0, y1 = (edge / samples - half_side for edge in _extent(field.max(axis=1), level))
    return index, Glyph(tuple(bitmap.ravel().tolist()), (x0, y0, x1, y1), rotation, shear, level)


def _extent(profile: NDArray[np.float32], level: float) -> tuple[float, float]:
    """Where a profile first and last crosses the level, between samples, which lie at 0.5, 1.5, ..."""
    above = np.flatnonzero(profile >= level)
    first, last = int(above[0]), int(above[-1])
    rise = (profile[first] - level) / (profile[first] - profile[first - 1])
    fall = (profile[last] - level) / (profile[last] - profile[last + 1])
    return first + 0.5 - float(rise), last + 0.5 + float(fall)


def _write(
    bitmap: NDArray[np.float32],
    rotation: float,
    shear: float,
    origin: tuple[float, float],
    step_x: float,
    step_y: float,
    width: int,
    height: int,
) -> NDArray[np.float32]:
    """Ink [height, width] of a rotated and sheared bitmap, on a grid that starts at `origin` with the given steps.

    Origin and steps are in bitmap pixels, the origin counted from the bitmap's centre.
    """
    border = 2  # a margin without ink, so that strokes at the rim of the bitmap end smoothly
    padded = np.zeros((BITMAP_SIDE + 2 * border, BITMAP_SIDE + 2 * border), dtype=np.float32)
    padded[border:-border, border:-border] = bitmap
    cosine, sine = math.cos(rotation), math.sin(rotation)
    # From the page back to the bitmap: undo the shear, then the rotation.
    xx, xy = cosine, sine - cosine * shear
    yx, yy = -sine, cosine + sine * shear
    middle = border + BITMAP_SIDE / 2
    transform = (
        xx * step_x,
        xy * step_y,
        xx * origin[0] + xy * origin[1] + middle,
        yx * step_x,
        yy * step_y,
        yx * origin[0] + yy * origin[1] + middle,
    )
    image = Image.fromarray(padded)
    drawn = image.transform((width, height), Image.Transform.AFFINE, transform, Image.Resampling.BICUBIC)
    return np.asarray(drawn, dtype=np.float32)


def render(scene: Scene, size: int = REFERENCE_SIZE) -> NDArray[np.uint8]:
    """Draw the scene as RGB [size, size, 3]. The same scene and size always give the same pixels.

    Raises InputError for a size below 16, where nothing of an object would be left.
    """
    if size < 16:
        raise InputError(f"size must be at least 16, got {size}")
    generator = np.random.default_rng(scene.texture_seed)
    # Mostly light and dark, with a little colour: strong tints would pass for objects.
    clouds = (generator.random((7, 7, 1)) - 0.5) * 0.14 + (generator.random((7, 7, 3)) - 0.5) * 0.06 + scene.tint
    grain = generator.random((REFERENCE_SIZE, REFERENCE_SIZE), dtype=np.float32) - 0.5
    smooth = _interpolation(7, size)
    columns = (smooth @ clouds.astype(np.float32).reshape(7, 21)).reshape(size, 7, 3)
    image = smooth @ columns
    for item in scene.objects:
        x0, y0, x1, y1 = scale_box(item.box, size)
        left, top, right, bottom = math.floor(x0), math.floor(y0), math.ceil(x1), math.ceil(y1)
        alpha = _coverage(item, (x0, y0, x1, y1), left, top, right - left, bottom - top)
        window = image[top:bottom, left:right]
        window += alpha[:, :, None] * (np.array(item.rgb, dtype=np.float32) - window)
    if size != REFERENCE_SIZE:
        spread = _interpolation(REFERENCE_SIZE, size)
        grain = spread @ grain @ spread.T
    image += grain[:, :, None] * 0.03
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def _interpolation(points: int, size: int) -> NDArray[np.float32]:
    """Linear interpolation [size, points] from cells to pixels, both spread evenly over the image's side."""
    place = np.clip((np.arange(size) + 0.5) * points / size - 0.5, 0, points - 1)
    return np.maximum(0, 1 - np.abs(place[:, None] - np.arange(points))).astype(np.float32)


def _coverage(item: SceneObject, box: Box, left: int, top: int, width: int, height: int) -> _Reals:
    """Opacity [height, width] of an object with pixel box `box` in the window of pixels that starts at left, top."""
    x0, y0, x1, y1 = box
    if item.glyph is not None:
        ink_x0, ink_y0, ink_x1, ink_y1 = item.glyph.ink
        step_x, step_y = (ink_x1 - ink_x0) / (x1 - x0), (ink_y1 - ink_y0) / (y1 - y0)
        origin = ink_x0 + (left - x0) * step_x, ink_y0 + (top - y0) * step_y
        bitmap = np.array(item.glyph.bitmap, dtype=np.float32).reshape(BITMAP_SIDE, BITMAP_SIDE)
        field = _write(bitmap, item.glyph.rotation, item.glyph.shear, origin, step_x, step_y, width, height)
        # The slope turns the soft edge of the upscaled ink into one about a pixel wide.
        return np.clip(0.5 + (field - item.glyph.level) * 1.3 / math.sqrt(step_x * step_y), 0, 1)
    half = (x1 - x0) / 2
    across = ((np.arange(left, left + width, dtype=np.float32) + 0.5 - x0) / half - 1)[None, :]
    down = ((np.arange(top, top + height, dtype=np.float32) + 0.5 - y0) / half - 1)[:, None]
    # A distance of half a pixel on either side of the outline runs from full to no coverage.
    return np.clip(0.5 - _distance(item.kind, across, down) * half, 0, 1)


def _distance(kind: str, x: _Reals, y: _Reals) -> _Reals:
    """Signed distance to the outline of a shape that fills the square from -1 to 1, negative inside; y points down."""
    if kind == "circle":
        return np.hypot(x, y) - 1
    if kind == "ring":
        return np.abs(np.hypot(x, y) - 0.76) - 0.24
    if kind == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 1
    if kind == "triangle":
        return np.maximum(y - 1, (2 * np.abs(x) - 1 - y) / math.sqrt(5))
    if kind == "cross":
        arm = 0.34
        return np.minimum(
            np.maximum(np.abs(x) - 1, np.abs(y) - arm),
            np.maximum(np.abs(x) - arm, np.abs(y) - 1),
        )
    if kind == "star":
        # A five-pointed star is where at most one of five half planes is left; it is 1.902 wide and 1.809 high for
        # a radius of 1, stretched here to the square.
        angles = np.arange(5) * 2 * math.pi / 5
        x, y = x * math.sin(2 * math.pi / 5), y * (1 + math.cos(math.pi / 5)) / 2 - (1 - math.cos(math.pi / 5)) / 2
        planes = [x * math.sin(angle) - y * math.cos(angle) for angle in angles]
        return np.sort(np.stack(planes), axis=0)[3] - np.float32(math.cos(2 * math.pi / 5))
    raise ValueError(f"unknown shape {kind!r}")


@dataclass(frozen=True, eq=False)
class PatchTargets:
    """What lies in each patch of a grid, all [grid, grid], first index the row.

    `colour` 0 for background, else 1 + the place in `COLOUR_NAMES`; `kind` 0 for background, else 1 + the place in
    `KINDS`; `centre` 1 where the patch holds the centre of any object, else 0; `column` and `row` the patch that
    holds the centre of the patch's object, -1 for background; `covered` bool, False for background.
    """

    colour: NDArray[np.int64]
    kind: NDArray[np.int64]
    centre: NDArray[np.int64]
    column: NDArray[np.int64]
    row: NDArray[np.int64]
    covered: NDArray[np.bool_]


def patch_targets(scene: Scene, grid: int = 7) -> PatchTargets:
    """Label each patch of a `grid` by `grid` division with the object whose box covers most of it.

    Where no box covers at least 15% of the patch it is background. Raises InputError for a grid below 1.
    """
    if grid < 1:
        raise InputError(f"grid must be at least 1, got {grid}")
    boxes = np.array([item.box for item in scene.objects]) * grid
    edges = np.arange(grid)
    shared_x = np.clip(np.minimum(boxes[:, 2:3], edges + 1) - np.maximum(boxes[:, 0:1], edges), 0, None)
    shared_y = np.clip(np.minimum(boxes[:, 3:4], edges + 1) - np.maximum(boxes[:, 1:2], edges), 0, None)
    shared = shared_y[:, :, None] * shared_x[:, None, :]
    covered = shared.max(axis=0) >= 0.15
    owner = shared.argmax(axis=0)
    colours = np.array([1 + COLOUR_NAMES.index(item.colour) for item in scene.objects])
    kinds = np.array([1 + KINDS.index(item.kind) for item in scene.objects])
    columns = ((boxes[:, 0] + boxes[:, 2]) / 2).astype(np.int64)
    rows = ((boxes[:, 1] + boxes[:, 3]) / 2).astype(np.int64)
    centre = np.zeros((grid, grid), dtype=np.int64)
    centre[rows, columns] = 1
    return PatchTargets(
        colour=np.where(covered, colours[owner], 0),
        kind=np.where(covered, kinds[owner], 0),
        centre=centre,
        column=np.where(covered, columns[owner], -1),
        row=np.where(covered, rows[owner], -1),
        covered=covered,
    )
