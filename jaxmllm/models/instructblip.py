"""InstructBLIP with Vicuna: EVA ViT-g, a Q-Former that also reads the instruction, one linear map, a LLaMA decoder.

The image tokens depend on the question, so the question as the Q-Former reads it is part of an image's content here:
two questions about one picture are two images.

Source: Dai et al., "InstructBLIP" (arXiv 2305.06500); transformers' ``InstructBlipForConditionalGeneration`` is the
reference for names and numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxmllm.errors import ConfigError, InputError
from jaxmllm.models.boxes import TokenBoxes, square_boxes
from jaxmllm.models.config import ConfigReader
from jaxmllm.models.decoder import Decoder
from jaxmllm.models.eva import EvaConfig, EvaTower, read_eva
from jaxmllm.models.images import TEXT_BUCKETS, Images, Room, bucket_of, read_array, read_square_pixels
from jaxmllm.models.layers import Builder
from jaxmllm.models.qformer import QFormer, QFormerConfig, read_qformer
from jaxmllm.models.text_config import DecoderConfig, read_text

IMAGE_INPUTS = ("pixel_values", "qformer_input_ids", "qformer_attention_mask")
READS_QUESTION = True


@dataclasses.dataclass(frozen=True)
class InstructBlipConfig:
    """An InstructBLIP checkpoint with a Vicuna decoder."""

    model_type: ClassVar[str] = "instructblip"

    vision: EvaConfig
    qformer: QFormerConfig
    text: DecoderConfig
    image_token_id: int
    num_query_tokens: int = 32

    @property
    def tokens_per_image(self) -> int:
        return self.num_query_tokens


def read_config(fields: Mapping[str, Any]) -> InstructBlipConfig:
    """Reads the ``config.json`` of an ``InstructBlipForConditionalGeneration``.

    Raises:
      ConfigError: naming every field that is neither handled nor at its default; a Flan-T5 checkpoint; a file that
        names no placeholder.
    """
    reader = ConfigReader(fields, "config.json")
    reader.choice("model_type", "instructblip", ("instructblip",))
    text = _read_decoder(reader)
    vision = read_eva(reader.take("vision_config", {}, dict), "config.json: vision_config")
    qformer_fields = reader.take("qformer_config", {}, dict)
    config = InstructBlipConfig(
        vision=vision,
        qformer=read_qformer(qformer_fields, "config.json: qformer_config", vision.hidden_size),
        text=text,
        image_token_id=_read_placeholder(reader, text),
        num_query_tokens=reader.positive("num_query_tokens", 32),
    )
    reader.finish()
    return config


def _read_decoder(reader: ConfigReader) -> DecoderConfig:
    fields = reader.take("text_config", {}, dict)
    if fields.get("model_type") == "t5" or not reader.take("use_decoder_only_language_model", True, bool):
        raise ConfigError(
            f"config.json: text_config: model_type is {fields.get('model_type')!r}, an encoder-decoder; jaxmllm "
            "implements InstructBLIP with a decoder alone ('llama', the Vicuna checkpoints), not with Flan-T5"
        )
    reader.take("tie_word_embeddings", None, bool)  # transformers heeds the text config's alone
    # a text config without a type would be built as OPT
    return read_text(fields, "config.json: text_config", None, kinds=("llama",), default_kind="opt")


RESIZE = (
    "The placeholder is '<image>', which InstructBlipProcessor adds as the tokenizer's last token, and the embedding "
    "needs a row for it. In transformers: model.resize_token_embeddings(len(processor.tokenizer), "
    "pad_to_multiple_of=64); model.config.image_token_index = len(processor.tokenizer) - 1; save the model again."
)


def _read_placeholder(reader: ConfigReader, text: DecoderConfig) -> int:
    index = reader.take("image_token_index", None, int)
    token = reader.take("image_token_id", index, int)
    if token is None:
        raise ConfigError(
            "config.json: field 'image_token_index' is missing, as in files older than transformers 4.46, whose image "
            f"features had no placeholders. {RESIZE}"
        )
    if not 0 <= token < text.vocab_size:
        raise ConfigError(
            f"config.json: image_token_index={token} is outside the vocabulary of {text.vocab_size}. {RESIZE}"
        )
    return token


def pack_images(config: InstructBlipConfig, inputs: Mapping[str, Any], room: Room) -> Images | None:
    """Images with the instruction that each is read by.

    Where ``room`` rounds up, instructions are padded on the right to one of ``TEXT_BUCKETS``.

    Raises:
      InputError: arrays of the wrong shape, ids outside the Q-Former's vocabulary, or not one instruction an image.
    """
    vision = config.vision
    pixels = read_square_pixels(inputs, (vision.num_channels, vision.image_size, vision.image_size))
    ids = read_array(inputs, "qformer_input_ids", 2, "(images, instruction)")
    many, rows = (0 if array is None else array.shape[0] for array in (pixels, ids))
    if rows != many:
        raise InputError(
            f"qformer_input_ids hold {rows} instruction(s), pixel_values {many} image(s); the Q-Former reads one "
            "instruction an image: repeat a prompt's for each of its images, and leave out those of prompts without"
        )
    if pixels is None:
        return None
    mask = _read_mask(inputs, ids)
    _check_ids(config.qformer, ids)
    length = ids.shape[1]
    if room(1) != 1:
        length = min(bucket_of(length, TEXT_BUCKETS), config.qformer.max_positions)
    arrays = {
        "pixel_values": pixels,
        "qformer_input_ids": _pad(ids, length),
        "qformer_attention_mask": _pad(mask, length),
    }
    return Images(arrays, np.full(many, config.num_query_tokens, np.int32), config.num_query_tokens)


def _read_mask(inputs: Mapping[str, Any], ids: Any) -> Any:
    mask = read_array(inputs, "qformer_attention_mask", 2, "(images, instruction)")
    if mask is None:
        return np.ones(ids.shape, bool)
    if mask.shape != ids.shape:
        raise InputError(f"qformer_attention_mask has shape {mask.shape}; qformer_input_ids have shape {ids.shape}")
    return mask != 0


def _check_ids(config: QFormerConfig, ids: Any) -> None:
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise InputError(f"qformer_input_ids are of type {ids.dtype}; expected whole numbers")
    if ids.shape[1] > config.max_positions:
        raise InputError(
            f"qformer_input_ids have shape {ids.shape}; the Q-Former has {config.max_positions} positions. "
            "Shorten the question."
        )
    if isinstance(ids, jax.core.Tracer) or not ids.size:
        return
    low, high = int(np.asarray(ids).min()), int(np.asarray(ids).max())
    if low < 0 or high >= config.vocab_size:
        raise InputError(
            f"qformer_input_ids run from {low} to {high}; the Q-Former's vocabulary has {config.vocab_size} entries"
        )


def _pad(array: Any, length: int) -> Any:
    pad = jnp.pad if isinstance(array, jax.Array) else np.pad
    kind = array.dtype if array.dtype == bool else np.int32
    return pad(array.astype(kind), ((0, 0), (0, length - array.shape[1])))


def patch_boxes(config: InstructBlipConfig, processor: Any, image_size: tuple[int, int]) -> TokenBoxes:
    """The vision tower's patches, as ``InstructBlip.looks`` numbers them."""
    vision = config.vision
    boxes = square_boxes(processor, vision.image_size, vision.patch_size, image_size)
    return TokenBoxes(boxes, (vision.grid, vision.grid), image_size)


def token_boxes(config: InstructBlipConfig, processor: Any, image_size: tuple[int, int]) -> TokenBoxes:
    """Every query token saw the whole view; they have no places, so their grid is one row."""
    patches = patch_boxes(config, processor, image_size).boxes
    whole = np.array([*patches[0, :2], *patches[-1, 2:]])
    return TokenBoxes(np.tile(whole, (config.num_query_tokens, 1)), (1, config.num_query_tokens), image_size)


class InstructBlip(nnx.Module):
    """Vision tower, Q-Former, projection and decoder."""

    def __init__(self, config: InstructBlipConfig, build: Builder):
        self.config = config
        self.vision = EvaTower(config.vision, build)
        self.qformer = QFormer(config.qformer, config.num_query_tokens, build)
        self.projection = build.linear(config.qformer.hidden_size, config.text.hidden_size)
        self.decoder = Decoder(config.text, build)

    def encode_images(
        self, arrays: dict[str, Array], nudge: Float[Array, "C I H N T"] | None = None
    ) -> Float[Array, "I N D"]:
        """Image tokens as the decoder receives them, one a query token; ``nudge`` as ``QFormer`` takes it."""
        return self.connect(self.vision(arrays["pixel_values"]), arrays, nudge)

    def connect(
        self, features: Float[Array, "I T F"], arrays: dict[str, Array], nudge: Float[Array, "C I H N T"] | None = None
    ) -> Float[Array, "I N D"]:
        """The connector: Q-Former and projection."""
        words = arrays["qformer_input_ids"], arrays["qformer_attention_mask"]
        return self.projection(self.qformer(features, *words, nudge))

    def looks(self, arrays: dict[str, Array], nth: int | None = None) -> Float[Array, "I N P"]:
        """How much each query token looked at each patch; what is missing to 1 went to the class token.

        Args:
          arrays: of the images.
          nth: one of the cross-attentions, counted from the first; by default their mean.
        """
        weights = self.cross_weights(arrays)[..., 1:]
        return weights.mean(axis=(0, 2)) if nth is None else weights[nth].mean(axis=1)

    def cross_weights(self, arrays: dict[str, Array]) -> Float[Array, "C I H N T"]:
        """Weights of every cross-attention; the first of T is the class token."""
        states = self.vision(arrays["pixel_values"])
        return self.qformer.cross_weights(states, arrays["qformer_input_ids"], arrays["qformer_attention_mask"])
