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
from jaxtyping import Array, Float, Int

from jaxmllm.models.attention import BLOCKED, KeyValue, attention
from jaxmllm.models.capture import Capture
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
    def of_layer(cls, own: KeyValue, slots: int) -> Cache:
        """One layer's ``[K, B, T, E]`` from a run that begins with slot 0; what is behind it is zeros."""

        def place(values: Float[Array, "B run K E"]) -> Float[Array, "K B T E"]:
            room = ((0, 0), (0, slots - values.shape[1]), (0, 0), (0, 0))
            return jnp.moveaxis(jnp.pad(values, room), 2, 0)

        return cls(place(own.key), place(own.value))

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


def prefill(
    module: Any, hidden: Float[Array, "B S D"], layout: Layout, edits: Edits | None, capture: Capture
) -> tuple[Float[Array, "B V"], Cache, dict[str, Array]]:
    """The pass over the prompts.

    Args:
      module: of the family.
      hidden: embedded prompts.
      layout: of prompts and slots.
      edits: what is done on the way.
      capture: what is kept on the way.

    Returns:
      Logits of the first generated token, the cache, and the captured sites.
    """
    decoder, length = module.decoder, hidden.shape[1]
    resolved = resolve(edits, decoder.config.num_layers, decoder.config.num_heads, layout)

    def tap(layer: Array, edits: LayerEdits, _: Leaf) -> Tap:
        acting = (edits, resolved.queries_and_keys, resolved.hooks)
        return Tap(layer, *acting, capture, layout, 0, length, decoder.config.windows)

    def keep(tap: Tap, own: KeyValue) -> tuple[Cache, dict[str, Array]]:
        return Cache.of_layer(own, layout.length), tap.captured

    hidden, (cache, captured) = decoder.run(hidden, layout.positions[:, :length], resolved, tap, keep)
    return decoder.logits(gather_rows(hidden, layout.last[:, None])[:, 0]), cache, captured


@dataclasses.dataclass
class StepTap(Tap):
    """Stands at the sites of one layer for one slot, whose number is data: ``start``.

    Attributes:
      cache: the layer's, of all slots before.
    """

    cache: Cache | None = None

    def of_run(self, values: Float[Array, "B S"]) -> Float[Array, "B 1"]:
        return jax.lax.dynamic_slice_in_dim(values, self.start, 1, axis=1)

    def mix(self, query: Array, own: KeyValue, past: Sequence[KeyValue]) -> Float[Array, "B 1 H E"]:
        assert self.cache is not None
        seen, slot = self.cache.parts(), jnp.asarray(self.start)
        bias = self.bias(slot[None, None], seen.length)
        # the slot's own key stands apart: put into its place it would have the whole layer's cache copied
        of_own = jax.lax.dynamic_slice_in_dim(bias, slot, 1, axis=2)
        bias = jnp.where(jnp.arange(seen.length) == slot, 2 * BLOCKED, bias)
        return attention(query, own, [*past, seen], lambda *span: jnp.concatenate([bias, of_own], axis=2))


def step(
    module: Any, tokens: Int[Array, " B"], slot: Int[Array, ""], layout: Layout, edits: Edits | None, cache: Cache
) -> tuple[Float[Array, "B V"], Cache]:
    """The pass over one generated token.

    Args:
      module: of the family.
      tokens: one an example.
      slot: where they stand.
      layout: of prompts and slots.
      edits: as in ``prefill``.
      cache: of all slots before.

    Returns:
      Logits of the next token, and the cache with this one.
    """
    decoder = module.decoder
    resolved = resolve(edits, decoder.config.num_layers, decoder.config.num_heads, layout)

    def tap(layer: Array, edits: LayerEdits, of_layer: Cache) -> Tap:
        acting = (edits, resolved.queries_and_keys, resolved.hooks)
        return StepTap(layer, *acting, Capture(), layout, slot, slot + 1, decoder.config.windows, cache=of_layer)

    hidden, own = decoder.run(
        decoder.embed(tokens[:, None]),
        jax.lax.dynamic_slice_in_dim(layout.positions, slot, 1, axis=1),
        resolved,
        tap,
        lambda tap, own: own,
        cache,
    )
    return decoder.logits(hidden[:, 0]), cache.put(own, slot)
