"""Hypotheses of the blocks of vision towers: CLIP's, EVA's, Qwen2-VL's and Qwen2.5-VL's."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxmllm.models.text_config import RopeConfig
from jaxmllm.validation.components import FAINT
from jaxmllm.validation.diagnosis.attention import study_out, turned
from jaxmllm.validation.diagnosis.attention_parts import Attention, Output, linear_of
from jaxmllm.validation.diagnosis.case import Case
from jaxmllm.validation.diagnosis.feed_forward import RESIDUAL_CHANGES, feed_forward_changes, feed_forward_of
from jaxmllm.validation.diagnosis.hypotheses import Change, Study, Variation, study
from jaxmllm.validation.diagnosis.norms import norm_of, study_norm
from jaxmllm.validation.diagnosis.parts import Linear, Mask, Norm, Projection, Residual
from jaxmllm.validation.diagnosis.rotary import ROTARY_CHANGES, Rotary
from jaxmllm.validation.diagnosis.sample import Sample, batched, draw

MOST_PICTURES = 4
QWEN_EPSILON = 1e-6

_LAYER = "vision/layers"
_CALL = "the block's __call__: jaxmllm.models.vision.VisionLayer, jaxmllm.models.eva, jaxmllm.models.qwen_vision"
_WINDOWS = "config: vision.full_layers, vision.window; jaxmllm.models.qwen_vision.QwenVisionAttention"
_SEGMENTS = "jaxmllm.models.qwen_vision.lay_out, attend_whole"


def is_qwen(config: Any) -> bool:
    """Whether the tower reads patches of images of any size."""
    return hasattr(config.vision, "merge")


def epsilon_of(config: Any) -> tuple[float, bool, str]:
    """The epsilon of a tower's norms, whether they take the mean off, and where that is said."""
    if is_qwen(config):
        return QWEN_EPSILON, not config.vision.gated, "jaxmllm.models.qwen_vision.NORM_EPS"
    return config.vision.layer_norm_eps, True, "config: vision.layer_norm_eps"


def few_pictures(case: Case) -> Case:
    """The case of the pictures that differ most, where there are many."""
    if case.got.ndim != 3 or len(case.got) <= MOST_PICTURES:
        return case
    gap = np.abs(case.got.astype(np.float64) - case.expected).sum(axis=(1, 2))
    chosen = np.sort(np.argsort(-np.nan_to_num(gap, nan=np.inf), kind="stable")[:MOST_PICTURES])

    def read(name: str) -> np.ndarray | None:
        array = case.read(name)
        return array[chosen] if array is not None and name.startswith("vision.") else array

    got, expected, mask = (array[chosen] for array in (case.got, case.expected, case.mask))
    return dataclasses.replace(case, got=got, expected=expected, mask=mask, read=read)


def block_study(case: Case) -> Study | None:
    """The hypotheses of a site of a block; ``None`` where what they start from is not at hand."""
    build = _SITES.get(case.site.removesuffix("~faint"))
    return None if build is None else build(few_pictures(case))


def _read(case: Case, site: str) -> np.ndarray | None:
    array = case.read(case.sibling(site))
    return None if array is None else batched(array)


def _norm(case: Case, x: np.ndarray, name: str, other: str) -> Norm | None:
    epsilon, centred, _ = epsilon_of(case.config)
    scale = FAINT if case.site.endswith("~faint") else 1.0
    return norm_of(case, x * scale, f"{_LAYER}/{name}", epsilon, centred, f"{_LAYER}/{other}")


def _attn_in(case: Case) -> Study | None:
    sample, entering = draw(case), _read(case, "resid_pre")
    norm = None if entering is None else _norm(case, sample.rows_of(entering), "attention_norm", "mlp_norm")
    return None if norm is None else study_norm(norm, sample, epsilon_of(case.config)[2])


def _middle(case: Case, sample: Sample) -> np.ndarray | None:
    """The stream between attention and feed-forward block."""
    entering, added = _read(case, "resid_pre"), _read(case, "attn_out")
    return None if entering is None or added is None else sample.rows_of(entering) + sample.rows_of(added)


def _mlp_in(case: Case) -> Study | None:
    sample = draw(case)
    middle = _middle(case, sample)
    norm = None if middle is None else _norm(case, middle, "mlp_norm", "attention_norm")
    return None if norm is None else study_norm(norm, sample, epsilon_of(case.config)[2])


def _mlp_out(case: Case) -> Study | None:
    sample, entering = draw(case, columns=True), _read(case, "mlp_in")
    act = case.config.vision.hidden_act
    x = None if entering is None else sample.rows_of(entering)
    block = None if x is None else feed_forward_of(case, x, f"{_LAYER}/mlp", act, sample.columns)
    return None if block is None else study(sample, block, feed_forward_changes(act))


def _resid_post(case: Case) -> Study | None:
    sample = draw(case)
    middle, added, normed = _middle(case, sample), _read(case, "mlp_out"), _read(case, "mlp_in")
    if middle is None or added is None:
        return None
    inner = None if normed is None else sample.rows_of(normed)
    found = study(sample, Residual(middle, sample.rows_of(added), inner), RESIDUAL_CHANGES)
    return dataclasses.replace(found, variations=(*found.variations, *_other_inputs(case, sample, middle)))


def _other_inputs(case: Case, sample: Sample, middle: np.ndarray) -> tuple[Variation, ...]:
    """The block's output where its feed-forward block reads something else; shown by the whole block alone."""
    entering = _read(case, "resid_pre")

    def output(x: np.ndarray | None) -> np.ndarray | None:
        act = case.config.vision.hidden_act
        block = None if x is None else feed_forward_of(case, x, f"{_LAYER}/mlp", act, sample.columns)
        return None if block is None else middle + block()

    def other_norm() -> np.ndarray | None:
        norm = _norm(case, middle, "attention_norm", "mlp_norm")
        return output(None if norm is None else norm())

    def before_attention() -> np.ndarray | None:
        norm = None if entering is None else _norm(case, sample.rows_of(entering), "mlp_norm", "attention_norm")
        return output(None if norm is None else norm())

    named: tuple[tuple[str, Callable[[], np.ndarray | None]], ...] = (
        ("feed-forward block reads through the norm of attention (attention_norm instead of mlp_norm)", other_norm),
        ("feed-forward block reads the stream before attention (both in parallel)", before_attention),
        ("feed-forward block reads the stream without its norm", lambda: output(middle)),
    )
    return tuple(Variation(Change(name, lambda part: part, _CALL), compute) for name, compute in named)


def _attn_out(case: Case) -> Study | None:
    sample, entering = draw(case, columns=True), _read(case, "resid_pre")
    out = linear_of(case, f"{_LAYER}/attention/out")
    fused = linear_of(case, f"{_LAYER}/attention/qkv")
    apart = (linear_of(case, f"{_LAYER}/attention/{side}") for side in _SIDES)
    maps = _thirds(fused, (0, 1, 2)) if fused else [each for each in apart if each is not None]
    norm = None if entering is None else _norm(case, entering.astype(np.float64), "attention_norm", "mlp_norm")
    if norm is None or out is None or len(maps) < 3:
        return None
    config, normed, count = case.config.vision, norm(), case.config.vision.num_heads
    width = out.kernel.shape[0] // count
    whole, windows, rotary = _layout_of(case, width)
    windowed = windows is not None and case.layer not in config.full_layers
    heads = np.arange(count)
    query, key, value = (
        Projection(x, linear, heads, count, width)
        for x, linear in zip((normed[:, sample.positions], normed, normed), maps, strict=True)
    )
    mask = Mask(np.ones(normed.shape[:2], bool), segments=windows if windowed else whole)
    attention = Attention(
        query, key, value, mask, sample.positions, heads, width**-0.5, turn_query=rotary, turn_key=rotary
    )
    changes = [*_fused_changes(fused), *_segment_changes(whole, windows, windowed)]
    if rotary is not None:
        changes += [turned("both", change) for change in ROTARY_CHANGES]
        changes += [turned("query", change) for change in ROTARY_CHANGES if change.name.startswith("no rotation")]
    return study_out(Output(attention, out, sample.columns), sample, tuple(changes))


_SIDES = ("query", "key", "value")


def _thirds(fused: Linear, order: tuple[int, ...]) -> list[Linear]:
    """The three parts of one map to queries, keys and values, in that order."""
    columns = np.split(np.arange(fused.kernel.shape[1]), 3)
    return [fused.columns(columns[part]) for part in order]


def _fused_changes(fused: Linear | None) -> list[Change]:
    """Other ways to cut one map into queries, keys and values."""
    if fused is None:
        return []
    where = "attention/qkv: the reshape to three parts"

    def cut(maps: Callable[[Attention], list[Any]]) -> Callable[[Attention], Attention]:
        def apply(part: Attention) -> Attention:
            sides = zip(_SIDES, maps(part), strict=True)
            fields = {side: dataclasses.replace(getattr(part, side), linear=linear) for side, linear in sides}
            return dataclasses.replace(part, **fields)

        return apply

    def by_head(part: Attention) -> list[Any]:
        columns = np.arange(fused.kernel.shape[1]).reshape(part.query.count, 3, -1)
        return [fused.columns(columns[:, third].ravel()) for third in range(3)]

    orders = list(itertools.permutations(range(3)))[1:]
    return [
        *(
            Change(
                f"qkv thirds in the order {', '.join(_SIDES[third] for third in order)}",
                cut(lambda part, order=order: _thirds(fused, order)),  # type: ignore[misc]
                where,
            )
            for order in orders
        ),
        Change("qkv interleaved by head", cut(by_head), where),
    ]


def _layout_of(case: Case, width: int) -> tuple[np.ndarray | None, np.ndarray | None, Rotary | None]:
    """Image and window of every patch ``[1, M]``, and the tower's rotary embedding; ``None`` where there is none."""
    if not is_qwen(case.config):
        return None, None, None
    config = case.config.vision
    places, images, windows = [], [], []
    for number, (_, rows, columns) in enumerate(np.asarray(case.inputs["image_grid_thw"]).tolist()):
        row, column = patch_places(rows, columns, config.merge)
        side = (config.window or 1) * config.merge
        places.append(np.stack([row, column], axis=-1))
        images.append(np.full(len(row), number))
        windows.append(number * 10**8 + row // side * 10**4 + column // side)
    positions = np.concatenate(places)[None]
    plain = np.arange(positions.shape[1])[None]
    rotary = Rotary(
        RopeConfig(theta=config.rope_theta), width, positions, plain, np.repeat([0, 1], width // 4), axial=True
    )
    segments = None if config.window is None else np.concatenate(windows)[None]
    return np.concatenate(images)[None], segments, rotary


def patch_places(rows: int, columns: int, merge: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of every patch of an image, in the processor's order: squares of ``merge`` by ``merge``."""
    number = np.arange(rows * columns)
    square, inside = np.divmod(number, merge**2)
    row, column = np.divmod(square, columns // merge)
    return row * merge + inside // merge, column * merge + inside % merge


def _segment_changes(whole: np.ndarray | None, windows: np.ndarray | None, windowed: bool) -> list[Change]:
    """Patches that see others than they should."""

    def seeing(segments: np.ndarray | None) -> Callable[[Attention], Attention]:
        return lambda part: dataclasses.replace(part, mask=dataclasses.replace(part.mask, segments=segments))

    changes = []
    if windows is not None and windowed:
        changes.append(Change("a window layer sees the whole image", seeing(whole), _WINDOWS))
    elif windows is not None:
        changes.append(Change("a full layer sees its window alone", seeing(windows), _WINDOWS))
    if whole is not None:
        changes.append(Change("patches of different images see each other", seeing(None), _SEGMENTS))
    return changes


_SITES: dict[str, Callable[[Case], Study | None]] = {
    "attn_in": _attn_in,
    "attn_out": _attn_out,
    "mlp_in": _mlp_in,
    "mlp_out": _mlp_out,
    "resid_post": _resid_post,
}
