"""The language decoder: LLaMA's architecture by config, its layers stacked and run under one scan.

The layer names its sites (TransformerLens's vocabulary) by passing every value through a ``Tap``; edits are applied and
captures taken there, so the arithmetic below reads as the model's alone.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxmllm.models.capture import ATTENTION, EARLY_LOGITS, Capture, row_index
from jaxmllm.models.config import DecoderConfig
from jaxmllm.models.edits import Edits, LayerEdits, ResolvedEdits, knockout_bias, resolve
from jaxmllm.models.layers import BLOCKED, Builder, GatedMlp, attention, attention_rows, rope_tables, rotate
from jaxmllm.models.layout import Layout, gather_rows

ERASE_SITE = "resid_pre"
BLIND_SITES = ("attn_in", "mlp_in")


@dataclasses.dataclass
class Tap:
    """Stands at the sites of one layer: edits what passes, and keeps what was asked for.

    Lives inside the trace of a single scan step; ``captured`` is that step's output.
    """

    layer: Int[Array, ""]
    edits: LayerEdits
    resolved: ResolvedEdits
    capture: Capture
    layout: Layout
    captured: dict[str, Array] = dataclasses.field(default_factory=dict)

    def __call__(self, site: str, value: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        keep = self.edits.erase if site == ERASE_SITE else self.edits.blind if site in BLIND_SITES else None
        if keep is not None:
            value = value * keep[..., None].astype(value.dtype)
        value = self.run_hooks(site, value)
        wanted = self.capture.site(site)
        if wanted is not None:
            whole = wanted.rows == "all"
            self.captured[site] = value if whole else gather_rows(value, row_index(wanted.rows, self.layout))
        return value

    def run_hooks(self, site: str, value: Array) -> Array:
        for name, hook in self.resolved.hooks:
            if name == site:
                value = hook(value, self.layer)
        return value

    def bias(self) -> Float[Array, "B 1 S S"]:
        """Additive attention bias of this layer: causality, padding and knockouts."""
        blocked = jnp.where(self.layout.may_attend, 0.0, BLOCKED)
        return (blocked + knockout_bias(self.edits.knockout, self.resolved.queries_and_keys))[:, None]

    def heads(self, value: Float[Array, "B S H E"]) -> Float[Array, "B S H E"]:
        if self.edits.head_scale is not None:
            value = value * self.edits.head_scale[:, None].astype(value.dtype)
        return self.run_hooks("z", value)

    def attention(self, query: Array, key: Array, bias: Float[Array, "B 1 S S"]) -> None:
        """Recomputes the attention weights of the rows asked for and keeps them."""
        wanted = self.capture.site(ATTENTION)
        if wanted is None:
            return
        rows = row_index(wanted.rows, self.layout)
        weights = attention_rows(gather_rows(query, rows), key, gather_rows(bias[:, 0], rows)[:, None])
        if wanted.heads == "mean":
            weights = weights.mean(axis=1)
        if wanted.keys == "image":
            index, filled = self.layout.image_index()
            middle = (1,) * (weights.ndim - 2)
            index = index.reshape(index.shape[0], *middle, -1)
            weights = jnp.take_along_axis(weights, index, axis=-1) * filled.reshape(index.shape)
        self.captured[ATTENTION] = weights


class SelfAttention(nnx.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, config: DecoderConfig, build: Builder):
        width = config.head_dim
        self.query = build.linear(config.hidden_size, config.num_heads * width, config.qkv_bias)
        self.key = build.linear(config.hidden_size, config.num_kv_heads * width, config.qkv_bias)
        self.value = build.linear(config.hidden_size, config.num_kv_heads * width, config.qkv_bias)
        self.out = build.linear(config.num_heads * width, config.hidden_size, config.out_bias)
        self.head_dim = width

    def __call__(
        self, hidden: Float[Array, "B S D"], rope: tuple[Float[Array, "B S E"], Float[Array, "B S E"]], tap: Tap
    ) -> Float[Array, "B S D"]:
        batch, length, _ = hidden.shape
        split = (batch, length, -1, self.head_dim)
        query = rotate(self.query(hidden).reshape(split), rope)
        key = rotate(self.key(hidden).reshape(split), rope)
        value = self.value(hidden).reshape(split)
        bias = tap.bias()
        tap.attention(query, key, bias)
        mixed = tap.heads(attention(query, key, value, bias))
        return self.out(mixed.reshape(batch, length, -1))


class DecoderLayer(nnx.Module):
    """Pre-norm transformer layer: attention, then a gated feed-forward block."""

    def __init__(self, config: DecoderConfig, build: Builder):
        self.attention_norm = build.rms_norm(config.hidden_size, config.rms_norm_eps)
        self.attention = SelfAttention(config, build)
        self.mlp_norm = build.rms_norm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMlp(config, build)

    def __call__(
        self, hidden: Float[Array, "B S D"], rope: tuple[Float[Array, "B S E"], Float[Array, "B S E"]], tap: Tap
    ) -> Float[Array, "B S D"]:
        hidden = tap("resid_pre", hidden)
        attended = self.attention(tap("attn_in", self.attention_norm(hidden)), rope, tap)
        hidden = tap("resid_mid", hidden + tap("attn_out", attended))
        transformed = self.mlp(tap("mlp_in", self.mlp_norm(hidden)))
        return tap("resid_post", hidden + tap("mlp_out", transformed))


class Decoder(nnx.Module):
    """Token embedding, stacked layers, final norm, output head (the embedding itself where the config ties them)."""

    def __init__(self, config: DecoderConfig, build: Builder):
        self.config = config
        self.embed = build.embed(config.vocab_size, config.hidden_size)
        self.layers = build.stack(config.num_layers, lambda build: DecoderLayer(config, build))
        self.norm = build.rms_norm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.head = build.linear(config.hidden_size, config.vocab_size, use_bias=False)

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Final norm and output head, in float32."""
        normed = self.norm(hidden)
        logits = self.embed.attend(normed) if self.config.tie_word_embeddings else self.head(normed)
        return logits.astype(jnp.float32)

    def __call__(
        self, hidden: Float[Array, "B S D"], layout: Layout, edits: Edits | None = None, capture: Capture = Capture()
    ) -> tuple[Float[Array, "B S D"], dict[str, Array]]:
        """Runs every layer.

        Args:
          hidden: token embeddings with the image features in place.
          layout: positions, mask and parts of the sequences.
          edits: what is done on the way.
          capture: what is kept on the way.

        Returns:
          The last layer's output (before the final norm) and the captured sites, each with a leading layer axis.
        """
        config = self.config
        resolved = resolve(edits, config.num_layers, config.num_heads, layout)
        rope = rope_tables(config.rope, config.head_dim, layout.positions)
        graphdef, params = nnx.split(self.layers)

        def step(hidden: Array, layer: tuple) -> tuple[Array, dict[str, Array]]:
            index, layer_params, layer_edits = layer
            tap = Tap(index, layer_edits, resolved, capture, layout)
            hidden = nnx.merge(graphdef, layer_params)(hidden, rope, tap)
            early = capture.site(EARLY_LOGITS)
            if early is not None:
                tap.captured[EARLY_LOGITS] = self.logits(gather_rows(hidden, row_index(early.rows, layout)))
            return hidden, tap.captured

        # Recomputed in the backward pass, a layer need not store its S x S weights; forward is unaffected.
        step = jax.checkpoint(step)
        return jax.lax.scan(step, hidden, (jnp.arange(config.num_layers), params, resolved.layers))
