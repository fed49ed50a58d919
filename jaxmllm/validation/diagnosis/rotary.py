"""Rotary positions written once more, and the ways in which they go wrong.

Source: transformers' ``modeling_rope_utils``; Qwen2-VL's multimodal positions (arXiv 2409.12191).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import numpy as np

from jaxmllm.models.text_config import RopeConfig
from jaxmllm.validation.diagnosis.case import Case
from jaxmllm.validation.diagnosis.hypotheses import Change, Study, setting, study
from jaxmllm.validation.diagnosis.parts import rounded
from jaxmllm.validation.diagnosis.sample import Sample, draw

BASES = (1e4, 1e6, 5e5, 1e3, 5e3, 1e5, 5e6)
_ROTATE, _TABLES = "jaxmllm.models.layers.rotate", "jaxmllm.models.layers.rope_tables"
_FREQUENCIES = "jaxmllm.models.layers.rope_frequencies; config: text.rope"
_POSITIONS = "position ids: jaxmllm.models.layout.make_layout"
_GRID = "jaxmllm.models.qwen2_vl.positions"


@dataclasses.dataclass(frozen=True)
class Rotary:
    """How queries and keys are turned.

    Attributes:
      rope: base and scaling rule.
      width: E.
      positions: ``[B, S]`` or ``[B, S, axes]``; ``plain`` the positions counted by ``[B, S]`` places, padding included.
      axis: which axis of the positions each of the E / 2 frequencies turns by; ``None`` where there is one.
      axial: every axis has all frequencies of half the width, one after another, as in Qwen's vision towers.
      pairs: neighbours are turned together, rather than both halves of a head.
      pair_tables: cosines and sines are repeated for neighbours although halves are turned.
      sign: -1 turns the other way; 0 turns nothing.
      scaled: whether the factor on cosines and sines is heeded.
      round_angles, round_tables: what angles, and cosines and sines, are rounded to.
    """

    rope: RopeConfig
    width: int
    positions: np.ndarray
    plain: np.ndarray
    axis: np.ndarray | None = None
    axial: bool = False
    pairs: bool = False
    pair_tables: bool = False
    sign: float = 1.0
    scaled: bool = True
    round_angles: str | None = None
    round_tables: str | None = None

    @cached_property
    def angles(self) -> np.ndarray:
        """``[B, S, E / 2]``; products in float32, as both frameworks compute them."""
        longest = int(self.positions.max()) + 1
        inverse = frequencies(self.rope, self.width // 2 if self.axial else self.width, longest)
        inverse = np.tile(inverse, 2) if self.axial else inverse
        turning = self.positions[..., None] if self.axis is None else self.positions[..., self.axis]
        angles = rounded(turning, self.round_angles) * rounded(inverse, self.round_angles).astype(np.float32)
        return rounded(angles.astype(np.float32).astype(np.float64), self.round_angles)

    def tables(self) -> np.ndarray:
        """Cosines, then sines ``[B, S, 2 E]``."""
        twice = np.repeat(self.angles, 2, axis=-1) if self.pair_tables else np.tile(self.angles, 2)
        factor = attention_factor(self.rope) if self.scaled else 1.0
        tables = np.concatenate([np.cos(twice), self.sign * np.sin(twice)], axis=-1) * factor
        return rounded(tables, self.round_tables)

    def turn(self, x: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
        """``[B, R, h, E]`` turned, where R are the given rows of the sequence, by default all."""
        if self.sign == 0:
            return x
        tables = self.tables() if rows is None else self.tables()[:, rows]
        cosine, sine = (part[:, :, None] for part in np.split(tables, 2, axis=-1))
        if self.pairs:
            half = self.width // 2
            first, second = x[..., 0::2], x[..., 1::2]
            turned = (
                first * cosine[..., :half] - second * sine[..., :half],
                second * cosine[..., :half] + first * sine[..., :half],
            )
            return np.stack(turned, axis=-1).reshape(x.shape)
        first, second = np.split(x, 2, axis=-1)
        return x * cosine + np.concatenate([-second, first], axis=-1) * sine


def frequencies(rope: RopeConfig, width: int, longest: int) -> np.ndarray:
    """Radians a position ``[width / 2]``, float32."""
    exponents = np.arange(0, width, 2, dtype=np.float32) / width
    inverse = (1.0 / np.float32(rope.theta) ** exponents).astype(np.float64)
    original = rope.original_max_positions
    if rope.kind == "linear":
        inverse = inverse / rope.factor
    elif rope.kind == "dynamic":
        stretch = rope.factor * max(longest, original) / original - (rope.factor - 1)
        inverse = 1.0 / (rope.theta * stretch ** (width / (width - 2))) ** exponents.astype(np.float64)
    elif rope.kind == "llama3":
        turns = original * inverse / (2 * np.pi)
        kept = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0, 1)
        inverse = inverse * (kept + (1 - kept) / rope.factor)
    elif rope.kind == "yarn":
        ends = [
            width * np.log(original / (turns * 2 * np.pi)) / (2 * np.log(rope.theta))
            for turns in (rope.beta_fast, rope.beta_slow)
        ]
        low, high = (np.floor(ends[0]), np.ceil(ends[1])) if rope.truncate else ends
        low, high = max(low, 0), min(high, width - 1)
        ramp = np.clip((np.arange(width // 2) - low) / (high - low or 0.001), 0, 1)
        inverse = inverse * (1 - ramp + ramp / rope.factor)
    return inverse.astype(np.float32)


def attention_factor(rope: RopeConfig) -> float:
    """What yarn multiplies cosines and sines by; 1 for other rules."""
    if rope.kind != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return float(rope.attention_factor)
    scales = [
        1.0 if rope.factor <= 1 else 0.1 * by * np.log(rope.factor) + 1
        for by in (rope.mscale, rope.mscale_all_dim)
        if by
    ]
    if len(scales) == 2:
        return float(scales[0] / scales[1])
    return 1.0 if rope.factor <= 1 else float(0.1 * np.log(rope.factor) + 1)


def text_positions(valid: np.ndarray) -> np.ndarray:
    """Positions ``[B, S]`` that padding does not count in."""
    return np.maximum(np.cumsum(valid, axis=1) - 1, 0)


def grid_positions(ids: np.ndarray, valid: np.ndarray, image_token: int, grids: np.ndarray) -> np.ndarray:
    """Positions ``[B, S, 3]`` by time, height and width.

    Args:
      ids, valid: ``[B, S]``.
      image_token: the placeholder.
      grids: rows and columns of every image's tokens ``[I, 2]``.
    """
    out = np.zeros((*ids.shape, 3), np.int64)
    image = 0
    for example, row in enumerate(ids):
        at = place = 0
        while place < len(row):
            if row[place] != image_token:
                out[example, place] = at * valid[example, place]
                at += int(valid[example, place])
                place += 1
                continue
            rows, columns = (int(side) for side in grids[image])
            inside = np.arange(rows * columns)
            offsets = np.stack([np.zeros_like(inside), inside // columns, inside % columns], axis=-1)
            out[example, place : place + len(inside)] = at + offsets
            at, place, image = at + max(rows, columns), place + len(inside), image + 1
    return out


def positions_of(config: Any, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """The rotary positions of a batch."""
    valid = np.asarray(inputs["attention_mask"]).astype(bool)
    grids = inputs.get("image_grid_thw")
    if grids is None or config.text.rope.sections is None:
        return text_positions(valid)
    merged = np.asarray(grids)[:, 1:] // config.vision.merge
    return grid_positions(np.asarray(inputs["input_ids"]), valid, config.image_token_id, merged)


def rotary_of(case: Case) -> Rotary:
    """How the decoder turns, by the port's config."""
    text, positions = case.config.text, positions_of(case.config, case.inputs)
    plain = np.broadcast_to(np.arange(positions.shape[1]), positions.shape[:2])
    axis = None if positions.ndim == 2 else np.repeat(np.arange(3), text.rope.sections)
    return Rotary(text.rope, text.head_dim, positions, plain, axis)


def with_rope(name: str, where: str = _FREQUENCIES, **fields: Any) -> Change:
    """Another base or scaling rule."""
    return Change(name, lambda part: dataclasses.replace(part, rope=dataclasses.replace(part.rope, **fields)), where)


def moved(name: str, change: Any, where: str = _POSITIONS) -> Change:
    """Other positions; ``change`` gives ``None`` where it does not apply."""

    def apply(part: Rotary) -> Rotary | None:
        positions = change(part)
        return None if positions is None else dataclasses.replace(part, positions=positions)

    return Change(name, apply, where)


def _scaled_otherwise(change: Any) -> Any:
    """A change of a scaling rule, where the config has one."""

    def apply(part: Rotary) -> Rotary | None:
        rope = None if part.rope.kind == "default" else change(part.rope)
        return None if rope is None else dataclasses.replace(part, rope=rope)

    return apply


def _on_axes(axes: Any) -> Any:
    """Other axes for the frequencies, where positions have three."""

    def apply(part: Rotary) -> Rotary | None:
        if part.axis is None or part.axial:
            return None
        axis = axes(part)
        return None if axis is None else dataclasses.replace(part, axis=axis)

    return apply


def _unscaled(base: float) -> Callable[[RopeConfig], RopeConfig]:
    return lambda rope: dataclasses.replace(rope, theta=base, kind="default")


def _in_order(order: tuple[int, ...]) -> Callable[[Rotary], np.ndarray]:
    """The axes' sections in another order."""
    return lambda part: np.repeat(np.array(order), np.asarray(part.rope.sections)[list(order)])


def _sized(order: tuple[int, ...]) -> Callable[[Rotary], np.ndarray]:
    """The axes in their order, with each other's sizes."""
    return lambda part: np.repeat(np.arange(3), np.asarray(part.rope.sections)[list(order)])


def _along_width(part: Rotary) -> np.ndarray:
    """The sections laid along the whole width of a head rather than along half of it."""
    sections = np.asarray(part.rope.sections)
    return np.repeat(np.arange(3), 2 * sections)[: part.width // 2]


def _in_turn(part: Rotary) -> np.ndarray:
    """Axes in turn, frequency by frequency."""
    return np.arange(part.width // 2) % 3


def _grids_as_text(part: Rotary) -> np.ndarray | None:
    """Every token counts on by one, on all axes."""
    if part.axis is None or part.axial:
        return None
    counted = part.plain - part.plain.min(axis=1, keepdims=True)
    return np.repeat(counted[..., None], 3, axis=-1)


ROTARY_CHANGES = (
    setting("rotation of neighbouring pairs (interleaved)", _ROTATE, pairs=True),
    setting("cosines and sines of neighbouring pairs (interleaved tables)", _TABLES, pair_tables=True),
    setting("rotation in the opposite direction", _ROTATE, sign=-1.0),
    setting("no rotation (rotary embedding missing)", _ROTATE, sign=0.0),
    Change(
        "rotary scaling missing (factor ignored)",
        _scaled_otherwise(lambda rope: dataclasses.replace(rope, kind="default")),
        _FREQUENCIES,
    ),
    Change(
        "rotary scaling by the inverse factor",
        _scaled_otherwise(lambda rope: dataclasses.replace(rope, factor=1 / rope.factor)),
        _FREQUENCIES,
    ),
    Change(
        "linear rotary scaling",
        _scaled_otherwise(lambda rope: None if rope.kind == "linear" else dataclasses.replace(rope, kind="linear")),
        _FREQUENCIES,
    ),
    Change(
        "rotary attention factor missing",
        lambda part: dataclasses.replace(part, scaled=False) if part.rope.kind == "yarn" else None,
        _FREQUENCIES,
    ),
    *(with_rope(f"rotary base {base:g}", theta=base) for base in BASES),
    *(
        Change(
            f"rotary base {base:g} without scaling",
            _scaled_otherwise(_unscaled(base)),
            _FREQUENCIES,
        )
        for base in BASES
    ),
    moved("positions one too high", lambda part: part.positions + 1),
    moved("positions one too low", lambda part: part.positions - 1),
    moved("positions counted with padding", lambda part: part.plain if part.positions.ndim == 2 else None),
    moved("M-RoPE positions counted as text (no grid)", _grids_as_text, _GRID),
    moved(
        "M-RoPE rows and columns swapped",
        lambda part: part.positions[..., [0, 2, 1]] if part.positions.shape[2:] == (3,) else None,
        _GRID,
    ),
    moved(
        "vision rows and columns swapped",
        lambda part: part.positions[..., ::-1] if part.axial else None,
        "jaxmllm.models.qwen_vision.lay_out",
    ),
    Change("M-RoPE sections ignored (time alone)", _on_axes(lambda part: np.zeros_like(part.axis)), _TABLES),
    *(
        Change(
            f"M-RoPE sections in the order {', '.join(('time', 'height', 'width')[axis] for axis in order)}",
            _on_axes(_in_order(order)),
            _TABLES,
        )
        for order in list(itertools.permutations(range(3)))[1:]
    ),
    *(
        Change(
            f"M-RoPE sections with their sizes in the order {', '.join(str(1 + place) for place in order)}",
            _on_axes(_sized(order)),
            _TABLES,
        )
        for order in list(itertools.permutations(range(3)))[1:]
    ),
    Change("M-RoPE sections along the whole head width", _on_axes(_along_width), _TABLES),
    Change("M-RoPE axes in turn (interleaved sections)", _on_axes(_in_turn), _TABLES),
    *(setting(f"rotary angles in {kind}", _TABLES, round_angles=kind) for kind in ("bfloat16", "float16")),
    *(setting(f"cosines and sines in {kind}", _TABLES, round_tables=kind) for kind in ("bfloat16", "float16")),
)


def study_positions(case: Case) -> Study:
    """Hypotheses of ``positions``."""
    if case.got.ndim == 2:
        case = dataclasses.replace(case, got=case.got[..., None], expected=case.expected[..., None])
    sample = draw(case)
    changes = tuple(change for change in ROTARY_CHANGES if "positions" in change.name or "rows and" in change.name)
    image = np.asarray(case.inputs["input_ids"]) == case.config.image_token_id
    ended = np.cumsum(np.pad(image[:, :-1] & ~image[:, 1:], ((0, 0), (1, 0))), axis=1)[..., None]
    behind = tuple(
        moved(f"positions behind every image one too {word}", lambda part, by=by: part.positions + by * ended, _GRID)
        for by, word in ((-1, "low"), (1, "high"))
    )
    changes = (*changes, *(behind if rotary_of(case).positions.ndim == 3 else ()))
    return study(sample, rotary_of(case), changes, lambda part: sample.rows_of(_with_axes(part.positions)))


def study_rotary(case: Case) -> Study:
    """Hypotheses of the tables of cosines and sines."""
    sample = draw(case)
    return study(sample, rotary_of(case), ROTARY_CHANGES, lambda part: _shown(part, sample))


def _with_axes(positions: np.ndarray) -> np.ndarray:
    return positions[..., None] if positions.ndim == 2 else positions


def _shown(part: Rotary, sample: Sample) -> np.ndarray:
    """The tables; those that turn nothing are ones and zeros."""
    if part.sign == 0:
        part = dataclasses.replace(part, sign=1.0, positions=0 * part.positions)
    return sample.rows_of(part.tables())
