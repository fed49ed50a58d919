"""Qwen2-VL: a vision tower for images of any size, a merger, a Qwen2 decoder with multimodal rotary positions.

Source: Wang et al., "Qwen2-VL" (arXiv 2409.12191); transformers' ``Qwen2VLForConditionalGeneration`` is the reference
for names and numbers. Videos are not supported.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxmllm.errors import ConfigError, InputError
from jaxmllm.models.boxes import Axis, TokenBoxes, grid_boxes
from jaxmllm.models.config import ConfigReader
from jaxmllm.models.decoder import Decoder
from jaxmllm.models.images import Images, Room, read_array, read_known
from jaxmllm.models.layers import Builder
from jaxmllm.models.qwen_vision import QwenVisionConfig, QwenVisionTower, lay_out, read_vision_2
from jaxmllm.models.text_config import DecoderConfig, read_text

IMAGE_INPUTS = ("pixel_values", "image_grid_thw")
TOKENS_VARY = True
PIXELS = "patches"

# The ids of special tokens; files of transformers 4.5x repeat them in the text config, where nothing reads them.
SPECIAL_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "vision_token_id")

# Text fields that such files also leave at the top level, beside the text_config that counts.
_LEFT_OVER = """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act
    max_position_embeddings rms_norm_eps use_sliding_window sliding_window max_window_layers layer_types
    rope_theta rope_scaling rope_parameters
"""
# All that may stand at the top level beside a text_config.
OUTER = frozenset(
    ("model_type", "vision_config", "text_config", "tie_word_embeddings", *SPECIAL_IDS, *_LEFT_OVER.split())
)

# Longest side over shortest side that transformers' image processor takes.
MAX_ASPECT_RATIO = 200


@dataclasses.dataclass(frozen=True)
class QwenVLConfig:
    """A Qwen2-VL or Qwen2.5-VL checkpoint.

    Attributes:
      video_token_id: placeholder of videos, which are refused.
    """

    model_type: str
    vision: QwenVisionConfig
    text: DecoderConfig
    image_token_id: int = 151_655
    video_token_id: int = 151_656


def read_config(fields: Mapping[str, Any]) -> QwenVLConfig:
    """Reads the ``config.json`` of a ``Qwen2VLForConditionalGeneration``.

    Raises:
      ConfigError: naming every field that is neither handled nor at its default.
    """
    return read_qwen(fields, "qwen2_vl", read_vision_2)


def read_qwen(
    fields: Mapping[str, Any], model_type: str, read_vision: Callable[[ConfigReader], QwenVisionConfig]
) -> QwenVLConfig:
    """Reads a config whose text fields stand in ``text_config`` or, in the hub's files, at the top level."""
    reader = ConfigReader(fields, "config.json")
    reader.choice("model_type", model_type, (model_type,))
    vision = read_vision(ConfigReader(reader.take("vision_config", {}, dict), "config.json: vision_config"))
    tied = reader.take("tie_word_embeddings", None, bool)
    image = reader.take("image_token_id", 151_655, int)
    video = reader.take("video_token_id", 151_656, int)
    text_fields = reader.take("text_config", None, dict)
    if text_fields is None:
        where = "config.json"
        not_text = {"model_type", "vision_config", "text_config", *SPECIAL_IDS}
        text_fields = {name: value for name, value in fields.items() if name not in not_text}
    else:
        ConfigReader({name: value for name, value in fields.items() if name not in OUTER}, "config.json").finish()
        where = "config.json: text_config"
        text_fields = {name: value for name, value in text_fields.items() if name not in SPECIAL_IDS}
    kind = f"{model_type}_text"
    text = read_text(text_fields, where, tied, kinds=(kind,), default_kind=kind)
    if text.head_dim * text.num_heads != text.hidden_size:
        raise ConfigError(
            f"{where}: head_dim={text.head_dim} is not hidden_size={text.hidden_size} over "
            f"num_attention_heads={text.num_heads}"
        )
    if vision.out_size != text.hidden_size:
        raise ConfigError(
            f"config.json: the vision tower makes tokens of width {vision.out_size}; the decoder takes "
            f"{text.hidden_size}"
        )
    if not 0 <= image < text.vocab_size:
        raise ConfigError(f"config.json: image_token_id={image} is outside the vocabulary of {text.vocab_size}")
    return QwenVLConfig(model_type, vision, text, image, video)


def pack_images(config: QwenVLConfig, inputs: Mapping[str, Any], room: Room) -> Images | None:
    """Every image's patches on their own, padded to one size; an image takes a token for ``merge**2`` patches.

    Raises:
      InputError: grids that do not fit the patches or the model; a video.
    """
    _refuse_videos(config, inputs)
    pixels = read_array(inputs, "pixel_values", 2, "(patches, values of a patch)")
    grids = read_known(inputs, "image_grid_thw", 2, "(images, 3)")
    if (pixels is None) != (grids is None):
        given, missing = IMAGE_INPUTS if grids is None else IMAGE_INPUTS[::-1]
        raise InputError(f"inputs hold {given} without {missing}; give both, as the processor returns them")
    if pixels is None or (len(grids) == 0 and len(pixels) == 0):
        return None
    vision = config.vision
    _check_grids(vision, pixels.shape, grids)
    grids = grids[:, 1:].astype(np.int64) // vision.merge
    layout = lay_out(vision, grids, room)
    arrays = {
        "patches": pixels[layout.index] * layout.real[..., None],
        "places": layout.places,
        "real": layout.real,
        "grid": grids.astype(np.int32),
    }
    if layout.order is not None:
        arrays["order"] = layout.order
    return Images(arrays, grids.prod(axis=1).astype(np.int32), layout.tokens)


def _refuse_videos(config: QwenVLConfig, inputs: Mapping[str, Any]) -> None:
    ids = inputs.get("input_ids")
    if ids is None or isinstance(ids, jax.core.Tracer):
        return
    videos = int((np.asarray(ids) == config.video_token_id).sum())
    if videos:
        raise InputError(
            f"input_ids hold {videos} video placeholders (id {config.video_token_id}); videos are not supported, give "
            "frames as images"
        )


def _check_grids(vision: QwenVisionConfig, shape: tuple[int, ...], grids: np.ndarray) -> None:
    if grids.shape[1] != 3:
        raise InputError(f"image_grid_thw has shape {grids.shape}; expected (images, 3)")
    for number, (frames, rows, columns) in enumerate(grids.tolist()):
        grid = f"image_grid_thw[{number}] is {[frames, rows, columns]}"
        if frames != 1:
            raise InputError(f"{grid}; expected 1 frame, videos are not supported")
        if min(rows, columns) <= 0 or rows % vision.merge or columns % vision.merge:
            raise InputError(f"{grid}; expected rows and columns above zero that are multiples of {vision.merge}")
    patches = int(grids.prod(axis=1).sum())
    if shape != (patches, vision.patch_values):
        raise InputError(
            f"pixel_values have shape {shape}; image_grid_thw asks for {patches} patches and the vision tower for "
            f"{vision.patch_values} values of each"
        )


def positions(
    config: QwenVLConfig, ids: Int[np.ndarray, "B S"], valid: Bool[np.ndarray, "B S"], images: Images
) -> Int[np.ndarray, "B S 3"]:
    """Rotary positions (time, height, width): text counts on; image tokens add row and column to the image's start.

    The text after an image goes on from where its longer side ends. Padding is passed over, and has position 0. Images
    that follow one another without text between are told apart by their grids.

    Source: transformers' ``get_rope_index``.
    """
    grids, counts = np.asarray(images.arrays["grid"]), np.asarray(images.counts)
    placeholder = ids == config.image_token_id
    number = np.cumsum(placeholder.ravel()).reshape(ids.shape) - 1
    ends = np.cumsum(counts)
    image = np.minimum(np.searchsorted(ends, number, side="right"), len(counts) - 1)
    row, column = np.divmod(number - (ends - counts)[image], grids[image, 1])
    visible = placeholder & valid
    # What follows an image starts past its longer side, whose step is therefore taken at its last token.
    step = (valid & ~placeholder).astype(np.int64)
    where = np.flatnonzero(visible)
    group = (np.arange(len(ids))[:, None] * len(counts) + image).ravel()[where]
    last = where[np.append(group[1:] != group[:-1], True)] if len(where) else where
    step.ravel()[last] = grids[image.ravel()[last]].max(axis=1)
    start = np.cumsum(step, axis=1) - step
    offsets = np.stack([np.zeros_like(row), row, column], axis=-1)
    return (start[..., None] + offsets * visible[..., None]) * valid[..., None]


def smart_resize(width: int, height: int, factor: int, fewest: int, most: int) -> tuple[int, int]:
    """Width and height that transformers' image processor gives an image: multiples of ``factor``, pixels in bounds.

    Args:
      width, height: of the image in pixels.
      factor: pixels along one side of an image token.
      fewest, most: bounds of the number of pixels.

    Raises:
      InputError: sides too unlike.
    """
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise InputError(
            f"an image of {width} x {height} pixels has sides too unlike; the image processor takes up to "
            f"{MAX_ASPECT_RATIO} to 1"
        )
    sides = [round(side / factor) * factor for side in (width, height)]
    if sides[0] * sides[1] > most:
        shrink = math.sqrt(height * width / most)
        sides = [max(factor, math.floor(side / shrink / factor) * factor) for side in (width, height)]
    elif sides[0] * sides[1] < fewest:
        grow = math.sqrt(fewest / (height * width))
        sides = [math.ceil(side * grow / factor) * factor for side in (width, height)]
    return sides[0], sides[1]


def token_boxes(config: QwenVLConfig, processor: Any, image_size: tuple[int, int]) -> TokenBoxes:
    """Squares of ``merge`` by ``merge`` patches, row by row, of the image as it was resized."""
    vision = config.vision
    if (processor.patch_size, processor.merge_size) != (vision.patch_size, vision.merge):
        raise InputError(
            f"the image processor makes patches of {processor.patch_size} pixels and merges {processor.merge_size}; "
            f"the vision tower takes {vision.patch_size} and {vision.merge}"
        )
    unit = vision.patch_size * vision.merge
    across, down = Axis(float(image_size[0])), Axis(float(image_size[1]))
    if processor.do_resize:
        bounds = int(processor.size["shortest_edge"]), int(processor.size["longest_edge"])
        for axis, side in zip((across, down), smart_resize(*image_size, unit, *bounds), strict=True):
            axis.resize(side)
    elif image_size[0] % unit or image_size[1] % unit:
        raise InputError(
            f"the image processor does not resize, and {image_size[0]} x {image_size[1]} pixels are no multiples of "
            f"{unit}"
        )
    grid = int(down.size) // unit, int(across.size) // unit
    ys, xs = (np.arange(many + 1) * unit for many in grid)
    return TokenBoxes(grid_boxes(across, down, xs, ys, image_size), grid, image_size)


class QwenVL(nnx.Module):
    """Vision tower with its merger, and decoder: Qwen2-VL or, by its config, Qwen2.5-VL."""

    def __init__(self, config: QwenVLConfig, build: Builder):
        self.config = config
        self.vision = QwenVisionTower(config.vision, build)
        self.decoder = Decoder(config.text, build)

    def encode_images(self, arrays: dict[str, Array]) -> Float[Array, "I N D"]:
        """Image tokens as the decoder receives them."""
        return self.vision(arrays)
