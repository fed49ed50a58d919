"""Which examples, positions, heads and features depart, where only some do."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxmllm.validation.components import along_sequence
from jaxmllm.validation.diagnosis.case import Case
from jaxmllm.validation.report import Cause

_NOT_FINITE = 1e60  # stands for a difference that is not finite
QUIET = 0.02  # of the largest: below, an index does not depart


def pattern_causes(case: Case) -> tuple[Cause, ...]:
    """A line for every axis along which only some indices depart."""
    gap, axes = _gap(case), _axes(case)
    found = []
    for axis, word in enumerate(axes):
        size = _sizes(gap, axis)
        if size is None:
            continue
        known = ~np.isnan(size)
        departs = known & (size > QUIET * np.nanmax(size))
        if departs[known].all() or not departs.any():
            continue
        numbers = np.flatnonzero(departs)
        name = f"only some {word} depart: {_places(case, word, numbers, known)}"
        quiet = float(np.nanmax(size[~departs & known]))
        largest = float(np.nanmax(size))
        much = "and are not finite" if largest > _NOT_FINITE**0.5 else f"by up to {largest:.3g} (root mean square)"
        evidence = f"{len(numbers)} of {int(known.sum())} {word} differ, {much}; the others by {quiet:.3g} at most"
        found.append(Cause(name, evidence, None, f"what sets these {word} apart"))
    return tuple(found)


def _gap(case: Case) -> np.ndarray:
    """Squared differences; not a number where nothing is compared."""
    mask = np.asarray(case.mask, bool)
    mask = np.broadcast_to(mask.reshape(*mask.shape, *(1,) * (case.got.ndim - mask.ndim)), case.got.shape)
    with np.errstate(invalid="ignore", over="ignore"):
        gap = (case.got.astype(np.float64) - case.expected) ** 2
    gap = np.where(np.isfinite(gap), gap, _NOT_FINITE**2)
    return np.where(mask, gap, np.nan)


def _sizes(gap: np.ndarray, axis: int) -> np.ndarray | None:
    """Root mean square along an axis; ``None`` where it has one index."""
    if gap.shape[axis] < 2:
        return None
    others = tuple(each for each in range(gap.ndim) if each != axis)
    counted = (~np.isnan(gap)).sum(axis=others)
    total = np.nansum(gap, axis=others)
    if not total.any():
        return None
    return np.where(counted > 0, np.sqrt(total / np.maximum(counted, 1)), np.nan)


def _axes(case: Case) -> tuple[str, ...]:
    """What the axes of the array are."""
    if case.site == "attn_probs":
        return ("examples", "heads", "query positions", "key positions")
    first = "examples" if along_sequence(case.component) else "pictures"
    if case.got.ndim == 2 and along_sequence(case.component):
        return ("examples", "positions")
    if case.got.ndim == 2:
        return ("rows", "features")
    if case.site in ("keys", "values"):
        return ("examples", "positions", "heads", "features of a head")
    return (first, "positions" if along_sequence(case.component) else "rows", "features")


def _places(case: Case, word: str, numbers: np.ndarray, known: np.ndarray) -> str:
    """Indices in words."""
    total = int(known.sum())
    if word in ("positions", "query positions"):
        places = numbers if case.rows is None else np.asarray(case.rows)[numbers]
        return spans(places) + _role(case, places)
    text = f"{spans(numbers)} of {total}"
    if word == "examples":
        return text + _of_examples(case, numbers)
    if len(numbers) > 2:
        steps = np.diff(numbers)
        if (steps == steps[0]).all() and steps[0] > 1:
            return f"every {_ordinal(int(steps[0]))} from {numbers[0]} on, of {total}"
        if total % 2 == 0 and len(numbers) == total // 2 and numbers[-1] - numbers[0] == len(numbers) - 1:
            half = "first" if numbers[0] == 0 else "second" if numbers[0] == total // 2 else None
            return f"the {half} half of {total}" if half else text
    return text


def _ordinal(number: int) -> str:
    return {2: "second", 3: "third"}.get(number, f"{number}th")


def _role(case: Case, places: np.ndarray) -> str:
    """What sets positions apart: image tokens, text, what stands behind an image."""
    ids, valid = (np.asarray(case.inputs[name]) for name in ("input_ids", "attention_mask"))
    image = (ids == case.config.image_token_id) & valid.astype(bool)
    rows = np.arange(ids.shape[1]) if case.rows is None else np.asarray(case.rows)
    departs = np.isin(rows, places)
    seen = np.cumsum(image, axis=1) > 0
    roles = {
        "image tokens": image.any(axis=0),
        "text": (valid.astype(bool) & ~image).any(axis=0),
        "all from the first image token on": seen.any(axis=0),
        "all behind the first position": np.arange(ids.shape[1]) > 0,
    }
    words = [word for word, at in roles.items() if at[rows].any() and np.array_equal(at[rows], departs)]
    return f" ({words[0]})" if words else ""


def _of_examples(case: Case, numbers: np.ndarray) -> str:
    """Whether padding sets examples apart."""
    valid = np.asarray(case.inputs["attention_mask"]).astype(bool)
    padded = ~valid.all(axis=1)
    if padded.any() and np.array_equal(np.flatnonzero(padded), numbers):
        side = "left" if not valid[numbers, 0].any() else "right"
        return f" (those with padding on the {side})"
    return ""


def spans(numbers: Sequence[int] | np.ndarray, most: int = 6) -> str:
    """Indices as ranges: ``0-3, 7, 9-12``."""
    numbers = np.asarray(numbers)
    cuts = np.flatnonzero(np.diff(numbers) > 1) + 1
    runs = np.split(numbers, cuts)
    words = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs if len(run)]
    return ", ".join(words[:most]) + (f", ... ({len(numbers)} in all)" if len(words) > most else "")
