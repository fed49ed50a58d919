"""The CLIP vision tower: patches, class token, position embedding and a stack of pre-norm layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxmllm.models.attention import KeyValue, attention
from jaxmllm.models.config import VisionConfig
from jaxmllm.models.layers import Builder, Mlp


def patchify(pixels: Float[Array, "I C Y X"], patch: int) -> Float[Array, "I P F"]:
    """Cuts images into square patches, row by row; a patch's pixels are ordered (row, column, channel)."""
    images, channels, height, width = pixels.shape
    grid = pixels.reshape(images, channels, height // patch, patch, width // patch, patch)
    return grid.transpose(0, 2, 4, 3, 5, 1).reshape(images, (height // patch) * (width // patch), -1)


class VisionAttention(nnx.Module):
    """Multi-head self-attention without a mask."""

    def __init__(self, config: VisionConfig, build: Builder):
        width = config.hidden_size
        self.query = build.linear(width, width)
        self.key = build.linear(width, width)
        self.value = build.linear(width, width)
        self.out = build.linear(width, width)
        self.num_heads = config.num_heads

    def __call__(self, hidden: Float[Array, "I S D"]) -> Float[Array, "I S D"]:
        images, length, width = hidden.shape
        split = (images, length, self.num_heads, -1)
        query, key, value = (part(hidden).reshape(split) for part in (self.query, self.key, self.value))
        return self.out(attention(query, KeyValue(key, value)).reshape(images, length, width))


class VisionLayer(nnx.Module):
    """Pre-norm transformer layer of CLIP; towers with another attention hand in its class."""

    def __init__(
        self, config: VisionConfig, build: Builder, attention: Callable[[Any, Builder], nnx.Module] = VisionAttention
    ):
        width = config.hidden_size
        self.attention_norm = build.layer_norm(width, config.layer_norm_eps)
        self.attention = attention(config, build)
        self.mlp_norm = build.layer_norm(width, config.layer_norm_eps)
        self.mlp = Mlp((width, config.intermediate_size, width), config.hidden_act, build)

    def __call__(self, hidden: Float[Array, "I S D"]) -> Float[Array, "I S D"]:
        hidden = hidden + self.attention(self.attention_norm(hidden))
        return hidden + self.mlp(self.mlp_norm(hidden))


class VisionTower(nnx.Module):
    """CLIP's vision transformer up to the deepest layer that is read; what comes after it is not built."""

    def __init__(self, config: VisionConfig, feature_layers: tuple[int, ...], build: Builder):
        width = config.hidden_size
        self.config = config
        self.feature_layers = feature_layers
        self.depth = max(feature_layers)
        self.dtype = build.dtype
        self.patch_embed = build.linear(config.patch_size**2 * config.num_channels, width, use_bias=False)
        self.class_embed = build.normal(width)
        self.position_embed = build.normal(config.num_patches + 1, width)
        self.pre_norm = build.layer_norm(width, config.layer_norm_eps)
        self.layers = build.stack(self.depth, lambda build: VisionLayer(config, build))

    def embed(self, pixel_values: Float[Array, "I C Y X"]) -> Float[Array, "I S D"]:
        """What enters the first layer; S = 1 + patches, the class token first."""
        images = pixel_values.shape[0]
        patches = self.patch_embed(patchify(pixel_values.astype(self.dtype), self.config.patch_size))
        first = jnp.broadcast_to(self.class_embed[...].astype(self.dtype), (images, 1, patches.shape[-1]))
        hidden = jnp.concatenate([first, patches], axis=1) + self.position_embed[...].astype(self.dtype)
        return self.pre_norm(hidden)

    def __call__(self, pixel_values: Float[Array, "I C Y X"]) -> Float[Array, "I S F"]:
        """Outputs of the feature layers side by side along the width."""
        hidden = self.embed(pixel_values)
        graphdef, params = nnx.split(self.layers)

        # Only the layers that are read are carried along, so memory does not grow with depth.
        def step(kept: tuple[Array, ...], layer: tuple) -> tuple[tuple[Array, ...], None]:
            number, layer_params = layer
            *features, hidden = kept
            hidden = nnx.merge(graphdef, layer_params)(hidden)
            features = [
                jnp.where(number == wanted, hidden, feature)
                for wanted, feature in zip(self.feature_layers, features, strict=True)
            ]
            return (*features, hidden), None

        kept = (hidden,) * (len(self.feature_layers) + 1)
        (*features, _), _ = jax.lax.scan(step, kept, (jnp.arange(1, self.depth + 1), params))
        return jnp.concatenate(features, axis=-1)
