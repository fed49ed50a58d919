"""Beams of one example as a tree in the key-value cache.

Every token that a beam ever took keeps its slot: depth p, row r, behind the prompt. A beam is a path through the tree,
and its attention sees the slots of its own path alone. So beams share the prompt's keys, nothing is copied when beams
are reordered, and going back to an earlier depth is only a matter of the paths that held there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxmllm.decoding.cache import Cache, StepTap
from jaxmllm.decoding.rules import Decoding
from jaxmllm.models.attention import BLOCKED, KeyValue, attention, attention_rows
from jaxmllm.models.capture import ATTENTION, Capture, Site
from jaxmllm.models.decoder import Tap
from jaxmllm.models.edits import LayerEdits, ResolvedEdits, resolve
from jaxmllm.models.layers import Leaf
from jaxmllm.models.layout import Layout

# The attention of a token to everything on its path, itself last: the highest of its heads.
HIGHEST = Capture.attention(rows="last", keys="all", heads="max")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tree:
    """One example's prompt with room for the tokens of its beams.

    Attributes:
      layout: of one row: S slots of the prompt, then ``depth x beams``, the row running fastest.
      layers, pairs: edits spelled out for these slots.
      cache: keys and values, ``[L, K, 1, slots, E]``.
      beams: R.
      prompt: S.
    """

    layout: Layout
    layers: LayerEdits
    pairs: tuple[tuple[Leaf, Leaf], ...]
    cache: Cache
    beams: int = dataclasses.field(metadata={"static": True})
    prompt: int = dataclasses.field(metadata={"static": True})

    @property
    def depth(self) -> int:
        """T, the longest path that there is room for."""
        return (self.layout.length - self.prompt) // self.beams


def plant(decoding: Decoding, beams: int) -> Tree:
    """The trees of all examples, with a leading axis of B; see ``jax.lax.map``."""
    config, layout = decoding.module.decoder.config, decoding.prompts.layout
    resolved = resolve(decoding.edits, config.num_layers, config.num_heads, layout)
    prompt, room = decoding.first_slot, decoding.ending.room
    slots = jnp.concatenate([jnp.arange(prompt), prompt + jnp.repeat(jnp.arange(room), beams)])

    def of_slots(values: Leaf | None, axis: int) -> Leaf | None:
        """Slots for a tree, and examples in front, each as a batch of one."""
        if values is None:
            return None
        return jnp.expand_dims(jnp.moveaxis(jnp.take(values, slots, axis=axis), axis - 1, 0), axis)

    def cached(values: Float[Array, "L K B T E"]) -> Float[Array, "B L K 1 slots E"]:
        grown = jnp.pad(values[..., :prompt, :], ((0, 0),) * 3 + ((0, room * beams), (0, 0)))
        return jnp.expand_dims(jnp.moveaxis(grown, 2, 0), 3)

    batch = len(layout.valid)
    each = dataclasses.replace(
        layout,
        image=of_slots(layout.image, 1),
        valid=of_slots(layout.valid, 1),
        positions=of_slots(layout.positions, 1),
        place=of_slots(layout.place, 1),
        answer_positions=layout.last[:, None, None],
    )
    layers = LayerEdits(
        erase=of_slots(resolved.layers.erase, 2),
        blind=of_slots(resolved.layers.blind, 2),
        knockout=tuple(jnp.broadcast_to(gate, (batch, *gate.shape)) for gate in resolved.layers.knockout),
        head_scale=None
        if resolved.layers.head_scale is None
        else jnp.broadcast_to(resolved.layers.head_scale, (batch, *resolved.layers.head_scale.shape)),
    )
    pairs = tuple((of_slots(queries, 1), of_slots(keys, 1)) for queries, keys in resolved.queries_and_keys)
    cache = Cache(cached(decoding.cache.key), cached(decoding.cache.value))
    return Tree(each, layers, pairs, cache, beams, prompt)


@dataclasses.dataclass
class PathTap(StepTap):
    """Stands at the sites of one layer for a token of each of several paths, all of one depth.

    Attributes:
      visible ``[Q, slots]``: the slots on each path, the prompt's included.
    """

    visible: Leaf | None = None

    def rows(self, wanted: Site) -> Int[Array, "Q 1"]:
        assert self.visible is not None
        return jnp.zeros((len(self.visible), 1), jnp.int32)

    def attend(self, query: Array, own: KeyValue, past: Sequence[KeyValue]) -> Float[Array, "Q 1 H E"]:
        assert self.visible is not None
        seen, bias = self.seen(jnp.asarray(self.start))
        on_path = jnp.concatenate([self.visible, jnp.ones((len(self.visible), 1), bool)], axis=1)
        bias = jnp.where(on_path[:, None], bias, 2 * BLOCKED)
        wanted = self.capture.site(ATTENTION)
        if wanted is not None:
            self.keep_attention(wanted, attention_rows(query, [*past, seen, own], bias))
        return self.finish(attention(query, own, [*past, seen], lambda *span: bias))


def grow(
    decoding: Decoding,
    tree: Tree,
    tokens: Int[Array, " Q"],
    depth: Int[Array, ""],
    paths: Int[Array, "Q T"],
) -> tuple[Float[Array, "Q V"], Float[Array, "Q slots"], KeyValue]:
    """The pass over one token at the end of each path.

    Args:
      decoding: gives the model.
      tree: whose slots up to ``depth`` the paths run through.
      tokens: one a path.
      depth: at which they stand.
      paths: the row of each path at every lesser depth.

    Returns:
      Logits of what follows, the last layer's highest attention to every slot and, last, to the token itself; and its
      keys and values of all layers.
    """
    decoder = decoding.module.decoder
    levels = jnp.arange(tree.depth)
    on_path = (paths[:, :, None] == jnp.arange(tree.beams)) & (levels < depth)[None, :, None]
    of_prompt = jnp.broadcast_to(tree.layout.valid[:, : tree.prompt], (len(tokens), tree.prompt))
    visible = jnp.concatenate([of_prompt, on_path.reshape(len(tokens), -1)], axis=1)
    slot = tree.prompt + depth * tree.beams
    hooks = () if decoding.edits is None else decoding.edits.hooks

    def tap(layer: Array, edits: LayerEdits, of_layer: Cache) -> Tap:
        acting = (edits, tree.pairs, hooks)
        windows = decoder.config.windows
        return PathTap(layer, *acting, HIGHEST, tree.layout, slot, slot + 1, windows, cache=of_layer, visible=visible)

    positions = jax.lax.dynamic_slice_in_dim(tree.layout.positions, slot, 1, axis=1)
    hidden, (own, captured) = decoder.run(
        decoder.embed(tokens[:, None]),
        jnp.broadcast_to(positions, (len(tokens), *positions.shape[1:])),
        ResolvedEdits(tree.layers, tree.pairs, hooks),
        tap,
        lambda tap, own: (own, tap.captured),
        tree.cache,
    )
    return decoder.logits(hidden[:, 0]), captured[ATTENTION][-1, :, 0], own


def rooted(tree: Tree, own: KeyValue, depth: Int[Array, ""]) -> Tree:
    """The tree with the keys and values ``[L, R, 1, K, E]`` of a whole depth in place."""
    slot = tree.prompt + depth * tree.beams

    def write(values: Float[Array, "L K 1 slots E"], new: Float[Array, "L R 1 K E"]) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(values, jnp.transpose(new, (0, 3, 2, 1, 4)), slot, axis=3)

    return dataclasses.replace(tree, cache=Cache(write(tree.cache.key, own.key), write(tree.cache.value, own.value)))


def along(rows: Float[Array, "Q slots"], tree: Tree, depth: Int[Array, ""]) -> Float[Array, "Q T"]:
    """Attention of the tokens at ``depth`` to their paths, by depth; their own attention to themselves included."""
    by_depth = rows[:, tree.prompt : -1].reshape(len(rows), tree.depth, tree.beams).sum(axis=-1)
    return jnp.where(jnp.arange(tree.depth) == depth, rows[:, -1:], by_depth)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chosen:
    """What a step of beam search chooses.

    Attributes:
      parents ``[R]``, tokens ``[R]``, scores ``[R]``: the beams that go on.
      best_parents ``[R]``, best_tokens ``[R]``, best_scores ``[R]``: the best R, those that end included.
    """

    parents: Leaf
    tokens: Leaf
    scores: Leaf
    best_parents: Leaf
    best_tokens: Leaf
    best_scores: Leaf


def choose_beams(scores: Float[Array, "R V"], stops: Bool[Array, " V"]) -> Chosen:
    """The best R continuations that do not end, and the best R of all.

    Source: transformers' ``BeamSearchScorer.process``.
    """
    beams, words = scores.shape
    best, flat = jax.lax.top_k(scores.reshape(-1), 2 * beams)
    parents, tokens = flat // words, flat % words
    ends = stops[tokens]
    going = jnp.argsort(ends, stable=True)[:beams]
    return Chosen(
        parents=parents[going],
        tokens=tokens[going],
        scores=best[going],
        best_parents=parents[:beams],
        best_tokens=tokens[:beams],
        best_scores=best[:beams],
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ended:
    """The best answers that have ended, R at most, in no order; lists of them have a leading axis.

    Attributes:
      scores ``[R]``: log-probability by length; minus infinity where there is none.
      tokens ``[R, T]``, token_scores ``[R, T]``: the end token included; token_scores are the model's own
        log-probabilities.
      lengths ``[R]``: tokens without the end token.
    """

    scores: Leaf
    tokens: Leaf
    token_scores: Leaf
    lengths: Leaf

    def add(self, present: Leaf, score: Leaf, tokens: Leaf, token_scores: Leaf, length: Leaf) -> Ended:
        """With one more in the place of the worst, if it is ``present`` and better.

        Source: transformers' ``BeamHypotheses.add``.
        """
        worst = jnp.argmin(self.scores)
        better = present & (score > self.scores[worst])

        def put(values: Array, new: Array) -> Array:
            return values.at[worst].set(jnp.where(better, new, values[worst]))

        return Ended(
            put(self.scores, score),
            put(self.tokens, tokens),
            put(self.token_scores, token_scores),
            put(self.lengths, length),
        )


def path_values(values: Shaped[Array, "T R *rest"], path: Int[Array, " T"]) -> Any:
    """What stands along a path, by depth."""
    return values[jnp.arange(len(path)), path]
