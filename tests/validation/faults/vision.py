"""Bugs in the vision towers: CLIP's, EVA's and Qwen's."""

import dataclasses
import functools

import jax.numpy as jnp
from flax import nnx

from jaxmllm.models import eva, llava, qwen2_5_vl, qwen_vision, vision
from jaxmllm.models.attention import BLOCKED, KeyValue
from jaxmllm.models.eva import EvaTower, FusedAttention
from jaxmllm.models.layers import ACTIVATIONS, Builder, exact_gelu
from jaxmllm.models.llava import Llava
from jaxmllm.models.qwen_vision import Merger, QwenVisionTower
from jaxmllm.models.vision import VisionLayer, VisionTower
from tests.validation.faults.fault import Fault, NoNorm, around, become, listed, recast

FAULTS: list[Fault] = []
fault = functools.partial(listed, FAULTS)


def cut(pixels, patch, axes):
    """Patches in another order of axes than ``vision.patchify`` (image, channel, row, y, column, x) has."""
    images, channels, height, width = pixels.shape
    grid = pixels.reshape(images, channels, height // patch, patch, width // patch, patch)
    return grid.transpose(axes).reshape(images, (height // patch) * (width // patch), -1)


@fault("vision.patchify", "grouped_queries", "vision.embed", "order")
def pixels_of_a_patch_channel_first(patch):
    patch.setattr(vision, "patchify", lambda pixels, size: cut(pixels, size, (0, 2, 4, 1, 3, 5)))


@fault("vision.patchify", "grouped_queries", "vision.embed", "column by column")
def patches_column_by_column(patch):
    patch.setattr(vision, "patchify", lambda pixels, size: cut(pixels, size, (0, 4, 2, 3, 5, 1)))


@fault("VisionTower.embed", "grouped_queries", "vision.embed", "norm")
def norm_before_the_layers_missing(patch):
    recast(patch, VisionTower, "pre_norm", NoNorm)


@fault("Builder.layer_norm", "grouped_queries", "vision", "epsilon")
def layer_norm_epsilon_of_the_config_ignored(patch):
    around(patch, Builder, "layer_norm", lambda original, self, size, epsilon: original(self, size, 1e-6))


@fault("Builder.layer_norm", "grouped_queries", "vision.embed", "mean")
def mean_not_subtracted_in_layer_norm(patch):
    class Uncentred(nnx.LayerNorm):
        def __call__(self, x, *, mask=None):
            normed = x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
            return normed * self.scale[...] + self.bias[...]

    def make(original, *given):
        norm = original(*given)
        become(norm, Uncentred)
        return norm

    around(patch, Builder, "layer_norm", make)


@fault("layers.ACTIVATIONS", "grouped_queries", "vision.0.mlp_out", "gelu")
def gelu_where_clip_has_quick_gelu(patch):
    patch.setitem(ACTIVATIONS, "quick_gelu", exact_gelu)


@fault("VisionAttention.__call__", "grouped_queries", "vision.0.attn_out", "causal")
def vision_attention_causal(patch):
    def causal(original, query, own):
        def bias_of(start, stop, seen):
            return jnp.where(jnp.arange(seen) <= jnp.arange(start, stop)[:, None], 0.0, BLOCKED)[None]

        return original(query, own, (), bias_of)

    around(patch, vision, "attention", causal)


@fault("VisionLayer.__call__", "grouped_queries", "vision.0.resid_post", "attention_norm instead")
def vision_norms_exchanged(patch):
    def call(self, hidden):
        hidden = hidden + self.attention(self.attention_norm(hidden))
        return hidden + self.mlp(self.attention_norm(hidden))

    def init(original, self, *given, **named):
        original(self, *given, **named)
        become(self, Exchanged)

    class Exchanged(VisionLayer):
        __call__ = call

    around(patch, VisionLayer, "__init__", init)


@fault("llava._feature_layer", "grouped_queries", "vision.features", "feature layer 1 block(s) later")
def feature_layer_one_too_early(patch):
    around(patch, llava, "_feature_layer", lambda original, layer, many: original(layer, many) - 1)


@fault("Llava.vision_features", "grouped_queries", "vision.features", "class token")
def class_token_kept_and_last_patch_dropped(patch):
    patch.setattr(Llava, "vision_features", lambda self, pixels: self.vision(pixels)[:, :-1])


@fault("EvaTower.embed", "instructblip_cross_seldom", "vision.embed", "position")
def vision_positions_off_by_one(patch):
    def embed(original, self, pixels):
        self.position_embed = nnx.Param(jnp.roll(self.position_embed[...], 1, axis=1))
        return original(self, pixels)

    around(patch, EvaTower, "embed", embed)


@fault("EvaTower.embed", "instructblip_cross_seldom", "vision.embed", "class token")
def class_token_last(patch):
    def embed(self, pixels):
        patches = self.patch_embed(eva.patchify(pixels.astype(self.dtype), self.config.patch_size))
        last = jnp.broadcast_to(self.class_embed[...].astype(self.dtype), (len(pixels), 1, patches.shape[-1]))
        return jnp.concatenate([patches, last], axis=1) + self.position_embed[...].astype(self.dtype)

    patch.setattr(EvaTower, "embed", embed)


@fault("FusedAttention.__call__", "instructblip_cross_seldom", "vision.0.attn_out", "thirds")
def fused_thirds_in_the_order_query_value_key(patch):
    def call(self, hidden):
        images, length, width = hidden.shape
        parts = self.qkv(hidden).reshape(images, length, 3, self.num_heads, -1)
        query, value, key = (parts[:, :, number] for number in range(3))
        return self.out(eva.attention(query, KeyValue(key, value)).reshape(images, length, width))

    patch.setattr(FusedAttention, "__call__", call)


@fault("FusedAttention.__call__", "instructblip_cross_everywhere", "vision.0.attn_out", "head")
def fused_thirds_interleaved_by_head(patch):
    def call(self, hidden):
        images, length, width = hidden.shape
        parts = self.qkv(hidden).reshape(images, length, self.num_heads, 3, -1)
        query, key, value = (parts[:, :, :, number] for number in range(3))
        return self.out(eva.attention(query, KeyValue(key, value)).reshape(images, length, width))

    patch.setattr(FusedAttention, "__call__", call)


@fault("EvaTower.__call__", "instructblip_cross_seldom", "vision.features", "norm")
def norm_behind_the_layers_missing(patch):
    recast(patch, EvaTower, "post_norm", NoNorm)


@fault("qwen_vision.axial_tables", "qwen2_vl", "vision.0.attn_out", "rows")
def rows_and_columns_of_patches_exchanged(patch):
    around(patch, qwen_vision, "axial_tables", lambda original, places, *given: original(places[..., ::-1], *given))


@fault("qwen_vision._read_common", "qwen2_vl_tied_yarn_windows", "vision.0.attn_out", "base")
def vision_rotary_base_ignored(patch):
    around(patch, qwen_vision, "axial_tables", lambda original, places, width, theta: original(places, width, 1e4))


@fault("qwen_vision.attend_whole", "qwen2_vl", "vision.0.attn_out", "padding")
def padding_of_patches_seen(patch):
    around(
        patch,
        qwen_vision,
        "attend_whole",
        lambda original, query, key, value, real: original(query, key, value, jnp.ones_like(real)),
    )


@fault("qwen_vision.read_vision_2_5", "qwen2_5_vl", "vision.2.attn_out", "window")
def layers_that_see_the_whole_image_off_by_one(patch):
    def read(original, reader):
        config = original(reader)
        return dataclasses.replace(config, full_layers=tuple(layer + 1 for layer in config.full_layers))

    around(patch, qwen2_5_vl, "read_vision_2_5", read)


@fault("qwen_vision.read_vision_2_5", "qwen2_5_vl", "vision.0.attn_out", "window")
def windows_ignored(patch):
    def read(original, reader):
        config = original(reader)
        return dataclasses.replace(config, full_layers=tuple(range(config.num_layers)))

    around(patch, qwen2_5_vl, "read_vision_2_5", read)


@fault("QwenVisionTower.merge", "qwen2_5_vl", "connector", "order")
def order_of_windows_not_undone(patch):
    def merge(original, self, hidden, arrays):
        order = jnp.broadcast_to(jnp.arange(arrays["order"].shape[1]), arrays["order"].shape)
        return original(self, hidden, arrays | {"order": order})

    around(patch, QwenVisionTower, "merge", merge)


@fault("Merger.__call__", "qwen2_vl", "connector", "group")
def patches_of_a_token_column_by_column(patch):
    def call(original, self, groups):
        side = round(groups.shape[2] ** 0.5)
        apart = groups.reshape(*groups.shape[:2], side, side, groups.shape[-1])
        return original(self, jnp.swapaxes(apart, 2, 3).reshape(groups.shape))

    around(patch, Merger, "__call__", call)


@fault("Merger.__call__", "qwen2_5_vl", "connector", "norm")
def merger_norm_over_the_whole_token(patch):
    def call(self, groups):
        wide = groups.reshape(*groups.shape[:2], -1)
        spread = jnp.sqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-6)
        return self.mlp(wide / spread * jnp.tile(self.norm.scale[...], groups.shape[2]))

    patch.setattr(Merger, "__call__", call)
