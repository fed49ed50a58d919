"""Bugs of precision: bfloat16 where float32 is due."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmllm.models import attention, decoder
from jaxmllm.models.attention import KeyValue
from jaxmllm.models.decoder import Decoder
from jaxmllm.models.layers import Builder, rope_frequencies, rope_tables
from tests.validation.faults.decoder import norms_become
from tests.validation.faults.fault import Fault, around, become, listed, wherever

FAULTS: list[Fault] = []


def fault(where, on, first, cause="bfloat16", dtype="float32"):
    return listed(FAULTS, where, on, first, cause, dtype)


HALF = jnp.bfloat16


class HalfNorm(nnx.RMSNorm):
    """RMSNorm with its statistic in bfloat16."""

    def __call__(self, x, mask=None):
        half = x.astype(HALF)
        spread = jax.lax.rsqrt(jnp.mean(half * half, axis=-1, keepdims=True) + HALF(self.epsilon))
        return (half * spread * self.scale[...].astype(HALF)).astype(x.dtype)


@fault("Builder.rms_norm", "grouped_queries", "decoder.0.attn_in")
def rms_norm_in_bfloat16_in_a_float32_model(patch):
    norms_become(patch, HalfNorm)


@fault("Builder.rms_norm", "grouped_queries", "decoder.", cause="", dtype="bfloat16")
def rms_norm_in_bfloat16_in_a_bfloat16_model(patch):
    norms_become(patch, HalfNorm)


@fault("Builder.layer_norm", "grouped_queries", "vision.embed")
def layer_norm_in_bfloat16_in_a_float32_model(patch):
    class Half(nnx.LayerNorm):
        def __call__(self, x, *, mask=None):
            x = x.astype(HALF)
            x = x - jnp.mean(x, axis=-1, keepdims=True)
            normed = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + HALF(self.epsilon))
            return (normed * self.scale[...].astype(HALF) + self.bias[...].astype(HALF)).astype(jnp.float32)

    def make(original, *given):
        norm = original(*given)
        become(norm, Half)
        return norm

    around(patch, Builder, "layer_norm", make)


def softmax_in_half(query, parts, bias):
    """``attention._mix`` with the softmax in bfloat16."""
    key, value = (jnp.concatenate([getattr(part, name) for part in parts], axis=1) for name in ("key", "value"))
    scores = jnp.einsum("brhe,bte->brht", query, key, preferred_element_type=jnp.float32) * query.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias[:, :, None]
    weights = jax.nn.softmax(scores.astype(HALF), axis=-1)
    return jnp.einsum("brht,bte->brhe", weights, value.astype(HALF)).astype(query.dtype)


@fault("attention._mix", "grouped_queries", "vision.0.attn_out")
def softmax_in_bfloat16_in_a_float32_model(patch):
    patch.setattr(attention, "_mix", softmax_in_half)


@fault("layers.rope_tables", "grouped_queries", "rotary", dtype="bfloat16")
def rotary_angles_in_bfloat16(patch):
    def tables(_, rope, width, positions):
        frequencies, factor = rope_frequencies(rope, width, jnp.max(positions) + 1)
        angles = positions[..., None].astype(HALF) * frequencies.astype(HALF)
        angles = jnp.concatenate([angles, angles], axis=-1)
        return jnp.cos(angles).astype(jnp.float32) * factor, jnp.sin(angles).astype(jnp.float32) * factor

    wherever(patch, rope_tables, tables)


@fault("Tap.mix", "grouped_queries", "decoder.0.attn_out")
def attention_in_bfloat16_in_a_float32_model(patch):
    def mixed(original, query, own, past, valid):
        own = KeyValue(own.key.astype(HALF), own.value.astype(HALF))
        return original(query.astype(HALF), own, past, valid).astype(query.dtype)

    around(patch, decoder, "causal_attention", mixed)


@fault("Decoder.read", "grouped_queries", "logits")
def head_in_bfloat16_in_a_float32_model(patch):
    def read(self, normed):
        return (normed.astype(HALF) @ self.head.kernel[...].astype(HALF)).astype(jnp.float32)

    patch.setattr(Decoder, "read", read)
