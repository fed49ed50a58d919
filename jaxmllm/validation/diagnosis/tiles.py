"""LLaVA-NeXT's image tokens: newlines that are something else, and padding that is cut from the wrong side of tiles."""

from __future__ import annotations

import numpy as np

from jaxmllm.validation.diagnosis.case import Case
from jaxmllm.validation.report import Cause

_NEAR = 1e-3  # of the scale: rows nearer than this are taken for the same
_NEWLINE = "newline (image_newline); jaxmllm.models.llava_next.LlavaNext.arrange"
_UNPADDING = "jaxmllm.models.anyres.Tiling.order, tiling"


def tile_causes(case: Case) -> tuple[Cause, ...]:
    """What may be wrong with the tokens ``image_tokens`` of images that were cut into tiles.

    Returns:
      At most one cause; none for other families, or where not all tokens are at hand.
    """
    if case.config.model_type != "llava_next" or case.got.shape != case.expected.shape:
        return ()
    sizes = np.asarray(case.inputs["image_sizes"])
    tilings = [case.config.tiling((int(height), int(width))) for height, width in sizes]
    got, expected = (array.astype(np.float64) for array in (case.got, case.expected))
    if sum(len(tiling.order) for tiling in tilings) != len(got):
        return ()
    near = _NEAR * (float(np.sqrt(np.mean(expected**2))) or 1.0)
    newline = np.concatenate([tiling.order == 0 for tiling in tilings])
    same = np.abs(got - expected).max(axis=-1) <= near
    if same[~newline].all():
        return (_other_newline(got[newline], near),)
    whole = {name: _cut(got, expected, tilings, side, near) for name, side in _SIDES.items()}
    return tuple(
        Cause(
            f"padding of tiles cut from the {name} alone instead of from both sides",
            f"{int((~same).sum())} rows depart; moved back by half of the padding, all are the reference's",
            1.0,
            _UNPADDING,
        )
        for name, found in whole.items()
        if found
    )


def _other_newline(rows: np.ndarray, near: float) -> Cause:
    """What newlines are, where nothing else departs."""
    kind = "zero" if np.abs(rows).max() <= near else "another row than image_newline"
    return Cause(f"newlines are {kind}", f"all rows but the {len(rows)} newlines are the reference's", 1.0, _NEWLINE)


# Which way the port's patches are moved: towards the end where padding is cut from the end alone.
_SIDES = {"end": 1, "start": -1}


def _cut(got: np.ndarray, expected: np.ndarray, tilings: list, side: int, near: float) -> bool:
    """Whether the port's rows are the reference's moved by half of each image's padding."""
    start, padded = 0, False
    for tiling in tilings:
        count, first = len(tiling.order), tiling.grid**2
        ours, theirs = (
            array[start + first : start + count].reshape(tiling.kept[0], tiling.kept[1] + 1, -1)[:, :-1]
            for array in (got, expected)
        )
        down, right = (
            side * ((tiling.grid * tiles - kept) // 2) for tiles, kept in zip(tiling.tiles, tiling.kept, strict=True)
        )
        if np.abs(_moved(ours, down, right) - _moved(theirs, -down, -right)).max(initial=0.0) > near:
            return False
        padded |= bool(down or right)
        start += count
    return padded


def _moved(grid: np.ndarray, down: int, right: int) -> np.ndarray:
    """What of a grid lies in itself moved so far."""
    rows, columns = grid.shape[:2]
    return grid[max(down, 0) : rows + min(down, 0), max(right, 0) : columns + min(right, 0)]
