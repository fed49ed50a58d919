"""The language decoder: LLaMA's architecture by config, its layers stacked and run under one scan.

The layer names its sites (TransformerLens's vocabulary) by passing every value through a ``Tap``; edits are applied and
captures taken there, so the arithmetic below reads as the model's alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxmllm.models.attention import BLOCKED, KeyValue, attention, attention_rows
from jaxmllm.models.capture import ATTENTION, EARLY_LOGITS, Capture, Site, row_index
from jaxmllm.models.edits import Edits, Hook, LayerEdits, ResolvedEdits, knockout_bias, resolve
from jaxmllm.models.fused import causal_attention
from jaxmllm.models.layers import Builder, GatedMlp, Leaf, rope_tables, rotate
from jaxmllm.models.layout import Layout, gather_rows
from jaxmllm.models.sharding import constrain
from jaxmllm.models.text_config import DecoderConfig

ERASE_SITE = "resid_pre"
BLIND_SITES = ("attn_in", "mlp_in")


@dataclasses.dataclass
class Tap:
    """Stands at the sites of one layer: edits what passes, and keeps what was asked for.

    Lives inside the trace of a single layer; ``captured`` is that layer's output. The layer may run over all positions
    of the layout or over the run ``[start, stop)`` of them; what stands before the run is then met as past keys.

    Attributes:
      layer: its number.
      edits: this layer's, over all positions of the layout.
      queries_and_keys: what each knockout acts on, over all positions of the layout.
      start, stop: the run.
      windows: how far back each layer may look, where the config says so.
    """

    layer: Int[Array, ""]
    edits: LayerEdits
    queries_and_keys: tuple[tuple[Float[Array, "B S"], Float[Array, "B S"]], ...]
    hooks: tuple[tuple[str, Hook], ...]
    capture: Capture
    layout: Layout
    start: int | Int[Array, ""]
    stop: int | Int[Array, ""]
    windows: tuple[int | None, ...] | None = None
    captured: dict[str, Array] = dataclasses.field(default_factory=dict)

    def __call__(self, site: str, value: Float[Array, "B run D"]) -> Float[Array, "B run D"]:
        keep = self.edits.erase if site == ERASE_SITE else self.edits.blind if site in BLIND_SITES else None
        if keep is not None:
            value = value * self.of_run(keep)[..., None].astype(value.dtype)
        value = self.run_hooks(site, value)
        wanted = self.capture.site(site)
        if wanted is not None:
            self.captured[site] = value if wanted.rows == "all" else gather_rows(value, self.rows(wanted))
        return value

    def run_hooks(self, site: str, value: Array) -> Array:
        for name, hook in self.hooks:
            if name == site:
                value = hook(value, self.layer)
        return value

    def of_run(self, values: Float[Array, "B S"]) -> Float[Array, "B run"]:
        """What holds of the positions of the run."""
        return values[:, self.start : self.stop]

    def rows(self, wanted: Site) -> Int[Array, "B R"]:
        """The rows a site asks for, counted from the start of the run."""
        rows = row_index(wanted.rows, self.layout)
        return (rows[:, self.start : self.stop] if wanted.rows == "all" else rows) - self.start

    def bias(self, rows: Int[Array, "#B R"], seen: int) -> Float[Array, "#B R seen"]:
        """Additive attention bias of query positions to the first keys: causality, padding and knockouts."""
        # Lower than what a knockout leaves, so that where everything visible is knocked out, the future and padding
        # still get nothing.
        window = None
        if self.windows is not None:
            sizes = [np.iinfo(np.int32).max if size is None else size for size in self.windows]
            window = jnp.asarray(sizes)[self.layer]
        blocked = jnp.where(self.layout.may_attend(rows, seen, window), 0.0, 2 * BLOCKED)
        near = tuple(
            (jnp.take_along_axis(queries, rows, axis=1), keys[:, :seen]) for queries, keys in self.queries_and_keys
        )
        return blocked + knockout_bias(self.edits.knockout, near)

    def attend(self, query: Array, own: KeyValue, past: Sequence[KeyValue]) -> Float[Array, "B run H E"]:
        """Attention of the run to what it may see; the weights of the rows asked for are computed apart and kept."""
        wanted = self.capture.site(ATTENTION)
        if wanted is not None:
            rows = self.rows(wanted)
            parts = (*past, own)
            bias = self.bias(rows + self.start, sum(part.length for part in parts))
            self.keep_attention(wanted, attention_rows(gather_rows(query, rows), parts, bias))
        return self.finish(self.mix(query, own, past))

    def finish(self, mixed: Float[Array, "B run H E"]) -> Float[Array, "B run H E"]:
        """What is done to the heads' outputs."""
        if self.edits.head_scale is not None:
            mixed = mixed * self.edits.head_scale[:, None].astype(mixed.dtype)
        return self.run_hooks("z", mixed)

    def mix(self, query: Array, own: KeyValue, past: Sequence[KeyValue]) -> Float[Array, "B run H E"]:
        """Attention of the run to what stands before it and to itself."""
        if not self.edits.knockout and self.layout.mask is None and self.windows is None:
            return causal_attention(query, own, past, self.layout.valid[:, : self.stop])

        def bias_of(start: int, stop: int, seen: int) -> Array:
            return self.bias(jnp.arange(self.start + start, self.start + stop)[None], seen)

        return attention(query, own, past, bias_of, causal=self.layout.mask is None)

    def keep_attention(self, wanted: Site, weights: Float[Array, "B H R T"]) -> None:
        if wanted.heads != "each":
            weights = weights.mean(axis=1) if wanted.heads == "mean" else weights.max(axis=1)
        if wanted.keys == "image":
            index, filled = self.layout.image_index()
            middle = (1,) * (weights.ndim - 2)
            index = index.reshape(index.shape[0], *middle, -1)
            weights = jnp.take_along_axis(weights, index, axis=-1) * filled.reshape(index.shape)
        self.captured[ATTENTION] = weights


Rope = tuple[Float[Array, "B run E"], Float[Array, "B run E"]]


class SelfAttention(nnx.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, config: DecoderConfig, build: Builder):
        width = config.head_dim
        self.query = build.linear(config.hidden_size, config.num_heads * width, config.qkv_bias)
        self.key = build.linear(config.hidden_size, config.num_kv_heads * width, config.qkv_bias)
        self.value = build.linear(config.hidden_size, config.num_kv_heads * width, config.qkv_bias)
        self.out = build.linear(config.num_heads * width, config.hidden_size, config.out_bias)
        self.head_dim = width

    def split(self, projected: Float[Array, "B run F"]) -> Float[Array, "B run heads E"]:
        heads = projected.reshape(*projected.shape[:2], -1, self.head_dim)
        return constrain(heads, "examples", None, "heads")

    def keys(self, hidden: Float[Array, "B run D"], rope: Rope) -> KeyValue:
        """What later positions see of these."""
        return KeyValue(rotate(self.split(self.key(hidden)), rope), self.split(self.value(hidden)))

    def __call__(
        self, hidden: Float[Array, "B run D"], rope: Rope, tap: Tap, past: Sequence[KeyValue]
    ) -> tuple[Float[Array, "B run D"], KeyValue]:
        query, own = rotate(self.split(self.query(hidden)), rope), self.keys(hidden, rope)
        mixed = tap.attend(query, own, past)
        return self.out(mixed.reshape(*hidden.shape[:2], -1)), own


class DecoderLayer(nnx.Module):
    """Pre-norm transformer layer: attention, then a gated feed-forward block."""

    def __init__(self, config: DecoderConfig, build: Builder):
        self.attention_norm = build.rms_norm(config.hidden_size, config.rms_norm_eps)
        self.attention = SelfAttention(config, build)
        self.mlp_norm = build.rms_norm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMlp(config, build)

    def __call__(
        self, hidden: Float[Array, "B run D"], rope: Rope, tap: Tap, past: Sequence[KeyValue] = ()
    ) -> tuple[Float[Array, "B run D"], KeyValue]:
        """The next layer's input at the positions of the run, and the keys and values that later runs will see."""
        hidden = tap("resid_pre", hidden)
        attended, own = self.attention(tap("attn_in", self.attention_norm(hidden)), rope, tap, past)
        hidden = tap("resid_mid", hidden + tap("attn_out", attended))
        transformed = self.mlp(tap("mlp_in", self.mlp_norm(hidden)))
        return tap("resid_post", hidden + tap("mlp_out", transformed)), own

    def keys(self, hidden: Float[Array, "B run D"], rope: Rope, tap: Tap) -> KeyValue:
        """The keys and values alone, for positions whose output nothing reads."""
        return self.attention.keys(tap("attn_in", self.attention_norm(tap("resid_pre", hidden))), rope)


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
        return self.read(self.norm(hidden))

    def read(self, normed: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """The output head alone, in float32."""
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
        resolved = resolve(edits, self.config.num_layers, self.config.num_heads, layout)

        def tap(layer: Array, edits: LayerEdits, _: Leaf) -> Tap:
            acting = (edits, resolved.queries_and_keys, resolved.hooks)
            return Tap(layer, *acting, capture, layout, 0, layout.length, self.config.windows)

        return self.run(hidden, layout.positions, resolved, tap, lambda tap, own: tap.captured)

    def run(
        self,
        hidden: Float[Array, "B run D"],
        positions: Int[Array, "B run *axes"],
        resolved: ResolvedEdits,
        tap_of: Callable[[Array, LayerEdits, Leaf], Tap],
        keep: Callable[[Tap, KeyValue], Leaf],
        per_layer: Leaf = (),
    ) -> tuple[Float[Array, "B run D"], Leaf]:
        """Runs every layer over a run of positions: one scan, whatever is kept on the way.

        Args:
          hidden: what enters layer 0.
          positions: rotary positions of the run.
          resolved: edits, as ``resolve`` spells them out.
          tap_of: a layer's number, its edits and its part of ``per_layer`` -> the tap that stands at its sites.
          keep: the tap after the layer, and the layer's keys and values of the run -> what is stacked over the layers.
          per_layer: anything whose leaves have a leading layer axis.

        Returns:
          The last layer's output and what ``keep`` returned, with a leading layer axis.
        """
        config = self.config
        rope = rope_tables(config.rope, config.head_dim, positions)
        graphdef, params = nnx.split(self.layers)

        def step(hidden: Array, layer: tuple) -> tuple[Array, Leaf]:
            index, layer_params, *of_layer = layer
            tap = tap_of(index, *of_layer)
            hidden, own = nnx.merge(graphdef, layer_params)(hidden, rope, tap)
            hidden = constrain(hidden, "examples")
            early = tap.capture.site(EARLY_LOGITS)
            if early is not None:
                tap.captured[EARLY_LOGITS] = self.logits(gather_rows(hidden, tap.rows(early)))
            return hidden, keep(tap, own)

        # Recomputed in the backward pass, a layer need not store its S x S weights; forward is unaffected.
        step = jax.checkpoint(step)
        return jax.lax.scan(step, hidden, (jnp.arange(config.num_layers), params, resolved.layers, per_layer))
