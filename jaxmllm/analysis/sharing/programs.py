"""The compiled functions of the fast sweep. Their number does not grow with layers, branches or questions."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxmllm.analysis.scores import Scores, score
from jaxmllm.models import forward as pure
from jaxmllm.models.attention import KeyValue
from jaxmllm.models.capture import Capture
from jaxmllm.models.decoder import Tap
from jaxmllm.models.edits import LayerEdits
from jaxmllm.models.layers import Leaf, rope_tables
from jaxmllm.models.layout import Layout, gather_rows
from jaxmllm.models.sharding import constrain
from jaxmllm.models.text_config import DecoderConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RunEdits:
    """The edits of one layer on one run of slots.

    Attributes:
      erase, blind: pairs of a gate ``[]`` and weights ``[n, S]``.
      knockout: triples of a gate, query weights and key weights.
      head_scale ``[H]``: factors on heads, or ``None``.
    """

    erase: tuple[tuple[Leaf, Leaf], ...] = ()
    blind: tuple[tuple[Leaf, Leaf], ...] = ()
    knockout: tuple[tuple[Leaf, Leaf, Leaf], ...] = ()
    head_scale: Leaf | None = None

    def of_layer(self) -> LayerEdits:
        return LayerEdits(
            erase=_keep(self.erase),
            blind=_keep(self.blind),
            knockout=tuple(gate for gate, _, _ in self.knockout),
            head_scale=self.head_scale,
        )


def _keep(masks: tuple[tuple[Array, Array], ...]) -> Array | None:
    return math.prod(1.0 - gate * weights for gate, weights in masks) if masks else None  # type: ignore[return-value]


@functools.partial(jax.jit, static_argnames=("graphdef", "config", "start", "stop", "capture", "keys_alone", "at_once"))
def run_layer(
    graphdef: nnx.GraphDef,
    params: pure.Params,
    layer: Int[Array, ""],
    hidden: Float[Array, "n run D"],
    past: tuple[KeyValue, ...],
    layout: Layout,
    edits: RunEdits,
    *,
    config: DecoderConfig,
    start: int,
    stop: int,
    capture: Capture,
    keys_alone: bool,
    at_once: int,
) -> tuple[Float[Array, "n run D"], KeyValue, dict[str, Array]]:
    """One decoder layer over the run ``[start, stop)`` of the slots.

    Args:
      graphdef: of a decoder layer.
      params: of this layer.
      layer: its number.
      hidden: the run's residual stream.
      past: keys and values of the slots before the run, in order.
      layout: of the slots.
      edits: of this layer.
      config: of the decoder.
      start, stop: the run.
      capture: what to keep of it.
      keys_alone: compute keys and values only; ``hidden`` comes back as it is.
      at_once: examples computed together.

    Returns:
      The next layer's input, keys and values of the run, what was captured.
    """
    module = nnx.merge(graphdef, nnx.State(params))

    def run(
        hidden: Array, past: tuple[KeyValue, ...], layout: Layout, edits: RunEdits
    ) -> tuple[Array, KeyValue, dict[str, Array]]:
        rope = rope_tables(config.rope, config.head_dim, layout.positions[:, start:stop])
        acting = tuple((queries, keys) for _, queries, keys in edits.knockout)
        tap = Tap(layer, edits.of_layer(), acting, (), capture, layout, start, stop, config.windows)
        if keys_alone:
            return hidden, module.keys(hidden, rope, tap), {}
        after, own = module(hidden, rope, tap, past)
        return constrain(after, "examples"), own, tap.captured

    return in_pieces(run, hidden.shape[0], at_once, (hidden, past, layout, edits))


def in_pieces(run: Callable[..., Leaf], count: int, at_once: int, args: tuple[Leaf, ...]) -> Leaf:
    """``run(*args)`` over so many examples at a time; leaves without a leading axis of all examples serve every piece.

    Keys of contexts that serve several examples each cannot be cut, so then everything runs at once.
    """
    leaves, structure = jax.tree.flatten(args)
    of_examples = [leaf.ndim >= 2 and leaf.shape[0] == count for leaf in leaves]
    between = any(leaf.ndim >= 2 and leaf.shape[0] not in (1, count) for leaf in leaves)
    if count <= at_once or count % at_once or between:
        return run(*args)

    def piece(own: list[Array]) -> Leaf:
        cut = iter(own)
        whole = [next(cut) if mine else leaf for leaf, mine in zip(leaves, of_examples, strict=True)]
        return run(*jax.tree.unflatten(structure, whole))

    pieces = [leaf for leaf, mine in zip(leaves, of_examples, strict=True) if mine]
    found = jax.lax.map(piece, [leaf.reshape(-1, at_once, *leaf.shape[1:]) for leaf in pieces])
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), found)


@functools.partial(jax.jit, static_argnames=("graphdef",))
def embed(
    graphdef: nnx.GraphDef,
    params: pure.Params,
    ids: Int[Array, "n T"],
    features: Int[Array, "n T"],
    images: Float[Array, "I N D"] | None,
) -> Float[Array, "n T D"]:
    """Token embeddings, with image feature number ``features`` (of all images, -1 for text) in place."""
    embedded = pure.merge(graphdef, params).decoder.embed(ids)
    if images is None:
        return constrain(embedded, "examples")
    placed = images.reshape(-1, images.shape[-1])[jnp.maximum(features, 0)].astype(embedded.dtype)
    return constrain(jnp.where((features >= 0)[..., None], placed, embedded), "examples")


@functools.partial(jax.jit, static_argnames=("graphdef", "start"))
def read_answer(
    graphdef: nnx.GraphDef,
    params: pure.Params,
    hidden: Float[Array, "B T D"],
    places: Int[Array, "B A"],
    answer_ids: Int[Array, "B A"],
    *,
    start: int,
) -> Scores:
    """Scores ``[B]`` of the answers, read through final norm and head from a layer's output at the slots ``places``,
    of which ``hidden`` begins with slot ``start``."""
    logits = pure.merge(graphdef, params).decoder.logits(gather_rows(hidden, places - start))
    return score(logits, answer_ids)


@jax.jit
def take_layer(stacked: pure.Params, layer: Int[Array, ""]) -> pure.Params:
    """One layer's params."""
    return jax.tree.map(lambda leaf: leaf[layer], stacked)


@jax.jit
def take_rows(tree: Leaf, rows: Int[Array, " B"]) -> Leaf:
    """Rows of every leaf, in any number and order."""
    return jax.tree.map(lambda leaf: constrain(leaf[rows], "examples"), tree)


@functools.partial(jax.jit, static_argnames=("start", "stop"))
def take_slice(tree: Leaf, *, start: int, stop: int) -> Leaf:
    """Positions ``[start, stop)`` of every leaf ``[n, T, ...]``."""
    return jax.tree.map(lambda leaf: leaf[:, start:stop], tree)
