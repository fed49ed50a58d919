"""The model families: one line each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import numpy as np
from flax import nnx

from jaxmllm.errors import ConfigError
from jaxmllm.models import instructblip, llava, llava_next, qwen2_5_vl, qwen2_vl, vipllava
from jaxmllm.models.boxes import TokenBoxes
from jaxmllm.models.images import Images, Room
from jaxmllm.models.layers import Builder


@dataclasses.dataclass(frozen=True)
class Family:
    """What the library needs to know of a family; all of it stands in the family's file under these names.

    Attributes:
      read_config: ``config.json`` as a dict -> the family's frozen config, whose ``model_type`` is the family's name.
      module: makes the family's NNX module from its config.
      image_inputs: names of the processor's arrays that describe images (``IMAGE_INPUTS``).
      pack_images: config, a processor's arrays, room -> ``Images``, or ``None`` where there are none. Sizes that differ
        between images are padded to what ``room`` makes of them.
      token_boxes: config, image processor, (width, height) -> what each image token saw of an image of this size.
      tokens_vary: whether images take unlike numbers of tokens (``TOKENS_VARY``).
      positions: config, ids ``[B, S]``, valid ``[B, S]``, images -> rotary positions ``[B, S, 3]``; ``None`` where
        positions count the tokens.
      patch_boxes: as ``token_boxes``, of the patches that image tokens look at by cross-attention; ``None`` where there
        is none. Such a family's module has ``looks(arrays)``, how much each image token looked at each patch
        ``[I, N, P]``.
      reads_question: whether image tokens depend on the text of the prompt (``READS_QUESTION``).
      pixels: name of the array of ``Images`` that holds normalised pixels (``PIXELS``).
    """

    read_config: Callable[[Mapping[str, Any]], Any]
    module: Callable[[Any, Builder], nnx.Module]
    image_inputs: tuple[str, ...]
    pack_images: Callable[[Any, Mapping[str, Any], Room], Images | None]
    token_boxes: Callable[[Any, Any, tuple[int, int]], TokenBoxes]
    tokens_vary: bool = False
    positions: Callable[[Any, np.ndarray, np.ndarray, Images], np.ndarray] | None = None
    patch_boxes: Callable[[Any, Any, tuple[int, int]], TokenBoxes] | None = None
    reads_question: bool = False
    pixels: str = "pixel_values"


def _family(file: ModuleType, module: Callable[[Any, Builder], nnx.Module]) -> Family:
    return Family(
        read_config=file.read_config,
        module=module,
        image_inputs=file.IMAGE_INPUTS,
        pack_images=file.pack_images,
        token_boxes=file.token_boxes,
        tokens_vary=getattr(file, "TOKENS_VARY", False),
        positions=getattr(file, "positions", None),
        patch_boxes=getattr(file, "patch_boxes", None),
        reads_question=getattr(file, "READS_QUESTION", False),
        pixels=getattr(file, "PIXELS", "pixel_values"),
    )


FAMILIES: dict[str, Family] = {
    "instructblip": _family(instructblip, instructblip.InstructBlip),
    "llava": _family(llava, llava.Llava),
    "llava_next": _family(llava_next, llava_next.LlavaNext),
    "qwen2_5_vl": _family(qwen2_5_vl, qwen2_5_vl.QwenVL),
    "qwen2_vl": _family(qwen2_vl, qwen2_vl.QwenVL),
    "vipllava": _family(vipllava, vipllava.VipLlava),
}


def family_named(name: str) -> Family:
    """The family of a config that was read."""
    return FAMILIES[name]


def family_of(fields: Mapping[str, Any]) -> Family:
    """The family that a ``config.json`` names by its ``model_type``.

    Raises:
      ConfigError: no such field, or a family that is not implemented.
    """
    name = fields.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ConfigError(
            f"config.json: model_type is {name!r}; jaxmllm implements {', '.join(sorted(FAMILIES))}. "
            "Other families need a port first (docs/adding-a-model.md)."
        )
    return FAMILIES[name]
