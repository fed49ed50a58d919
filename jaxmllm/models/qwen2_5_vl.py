"""Qwen2.5-VL: as Qwen2-VL, but for a vision tower whose layers attend within windows.

Source: Bai et al., "Qwen2.5-VL" (arXiv 2502.13923); transformers' ``Qwen2_5_VLForConditionalGeneration`` is the
reference for names and numbers. Videos are not supported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxmllm.models.qwen2_vl import (
    IMAGE_INPUTS,
    PIXELS,
    TOKENS_VARY,
    QwenVL,
    QwenVLConfig,
    pack_images,
    positions,
    read_qwen,
    token_boxes,
)
from jaxmllm.models.qwen_vision import read_vision_2_5

__all__ = ["IMAGE_INPUTS", "PIXELS", "TOKENS_VARY", "QwenVL", "pack_images", "positions", "read_config", "token_boxes"]


def read_config(fields: Mapping[str, Any]) -> QwenVLConfig:
    """Reads the ``config.json`` of a ``Qwen2_5_VLForConditionalGeneration``.

    Raises:
      ConfigError: naming every field that is neither handled nor at its default.
    """
    return read_qwen(fields, "qwen2_5_vl", read_vision_2_5)
