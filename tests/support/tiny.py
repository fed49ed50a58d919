"""Tiny random models, in PyTorch and in JAX, with every parameter perturbed so that no zero or one hides a mistake."""

import dataclasses
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, LlavaForConditionalGeneration

import jaxmllm
from jaxmllm.model import Model

TEXT = {
    "model_type": "llama",
    "vocab_size": 99,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}
LLAVA = {"model_type": "llava", "image_token_index": 90, "vision_feature_layer": -2}

# Each variant turns on what a config can ask for; (top level, text config, vision config).
VARIANTS = {
    "grouped_queries": ({}, {"num_key_value_heads": 2}, {}),
    "feature_layers": ({"vision_feature_layer": [-2, 1, -1]}, {}, {"hidden_act": "gelu"}),
    "class_token_biases": (
        {"vision_feature_select_strategy": "full", "vision_feature_layer": -1, "multimodal_projector_bias": False},
        {"attention_bias": True, "mlp_bias": True, "head_dim": 16, "hidden_act": "gelu"},
        {},
    ),
    "tied_linear_rope": (
        {"tie_word_embeddings": True, "projector_hidden_act": "relu"},
        {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e4}},
        {},
    ),
    "llama3_rope": (
        {},
        {
            "num_key_value_heads": 1,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
        {},
    ),
    "yarn_rope": (
        {},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e3, "factor": 4.0, "beta_fast": 8.0,
                             "original_max_position_embeddings": 32}},
        {},
    ),
    "dynamic_rope": (
        {},
        {"max_position_embeddings": 16, "rope_parameters": {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 1e3}},
        {},
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Pair:
    """One checkpoint in both frameworks."""

    name: str
    folder: Path
    torch: LlavaForConditionalGeneration
    jax: Model

    @property
    def image_token(self) -> int:
        return self.jax.config.image_token_id


def config_fields(variant: str) -> dict:
    top, text, vision = VARIANTS[variant]
    return {**LLAVA, **top, "text_config": {**TEXT, **text}, "vision_config": {**VISION, **vision}}


def make_torch(fields: dict, seed: int = 0) -> LlavaForConditionalGeneration:
    """A random PyTorch model with eager attention; every parameter is moved away from its initial value."""
    fields = {**fields}
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.5 / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 0.2
            parameter.add_(torch.randn_like(parameter) * spread)
    return model


def make_pair(variant: str, folder: Path, seed: int = 0) -> Pair:
    model = make_torch(config_fields(variant), seed)
    model.save_pretrained(folder)
    return Pair(variant, folder, model, jaxmllm.load(folder))


def make_inputs(pair: Pair, layout: list[list[int]], side: str = "right", seed: int = 0) -> dict[str, np.ndarray]:
    """A batch of prompts; each is a list of text lengths, with one image between every two of them.

    ``[3, 5]`` is three words, an image, five words; ``[6]`` is text alone; ``[2, 1, 4]`` holds two images.
    """
    rng = np.random.default_rng(seed)
    tokens = pair.jax.config.tokens_per_image
    rows, images = [], 0
    for lengths in layout:
        row = list(rng.integers(3, 89, lengths[0]))
        for length in lengths[1:]:
            row += [pair.image_token] * tokens + list(rng.integers(3, 89, length))
            images += 1
        rows.append(row)
    width = max(map(len, rows))
    ids, mask = np.full((len(rows), width), 1), np.zeros((len(rows), width), np.int64)
    for index, row in enumerate(rows):
        at = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[index, at], mask[index, at] = row, 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    size = pair.jax.config.vision.image_size
    if images:
        inputs["pixel_values"] = rng.normal(size=(images, 3, size, size)).astype(np.float32)
    return inputs


# Prompts that between them hold one image, several images, no image, and unlike lengths.
LAYOUTS = {
    "one_image": [[3, 6], [3, 6]],
    "unlike_lengths": [[2, 7], [5, 3], [1, 1]],
    "several_images": [[2, 1, 4], [6], [3, 5]],
    "text_only": [[7], [4]],
}
