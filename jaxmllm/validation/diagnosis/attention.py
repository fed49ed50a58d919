"""The ways in which attention goes wrong."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from jaxmllm.validation.diagnosis.attention_parts import Attention, Output
from jaxmllm.validation.diagnosis.hypotheses import Change, Study, Variation, setting, study, vary
from jaxmllm.validation.diagnosis.parts import rounding
from jaxmllm.validation.diagnosis.rotary import ROTARY_CHANGES
from jaxmllm.validation.diagnosis.sample import Sample

_KERNELS = "jaxmllm.convert.names.TRANSFORMS; the kernel's leaf"
_SPLIT = "jaxmllm.models.decoder.SelfAttention.split"
_SCALE = "jaxmllm.models.attention (scores times E ** -0.5)"
_BIAS = "jaxmllm.models.decoder.Tap.bias, jaxmllm.models.layout.Layout.may_attend"
_SOFTMAX = "jaxmllm.models.attention (softmax in float32)"
_GROUPS = "jaxmllm.models.attention (grouping of query heads)"
_OUT = "jaxmllm.models.decoder.SelfAttention.__call__; attention/out"


def projecting(side: str, change: Any) -> Any:
    """A change of the map to queries, keys or values; ``change`` gives ``None`` where it does not apply."""

    def apply(part: Attention) -> Attention | None:
        projection = getattr(part, side)
        linear = change(projection.linear)
        return (
            None
            if linear is None
            else dataclasses.replace(part, **{side: dataclasses.replace(projection, linear=linear)})
        )

    return apply


def _kernel_of(side: str, other: str) -> Any:
    """One map in the place of another of the same shape."""

    def apply(part: Attention) -> Attention | None:
        mine, theirs = getattr(part, side), getattr(part, other)
        if mine.linear.kernel.shape != theirs.linear.kernel.shape:
            return None
        return dataclasses.replace(part, **{side: dataclasses.replace(mine, linear=theirs.linear)})

    return apply


def _projected(side: str, **fields: Any) -> Any:
    return lambda part: dataclasses.replace(part, **{side: dataclasses.replace(getattr(part, side), **fields)})


def _swapped(one: str, other: str) -> Any:
    """Two maps in each other's place."""

    def apply(part: Attention) -> Attention | None:
        first, second = getattr(part, one), getattr(part, other)
        if first.linear.kernel.shape != second.linear.kernel.shape:
            return None
        mine = dataclasses.replace(first, linear=second.linear)
        theirs = dataclasses.replace(second, linear=first.linear)
        return dataclasses.replace(part, **{one: mine, other: theirs})

    return apply


def projection_changes(side: str) -> tuple[Change, ...]:
    """Changes of the map to queries, keys or values."""
    leaf = f"attention/{side}"
    others = [other for other in ("query", "key", "value") if other != side]
    return (
        Change(f"{side} bias dropped", projecting(side, lambda linear: linear.without_bias), f"{leaf}/bias"),
        Change(
            f"{side} kernel transposed",
            projecting(side, lambda linear: linear.transposed),
            f"{leaf}/kernel; {_KERNELS}",
            both_ways=True,
        ),
        *(Change(f"{other} kernel used for {side}", _kernel_of(side, other), f"{leaf}/kernel") for other in others),
        Change(f"{side}: heads and head width swapped in the split", _projected(side, width_first=True), _SPLIT),
        *(
            Change(
                f"{side}: product of operands rounded to {kind}",
                projecting(side, rounding(kind)),
                "matmul precision",
            )
            for kind in ("bfloat16", "float16", "tf32")
        ),
    )


def _with_mask(**fields: Any) -> Any:
    return lambda part: dataclasses.replace(part, mask=dataclasses.replace(part.mask, **fields))


def _if_causal(change: Any) -> Any:
    return lambda part: None if part.mask.causal is None else change(part)


def _if_not_causal(change: Any) -> Any:
    return lambda part: None if part.mask.causal is not None else change(part)


def _windowed(by: int | None) -> Any:
    """A window that is larger by so much, or missing."""

    def apply(part: Attention) -> Attention | None:
        window = part.mask.window
        if window is None:
            return None
        return _with_mask(window=None if by is None else window + by)(part)

    return apply


def _scaled(change: Any) -> Any:
    return lambda part: dataclasses.replace(part, scale=change(part))


def _tiled(part: Attention) -> Attention | None:
    """Key-value heads repeated one after another as a whole."""
    heads = part.key.heads if len(part.key.heads) else part.source
    kv = part.key.count
    if kv == part.query.count or len(heads) != kv:
        return None
    return dataclasses.replace(part, source=part.query.heads % kv)


def turned(side: str, change: Change) -> Change:
    """A change of the rotary embedding of queries or keys or of both."""
    sides = ("query", "key") if side == "both" else (side,)

    def apply(part: Attention) -> Attention | None:
        fields = {}
        for each in sides:
            rotary = getattr(part, f"turn_{each}")
            changed = None if rotary is None else change.apply(rotary)
            if changed is None:
                return None
            fields[f"turn_{each}"] = changed
        return dataclasses.replace(part, **fields)

    name = change.name if side == "both" else f"{side}: {change.name}"
    return Change(name, apply, change.where)


def _over_queries(part: Attention) -> Attention | None:
    whole = len(part.rows) == part.mask.valid.shape[1]
    return dataclasses.replace(part, over_queries=True) if whole else None


MASK_CHANGES = (
    Change("causal mask missing", _if_causal(_with_mask(causal=None)), _BIAS),
    Change("causal mask off by one: the diagonal is blocked", _if_causal(_with_mask(causal=-1)), _BIAS),
    Change("causal mask off by one: one future key is visible", _if_causal(_with_mask(causal=1)), _BIAS),
    Change(
        "padding not blocked in the attention mask",
        lambda part: _with_mask(valid=np.ones_like(part.mask.valid))(part),
        _BIAS,
    ),
    Change("sliding window missing", _windowed(None), f"config: text.windows; {_BIAS}"),
    Change("sliding window one too long", _windowed(1), f"config: text.windows; {_BIAS}"),
    Change("sliding window one too short", _windowed(-1), f"config: text.windows; {_BIAS}"),
    Change(
        "causal mask where there should be none", _if_not_causal(_with_mask(causal=0)), "the vision tower's attention"
    ),
)
SCORE_CHANGES = (
    Change("attention scale missing", _scaled(lambda part: 1.0), _SCALE),
    Change("attention scale applied twice (squared)", _scaled(lambda part: part.scale**2), _SCALE),
    Change("attention scale of the hidden size", _scaled(lambda part: part.query.x.shape[-1] ** -0.5), _SCALE),
    Change(
        "attention scale of all heads' width",
        _scaled(lambda part: (part.query.width * part.query.count) ** -0.5),
        _SCALE,
    ),
    Change("attention scale of half the head width", _scaled(lambda part: (part.query.width / 2) ** -0.5), _SCALE),
    Change(
        "attention scale of the hidden size over the number of heads",
        _scaled(lambda part: (part.query.x.shape[-1] / part.query.count) ** -0.5),
        _SCALE,
    ),
    Change("attention scale 1 / E (no square root)", _scaled(lambda part: 1 / part.query.width), _SCALE),
    Change("attention scale inverted", _scaled(lambda part: 1 / part.scale), _SCALE),
    Change("key-value heads repeated as tile, not as repeat_interleave", _tiled, _GROUPS),
    Change("softmax over queries", _over_queries, _SOFTMAX),
    setting("attention sink: a score of zero in the softmax", _SOFTMAX, sink=True),
)
ROUNDED_SCORES = tuple(
    change
    for kind in ("bfloat16", "float16")
    for change in (
        setting(f"softmax in {kind}", _SOFTMAX, round_scores=kind, round_weights=kind),
        setting(f"attention scores rounded to {kind}", _SOFTMAX, round_scores=kind),
        setting(f"attention weights rounded to {kind}", _SOFTMAX, round_weights=kind),
    )
)
# Of queries alone, of both, and of keys alone: keys that are right leave the first.
WEIGHT_CHANGES = (
    *MASK_CHANGES,
    *SCORE_CHANGES,
    *projection_changes("query"),
    *(turned("query", change) for change in ROTARY_CHANGES),
    *(turned("both", change) for change in ROTARY_CHANGES),
    *(turned("key", change) for change in ROTARY_CHANGES),
    *projection_changes("key"),
    Change("query and key kernels swapped", _swapped("query", "key"), "attention/query, attention/key", both_ways=True),
    *ROUNDED_SCORES,
)
MIX_CHANGES = (
    Change("values of the position before", _projected("value", shift=1), "the attention's values"),
    Change("values of the position after", _projected("value", shift=-1), "the attention's values"),
    Change("query and key kernels swapped", _swapped("query", "key"), "attention/query, attention/key", both_ways=True),
    Change("key and value kernels swapped", _swapped("key", "value"), "attention/key, attention/value", both_ways=True),
    Change(
        "query and value kernels swapped",
        _swapped("query", "value"),
        "attention/query, attention/value",
        both_ways=True,
    ),
)


def out_changes(heads: int) -> tuple[Change, ...]:
    """Changes of the map of the heads' outputs."""

    def mapping(change: Any) -> Any:
        def apply(part: Output) -> Output | None:
            linear = change(part.out)
            # the mixed values stay; only what is made of them changes
            return None if linear is None else _kept(part, out=linear)

        return apply

    return (
        Change(
            "out kernel transposed",
            mapping(lambda linear: linear.transposed),
            f"attention/out/kernel; {_KERNELS}",
            both_ways=True,
        ),
        Change("out bias dropped", mapping(lambda linear: linear.without_bias), "attention/out/bias"),
        Change("heads merged in the order width, head", lambda part: _kept(part, width_first=True), _OUT),
        *(
            Change(f"head {head} of {heads} is missing", functools.partial(_kept, dropped=head), _OUT)
            for head in range(min(heads, 64))
        ),
        *(
            Change(
                f"out: product of operands rounded to {kind}",
                mapping(rounding(kind)),
                "matmul precision",
            )
            for kind in ("bfloat16", "float16", "tf32")
        ),
    )


def _kept(part: Output, **fields: Any) -> Output:
    """A changed output of the same mixed values, which are not computed anew."""
    changed = dataclasses.replace(part, **fields)
    changed.__dict__["mixed"] = part.mixed
    return changed


def study_weights(part: Attention, sample: Sample) -> Study:
    """Hypotheses of attention weights."""
    changes = (*_seen_windows(part, sample), *WEIGHT_CHANGES)
    return study(sample, part, changes, lambda part: part.weights())


def _seen_windows(part: Attention, sample: Sample) -> tuple[Change, ...]:
    """Sliding windows that the port's or the reference's weights show, where the port's config has none."""
    if part.mask.causal is None or part.mask.window is not None:
        return ()
    sizes = {reach(array, part.rows, part.mask.valid) for array in (sample.got, sample.expected)} - {None}
    return tuple(
        Change(f"sliding window of {size}", _with_mask(window=size), f"config: text.windows; {_BIAS}") for size in sizes
    )


def reach(weights: np.ndarray, rows: np.ndarray, valid: np.ndarray) -> int | None:
    """How far back queries look, themselves included, where some do not look at all keys before them.

    Args:
      weights: ``[B, H, R, S]``.
      rows: positions of the queries ``[R]``.
      valid: ``[B, S]``, false at padding.
    """
    first = np.argmax((weights > 0) & valid[:, None, None], axis=-1)
    start = np.argmax(valid, axis=-1)
    looks = valid[:, None, rows] & np.ones_like(first, bool)
    back = np.where(looks, rows - first + 1, 0)
    size = int(back.max())
    cut = looks & (rows - start[:, None, None] + 1 > size)
    return size if cut.any() else None


def study_out(part: Output, sample: Sample, more: tuple[Change, ...] = ()) -> Study:
    """Hypotheses of what attention adds; ``more`` are changes of the attention, tried first."""
    changes = (*more, *MASK_CHANGES, *SCORE_CHANGES, *MIX_CHANGES, *projection_changes("value"), *ROUNDED_SCORES)
    within = vary(part.attention, changes, lambda attention: dataclasses.replace(part, attention=attention)())
    variations: tuple[Variation, ...] = (
        *within,
        *vary(part, out_changes(part.attention.query.count), lambda part: part()),
    )
    return Study(sample, part, variations)


def study_projected(part: Attention, sample: Sample, side: str) -> Study:
    """Hypotheses of ``keys`` or ``values`` at the sampled rows, all heads."""
    if side == "value":
        found = study(sample, part, projection_changes("value"), lambda part: part.value.array)
        rotary = part.turn_key
        if rotary is None:
            return found
        too = Change("values are rotated, as keys are", lambda part: part, "jaxmllm.models.decoder.SelfAttention.keys")
        rotated = Variation(too, lambda: rotary.turn(part.value.array, sample.positions))
        return dataclasses.replace(found, variations=(rotated, *found.variations))
    both = tuple(turned("key", change) for change in ROTARY_CHANGES)
    names = tuple(Change(each.name.removeprefix("key: "), each.apply, each.where, each.both_ways) for each in both)
    return study(
        sample,
        part,
        (*names, *projection_changes("key")),
        lambda part: part.key.array if part.turn_key is None else part.turn_key.turn(part.key.array, sample.positions),
    )
