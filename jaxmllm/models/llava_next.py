"""LLaVA-NeXT (LLaVA-1.6): LLaVA over the whole image and over tiles of it at a higher resolution.

An image is fitted into the best of a few resolutions and cut into tiles. Its tokens are those of the whole image, then
those of the tiles row by row over all of them, without what is padding, each row ended by a newline token. Which
tokens these are follows from the image's size alone, so that it is one gather by an index made on the host.

Source: Liu et al., "LLaVA-NeXT" (https://llava-vl.github.io/blog/2024-01-30-llava-next); transformers'
``LlavaNextForConditionalGeneration`` is the reference for names and numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxmllm.errors import ConfigError, InputError
from jaxmllm.models.anyres import Size, Tiling, best_resolution, fitted_size, tiling
from jaxmllm.models.boxes import Axis, TokenBoxes, grid_boxes, resize_and_crop
from jaxmllm.models.config import ConfigReader
from jaxmllm.models.images import Images, Room, pad_rows, read_array, read_known
from jaxmllm.models.layers import Builder
from jaxmllm.models.llava import Llava, LlavaBase, read_shared

IMAGE_INPUTS = ("pixel_values", "image_sizes")
TOKENS_VARY = True

# transformers' LlavaNextConfig
DEFAULT_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


@dataclasses.dataclass(frozen=True)
class LlavaNextConfig(LlavaBase):
    """A LLaVA-NeXT checkpoint.

    Attributes:
      pinpoints: the resolutions (height, width) in pixels that images are fitted to.
      backbone: the decoder's ``model_type``, on which the prompt of checkpoints without a chat template depends.
    """

    model_type: ClassVar[str] = "llava_next"

    pinpoints: tuple[Size, ...] = tuple((height, width) for height, width in DEFAULT_PINPOINTS)
    backbone: str = "llama"

    def tiling(self, size: Size) -> Tiling:
        """How an image of (height, width) pixels is tiled."""
        return tiling(size, best_resolution(size, self.pinpoints), self.vision.image_size, self.vision.grid)

    @property
    def most_tiles(self) -> int:
        """Pictures that the vision tower gets of an image at the most."""
        return 1 + max(height * width for height, width in self.pinpoints) // self.vision.image_size**2


def read_config(fields: Mapping[str, Any]) -> LlavaNextConfig:
    """Reads the ``config.json`` of a ``LlavaNextForConditionalGeneration``.

    Raises:
      ConfigError: naming every field that is neither handled nor at its default.
    """
    reader = ConfigReader(fields, "config.json")
    reader.choice("model_type", "llava_next", ("llava_next",))
    reader.take("use_image_newline_parameter", True, bool)  # transformers always has the newline
    if reader.choice("vision_feature_select_strategy", "default", ("default", "full")) == "full":
        raise ConfigError(
            "config.json: field 'vision_feature_select_strategy' is 'full', which keeps the class token of every tile; "
            "tiles with one more token than patches form no grid, in transformers either; expected 'default'"
        )
    shared = read_shared(reader, -2)
    config = LlavaNextConfig(
        **shared,
        projector_bias=reader.take("multimodal_projector_bias", True, bool),
        pinpoints=_read_pinpoints(reader, shared["vision"].image_size),
        backbone=reader.take("text_config", {}).get("model_type") or "llama",
    )
    reader.finish()
    return config


def _read_pinpoints(reader: ConfigReader, side: int) -> tuple[Size, ...]:
    pinpoints = reader.take("image_grid_pinpoints", DEFAULT_PINPOINTS, list)

    def fits(pinpoint: Any) -> bool:
        pair = isinstance(pinpoint, (list, tuple)) and len(pinpoint) == 2
        return pair and all(type(length) is int and length > 0 and length % side == 0 for length in pinpoint)

    wrong = [pinpoint for pinpoint in pinpoints if not fits(pinpoint)]
    if wrong or not pinpoints:
        raise ConfigError(
            f"config.json: field 'image_grid_pinpoints' holds {wrong[0] if wrong else 'nothing'!r}; expected pairs "
            f"(height, width) of multiples of the vision tower's image_size={side}"
        )
    return tuple((height, width) for height, width in pinpoints)


def pack_images(config: LlavaNextConfig, inputs: Mapping[str, Any], room: Room) -> Images | None:
    """The pictures of each image, ``[I, T, C, Y, X]``, and which of their patches its tokens are, ``order [I, N]``.

    Where ``room`` rounds up, T is the most that an image can have, else the most that one of these has.

    Args:
      config: the family's config.
      inputs: ``pixel_values``, the pictures of each image stacked and padded, or those of all images one after another
        without padding; ``image_sizes`` ``[I, 2]``, (height, width) of the original images.
      room: what sizes are padded to.

    Raises:
      InputError: arrays that do not fit each other or the model; traced ``image_sizes``.
    """
    axes = "(images, tiles, channels, height, width) or (tiles of all images, channels, height, width)"
    pixels = read_array(inputs, "pixel_values", (4, 5), axes)
    if pixels is None or not pixels.shape[0]:
        return None
    sizes = read_known(inputs, "image_sizes", 2, "(images, 2)")
    if sizes is None:
        raise InputError("inputs hold pixel_values but no image_sizes, on which the order of the tokens depends")
    if sizes.shape[1] != 2 or not (sizes > 0).all():
        raise InputError(f"image_sizes are {sizes.tolist()}; expected (height, width) in pixels for each image")
    tilings = [config.tiling((int(height), int(width))) for height, width in sizes]
    counts = np.array([each.num_tiles for each in tilings])
    vision = config.vision
    wanted = (vision.num_channels, vision.image_size, vision.image_size)
    if tuple(pixels.shape[-3:]) != wanted:
        raise InputError(
            f"pixel_values have shape {tuple(pixels.shape)}; the model takes tiles of {', '.join(map(str, wanted))}"
        )
    if pixels.ndim == 5:
        fits = pixels.shape[0] == len(sizes) and pixels.shape[1] >= max(counts)
        starts = np.arange(len(sizes)) * pixels.shape[1]
    else:
        fits, starts = pixels.shape[0] == counts.sum(), np.cumsum(counts) - counts
    if not fits:
        raise InputError(
            f"pixel_values have shape {tuple(pixels.shape)}; images of {sizes.tolist()} (height, width) have "
            f"{counts.tolist()} tiles, the whole image counted"
        )
    tiles = max(counts) if room(1) == 1 else config.most_tiles
    orders = [each.order.astype(np.int32) for each in tilings]
    tokens = room(max(map(len, orders)))
    return Images(
        {"pixel_values": _stack(pixels, starts, counts, int(tiles)), "order": pad_rows(orders, tokens)},
        np.array([len(order) for order in orders], np.int32),
        tokens,
    )


def _stack(pixels: Any, starts: np.ndarray, counts: np.ndarray, tiles: int) -> Any:
    """Pictures ``[I, tiles, C, Y, X]``, zero past an image's own."""
    xp = jnp if isinstance(pixels, jax.Array) else np
    flat = pixels.reshape(-1, *pixels.shape[-3:])
    slot = np.arange(tiles)
    chosen = flat[np.minimum(starts[:, None] + slot, len(flat) - 1)]
    return xp.where((slot < counts[:, None])[..., None, None, None], chosen, xp.zeros((), pixels.dtype))


def token_boxes(config: LlavaNextConfig, processor: Any, image_size: tuple[int, int]) -> TokenBoxes:
    """The patches of the whole image resized to a square, then those of its tiles; newlines have no box.

    Follows transformers' image processor: the image is scaled to fit into the best resolution, padded on both sides,
    cut into tiles, and every picture then resized and cropped as any other.

    Raises:
      InputError: the processor's pictures are not what the model takes.
    """
    width, height = image_size
    resolution = best_resolution((height, width), config.pinpoints)
    theirs = best_resolution((height, width), [(one, other) for one, other in processor.image_grid_pinpoints])
    if resolution != theirs:
        raise InputError(
            f"the image processor fits a {width} x {height} image into {theirs} (height, width) and the model into "
            f"{resolution}; image_grid_pinpoints must be the same in both configs"
        )
    size, crop = processor.size, processor.crop_size
    whole = (size.get("height") or size["shortest_edge"], size.get("width") or size["shortest_edge"])
    side = crop.get("height") if crop else None
    side = side or whole[0]
    if side != config.vision.image_size:
        raise InputError(
            f"the image processor cuts tiles of {side} pixels, and the vision tower takes {config.vision.image_size}; "
            "crop_size must be the tower's image_size"
        )
    across, down = Axis(float(width)), Axis(float(height))
    across.resize(whole[1])
    down.resize(whole[0])
    pictures = [_picture(config, processor, across, down, image_size)]
    fitted = fitted_size((height, width), resolution)
    for top in range(0, resolution[0], side):
        for left in range(0, resolution[1], side):
            across, down = Axis(float(width)), Axis(float(height))
            for axis, inner, outer, start in (
                (across, fitted[1], resolution[1], left),
                (down, fitted[0], resolution[0], top),
            ):
                axis.resize(inner)
                axis.pad(outer, (outer - inner) // 2)
                axis.cut(start, side)
            pictures.append(_picture(config, processor, across, down, image_size))
    layout = config.tiling((height, width))
    order = layout.order
    boxes = np.concatenate([np.zeros((1, 4)), *pictures])[order]
    return TokenBoxes(boxes, (layout.kept[0], layout.kept[1] + 1), image_size, (order - 1) // config.vision.num_patches)


def _picture(
    config: LlavaNextConfig, processor: Any, across: Axis, down: Axis, image_size: tuple[int, int]
) -> Float[np.ndarray, "n 4"]:
    """Boxes of the patches of one picture, which is resized and cropped first."""
    resize_and_crop(processor, across, down)
    side = config.vision.image_size
    if (round(down.size), round(across.size)) != (side, side):
        raise InputError(
            f"the image processor makes tiles of {across.size:g} x {down.size:g} pixels; the vision tower takes "
            f"{side} x {side}"
        )
    edges = np.arange(config.vision.grid + 1) * config.vision.patch_size
    return grid_boxes(across, down, edges, edges, image_size)


class LlavaNext(Llava):
    """LLaVA with an embedding that ends the rows of the tiles."""

    def __init__(self, config: LlavaNextConfig, build: Builder):
        super().__init__(config, build)
        self.newline = build.normal(config.text.hidden_size)

    def encode_images(self, arrays: dict[str, Array]) -> Float[Array, "I N D"]:
        """Image tokens as the decoder receives them; those past an image's own number are newlines."""
        pixels = arrays["pixel_values"]
        images, tiles = pixels.shape[:2]
        connected = self.connect(self.vision_features(pixels.reshape(images * tiles, *pixels.shape[2:])))
        return self.arrange(connected.reshape(images, -1, connected.shape[-1]), arrays["order"])

    def arrange(self, connected: Float[Array, "I P D"], order: Int[Array, "I N"]) -> Float[Array, "I N D"]:
        """Patches of all pictures of an image, and newlines, in the order of its tokens."""
        newline = jnp.broadcast_to(self.newline[...].astype(connected.dtype), (len(connected), 1, connected.shape[-1]))
        rows = jnp.concatenate([newline, connected], axis=1)
        return jnp.take_along_axis(rows, order[..., None], axis=1)
