"""Whether the leaves that a component is computed from hold what the checkpoint's tensors say, and if not, what."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping

import numpy as np

from jaxmllm.validation.diagnosis.case import Case
from jaxmllm.validation.diagnosis.hypotheses import Study
from jaxmllm.validation.diagnosis.parts import rounded
from jaxmllm.validation.diagnosis.sample import distance
from jaxmllm.validation.diagnosis.token_order import matched_rows
from jaxmllm.validation.report import Cause

_LOADING = "jaxmllm.convert.tables, jaxmllm.convert.names.TRANSFORMS"


def _linear(*paths: str) -> tuple[str, ...]:
    return tuple(f"{path}/{name}" for path in paths for name in ("kernel", "bias"))


def _norm(path: str) -> tuple[str, ...]:
    return f"{path}/scale", f"{path}/bias"


_ATTENTION = _linear(*(f"attention/{side}" for side in ("query", "key", "value", "out", "qkv")))
_MLP = _linear("mlp/gate", "mlp/up", "mlp/down")
_IN_LAYER = {
    "attn_in": _norm("attention_norm"),
    "keys": (*_linear("attention/key"), *_norm("attention_norm")),
    "values": (*_linear("attention/value"), *_norm("attention_norm")),
    "attn_probs": _linear("attention/query", "attention/key"),
    "attn_out": _ATTENTION,
    "mlp_in": _norm("mlp_norm"),
    "mlp_out": _MLP,
}
_Q_LAYER = "qformer/layers/"
_ALONE = {
    "vision.embed": (
        *_linear("vision/patch_embed"),
        "vision/class_embed",
        "vision/position_embed",
        *_norm("vision/pre_norm"),
    ),
    "vision.features": _norm("vision/post_norm"),
    "qformer.embed": (
        "qformer/query_tokens",
        "qformer/word_embed/embedding",
        "qformer/position_embed/embedding",
        *_norm("qformer/norm"),
    ),
    "connector": (
        *_linear("projector/up", "projector/down", "projection", "vision/merger/mlp/up", "vision/merger/mlp/down"),
        *_norm("projector_norm"),
        *_norm("vision/merger/norm"),
    ),
    "image_tokens": ("newline",),
    "embedding": ("decoder/embed/embedding",),
    "final_norm": ("decoder/norm/scale",),
    "logits": ("decoder/head/kernel", "decoder/embed/embedding"),
}
_QFORMER = {
    "attn_out": (*(f"{_Q_LAYER}{leaf}" for leaf in _ATTENTION), *_norm(f"{_Q_LAYER}attention/norm")),
    "cross_out": (
        *(f"qformer/cross/{leaf.removeprefix('attention/')}" for leaf in _ATTENTION),
        *_norm("qformer/cross/norm"),
    ),
    "resid_post": tuple(
        leaf
        for block in ("query_mlp", "text_mlp")
        for leaf in (
            *_linear(f"{_Q_LAYER}{block}/mlp/up", f"{_Q_LAYER}{block}/mlp/down"),
            *_norm(f"{_Q_LAYER}{block}/norm"),
        )
    ),
}


def leaves_of(case: Case) -> tuple[str, ...]:
    """The leaves that a component is computed from; not all of them are there in every family."""
    if case.component in _ALONE:
        return _ALONE[case.component]
    site = case.site.removesuffix("~faint")
    if case.part == "qformer":
        return _QFORMER.get(site, ())
    return tuple(f"{case.part}/layers/{leaf}" for leaf in _IN_LAYER.get(site, ()))


def weight_causes(case: Case, study_of: Callable[[Case], Study | None]) -> tuple[Cause, ...]:
    """Leaves that do not hold their tensor, each with how it differs.

    Args:
      case: the departure.
      study_of: the hypotheses of a case, which tell how much goes away with the checkpoint's tensors in place.
    """
    leaves, words = leaves_of(case), []
    mended: dict[str, np.ndarray] = {}
    for leaf in leaves:
        have, want = case.leaf(leaf), case.tensor(leaf)
        if have is None or want is None or np.array_equal(have, want.astype(have.dtype), equal_nan=True):
            continue
        mended[leaf] = want
        words.append(f"{leaf}: {how_they_differ(have, want, case.tensor, [x for x in leaves if x != leaf])}")
    if not mended:
        return ()
    explained = _explained(dataclasses.replace(case, leaf=lambda name: mended.get(name, case.leaf(name))), study_of)
    evidence = f"not what the checkpoint's tensors say: {'; '.join(words[:4])}{'; ...' if words[4:] else ''}"
    if explained is not None:
        evidence += f"; with the tensors in their place, {100 * explained:.4g}% of the difference goes away"
    name = words[0] if len(words) == 1 else f"{words[0]} (and {len(words) - 1} more)"
    return (Cause(_swapped(mended, case) or name, evidence, explained, f"{next(iter(mended))}; {_LOADING}"),)


def _swapped(mended: Mapping[str, np.ndarray], case: Case) -> str:
    """Two leaves that hold each other's tensors, in words."""
    for one, other in itertools.combinations(mended, 2):
        if _holds(case, one, mended[other]) and _holds(case, other, mended[one]):
            return f"{one} and {other} are swapped"
    return ""


def _holds(case: Case, leaf: str, tensor: np.ndarray) -> bool:
    have = case.leaf(leaf)
    return have is not None and np.array_equal(have, tensor.astype(have.dtype))


def _explained(mended: Case, study_of: Callable[[Case], Study | None]) -> float | None:
    """Share of the difference that goes away in a case whose leaves are mended."""
    study = study_of(mended)
    if study is None or study.sample.difference == 0:
        return None
    left = distance(study.correct(), study.sample.expected, study.sample.mask)
    return max(0.0, 1 - left / study.sample.difference)


def how_they_differ(
    have: np.ndarray, want: np.ndarray, tensor: Callable[[str], np.ndarray | None], others: list[str]
) -> str:
    """In words, what a leaf holds in place of its tensor.

    Args:
      have: the leaf; ``want`` the tensor in the same layout.
      tensor: the checkpoint's tensors by leaf.
      others: leaves that might have been taken for it.
    """
    if have.shape != want.shape:
        return f"shape {have.shape} instead of {want.shape}"
    a, b = have.astype(np.float64), want.astype(np.float64)
    if not a.any():
        return "all zeros"
    if a.ndim == 2 and a.shape[0] == a.shape[1] and np.array_equal(a, b.T):
        return "transposed"
    if np.array_equal(a, -b):
        return "negated"
    for name in others:
        other = tensor(name)
        if other is not None and other.shape == want.shape and np.array_equal(have, other.astype(have.dtype)):
            return f"holds the tensor of {name}"
    for kind in ("bfloat16", "float16", "tf32"):
        if np.array_equal(a, rounded(b, kind)):
            return f"rounded to {kind}"
    if np.allclose(a, b + 1, rtol=0, atol=1e-6):
        return "one added"
    gain = float(np.vdot(a, b) / np.vdot(b, b)) if b.any() else 0.0
    if np.allclose(a, gain * b, rtol=1e-4, atol=1e-6 * float(np.abs(b).max())):
        return f"scaled by {gain:.6g}"
    for axis in range(a.ndim):
        word = _moved(np.moveaxis(a, axis, 0), np.moveaxis(b, axis, 0), ("rows", "columns")[min(axis, 1)])
        if word:
            return word
    if a.ndim == 2 and np.array_equal(a, b.T.reshape(a.shape)):
        return "laid out transposed (reshaped, not transposed)"
    differing = a != b
    largest = float(np.abs(a - b)[differing].max())
    return f"{int(differing.sum())} of {a.size} numbers differ (by {largest:.3g} at most)"


def _moved(a: np.ndarray, b: np.ndarray, word: str) -> str:
    """Whether rows stand elsewhere."""
    if len(a) > 8192:  # tables of tokens: what is moved by little is found by trial
        by = next((by for by in (1, -1, 2, -2) if np.array_equal(a, np.roll(b, by, axis=0))), 0)
        return f"{word} rolled by {by}" if by else ""
    flat = a.reshape(len(a), -1), b.reshape(len(b), -1)
    found, share = matched_rows(*flat)
    if share < 1 or not np.array_equal(a, b[found]):
        return ""
    shifts = (found - np.arange(len(found))) % len(found)
    if (shifts == shifts[0]).all():
        by = int(-shifts[0]) % len(found)
        return f"{word} rolled by {by if by <= len(found) // 2 else by - len(found)}"
    return f"{word} in another order (the first are {', '.join(map(str, found[:6]))})"
