"""Bugs in the arithmetic of decoder layers, of the final norm and of the head."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmllm.decoding import cache
from jaxmllm.models import decoder
from jaxmllm.models.attention import KeyValue
from jaxmllm.models.decoder import Decoder, DecoderLayer, SelfAttention
from jaxmllm.models.layers import ACTIVATIONS, Builder, GatedMlp
from tests.validation.faults.fault import Biasless, Fault, Patch, around, become, listed, recast

FAULTS: list[Fault] = []
fault = functools.partial(listed, FAULTS)

ATTENTION = ("attention", "attention_rows", "causal_attention")


def norms_become(patch: Patch, kind: type) -> None:
    """Every RMSNorm computes as ``kind`` does."""

    def make(original, *arguments):
        norm = original(*arguments)
        become(norm, kind)
        return norm

    around(patch, Builder, "rms_norm", make)


def around_attention(patch: Patch, wrapper) -> None:
    """Wraps every function by which the decoder attends: over prompts, for captured rows and for generated tokens."""
    for module in (decoder, cache):
        for name in ATTENTION:
            if hasattr(module, name):
                around(patch, module, name, wrapper)


@fault("GatedMlp.__call__", "grouped_queries", "decoder.0.mlp_out", "gate and up")
def gate_and_up_swapped(patch):
    patch.setattr(
        GatedMlp, "__call__", lambda self, x: self.down(ACTIVATIONS[self.activation](self.up(x)) * self.gate(x))
    )


@fault("GatedMlp.__call__", "grouped_queries", "decoder.0.mlp_out", "activation on the product")
def activation_over_the_product_of_gate_and_up(patch):
    patch.setattr(
        GatedMlp, "__call__", lambda self, x: self.down(ACTIVATIONS[self.activation](self.gate(x) * self.up(x)))
    )


@fault("DecoderLayer.__init__", "class_token_biases", "decoder.0.mlp_out", "tanh")
def tanh_gelu_where_the_decoder_has_gelu(patch):
    def init(original, self, config, build):
        original(self, config, build)
        self.mlp.activation = "gelu_pytorch_tanh"

    around(patch, DecoderLayer, "__init__", init)


@fault("attention: the scores' factor", "grouped_queries", "decoder.0.attn_probs", "scale")
def attention_scale_missing(patch):
    around_attention(
        patch, lambda original, query, *rest, **named: original(query * query.shape[-1] ** 0.5, *rest, **named)
    )


@fault("attention: the scores' factor", "class_token_biases", "decoder.0.attn_probs", "scale")
def attention_scaled_by_the_model_width_over_heads(patch):
    # a head is 16 wide, the model's 48 over 4 heads are 12
    factor = (16 / 12) ** 0.5
    around_attention(patch, lambda original, query, *rest, **named: original(query * factor, *rest, **named))


@fault("attention: grouped queries", "grouped_queries", "decoder.0.attn_probs", "tile")
def key_value_heads_tiled_instead_of_repeated(patch):
    def regroup(heads, outer, axis):
        shape = heads.shape
        apart = heads.reshape(*shape[:axis], outer, shape[axis] // outer, *shape[axis + 1 :])
        return jnp.swapaxes(apart, axis, axis + 1).reshape(shape)

    def tiled(original, query, *rest, **named):
        parts = rest[0] if isinstance(rest[0], (list, tuple)) else [rest[0]]
        kv_heads, heads = parts[0].key.shape[2], query.shape[2]
        axis = 1 if original.__name__ == "attention_rows" else 2
        return regroup(original(regroup(query, heads // kv_heads, 2), *rest, **named), kv_heads, axis)

    around_attention(patch, tiled)


@fault("SelfAttention.__call__", "class_token_biases", "decoder.0.attn_probs", "bias")
def query_bias_dropped(patch):
    recast(patch, SelfAttention, "query", Biasless)


@fault("SelfAttention.__call__", "class_token_biases", "decoder.0.attn_out", "bias")
def output_bias_dropped(patch):
    recast(patch, SelfAttention, "out", Biasless)


@fault("SelfAttention.__call__", "grouped_queries", "decoder.0.attn_probs", "query")
def queries_not_rotated(patch):
    def call(self, hidden, rope, tap, past):
        own = self.keys(hidden, rope)
        mixed = tap.attend(self.split(self.query(hidden)), own, past)
        return self.out(mixed.reshape(*hidden.shape[:2], -1)), own

    patch.setattr(SelfAttention, "__call__", call)


@fault("SelfAttention.keys", "grouped_queries", "decoder.0.values", "rotat")
def values_rotated_too(patch):
    def keys(self, hidden, rope):
        key, value = (decoder.rotate(self.split(part(hidden)), rope) for part in (self.key, self.value))
        return KeyValue(key, value)

    patch.setattr(SelfAttention, "keys", keys)


@fault("SelfAttention.__call__", "grouped_queries", "decoder.0.attn_out", "merge")
def heads_merged_feature_by_feature(patch):
    def call(self, hidden, rope, tap, past):
        query, own = decoder.rotate(self.split(self.query(hidden)), rope), self.keys(hidden, rope)
        mixed = tap.attend(query, own, past)
        return self.out(jnp.swapaxes(mixed, 2, 3).reshape(*hidden.shape[:2], -1)), own

    patch.setattr(SelfAttention, "__call__", call)


@fault("SelfAttention.split", "grouped_queries", "decoder.0.keys", "head")
def heads_split_feature_by_feature(patch):
    def split(self, projected):
        apart = projected.reshape(*projected.shape[:2], self.head_dim, -1)
        return jnp.swapaxes(apart, 2, 3)

    patch.setattr(SelfAttention, "split", split)


@fault("DecoderLayer.__call__", "grouped_queries", "decoder.0.resid_mid", "residual")
def residual_taken_behind_the_norm(patch):
    def call(self, hidden, rope, tap, past=()):
        normed = tap("attn_in", self.attention_norm(tap("resid_pre", hidden)))
        attended, own = self.attention(normed, rope, tap, past)
        hidden = tap("resid_mid", normed + tap("attn_out", attended))
        transformed = self.mlp(tap("mlp_in", self.mlp_norm(hidden)))
        return tap("resid_post", hidden + tap("mlp_out", transformed)), own

    patch.setattr(DecoderLayer, "__call__", call)


@fault("DecoderLayer.__call__", "grouped_queries", "decoder.0.mlp_in", "in parallel")
def attention_and_feed_forward_in_parallel(patch):
    def call(self, hidden, rope, tap, past=()):
        before = tap("resid_pre", hidden)
        attended, own = self.attention(tap("attn_in", self.attention_norm(before)), rope, tap, past)
        hidden = tap("resid_mid", before + tap("attn_out", attended))
        transformed = self.mlp(tap("mlp_in", self.mlp_norm(before)))
        return tap("resid_post", hidden + tap("mlp_out", transformed)), own

    patch.setattr(DecoderLayer, "__call__", call)


@fault("Builder.rms_norm", "grouped_queries", "decoder.0.attn_in", "epsilon")
def rms_norm_epsilon_of_the_config_ignored(patch):
    around(patch, Builder, "rms_norm", lambda original, self, size, epsilon: original(self, size, 1e-6))


@fault("Builder.rms_norm", "grouped_queries", "decoder.0.attn_in", "scale")
def rms_norm_by_one_plus_scale(patch):
    class OnePlus(nnx.RMSNorm):
        def __call__(self, x, mask=None):
            normed = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
            return normed * (1 + self.scale[...])

    norms_become(patch, OnePlus)


@fault("Builder.rms_norm", "grouped_queries", "decoder.0.attn_in", "mean")
def layer_norm_where_the_decoder_has_rms_norm(patch):
    class Centred(nnx.RMSNorm):
        def __call__(self, x, mask=None):
            x = x - x.mean(axis=-1, keepdims=True)
            return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon) * self.scale[...]

    norms_become(patch, Centred)


@fault("Decoder.read", "grouped_queries", "logits", "twice")
def final_norm_applied_twice(patch):
    around(patch, Decoder, "read", lambda original, self, normed: original(self, self.norm(normed)))


@fault("Decoder.logits", "grouped_queries", "final_norm", "norm")
def final_norm_missing(patch):
    recast_norm = type("Missing", (nnx.RMSNorm,), {"__call__": lambda self, x, mask=None: x})
    recast(patch, Decoder, "norm", recast_norm)


@fault("Decoder.read", "grouped_queries", "logits", "tied")
def head_tied_although_the_config_says_not(patch):
    patch.setattr(Decoder, "read", lambda self, normed: self.embed.attend(normed).astype(jnp.float32))


@fault("Decoder.read", "tied_linear_rope", "logits", "tied")
def head_not_tied_although_the_config_says_so(patch):
    def read(self, normed):
        # an output matrix of its own, as it was initialised, because no tensor of the file fills it
        kernel = jax.random.normal(jax.random.key(0), self.embed.embedding[...].shape[::-1]) * 0.14
        return normed.astype(jnp.float32) @ kernel

    patch.setattr(Decoder, "read", read)
