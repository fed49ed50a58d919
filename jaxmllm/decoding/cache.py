"""The key-value cache: a fixed number of slots, prompts first, then what is generated; its two passes over the decoder.

All prompts of a batch end at the same slot, their padding included, so that each step of the batch fills one slot.
Positions, masks and edits follow from the layout of prompts *and* slots, so they hold for all that is generated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxmllm.models.attention import BLOCKED, KeyValue, attention, attention_rows
from jaxmllm.models.capture import ATTENTION, Capture, Site
from jaxmllm.models.decoder import Tap
from jaxmllm.models.edits import Edits, LayerEdits, resolve
from jaxmllm.models.layers import Leaf
from jaxmllm.models.layout import Layout, gather_rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys (rotated) and values of every layer.

    Attributes:
      key ``[L, K, B, T, E]``, value ``[L, K, B, T, E]``: heads first, the order in which attention reads them.
    """

    key: Leaf
    value: Leaf

    @classmethod
    def of_layer(cls, own: KeyValue, slots: int, before: Cache | None = None) -> Cache:
        """One layer's ``[K, B, T, E]`` from a run that follows ``before`` (or begins with slot 0); zeros behind it."""

        def place(values: Float[Array, "B run K E"], first: Float[Array, "K B head E"] | None) -> Array:
            heads_first = jnp.moveaxis(values, 2, 0)
            filled = heads_first if first is None else jnp.concatenate([first, heads_first], axis=2)
            return jnp.pad(filled, ((0, 0), (0, 0), (0, slots - filled.shape[2]), (0, 0)))

        if before is None:
            return cls(place(own.key, None), place(own.value, None))
        return cls(place(own.key, before.key), place(own.value, before.value))

    def head(self, slots: int) -> Cache:
        """The first slots alone."""
        return Cache(self.key[..., :slots, :], self.value[..., :slots, :])

    def parts(self) -> KeyValue:
        """The slots as ``attention`` takes them, ``[..., B, T, K, E]``."""
        return KeyValue(jnp.moveaxis(self.key, -4, -2), jnp.moveaxis(self.value, -4, -2))

    def put(self, own: KeyValue, slot: Int[Array, ""]) -> Cache:
        """With the keys and values ``[..., B, 1, K, E]`` of one slot in place."""

        def write(values: Array, new: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(values, jnp.moveaxis(new, -2, -4), slot, axis=values.ndim - 2)

        return Cache(write(self.key, own.key), write(self.value, own.value))


def with_room(layout: Layout, room: int) -> Layout:
    """The layout of prompts followed by ``room`` slots for what is generated.

    Generated tokens count on from the prompt's highest rotary position. They are text, and question where the prompt
    has an image; ``last`` stays the prompt's last token, as where an answer is given (``append_answers``).

    Args:
      layout: of the prompts alone, without a mask over pairs.
      room: slots to add.
    """
    batch, length = layout.valid.shape
    more = jnp.arange(room)
    seen = layout.valid if layout.positions.ndim == 2 else layout.valid[..., None]
    highest = jnp.max(jnp.where(seen, layout.positions, -1).reshape(batch, -1), axis=-1)
    positions = jnp.broadcast_to(
        (highest[:, None] + 1 + more).reshape(batch, room, *[1] * (layout.positions.ndim - 2)),
        (batch, room, *layout.positions.shape[2:]),
    )
    # sliding windows count tokens as they were given: what is generated follows the last token, not the padding
    place = jnp.concatenate(
        [jnp.broadcast_to(jnp.arange(length), (batch, length)), layout.last[:, None] + 1 + more], axis=1
    )
    filled = jnp.ones((batch, room), bool)
    return dataclasses.replace(
        layout,
        image=jnp.concatenate([layout.image, ~filled], axis=1),
        valid=jnp.concatenate([layout.valid, filled], axis=1),
        positions=jnp.concatenate([layout.positions, positions], axis=1),
        answer_positions=layout.last[:, None],
        # edits' position weights are those of the prompt, and 0 behind it
        bucketed=True,
        place=place,
    )


def join(head: Layout, keep: Bool[Array, "B S"], tail: Layout) -> Layout:
    """The layout of slots that are there already, of which only some count, followed by others.

    Tokens of the tail count on from the highest rotary position that is kept, whatever positions they have themselves.

    Args:
      head: of the slots that are there.
      keep: those of them that the sequence still has, in order; a part of the valid ones.
      tail: of what follows.
    """
    following = tail.positions
    if following.ndim < head.positions.ndim:  # text alone counts alike on every rotary axis
        following = jnp.broadcast_to(following[..., None], (*following.shape, head.positions.shape[-1]))
    axes = (1,) * (following.ndim - 2)
    seen = keep.reshape(*keep.shape, *axes)
    highest = jnp.max(jnp.where(seen, head.positions, -1).reshape(len(keep), -1), axis=-1).reshape(-1, 1, *axes)
    valid = jnp.concatenate([keep, tail.valid], axis=1)
    return Layout(
        image=jnp.concatenate([head.image & keep, tail.image], axis=1),
        valid=valid,
        positions=jnp.concatenate([head.positions, following + highest + 1], axis=1),
        mask=None,
        answer_positions=None,
        max_image_tokens=head.max_image_tokens + tail.max_image_tokens,
        bucketed=True,
        # what was left out stands between the two, so windows count what is left
        place=jnp.cumsum(valid, axis=1) - 1,
    )


def prefill(
    module: Any,
    hidden: Float[Array, "B run D"],
    layout: Layout,
    edits: Edits | None,
    capture: Capture,
    before: Cache | None = None,
) -> tuple[Float[Array, "B V"], Cache, dict[str, Array]]:
    """The pass over prompts, or over what follows slots that are filled already.

    Args:
      module: of the family.
      hidden: embedded tokens of the run.
      layout: of all slots, those for generated tokens included.
      edits: what is done on the way.
      capture: what is kept on the way.
      before: keys and values of the slots before the run.

    Returns:
      Logits of the first generated token, the cache, and the captured sites.
    """
    decoder = module.decoder
    start = 0 if before is None else before.key.shape[-2]
    stop = start + hidden.shape[1]
    resolved = resolve(edits, decoder.config.num_layers, decoder.config.num_heads, layout)

    def tap(layer: Array, edits: LayerEdits, of_layer: Cache | None) -> Tap:
        acting = (edits, resolved.queries_and_keys, resolved.hooks)
        return RunTap(layer, *acting, capture, layout, start, stop, decoder.config.windows, before=of_layer)

    def keep(tap: Tap, own: KeyValue) -> tuple[Cache, dict[str, Array]]:
        assert isinstance(tap, RunTap)
        return Cache.of_layer(own, layout.length, tap.before), tap.captured

    hidden, (cache, captured) = decoder.run(hidden, layout.positions[:, start:stop], resolved, tap, keep, before)
    return decoder.logits(gather_rows(hidden, layout.last[:, None] - start)[:, 0]), cache, captured


@dataclasses.dataclass
class RunTap(Tap):
    """Stands at the sites of one layer for a run of slots.

    Attributes:
      before: keys and values of the slots before the run.
    """

    before: Cache | None = None

    def attend(self, query: Array, own: KeyValue, past: Sequence[KeyValue]) -> Float[Array, "B run H E"]:
        return super().attend(query, own, past if self.before is None else [*past, self.before.parts()])


@dataclasses.dataclass
class StepTap(Tap):
    """Stands at the sites of one layer for one slot, whose number is data: ``start``.

    Attributes:
      cache: the layer's, of all slots before.
    """

    cache: Cache | None = None

    def of_run(self, values: Float[Array, "B S"]) -> Float[Array, "B 1"]:
        return jax.lax.dynamic_slice_in_dim(values, self.start, 1, axis=1)

    def rows(self, wanted: Site) -> Int[Array, "B 1"]:
        """The one row there is, whatever rows of the prompts were asked for."""
        return jnp.zeros((len(self.layout.valid), 1), jnp.int32)

    def seen(self, slot: Int[Array, ""]) -> tuple[KeyValue, Float[Array, "B 1 T"]]:
        """All slots before, and the bias towards them and, last, towards the slot's own key.

        The slot's own key stands apart: put into its place it would have the whole layer's cache copied.
        """
        assert self.cache is not None
        seen = self.cache.parts()
        bias = self.bias(slot[None, None], seen.length)
        of_own = jax.lax.dynamic_slice_in_dim(bias, slot, 1, axis=2)
        bias = jnp.where(jnp.arange(seen.length) == slot, 2 * BLOCKED, bias)
        return seen, jnp.concatenate([bias, of_own], axis=2)

    def attend(self, query: Array, own: KeyValue, past: Sequence[KeyValue]) -> Float[Array, "B 1 H E"]:
        seen, bias = self.seen(jnp.asarray(self.start))
        wanted = self.capture.site(ATTENTION)
        if wanted is not None:
            weights = attention_rows(query, [*past, seen, own], bias)
            slots = jax.lax.dynamic_update_slice_in_dim(weights[..., :-1], weights[..., -1:], self.start, axis=-1)
            self.keep_attention(wanted, slots)
        return self.finish(attention(query, own, [*past, seen], lambda *span: bias))


def step(
    module: Any,
    tokens: Int[Array, " B"],
    slot: Int[Array, ""],
    layout: Layout,
    edits: Edits | None,
    cache: Cache,
    capture: Capture = Capture(),
) -> tuple[Float[Array, "B V"], Cache, dict[str, Array]]:
    """The pass over one generated token.

    Args:
      module: of the family.
      tokens: one an example.
      slot: where they stand.
      layout: of prompts and slots.
      edits: as in ``prefill``.
      cache: of all slots before.
      capture: what is kept on the way, of this token alone.

    Returns:
      Logits of the next token, the cache with this one, and the captured sites.
    """
    decoder = module.decoder
    resolved = resolve(edits, decoder.config.num_layers, decoder.config.num_heads, layout)

    def tap(layer: Array, edits: LayerEdits, of_layer: Cache) -> Tap:
        acting = (edits, resolved.queries_and_keys, resolved.hooks)
        return StepTap(layer, *acting, capture, layout, slot, slot + 1, decoder.config.windows, cache=of_layer)

    hidden, (own, captured) = decoder.run(
        decoder.embed(tokens[:, None]),
        jax.lax.dynamic_slice_in_dim(layout.positions, slot, 1, axis=1),
        resolved,
        tap,
        lambda tap, own: (own, tap.captured),
        cache,
    )
    return decoder.logits(hidden[:, 0]), cache.put(own, slot), captured
