"""LLaVA-1.5: CLIP ViT, a two-layer projector, a LLaMA decoder.

Source: Liu et al., "Improved Baselines with Visual Instruction Tuning" (arXiv 2310.03744);
transformers' ``LlavaForConditionalGeneration`` is the reference for names and numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxmllm.errors import ConfigError
from jaxmllm.models.boxes import TokenBoxes, square_boxes
from jaxmllm.models.config import ACTIVATIONS, ConfigReader, VisionConfig, read_clip_vision
from jaxmllm.models.decoder import Decoder
from jaxmllm.models.images import Images, Room, read_square_pixels
from jaxmllm.models.layers import Builder, Mlp
from jaxmllm.models.text_config import DecoderConfig, read_text
from jaxmllm.models.vision import VisionTower

IMAGE_INPUTS = ("pixel_values",)

# transformers' LlavaConfig builds this tower where a file has no vision_config at all.
DEFAULT_VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}


@dataclasses.dataclass(frozen=True)
class LlavaBase:
    """What the configs of all LLaVA families hold.

    Attributes:
      feature_layers: vision hidden states that are read (0 is the embedding), concatenated along the width.
      keep_class_token: whether the class token is one of the image tokens.
    """

    vision: VisionConfig
    text: DecoderConfig
    image_token_id: int = 32_000
    feature_layers: tuple[int, ...] = (23,)
    keep_class_token: bool = False
    projector_act: str = "gelu"
    projector_bias: bool = True

    @property
    def vision_depth(self) -> int:
        """Vision layers that are needed to reach the deepest feature layer."""
        return max(self.feature_layers)


@dataclasses.dataclass(frozen=True)
class LlavaConfig(LlavaBase):
    """A LLaVA-1.5 checkpoint."""

    model_type: ClassVar[str] = "llava"

    @property
    def tokens_per_image(self) -> int:
        return self.vision.num_patches + self.keep_class_token


def read_config(fields: Mapping[str, Any]) -> LlavaConfig:
    """Reads the ``config.json`` of a ``LlavaForConditionalGeneration``.

    Raises:
      ConfigError: naming every field that is neither handled nor at its default.
    """
    reader = ConfigReader(fields, "config.json")
    reader.choice("model_type", "llava", ("llava",))
    config = LlavaConfig(
        **read_shared(reader, -2, text_ties=True),
        keep_class_token=reader.choice("vision_feature_select_strategy", "default", ("default", "full")) == "full",
        projector_bias=reader.take("multimodal_projector_bias", True, bool),
    )
    reader.finish()
    return config


def read_shared(reader: ConfigReader, default_layers: int | list[int], text_ties: bool = False) -> dict[str, Any]:
    """The fields that the configs of all LLaVA families have, by their names in ``LlavaBase``.

    Args:
      reader: of the whole config.
      default_layers: ``vision_feature_layer`` where the file does not give it.
      text_ties: whether the text config can turn on ``tie_word_embeddings``, as with LLaVA-1.5 alone.
    """
    vision_fields = reader.take("vision_config", None, dict)
    vision = read_clip_vision(
        vision_fields or {}, "config.json: vision_config", DEFAULT_VISION if vision_fields is None else {}
    )
    text_fields = reader.take("text_config", {}, dict)
    tied = reader.take("tie_word_embeddings", False, bool)
    text = read_text(text_fields, "config.json: text_config", tied)
    if not text_ties:
        text = dataclasses.replace(text, tie_word_embeddings=tied)
    reader.take("image_seq_length", None)  # transformers counts the features instead of reading it
    reader.take("vocab_size", None)  # of old files; the text config's is the one that shapes tensors
    image_token_id = reader.take("image_token_index", None, int)
    image_token_id = reader.take("image_token_id", 32_000 if image_token_id is None else image_token_id, int)
    if not 0 <= image_token_id < text.vocab_size:
        raise ConfigError(
            f"config.json: image_token_index={image_token_id} is outside the vocabulary of {text.vocab_size}"
        )
    layers = reader.take("vision_feature_layer", default_layers, (int, list))
    layers = layers if isinstance(layers, list) else [layers]
    if not layers or any(type(layer) is not int for layer in layers):
        raise ConfigError(f"config.json: field 'vision_feature_layer' is {layers!r}; expected whole numbers")
    return {
        "vision": vision,
        "text": text,
        "image_token_id": image_token_id,
        "feature_layers": tuple(_feature_layer(layer, vision.num_layers) for layer in layers),
        "projector_act": reader.choice("projector_hidden_act", "gelu", ACTIVATIONS),
    }


def _feature_layer(layer: int, num_layers: int) -> int:
    """Index into the num_layers + 1 hidden states, counted from the front."""
    index = layer + num_layers + 1 if layer < 0 else layer
    if not 1 <= index <= num_layers:
        raise ConfigError(
            f"config.json: vision_feature_layer {layer} is not an output of the {num_layers} vision layers"
        )
    return index


def pack_images(config: LlavaConfig, inputs: Mapping[str, Any], room: Room) -> Images | None:
    """Images as they are; each takes ``tokens_per_image`` tokens."""
    vision = config.vision
    pixels = read_square_pixels(inputs, (vision.num_channels, vision.image_size, vision.image_size))
    if pixels is None:
        return None
    tokens = config.tokens_per_image
    return Images({"pixel_values": pixels}, np.full(len(pixels), tokens, np.int32), tokens)


def token_boxes(config: LlavaConfig, processor: Any, image_size: tuple[int, int]) -> TokenBoxes:
    """The patches of the one square view; a class token, where it is kept, comes first and saw all of them."""
    vision = config.vision
    boxes = square_boxes(processor, vision.image_size, vision.patch_size, image_size)
    if config.keep_class_token:
        boxes = np.concatenate([[[*boxes[0, :2], *boxes[-1, 2:]]], boxes])
    return TokenBoxes(boxes, (vision.grid, vision.grid), image_size)


class Llava(nnx.Module):
    """Vision tower, projector and decoder."""

    def __init__(self, config: LlavaBase, build: Builder):
        self.config = config
        self.vision = VisionTower(config.vision, config.feature_layers, build)
        width = config.vision.hidden_size * len(config.feature_layers)
        sizes = (width, config.text.hidden_size, config.text.hidden_size)
        self.projector = Mlp(sizes, config.projector_act, build, config.projector_bias)
        self.decoder = Decoder(config.text, build)

    def vision_features(self, pixel_values: Float[Array, "I C Y X"]) -> Float[Array, "I N F"]:
        """What the projector reads: the feature layers' hidden states, the class token only if the config keeps it."""
        features = self.vision(pixel_values)
        return features if self.config.keep_class_token else features[:, 1:]

    def connect(self, features: Float[Array, "I N F"]) -> Float[Array, "I N D"]:
        """The connector: from vision features to the decoder's width."""
        return self.projector(features)

    def encode_images(self, arrays: dict[str, Array]) -> Float[Array, "I N D"]:
        """Image tokens as the decoder receives them."""
        return self.connect(self.vision_features(arrays["pixel_values"]))
