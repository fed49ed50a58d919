"""Image tokens in another order than the reference's: rows are matched, and the order is named."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np

from jaxmllm.validation.diagnosis.case import Case
from jaxmllm.validation.diagnosis.vision import is_qwen
from jaxmllm.validation.report import Cause

_PLACE = "jaxmllm.models.images.place_images"
_NEAR = 1e-3  # of the scale: rows nearer than this are taken for the same
_FEW = 64  # columns that rows are told apart by


def order_causes(case: Case) -> tuple[Cause, ...]:
    """Whether the port's image tokens are the reference's in another order, and in which.

    Returns:
      At most one cause, where nearly all rows are found elsewhere.
    """
    got, expected = case.got.astype(np.float64), case.expected.astype(np.float64)
    if got.ndim != 2 or got.shape[-1] != expected.shape[-1] or not (np.isfinite(got).all() and len(expected)):
        return ()
    found, share = matched_rows(got, expected)
    if share < 0.5 or np.array_equal(found, np.arange(len(got))):
        return ()
    name, where = _name_order(case, found, len(expected))
    moved = int((found != np.arange(len(got))).sum())
    evidence = (
        f"{100 * share:.4g}% of the port's {len(got)} rows are rows of the reference ({len(expected)} rows), "
        f"{moved} of them at other places: rows 0.. are the reference's {_short(found)}"
    )
    return (Cause(name, evidence, share, where),)


def matched_rows(got: np.ndarray, expected: np.ndarray) -> tuple[np.ndarray, float]:
    """The reference's row that each row of the port is (-1 where it is none), and the share of rows that are one."""
    columns = np.linspace(0, got.shape[-1] - 1, min(_FEW, got.shape[-1])).astype(int)
    a, b = got[:, columns], expected[:, columns]
    squares = (a**2).sum(1)[:, None] - 2 * a @ b.T + (b**2).sum(1)
    here = np.arange(min(len(a), len(b)))
    squares[here, here] -= 1e-9 * (b**2).sum(1)[here]  # of equal rows, the one at its own place
    nearest = squares.argmin(axis=1)
    gap = np.abs(a - b[nearest]).max(axis=1)
    scale = float(np.sqrt(np.mean(b**2))) or 1.0
    found = np.where(gap <= _NEAR * scale, nearest, -1)
    return found, float(np.mean(found >= 0))


def _short(found: np.ndarray) -> str:
    words = ["none" if row < 0 else str(row) for row in found[:10]]
    return ", ".join(words) + (", ..." if len(found) > 10 else "")


def _name_order(case: Case, found: np.ndarray, total: int) -> tuple[str, str]:
    """An order of rows in words, and where it is made."""
    orders: list[tuple[str, str, np.ndarray]] = []
    counts = image_counts(case, total)
    starts = np.cumsum(counts) - counts
    parts = [start + np.arange(count) for start, count in zip(starts, counts, strict=True)]
    if len(parts) > 1:
        orders.append(("images in reverse order", "jaxmllm.models.inputs, Images.take", np.concatenate(parts[::-1])))
        orders += [
            (
                f"images {one} and {other} exchanged",
                "jaxmllm.models.inputs",
                np.concatenate(exchanged(parts, one, other)),
            )
            for one, other in itertools.combinations(range(len(parts)), 2)
        ]
    orders += _grid_orders(case, parts)
    orders.append(("rows in reverse order", "the connector's output", np.arange(total)[::-1]))
    got, expected = (array.reshape(-1, array.shape[-1]).astype(np.float64) for array in (case.got, case.expected))
    scale = float(np.sqrt(np.mean(expected**2))) or 1.0
    for name, where, order in orders:
        if len(order) == len(got) and np.abs(expected[order] - got).max() <= _NEAR * scale:
            return name, where
    shifts = (found - np.arange(len(found)))[found >= 0]
    by, often = np.unique(shifts, return_counts=True)
    main = int(by[often.argmax()])
    if often.max() > 0.6 * len(shifts) and main:
        return f"image tokens are shifted by {main} row(s)", "the class token; the start of the image tokens"
    return "image tokens are in another order", _ORDER.get(case.config.model_type, _PLACE)


_ORDER = {
    "llava_next": "jaxmllm.models.anyres.Tiling.order (tiles, newlines, unpadding)",
    "qwen2_vl": "jaxmllm.models.qwen_vision.lay_out",
    "qwen2_5_vl": "jaxmllm.models.qwen_vision.lay_out (window order)",
}


def exchanged(parts: list[np.ndarray], one: int, other: int) -> list[np.ndarray]:
    """The tokens of two images in each other's place."""
    parts = list(parts)
    parts[one], parts[other] = parts[other], parts[one]
    return parts


def image_counts(case: Case, total: int) -> np.ndarray:
    """Tokens of each image."""
    config, inputs = case.config, case.inputs
    if is_qwen(config):
        return np.asarray(inputs["image_grid_thw"]).prod(axis=1) // config.vision.merge**2
    if config.model_type == "llava_next":
        sizes = np.asarray(inputs["image_sizes"])
        return np.array([len(config.tiling((int(y), int(x))).order) for y, x in sizes])
    each = config.tokens_per_image
    return np.full(total // each, each)


def _grid_orders(case: Case, parts: list[np.ndarray]) -> list[tuple[str, str, np.ndarray]]:
    """Orders that follow from the grid of an image's tokens."""
    config, where = case.config, _ORDER.get(case.config.model_type, _PLACE)
    if config.model_type == "llava_next":
        return _tile_orders(case, parts)
    if is_qwen(config):
        grids = [
            (int(y) // config.vision.merge, int(x) // config.vision.merge) for _, y, x in case.inputs["image_grid_thw"]
        ]
    elif hasattr(config, "qformer"):
        return []
    else:
        grids = [(config.vision.grid, config.vision.grid)] * len(parts)
    if any(rows * columns != len(part) for (rows, columns), part in zip(grids, parts, strict=False)):
        return []

    def by(change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        return np.concatenate([change(part.reshape(grid)).ravel() for part, grid in zip(parts, grids, strict=True)])

    found = [
        ("image tokens column by column (grid transposed)", where, by(np.transpose)),
        ("image tokens with rows upside down", where, by(np.flipud)),
        ("image tokens with columns mirrored", where, by(np.fliplr)),
    ]
    if getattr(config.vision, "window", None):
        window = config.vision.window
        found.append(
            ("image tokens left in window order (not undone)", where, by(lambda grid: in_windows(grid, window)))
        )
    return found


def in_windows(grid: np.ndarray, side: int) -> np.ndarray:
    """A grid's numbers window by window."""
    rows, columns = grid.shape
    return np.concatenate(
        [
            grid[top : top + side, left : left + side].ravel()
            for top in range(0, rows, side)
            for left in range(0, columns, side)
        ]
    )


def _tile_orders(case: Case, parts: list[np.ndarray]) -> list[tuple[str, str, np.ndarray]]:
    """LLaVA-NeXT's: the whole image, then rows over all tiles that each end with a newline."""
    where = _ORDER["llava_next"]
    config = case.config
    tilings = [config.tiling((int(y), int(x))) for y, x in np.asarray(case.inputs["image_sizes"])]
    base = [tiling.grid**2 for tiling in tilings]

    def joined(change: Callable[[np.ndarray, np.ndarray, tuple[int, int]], np.ndarray]) -> np.ndarray:
        pieces = [
            change(part[:own], part[own:], tiling.kept) for part, own, tiling in zip(parts, base, tilings, strict=True)
        ]
        return np.concatenate(pieces)

    def columns(first: np.ndarray, rest: np.ndarray, kept: tuple[int, int]) -> np.ndarray:
        lines = rest.reshape(kept[0], -1)
        return np.concatenate([first, np.concatenate([lines[:, :-1].T.reshape(kept), lines[:, -1:]], axis=1).ravel()])

    def bare(first: np.ndarray, rest: np.ndarray, kept: tuple[int, int]) -> np.ndarray:
        return np.concatenate([first, rest.reshape(kept[0], -1)[:, :-1].ravel()])

    def leading(first: np.ndarray, rest: np.ndarray, kept: tuple[int, int]) -> np.ndarray:
        return np.concatenate([first, np.roll(rest.reshape(kept[0], -1), 1, axis=1).ravel()])

    return [
        ("tiles before the whole image", where, joined(lambda first, rest, kept: np.concatenate([rest, first]))),
        ("newline tokens missing", where, joined(bare)),
        ("newline tokens at the start of rows", where, joined(leading)),
        ("patches of the tiles column by column (grid transposed)", where, joined(columns)),
    ]
