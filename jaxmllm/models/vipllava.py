"""ViP-LLaVA: LLaVA that reads several vision layers, with a norm before its projector.

Source: Cai et al., "Making Large Multimodal Models Understand Arbitrary Visual Prompts" (arXiv 2312.00784);
transformers' ``VipLlavaForConditionalGeneration`` is the reference for names and numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from jaxtyping import Array, Float

from jaxmllm.models.config import ConfigReader
from jaxmllm.models.layers import Builder
from jaxmllm.models.llava import IMAGE_INPUTS, Llava, LlavaConfig, pack_images, read_shared, token_boxes

__all__ = ["IMAGE_INPUTS", "VipLlava", "VipLlavaConfig", "pack_images", "read_config", "token_boxes"]

# transformers' VipLlavaConfig
DEFAULT_LAYERS = [-2, -5, -8, -11, 6]


@dataclasses.dataclass(frozen=True)
class VipLlavaConfig(LlavaConfig):
    """A ViP-LLaVA checkpoint; the class token is never kept, and the projector always has biases.

    Attributes:
      projector_norm_eps: of the norm before the projector.
    """

    model_type: ClassVar[str] = "vipllava"

    projector_norm_eps: float = 1e-5


def read_config(fields: Mapping[str, Any]) -> VipLlavaConfig:
    """Reads the ``config.json`` of a ``VipLlavaForConditionalGeneration``.

    Raises:
      ConfigError: naming every field that is neither handled nor at its default.
    """
    fields = dict(fields)
    if fields.get("vision_feature_layers") is not None:  # the field's name in old files
        fields["vision_feature_layer"] = fields.pop("vision_feature_layers")
    reader = ConfigReader(fields, "config.json")
    reader.choice("model_type", "vipllava", ("vipllava",))
    config = VipLlavaConfig(
        **read_shared(reader, DEFAULT_LAYERS),
        projector_norm_eps=float(reader.take("projector_layernorm_eps", 1e-5, (int, float))),
    )
    reader.finish()
    return config


class VipLlava(Llava):
    """LLaVA with a layer norm over the features that the projector reads."""

    def __init__(self, config: VipLlavaConfig, build: Builder):
        super().__init__(config, build)
        width = config.vision.hidden_size * len(config.feature_layers)
        self.projector_norm = build.layer_norm(width, config.projector_norm_eps)

    def connect(self, features: Float[Array, "I N F"]) -> Float[Array, "I N D"]:
        """The connector: from vision features to the decoder's width."""
        return self.projector(self.projector_norm(features))
