"""Tiny random models, in PyTorch and in JAX, with every parameter perturbed so that no zero or one hides a mistake."""

import dataclasses
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, LlavaForConditionalGeneration

import jaxmllm
from jaxmllm.model import Model
from tests.support.variants import LLAVA, TEXT, VARIANTS, VISION, config_fields

__all__ = [
    "LAYOUTS",
    "LLAVA",
    "TEXT",
    "VARIANTS",
    "VISION",
    "Pair",
    "config_fields",
    "make_inputs",
    "make_pair",
    "roles",
]


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


def roles(pair: Pair, inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image, question and last positions ``[B, S]``, found without the code under test."""
    valid = inputs["attention_mask"].astype(bool)
    image = (inputs["input_ids"] == pair.image_token) & valid
    question = valid & ~image & (np.cumsum(image, axis=-1) > 0)
    last = np.zeros_like(valid)
    for row, mask in enumerate(valid):
        last[row, np.flatnonzero(mask)[-1]] = True
    return image, question, last
