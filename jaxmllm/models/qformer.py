"""InstructBLIP's Q-Former: query tokens that read the instruction, and the image by cross-attention.

A BERT (post-norm layers) over the query tokens followed by the instruction's words. All of them attend to each other;
in every ``cross_attention_frequency``-th layer, the first one included, the query tokens then attend to the vision
tower's hidden states. Query tokens and words have feed-forward blocks of their own.

Source: Li et al., "BLIP-2" (arXiv 2301.12597); Dai et al., "InstructBLIP" (arXiv 2305.06500); transformers'
``InstructBlipQFormerModel`` is the reference.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxmllm.errors import ConfigError
from jaxmllm.models.attention import BLOCKED, KeyValue, attention_rows
from jaxmllm.models.config import ACTIVATIONS, ConfigReader
from jaxmllm.models.layers import Builder, Mlp


@dataclasses.dataclass(frozen=True)
class QFormerConfig:
    """A Q-Former. Defaults are those of transformers' ``InstructBlipQFormerConfig``.

    Attributes:
      source_size: width of the hidden states that the query tokens attend to.
    """

    vocab_size: int = 30_522
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    max_positions: int = 512
    layer_norm_eps: float = 1e-12
    cross_attention_frequency: int = 2
    source_size: int = 1408

    @property
    def cross_layers(self) -> tuple[int, ...]:
        """The layers with cross-attention."""
        return tuple(range(0, self.num_layers, self.cross_attention_frequency))


def read_qformer(fields: Mapping[str, Any], where: str, source_size: int) -> QFormerConfig:
    """Reads the ``qformer_config`` of an InstructBLIP checkpoint.

    Raises:
      ConfigError: a field that is not handled, or sizes that do not divide.
    """
    reader = ConfigReader(fields, where)
    reader.choice("model_type", "instructblip_qformer", ("instructblip_qformer",))
    reader.take("tie_word_embeddings", None)  # old files write it into every nested config
    reader.choice("position_embedding_type", "absolute", ("absolute",))
    if not reader.take("use_qformer_text_input", True, bool):
        raise ConfigError(f"{where}: use_qformer_text_input is false; InstructBLIP's Q-Former reads the instruction")
    reader.take("encoder_hidden_size", None)  # transformers puts the vision tower's width in its place
    for dropout in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
        reader.take(dropout, None)
    config = QFormerConfig(
        vocab_size=reader.positive("vocab_size", 30_522),
        hidden_size=reader.positive("hidden_size", 768),
        num_layers=reader.positive("num_hidden_layers", 12),
        num_heads=reader.positive("num_attention_heads", 12),
        intermediate_size=reader.positive("intermediate_size", 3072),
        hidden_act=reader.choice("hidden_act", "gelu", ACTIVATIONS),
        max_positions=reader.positive("max_position_embeddings", 512),
        layer_norm_eps=float(reader.take("layer_norm_eps", 1e-12, (int, float))),
        cross_attention_frequency=reader.positive("cross_attention_frequency", 2),
        source_size=source_size,
    )
    reader.finish()
    if config.hidden_size % config.num_heads:
        raise ConfigError(
            f"{where}: hidden_size={config.hidden_size} is not a multiple of num_attention_heads={config.num_heads}"
        )
    return config


class QFormerAttention(nnx.Module):
    """Multi-head attention to a source, with BERT's norm after the residual sum.

    Queries are few, so the square of scores is small and is spelled out.
    """

    def __init__(self, config: QFormerConfig, source_size: int, build: Builder):
        width = config.hidden_size
        self.query = build.linear(width, width)
        self.key = build.linear(source_size, width)
        self.value = build.linear(source_size, width)
        self.out = build.linear(width, width)
        self.norm = build.layer_norm(width, config.layer_norm_eps)
        self.num_heads = config.num_heads

    def __call__(
        self,
        hidden: Float[Array, "I S D"],
        source: Float[Array, "I T F"],
        bias: Float[Array, "I 1 T"] | None = None,
        nudge: Float[Array, "I H S T"] | float = 0.0,
    ) -> Float[Array, "I S D"]:
        """``nudge`` is added to the weights, to be differentiated by."""
        value = self._heads(self.value(source))
        weights = (self.weights(hidden, source, bias) + nudge).astype(value.dtype)
        mixed = jnp.einsum("ihst,ithe->ishe", weights, value)
        return self.norm(self.out(mixed.reshape(hidden.shape)) + hidden)

    def weights(
        self, hidden: Float[Array, "I S D"], source: Float[Array, "I T F"], bias: Float[Array, "I 1 T"] | None = None
    ) -> Float[Array, "I H S T"]:
        """Attention weights in float32; ``bias`` is added to the scores of each key."""
        query, key = self._heads(self.query(hidden)), self._heads(self.key(source))
        shape = (*hidden.shape[:2], source.shape[1])
        every = jnp.zeros(shape) if bias is None else jnp.broadcast_to(bias, shape)
        return attention_rows(query, [KeyValue(key, key)], every)

    def _heads(self, states: Float[Array, "I S D"]) -> Float[Array, "I S H E"]:
        return states.reshape(*states.shape[:2], self.num_heads, -1)


class FeedForward(nnx.Module):
    """Two linear maps with BERT's norm after the residual sum."""

    def __init__(self, config: QFormerConfig, build: Builder):
        width = config.hidden_size
        self.mlp = Mlp((width, config.intermediate_size, width), config.hidden_act, build)
        self.norm = build.layer_norm(width, config.layer_norm_eps)

    def __call__(self, hidden: Float[Array, "I S D"]) -> Float[Array, "I S D"]:
        return self.norm(self.mlp(hidden) + hidden)


class QFormerLayer(nnx.Module):
    """What every layer has; cross-attention, which only some have, stands apart."""

    def __init__(self, config: QFormerConfig, build: Builder):
        self.attention = QFormerAttention(config, config.hidden_size, build)
        self.query_mlp = FeedForward(config, build)
        self.text_mlp = FeedForward(config, build)

    def __call__(
        self,
        queries: Float[Array, "I N D"],
        text: Float[Array, "I Q D"],
        bias: Float[Array, "I 1 S"],
        look: Callable[[Array], Array],
    ) -> tuple[Float[Array, "I N D"], Float[Array, "I Q D"]]:
        """Query tokens and words after the layer; ``look`` is the cross-attention of the query tokens."""
        both = jnp.concatenate([queries, text], axis=1)
        both = self.attention(both, both, bias)
        queries, text = jnp.split(both, [queries.shape[1]], axis=1)
        return self.query_mlp(look(queries)), self.text_mlp(text)


class QFormer(nnx.Module):
    """The query tokens, and what the Q-Former makes of them."""

    def __init__(self, config: QFormerConfig, num_query_tokens: int, build: Builder):
        self.config = config
        self.dtype = build.dtype
        self.query_tokens = build.normal(1, num_query_tokens, config.hidden_size)
        self.word_embed = build.embed(config.vocab_size, config.hidden_size)
        self.position_embed = build.embed(config.max_positions, config.hidden_size)
        self.norm = build.layer_norm(config.hidden_size, config.layer_norm_eps)
        self.layers = build.stack(config.num_layers, lambda build: QFormerLayer(config, build))
        self.cross = build.stack(
            len(config.cross_layers), lambda build: QFormerAttention(config, config.source_size, build)
        )

    def embed(self, input_ids: Int[Array, "I Q"]) -> tuple[Float[Array, "I N D"], Float[Array, "I Q D"]]:
        """Query tokens, which have no position, and the instruction's words, as they enter the first layer."""
        images, length = input_ids.shape
        text = self.word_embed(input_ids) + self.position_embed(jnp.arange(length))
        queries = jnp.broadcast_to(self.query_tokens[...].astype(self.dtype), (images, *self.query_tokens.shape[1:]))
        return self.norm(queries), self.norm(text)

    def bias(self, attention_mask: Bool[Array, "I Q"]) -> Float[Array, "I 1 S"]:
        """Keeps the instruction's padding out of self-attention."""
        blocked = jnp.pad(~attention_mask, ((0, 0), (self.query_tokens.shape[1], 0)))
        return jnp.where(blocked, BLOCKED, 0.0).astype(jnp.float32)[:, None]

    def __call__(
        self,
        source: Float[Array, "I T F"],
        input_ids: Int[Array, "I Q"],
        attention_mask: Bool[Array, "I Q"],
        nudge: Float[Array, "C I H N T"] | None = None,
    ) -> Float[Array, "I N D"]:
        """The query tokens after the last layer.

        Args:
          source: hidden states of the vision tower, the class token included.
          input_ids: the instruction in the Q-Former's own vocabulary.
          attention_mask: false at padding.
          nudge: what is added to the weights of each cross-attention, to be differentiated by.
        """
        return self._run(source, input_ids, attention_mask, nudge)[0]

    def cross_weights(
        self, source: Float[Array, "I T F"], input_ids: Int[Array, "I Q"], attention_mask: Bool[Array, "I Q"]
    ) -> Float[Array, "C I H N T"]:
        """Cross-attention weights of the query tokens, in every layer that has any; rows sum to 1."""
        _, asking = self._run(source, input_ids, attention_mask)
        graphdef, params = nnx.split(self.cross)

        def weights(params: Any, queries: Array) -> Array:
            return nnx.merge(graphdef, params).weights(queries, source)

        return jax.vmap(weights)(params, asking[:: self.config.cross_attention_frequency])

    def _run(
        self, source: Array, input_ids: Array, attention_mask: Array, nudge: Array | None = None
    ) -> tuple[Float[Array, "I N D"], Float[Array, "L I N D"]]:
        """The query tokens after the last layer, and in every layer as they enter the place of cross-attention."""
        bias = self.bias(attention_mask)
        layer_def, layers = nnx.split(self.layers)

        def step(hidden: tuple[Array, Array], layer: tuple[Array, Any]) -> tuple[tuple[Array, Array], Array]:
            number, params = layer
            asking: list[Array] = []

            def look(queries: Array) -> Array:
                asking.append(queries)
                return self.look(number, queries, source, nudge)

            return nnx.merge(layer_def, params)(*hidden, bias, look), asking[0]

        numbers = jnp.arange(self.config.num_layers)
        (queries, _), asking = jax.lax.scan(step, self.embed(input_ids), (numbers, layers))
        return queries, asking

    def look(
        self,
        number: Int[Array, ""],
        queries: Float[Array, "I N D"],
        source: Float[Array, "I T F"],
        nudge: Float[Array, "C I H N T"] | None = None,
    ) -> Float[Array, "I N D"]:
        """The query tokens after a layer's cross-attention; as they were where the layer has none."""
        every = self.config.cross_attention_frequency
        cross_def, cross = nnx.split(self.cross)

        def attend(queries: Array) -> Array:
            here = jax.tree.map(lambda leaf: leaf[number // every], cross)
            added = 0.0 if nudge is None else nudge[number // every]
            return nnx.merge(cross_def, here)(queries, source, nudge=added)

        return jax.lax.cond(number % every == 0, attend, lambda queries: queries, queries)
