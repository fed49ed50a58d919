"""The device side of a lane: its arrays by tier, and what is kept of the clean run."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jaxmllm.analysis.sharing.plan import Needs
from jaxmllm.analysis.sharing.programs import RunEdits, embed, take_rows
from jaxmllm.analysis.sharing.rule import Segment, Tier, Touch
from jaxmllm.analysis.sharing.segments import Chunk, Lane, Row, slots_of, take_pairs, take_slots
from jaxmllm.analysis.sharing.touch import Branch
from jaxmllm.models import forward as pure
from jaxmllm.models.attention import KeyValue
from jaxmllm.models.inputs import Inputs
from jaxmllm.models.layout import Layout, allowed_pairs
from jaxmllm.models.sharding import put
from jaxmllm.models.text_config import DecoderConfig

# Which chunk a value belongs to; ``None`` is the whole lane (tier GROUP).
Target = int | None
# Neighbouring segments whose values are kept in one array.
Segments = tuple[Segment, ...]


@dataclasses.dataclass(frozen=True)
class Place:
    """The slots of one tier of one chunk, on the device.

    Attributes:
      numbers ``[n]``: the rows they are taken from.
      slots ``[n, S]``: sequence index of each slot, -1 at padding; S is C for GROUP and CONTEXT.
      features ``[n, S]``: number of the image feature in each slot among those of these rows, -1 at text.
      images: indices of these rows' images.
    """

    numbers: np.ndarray
    slots: np.ndarray
    features: np.ndarray
    images: tuple[int, ...]
    layout: Layout


@dataclasses.dataclass
class LaneWork:
    """One lane of one block.

    Attributes:
      inputs: of the block, as NumPy arrays.
      windows: whether any layer looks back only so far.
      mesh: devices that examples are laid over; ``None`` where that is one device.
      hidden, keys: what is kept of the clean run, by layer, segment and target.
    """

    graphdef: Any
    params: pure.Params
    inputs: Inputs
    image_token_id: int
    rows: Sequence[Row]
    lane: Lane
    windows: bool = False
    mesh: Mesh | None = None
    hidden: dict[tuple[int, Segments, Target], Array] = dataclasses.field(default_factory=dict)
    keys: dict[tuple[int, Segment, Target], KeyValue] = dataclasses.field(default_factory=dict)
    _places: dict[tuple[Tier, Target], Place] = dataclasses.field(default_factory=dict)
    _weights: dict[tuple[int, Tier, Target], Array] = dataclasses.field(default_factory=dict)

    def put(self, value: np.ndarray) -> Array:
        """An array on the device, its examples laid over the mesh."""
        return put(value, self.mesh, "examples")

    def chunk(self, target: Target) -> Chunk:
        return self.lane.chunks[target or 0]

    def target(self, tier: int, chunk: int) -> Target:
        """Where a value of a tier is kept."""
        return None if tier == Tier.GROUP else chunk

    def place(self, tier: Tier, target: Target) -> Place:
        if (tier, target) not in self._places:
            self._places[tier, target] = self._make_place(tier, target)
        return self._places[tier, target]

    def _make_place(self, tier: Tier, target: Target) -> Place:
        chunk = self.chunk(target)
        widest = np.array([self.lane.widest])
        numbers = {Tier.GROUP: widest, Tier.CONTEXT: chunk.contexts, Tier.ROW: chunk.rows}[tier]
        lengths = chunk.lengths if tier == Tier.ROW else chunk.lengths[:2]
        slots = slots_of(self.rows, numbers, lengths)
        features = np.full(slots.shape, -1, np.int32)
        images: list[int] = []
        an_image = 0 if self.inputs.images is None else self.inputs.images.tokens
        for place, number in enumerate(numbers):
            row = self.rows[number]
            of_token = np.full(np.asarray(self.inputs.input_ids).shape[1], -1)
            of_token[row.tokens] = row.features
            here = np.where(slots[place] >= 0, of_token[slots[place]], -1)
            features[place] = np.where(here >= 0, here + len(images) * an_image, -1)
            images += row.images
        return Place(numbers, slots, features, tuple(images), self._layout(numbers, slots, tier, chunk))

    def _layout(self, numbers: np.ndarray, slots: np.ndarray, tier: Tier, chunk: Chunk) -> Layout:
        ids, mask = np.asarray(self.inputs.input_ids), np.asarray(self.inputs.attention_mask)
        valid = slots >= 0
        positions = self.inputs.position_ids
        if positions is None:
            allowed = mask.astype(bool) if mask.ndim == 2 else allowed_pairs(mask).any(axis=-1)
            positions = np.maximum(np.cumsum(allowed, axis=-1) - 1, 0)
        answers = None
        if tier == Tier.ROW:
            first = chunk.lengths[0] + chunk.lengths[1] + chunk.lengths[2]
            many = np.array([self.rows[number].length(Segment.ANSWER) for number in numbers])
            width = np.asarray(self.inputs.answer_positions).shape[1]
            answers = self.put((first + np.minimum(np.arange(width), many[:, None] - 1)).astype(np.int32))
        return Layout(
            image=self.put(valid & (take_slots(ids, numbers, slots) == self.image_token_id)),
            valid=self.put(valid),
            positions=self.put(take_slots(np.asarray(positions, np.int32), numbers, slots)),
            mask=self.put(take_pairs(allowed_pairs(mask), numbers, slots)) if mask.ndim == 4 else None,
            answer_positions=answers,
            max_image_tokens=self.inputs.max_image_tokens,
            bucketed=self.inputs.bucketed,
            place=self.put(slots.astype(np.int32)) if self.windows else None,
        )

    def embedded(self, segments: Segments, chunk: int) -> Float[Array, "n run D"]:
        """What enters layer 0."""
        tier = self.lane.content[segments[0]]
        target = self.target(tier, chunk)
        place, span = self.place(tier, target), self.span(segments, target)
        ids = take_slots(np.asarray(self.inputs.input_ids), place.numbers, place.slots)[:, span]
        features, images = place.features[:, span], None
        if self.inputs.images is not None and (features >= 0).any():
            shown = self.inputs.images.take(place.images)
            images = pure.encode_images(self.graphdef, self.params, jax.tree.map(self.put, shown.arrays))
        return embed(self.graphdef, self.params, self.put(ids), self.put(features), images)

    @functools.cached_property
    def dtype(self) -> Any:
        """What the decoder computes in."""
        return jax.eval_shape(lambda: pure.merge(self.graphdef, self.params).decoder.embed(jnp.zeros(1, int))).dtype

    def shared_layer_bytes(self, config: DecoderConfig) -> int:
        """Upper bound of what one layer of a shared run leaves: keys and values of its slots."""
        slots = self.chunk(None).context_end
        return slots * 2 * config.num_kv_heads * config.head_dim * self.dtype.itemsize

    def span(self, segments: Sequence[Segment], target: Target) -> slice:
        """The slots of neighbouring segments."""
        ends = np.concatenate([[0], np.cumsum(self.chunk(target).lengths)])
        return slice(int(ends[segments[0]]), int(ends[segments[-1] + 1]))

    def lift(self, value: Array, tier: Tier, to: Tier, chunk: int) -> Float[Array, "n T D"]:
        """A value of a lower tier for every example of a higher one."""
        if tier == to:
            return value
        many = len(self.place(to, chunk).numbers)
        if tier == Tier.GROUP:
            return jnp.broadcast_to(value, (many, *value.shape[1:]))
        return take_rows(value, put(self.chunk(chunk).owner.astype(np.int32), self.mesh))

    def lift_keys(self, keys: KeyValue, tier: Tier, to: Tier, chunk: int) -> KeyValue:
        """Keys for the queries of a higher tier: left as they are where every context has equally many rows in turn."""
        owner = self.chunk(chunk).owner
        if tier in (Tier.GROUP, to):
            return keys
        contexts = keys.key.shape[0]
        if len(owner) % contexts == 0 and (owner == np.arange(len(owner)) // (len(owner) // contexts)).all():
            return keys
        return take_rows(keys, put(owner.astype(np.int32), self.mesh))

    def edits(
        self, branch: Branch, touch: Touch, layer: int, segments: Sequence[Segment], tier: Tier, target: Target
    ) -> RunEdits:
        """A branch's edits of one layer on one run. A kind that never touches the run is left out, so that it does
        not lead to another program."""
        chosen = list(segments)

        def masks(terms: Sequence[Any], acts: np.ndarray) -> tuple:
            if not acts[:, chosen].any():
                return ()
            return tuple(
                (np.float32(term.gate[layer]), *(self.weights(values, tier, target) for values in term.weights))
                for term in terms
            )

        scale = None if branch.head_scale is None else put(branch.head_scale[layer], self.mesh)
        return RunEdits(
            erase=masks(branch.erase, touch.inputs),
            blind=masks(branch.blind, touch.keys),
            knockout=masks(branch.knockout, touch.outputs),
            head_scale=scale,
        )

    def weights(self, values: np.ndarray, tier: Tier, target: Target) -> Array:
        """Position weights by slot, on the device; branches share them."""
        key = (id(values), tier, target)
        if key not in self._weights:
            place = self.place(tier, target)
            self._weights[key] = self.put(take_slots(values, place.numbers, place.slots))
        return self._weights[key]

    def forget(self, chunk: int, needed: Needs) -> None:
        """Drops what the branches still to come do not need of a chunk's clean run."""
        for layer, segments, target in list(self.hidden):
            if target == chunk and not any((layer, segment) in needed.hidden for segment in segments):
                del self.hidden[layer, segments, target]
        for layer, segment, target in list(self.keys):
            if target == chunk and (layer, segment) not in needed.keys:
                del self.keys[layer, segment, target]
