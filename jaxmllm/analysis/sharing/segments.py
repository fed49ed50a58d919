"""Lays questions out in segments: head, body, question, answer, each padded on its own (see ``rule``).

A *slot* is a place in that arrangement. Padding may so stand between segments; positions count tokens alone, so no
number depends on it. All of this is NumPy on the host, done once a block of questions.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from jaxmllm.analysis.sharing.rule import Segment, Tier
from jaxmllm.analysis.sharing.shapes import Shapes, choose_shapes
from jaxmllm.models.images import Images
from jaxmllm.models.inputs import Inputs
from jaxmllm.models.layout import allowed_pairs


@dataclasses.dataclass(frozen=True)
class Row:
    """One question with its answer, as indices into its original (unpadded) sequence.

    Attributes:
      tokens: sequence index of each token that is not padding.
      ends: where head, body, question and answer end, counted in tokens. The answer's last token, from which nothing is
        read, is left out.
      images: the row's images, as indices into those of the batch.
      features ``[n]``: for an image token, which of the row's image features it holds (N slots an image); -1 for text.
        A placeholder that the mask hides takes its feature away with it.
    """

    tokens: Int[np.ndarray, " n"]
    ends: tuple[int, int, int, int]
    images: tuple[int, ...]
    features: Int[np.ndarray, " n"]

    def length(self, segment: Segment) -> int:
        return self.ends[segment] - (self.ends[segment - 1] if segment else 0)

    def span(self, segment: Segment) -> Int[np.ndarray, " n"]:
        """Sequence indices of a segment's tokens."""
        return self.tokens[self.ends[segment] - self.length(segment) : self.ends[segment]]


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Questions that are computed together: B rows over I contexts, some of either repeated to keep the shape.

    Attributes:
      contexts ``[I]``: one row number a context (that context's first row).
      rows ``[B]``: row numbers.
      kept ``[R]``: the places among them of the rows that are no repeats.
      owner ``[B]``: the context of each row.
      lengths: slots of head, body, question and answer.
    """

    contexts: Int[np.ndarray, " I"]
    rows: Int[np.ndarray, " B"]
    kept: Int[np.ndarray, " R"]
    owner: Int[np.ndarray, " B"]
    lengths: tuple[int, int, int, int]

    @property
    def context_end(self) -> int:
        """C, the slots of head and body."""
        return self.lengths[0] + self.lengths[1]

    @property
    def end(self) -> int:
        """All slots."""
        return sum(self.lengths)


@dataclasses.dataclass(frozen=True)
class Lane:
    """Chunks whose contexts have one shape.

    Attributes:
      shared: all contexts of the lane have the same tokens at the same positions, so that what depends on nothing else
        is computed once for all of them. Their numbers of image tokens may differ: no position sees a later one, so
        what is computed for the most of them serves fewer.
      widest: the row with the longest body.
    """

    chunks: tuple[Chunk, ...]
    shared: bool
    widest: int

    @property
    def content(self) -> tuple[Tier, Tier, Tier, Tier]:
        """On whose content each segment depends before any layer."""
        return (Tier.GROUP if self.shared else Tier.CONTEXT, Tier.CONTEXT, Tier.ROW, Tier.ROW)

    def side_by_side(self, devices: int) -> Lane:
        """The same chunks, so many at a time: each device of a mesh then computes one, as it would alone.

        Where chunks of one shape do not come out even, the last one is repeated, and its repeats count for nothing.
        """
        alike: dict[tuple[int, int, int, int], list[Chunk]] = {}
        for chunk in self.chunks:
            alike.setdefault(chunk.lengths, []).append(chunk)
        joined = [
            join_chunks(chunks[start : start + devices], devices)
            for chunks in alike.values()
            for start in range(0, len(chunks), devices)
        ]
        return dataclasses.replace(self, chunks=tuple(joined))

    @property
    def present(self) -> tuple[bool, bool, bool, bool]:
        """Which segments have slots in any chunk."""
        lengths = np.array([chunk.lengths for chunk in self.chunks])
        return tuple(bool(there) for there in lengths.max(axis=0) > 0)  # type: ignore[return-value]


def find_rows(inputs: Inputs, answer_ids: Int[np.ndarray, "B A"], image_token_id: int) -> list[Row] | None:
    """Cuts every sequence into segments.

    Where no split leaves every segment blind to later ones, as under a mask that lets the image see the question, the
    whole prompt becomes ``question``, of which nothing is shared; where not even the prompt is blind to its answer, the
    result is ``None`` and nothing can be reused at all.
    """
    ids = np.asarray(inputs.input_ids)
    mask = np.asarray(inputs.attention_mask)
    pairs = allowed_pairs(mask) if mask.ndim == 4 else None
    valid = mask.astype(bool) if pairs is None else np.any(pairs, axis=-1)
    first_answer = np.asarray(inputs.answer_positions)[:, 0]
    rows, taken = [], 0
    for number in range(len(ids)):
        placeholder = ids[number] == image_token_id
        images, of_placeholder = images_of(inputs.images, taken, int(placeholder.sum()))
        taken += len(of_placeholder)
        tokens = np.flatnonzero(valid[number])
        last = int(np.searchsorted(tokens, first_answer[number]))
        answer = int((answer_ids[number] >= 0).sum())
        tokens = tokens[: last + answer]
        features = np.full(len(placeholder), -1)
        features[placeholder] = of_placeholder
        features = features[tokens]
        where = np.flatnonzero(features >= 0)
        ends = (0, 0, last, last + answer)
        if len(where) and where[-1] < last:
            ends = (int(where[0]), int(where[-1]) + 1, last, last + answer)
        if pairs is not None:
            seen = pairs[number, tokens[:, None], tokens]
            if any(seen[:end, end:].any() for end in ends[:2]):
                ends = (0, 0, last, last + answer)
            if seen[:last, last:].any():
                return None
        rows.append(Row(tokens, ends, images, features))
    return rows


def images_of(images: Images | None, taken: int, count: int) -> tuple[tuple[int, ...], Int[np.ndarray, " count"]]:
    """The images that ``count`` placeholders hold, ``taken`` of the batch being before them; and for each placeholder
    which feature it holds of these images' (N slots an image)."""
    if images is None or not count:
        return (), np.arange(count)
    ends = np.cumsum(np.asarray(images.counts))
    number = taken + np.arange(count)
    image = np.searchsorted(ends, number, side="right")
    within = number - (ends - np.asarray(images.counts))[image]
    return tuple(range(int(image[0]), int(image[-1]) + 1)), (image - image[0]) * images.tokens + within


def context_keys(rows: Sequence[Row], inputs: Inputs) -> tuple[list[bytes], list[bytes]]:
    """For every row, what names its context's tokens, and what names these and the images' content.

    Of a context that is text and then image tokens alone, in their order, the number of image tokens is not part of
    the first name.
    """
    ids = np.asarray(inputs.input_ids)
    mask = np.asarray(inputs.attention_mask)
    positions = None if inputs.position_ids is None else np.asarray(inputs.position_ids)
    names: dict[int, bytes] = {}
    groups, contexts = [], []
    for number, row in enumerate(rows):
        context = row.tokens[: row.ends[1]]
        whole = [ids[number][context].tobytes(), row.features[: row.ends[1]].tobytes()]
        if positions is not None:
            whole.append(positions[number][context].tobytes())
        if mask.ndim == 4:
            whole.append(mask[number, 0][np.ix_(context, context)].tobytes())
        ends = np.array([*row.ends[:2], len(row.images)]).tobytes()
        body = context[row.ends[0] :]
        image_alone = len(body) > 0 and bool((row.features[row.ends[0] : row.ends[1]] >= 0).all())
        in_turn = image_alone and int(body[-1] - context[0]) == len(context) - 1
        if in_turn and positions is None and mask.ndim == 2:
            prefix = ids[number][context[: row.ends[0]]].tobytes()
            group = b"|".join([b"image alone", np.array([row.ends[0], len(row.images)]).tobytes(), prefix])
        else:
            group = b"|".join([ends, *whole])
        for image in row.images:
            if image not in names:
                names[image] = hash_image(inputs.images, image)
        # images that stand in the question part belong to the row alone
        content = [names[image] for image in row.images] if row.ends[1] else []
        groups.append(group)
        contexts.append(b"|".join([ends, *whole, *content]))
    return groups, contexts


def hash_image(images: Images | None, number: int) -> bytes:
    """A digest of all that is known of one image."""
    if images is None:
        raise AssertionError("a row with images has them in its batch")
    digest = hashlib.blake2b(np.asarray(images.counts)[number].tobytes(), digest_size=16)
    for name, array in sorted(images.arrays.items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(np.asarray(array)[number]).tobytes())
    return digest.digest()


# Contexts whose tokens recur in so many questions get a lane of their own; rarer ones are computed together, unshared.
SHARED_FROM = 4


def shapes_of(rows: Sequence[Row], inputs: Inputs, batch_size: int) -> Shapes:
    """``choose_shapes`` for the rows of one block."""
    _, contexts = context_keys(rows, inputs)
    return choose_shapes(
        [row.length(Segment.QUESTION) for row in rows],
        max(row.length(Segment.ANSWER) for row in rows),
        len(set(contexts)),
        batch_size,
    )


def make_lanes(rows: Sequence[Row], inputs: Inputs, shapes: Shapes) -> list[Lane]:
    """Groups rows into lanes and chunks.

    Args:
      rows: of ``find_rows``.
      inputs: what they were found in.
      shapes: what chunks are padded to.
    """
    groups, contexts = context_keys(rows, inputs)
    members: dict[Any, list[int]] = {}
    for number, group in enumerate(groups):
        members.setdefault(group, []).append(number)
    lanes: dict[Any, list[int]] = {}
    for group, numbers in members.items():
        shared = len(numbers) >= SHARED_FROM or len(members) == 1
        first = rows[numbers[0]]
        # what is computed together must at least have alike segments and as many images
        key = ("shared", group) if shared else (first.ends[0] > 0, first.ends[1] > 0, len(first.images))
        lanes.setdefault(key, []).extend(numbers)
    made = []
    for key, numbers in lanes.items():
        widest = max(numbers, key=lambda number: rows[number].length(Segment.BODY))
        made.append(Lane(tuple(_chunks(rows, numbers, contexts, shapes)), key[0] == "shared", widest))
    return made


def _chunks(rows: Sequence[Row], numbers: Sequence[int], contexts: Sequence[bytes], shapes: Shapes) -> list[Chunk]:
    head, body = (max(rows[number].length(segment) for number in numbers) for segment in (Segment.HEAD, Segment.BODY))
    body = shapes.body(body)
    classes: dict[int, dict[bytes, list[int]]] = {}
    for number in numbers:
        # at least one slot, so that no segment of the tail is an array without elements
        length = max(1, shapes.question(rows[number].length(Segment.QUESTION)))
        classes.setdefault(length, {}).setdefault(contexts[number], []).append(number)
    chunks = []
    for question, owned in sorted(classes.items()):
        answer = max(
            [
                shapes.answer,
                *[rows[number].length(Segment.ANSWER) for of_context in owned.values() for number in of_context],
            ]
        )
        for packed in pack(list(owned.values()), shapes.contexts, shapes.rows):
            chunks.append(_chunk(packed, shapes.contexts, shapes.rows, (head, body, question, answer)))
    return chunks


def pack(owned: Sequence[Sequence[int]], width: int, size: int) -> list[list[list[int]]]:
    """Fills chunks of at most ``width`` contexts and ``size`` rows; a context's rows may be split between chunks."""
    packed: list[list[list[int]]] = [[]]
    room = size
    for numbers in owned:
        left = list(numbers)
        while left:
            if room == 0 or len(packed[-1]) == width:
                packed.append([])
                room = size
            taken, left = left[:room], left[room:]
            packed[-1].append(taken)
            room -= len(taken)
    return packed


def _chunk(packed: Sequence[Sequence[int]], width: int, size: int, lengths: tuple[int, int, int, int]) -> Chunk:
    contexts = [numbers[0] for numbers in packed]
    rows = [number for numbers in packed for number in numbers]
    owner = [context for context, numbers in enumerate(packed) for _ in numbers]
    kept = len(rows)
    contexts += contexts[-1:] * (width - len(contexts))
    rows += rows[-1:] * (size - kept)
    # with one row a context, a repeated row has the repeated context, so that owner is the identity
    owner += [min(number, width - 1) if width == size else owner[-1] for number in range(kept, size)]
    return Chunk(np.array(contexts), np.array(rows), np.arange(kept), np.array(owner), lengths)


def join_chunks(chunks: Sequence[Chunk], count: int) -> Chunk:
    """Chunks of one shape as one, filled up to ``count`` with repeats of the last."""
    whole = [*chunks, *[dataclasses.replace(chunks[-1], kept=np.arange(0))] * (count - len(chunks))]
    rows, contexts = len(chunks[0].rows), len(chunks[0].contexts)
    return Chunk(
        contexts=np.concatenate([chunk.contexts for chunk in whole]),
        rows=np.concatenate([chunk.rows for chunk in whole]),
        kept=np.concatenate([chunk.kept + place * rows for place, chunk in enumerate(whole)]),
        owner=np.concatenate([chunk.owner + place * contexts for place, chunk in enumerate(whole)]),
        lengths=chunks[0].lengths,
    )


def slots_of(rows: Sequence[Row], numbers: Int[np.ndarray, " B"], lengths: Sequence[int]) -> Int[np.ndarray, "B S"]:
    """The sequence index of every slot, -1 where it is padding."""
    slots = np.full((len(numbers), sum(lengths)), -1, np.int64)
    for place, number in enumerate(numbers):
        start = 0
        for segment, length in zip(Segment, lengths, strict=False):
            span = rows[number].span(segment)
            slots[place, start : start + len(span)] = span
            start += length
    return slots


def take_slots(values: np.ndarray, numbers: Int[np.ndarray, " B"], slots: Int[np.ndarray, "B S"]) -> np.ndarray:
    """Values ``[rows, S, ...]`` of the original sequences by slot, 0 at padding."""
    taken = values[numbers[:, None], np.maximum(slots, 0)]
    there = (slots >= 0).reshape(*slots.shape, *(1,) * (values.ndim - 2))
    return np.where(there, taken, np.zeros((), values.dtype))


def take_pairs(
    mask: Bool[np.ndarray, "rows S S"], numbers: Int[np.ndarray, " B"], slots: Int[np.ndarray, "B T"]
) -> Bool[np.ndarray, "B T T"]:
    """A mask over pairs of positions by slot, False at padding."""
    index = np.maximum(slots, 0)
    taken = mask[numbers[:, None, None], index[:, :, None], index[:, None, :]]
    return taken & (slots >= 0)[:, :, None] & (slots >= 0)[:, None, :]
