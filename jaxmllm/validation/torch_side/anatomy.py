"""Where things are in transformers' modules, for all families alike. A family is one entry of ``FAMILIES``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from jaxmllm.errors import ConfigError

# What of a batch no reference reads: an answer's tokens and where they stand.
NOT_FOR_THE_MODEL = ("answer_ids", "answer_positions")


@dataclasses.dataclass(frozen=True)
class Parts:
    """Names of the parts of a transformer layer."""

    attention_norm: str
    attention: str
    mlp_norm: str
    mlp: str


DECODER_PARTS = Parts("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
CLIP_PARTS = Parts("layer_norm1", "self_attn", "layer_norm2", "mlp")
QWEN_PARTS = Parts("norm1", "attn", "norm2", "mlp")


@dataclasses.dataclass(frozen=True)
class Anatomy:
    """The modules of a multimodal LLM.

    Attributes:
      model_type: as in config.json.
      decoder: has ``embed_tokens``, ``layers``, ``norm`` and ``rotary_emb``.
      head: turns the decoder's output into logits.
      vision: the tower.
      vision_embedding: modules that, one after another, turn pixels into what enters block 0.
      blocks: of the tower, all of them.
      used_blocks: so many of them, from the first, does the connector's input depend on.
      block_parts: names of a block's parts.
      vision_rotary: gives the blocks their rotary tables; ``None`` where they have none.
      vision_norm: gives what the connector reads; ``None`` where it reads the blocks' outputs.
      connector: projector, merger or projection.
      qformer: has ``embeddings`` and ``encoder.layer``; ``None`` in other families.
      image_arguments: the arrays of a batch that ``get_image_features`` reads.
    """

    model_type: str
    decoder: Any
    head: nn.Module
    vision: Any
    vision_embedding: tuple[nn.Module, ...]
    blocks: list[nn.Module]
    used_blocks: int
    block_parts: Parts
    vision_rotary: nn.Module | None
    vision_norm: nn.Module | None
    connector: nn.Module
    qformer: Any
    image_arguments: tuple[str, ...]

    @property
    def layers(self) -> list[Any]:
        """The decoder's layers."""
        return list(self.decoder.layers)

    @property
    def rotary(self) -> Any:
        """Gives the decoder's layers their rotary tables."""
        return self.decoder.rotary_emb

    @property
    def qformer_layers(self) -> list[Any]:
        """The Q-Former's layers; none in families without one."""
        return [] if self.qformer is None else list(self.qformer.encoder.layer)


def find(model: Any) -> Anatomy:
    """The modules of a model.

    Args:
      model: one of transformers' ``*ForConditionalGeneration``.

    Raises:
      ConfigError: it is of no supported family.
    """
    model_type = model.config.model_type
    if model_type not in FAMILIES:
        raise ConfigError(f"model_type is {model_type!r}; expected one of {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type](model)


def _llava(model: Any, image_arguments: tuple[str, ...] = ("pixel_values",)) -> Anatomy:
    inner, tower = model.model, model.model.vision_tower
    blocks = list(tower.encoder.layers)
    chosen = model.config.vision_feature_layer
    # hidden state 0 is the input of block 0
    states = [index % (len(blocks) + 1) for index in ([chosen] if isinstance(chosen, int) else chosen)]
    return Anatomy(
        model_type=model.config.model_type,
        decoder=inner.language_model,
        head=model.lm_head,
        vision=tower,
        vision_embedding=(tower.embeddings, tower.pre_layrnorm),
        blocks=blocks,
        used_blocks=max(states),
        block_parts=CLIP_PARTS,
        vision_rotary=None,
        vision_norm=None,
        connector=inner.multi_modal_projector,
        qformer=None,
        image_arguments=image_arguments,
    )


def _llava_next(model: Any) -> Anatomy:
    return _llava(model, ("pixel_values", "image_sizes"))


def _instructblip(model: Any) -> Anatomy:
    tower = model.vision_model
    blocks = list(tower.encoder.layers)
    return Anatomy(
        model_type=model.config.model_type,
        decoder=model.language_model.model,
        head=model.language_model.lm_head,
        vision=tower,
        vision_embedding=(tower.embeddings,),
        blocks=blocks,
        used_blocks=len(blocks),
        block_parts=CLIP_PARTS,
        vision_rotary=None,
        vision_norm=tower.post_layernorm,
        connector=model.language_projection,
        qformer=model.qformer,
        image_arguments=("pixel_values", "qformer_input_ids", "qformer_attention_mask"),
    )


def _qwen(model: Any) -> Anatomy:
    tower = model.model.visual
    blocks = list(tower.blocks)
    return Anatomy(
        model_type=model.config.model_type,
        decoder=model.model.language_model,
        head=model.lm_head,
        vision=tower,
        vision_embedding=(tower.patch_embed,),
        blocks=blocks,
        used_blocks=len(blocks),
        block_parts=QWEN_PARTS,
        vision_rotary=tower.rotary_pos_emb,
        vision_norm=None,
        connector=tower.merger,
        qformer=None,
        image_arguments=("pixel_values", "image_grid_thw"),
    )


FAMILIES: dict[str, Callable[[Any], Anatomy]] = {
    "llava": _llava,
    "vipllava": _llava,
    "llava_next": _llava_next,
    "instructblip": _instructblip,
    "qwen2_vl": _qwen,
    "qwen2_5_vl": _qwen,
}


def tensors_of(inputs: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """The arrays of a batch that a model reads, as tensors.

    Args:
      inputs: what a processor gives, with or without an answer's tokens.
    """
    return {
        name: torch.from_numpy(np.ascontiguousarray(value))
        for name, value in inputs.items()
        if name not in NOT_FOR_THE_MODEL
    }


def image_features(model: Any, tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """What is put in the place of each image's tokens, ``[N, D]`` each.

    Args:
      model: see ``find``.
      tensors: a batch with images.
    """
    arguments = {name: tensors[name] for name in find(model).image_arguments if name in tensors}
    return list(model.get_image_features(**arguments).pooler_output)


def forward_arguments(model: Any, inputs: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """What ``forward`` needs beside a batch, so that padding on either side leaves the prompts' positions as they are.

    ``generate`` finds the same positions on its own.

    Args:
      model: see ``find``.
      inputs: ``input_ids`` and ``attention_mask`` ``[B, S]`` and, with images, the images' arrays.

    Returns:
      ``position_ids``: ``[B, S]``, or ``[3, B, S]`` for Qwen-VL with images. For InstructBLIP without images also an
      image, which it always runs, but which no prompt then reads.
    """
    mask = torch.from_numpy(np.asarray(inputs["attention_mask"]))
    if "image_grid_thw" in inputs:
        return {"position_ids": _multimodal_positions(model, tensors_of(inputs))}
    arguments = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    if model.config.model_type == "instructblip" and "pixel_values" not in inputs:
        side = model.config.vision_config.image_size
        arguments["pixel_values"] = torch.zeros(1, 3, side, side)
        arguments["qformer_input_ids"] = torch.ones(1, 1, dtype=torch.long)
    return arguments


def _multimodal_positions(model: Any, tensors: Mapping[str, Any]) -> torch.Tensor:
    """Rotary positions ``[3, B, S]``. Without them, or the types of the tokens, Qwen-VL would count the tokens."""
    ids = tensors["input_ids"]
    positions, _ = model.model.get_rope_index(
        ids,
        mm_token_type_ids=(ids == model.config.image_token_id).int(),
        image_grid_thw=tensors["image_grid_thw"],
        attention_mask=tensors["attention_mask"],
    )
    return positions


def patch_order(anatomy: Anatomy, grids: torch.Tensor) -> torch.Tensor | None:
    """The patch that stands in each row of a tower's hidden states; ``None`` where patches keep their order.

    Qwen2.5-VL sorts patches by windows, in units of merged patches.

    Args:
      anatomy: of the model.
      grids: ``image_grid_thw`` ``[I, 3]``.
    """
    tower = anatomy.vision
    if anatomy.model_type != "qwen2_5_vl":
        return None
    if hasattr(tower, "get_window_index"):  # older releases of transformers
        windows, _ = tower.get_window_index(grids)
    else:
        from transformers.vision_utils import get_vision_window_index

        windows, _ = get_vision_window_index(grids, tower.spatial_merge_size, tower.window_size, tower.patch_size)
    unit = tower.spatial_merge_unit
    return (torch.as_tensor(windows)[:, None] * unit + torch.arange(unit)).reshape(-1)
