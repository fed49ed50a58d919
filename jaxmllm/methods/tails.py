"""Prompts that begin as others did: what follows what they share, as inputs of its own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool
from PIL import Image

from jaxmllm.errors import InputError
from jaxmllm.models.images import TEXT_BUCKETS, pad_rows
from jaxmllm.models.inputs import Inputs, as_inputs
from jaxmllm.processing import encode_prompts, prepare

# Tails are mostly an image and a short question, so their text is padded less than that of whole prompts; heads are cut
# to a multiple of so many slots.
TAIL_BUCKETS = (16, 32, *TEXT_BUCKETS)
HEAD_STEP = 32

# What stands around an image's placeholder and belongs to it: Qwen's marks, and one line break.
_AROUND = r"(?:<\|vision_start\|>)?{token}(?:<\|vision_end\|>)?\n?"


def with_two_images(text: str, image_token: str) -> str:
    """A prompt that shows a second image right behind its own."""
    unit = re.compile(_AROUND.format(token=re.escape(image_token)))
    return unit.sub(lambda found: found[0] * 2, text, count=1)


def after_first(ids: np.ndarray, valid: np.ndarray, image_token_id: int, again: str) -> Bool[np.ndarray, "B S"]:
    """The positions of prompts that are run again: all behind the image (``question``), or the ``last`` token."""
    place = np.arange(ids.shape[1])
    if again == "last":
        last = ids.shape[1] - 1 - np.argmax(valid[:, ::-1], axis=1)
        return valid & (place == last[:, None])
    shown = (ids == image_token_id) & valid
    ends = ids.shape[1] - np.argmax(shown[:, ::-1], axis=1)
    return valid & (place >= np.where(shown.any(axis=1), ends, 0)[:, None])


def of_same(model: Any, inputs: Inputs, again: str) -> tuple[Inputs, Bool[np.ndarray, "B H"]]:
    """The last tokens of the prompts once more, and which of the prompts' slots stand before them.

    Args:
      model: a loaded model.
      inputs: the prompts.
      again: ``last`` or ``question``; see ``after_first``.
    """
    ids, valid = np.asarray(inputs.input_ids), np.asarray(inputs.attention_mask).astype(bool)
    tail = after_first(ids, valid, model.config.image_token_id, again)
    rows = [row[here].tolist() for row, here in zip(ids, tail, strict=True)]
    return _as_tail(model, rows, {}, bucketed=again != "last"), _cut(valid & ~tail)


def of_texts(model: Any, inputs: Inputs, texts: Sequence[str]) -> tuple[Inputs, Bool[np.ndarray, "B H"]]:
    """What other prompts about the same images have behind them, and which slots they share.

    Raises:
      InputError: the other prompts begin otherwise.
    """
    heads, keep = _heads(model, inputs)
    others = _expanded(model, texts, [[count] for count in _counts(inputs)])
    return _as_tail(model, _behind(heads, others), {}), keep


def of_pictures(
    model: Any, inputs: Inputs, texts: Sequence[str], pictures: Sequence[Image.Image]
) -> tuple[Inputs, Bool[np.ndarray, "B H"]]:
    """What prompts with a second image have behind the first, and which slots they share with those without.

    Raises:
      ProcessorError: a picture that the processor refuses.
      InputError: a prompt with two images begins otherwise.
    """
    prepared = dict(prepare(model.processor, list(pictures), list(texts)))
    arrays = {name: prepared[name] for name in model.family.image_inputs if name in prepared}
    seconds = model.family.pack_images(model.config, arrays, lambda size: size)
    pairs = list(zip(_counts(inputs), np.asarray(seconds.counts).tolist(), strict=True))
    twice = [with_two_images(text, model.processor.image_token) for text in texts]
    heads, keep = _heads(model, inputs)
    return _as_tail(model, _behind(heads, _expanded(model, twice, pairs)), arrays), keep


def _cut(keep: Bool[np.ndarray, "B S"]) -> Bool[np.ndarray, "B H"]:
    """Without what stands behind the last slot that any example keeps: what follows need not look at it."""
    kept = np.flatnonzero(keep.any(axis=0))
    last = int(kept[-1]) + 1 if len(kept) else 1
    return keep[:, : min(keep.shape[1], -(-last // HEAD_STEP) * HEAD_STEP)]


def _counts(inputs: Inputs) -> list[int]:
    assert inputs.images is not None
    return np.asarray(inputs.images.counts).tolist()


def _heads(model: Any, inputs: Inputs) -> tuple[list[list[int]], Bool[np.ndarray, "B H"]]:
    """The tokens of every prompt up to its image, and where they stand."""
    ids, valid = np.asarray(inputs.input_ids), np.asarray(inputs.attention_mask).astype(bool)
    keep = valid & ~after_first(ids, valid, model.config.image_token_id, "question")
    return [row[here].tolist() for row, here in zip(ids, keep, strict=True)], _cut(keep)


def _expanded(model: Any, texts: Sequence[str], counts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Token ids of prompts, with a placeholder for every image token."""
    placeholder = model.config.image_token_id
    expanded = []
    for ids, of_prompt in zip(encode_prompts(model.processor, texts), counts, strict=True):
        left = iter(of_prompt)
        expanded.append([token for one in ids for token in ([one] * next(left) if one == placeholder else [one])])
    return expanded


def _behind(heads: Sequence[list[int]], others: Sequence[list[int]]) -> list[list[int]]:
    for head, other in zip(heads, others, strict=True):
        if other[: len(head)] != head:
            raise InputError(
                "a second prompt begins with other tokens than the first did up to its image, so that what was "
                "computed of it cannot be used; put the image before what differs"
            )
    return [other[len(head) :] for head, other in zip(heads, others, strict=True)]


def _as_tail(model: Any, rows: Sequence[list[int]], arrays: dict[str, np.ndarray], bucketed: bool = True) -> Inputs:
    longest = max(map(len, rows))
    filler = int(model.config.image_token_id == 0)  # any id but the placeholder's
    ids = [np.array(row, np.int32) for row in rows]
    mask = [np.ones(len(row), np.int32) for row in rows]
    prepared = {"input_ids": pad_rows(ids, longest, filler), "attention_mask": pad_rows(mask, longest), **arrays}
    return as_inputs(prepared, model.config, bucketed, TAIL_BUCKETS)
