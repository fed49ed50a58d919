"""What the numbers themselves tell: rounding to a narrower type, one factor, one bias."""

from __future__ import annotations

import numpy as np

from jaxmllm.validation.diagnosis.case import Case
from jaxmllm.validation.diagnosis.hypotheses import CONFIRMED, PARTLY
from jaxmllm.validation.diagnosis.parts import rounded
from jaxmllm.validation.diagnosis.sample import Sample, batched, distance, draw
from jaxmllm.validation.report import Cause

_WHERE = "the computation's dtype; jax_default_matmul_precision; casts before norms, softmax, rotary angles and logits"
# Root mean square of the difference over that of the array, where operands or results have so many bits.
_SIZES = (("bfloat16 (8 bits)", 4e-4, 1.5e-2), ("float16 or tf32 (11 bits)", 4e-5, 4e-4))
_HALVES = ("bfloat16", "float16")
_PEAK = 12.0  # largest difference over the root mean square of all: above, the difference is not spread like rounding


def representable(values: np.ndarray, kind: str) -> bool:
    """Whether all numbers are exactly those of a type, other than zeros alone."""
    finite = values[np.isfinite(values)]
    return bool(finite.size and finite.any() and np.array_equal(rounded(finite, kind), finite))


def precision_causes(sample: Sample) -> tuple[Cause, ...]:
    """Rounding to a narrower type than the reference's, by the numbers themselves or by the size of the difference."""
    got, expected = sample.got[sample.mask], sample.expected[sample.mask]
    difference = sample.difference
    if not got.size or not np.isfinite(difference) or difference == 0:
        return ()
    if any(representable(expected, kind) for kind in _HALVES):
        return ()  # the reference's own numbers are no finer
    for kind in _HALVES:
        if representable(got, kind):
            left = distance(rounded(sample.expected, kind), sample.got, sample.mask)
            explained = max(0.0, 1 - left / difference)
            evidence = (
                f"all of the port's numbers are exactly {kind}'s, the reference's are not; the reference's rounded to "
                f"{kind} are off by {left:.3g} (before: {difference:.3g})"
            )
            name = f"computed or rounded in {kind} where the reference is not"
            return (Cause(name, evidence, explained if explained >= PARTLY else None, _WHERE),)
    scale = float(np.sqrt(np.mean(expected**2)))
    relative = difference / scale if scale else 0.0
    gap = got - expected
    spread = np.abs(gap).max() <= _PEAK * difference and abs(gap.mean()) <= 0.2 * difference
    for name, low, high in _SIZES:
        if spread and low <= relative < high:
            evidence = (
                f"the difference is spread evenly and {relative:.2g} of the array's scale (2^{np.log2(relative):.1f}), "
                f"as of numbers rounded to {name}"
            )
            return (Cause(f"computed with numbers rounded to {name}", evidence, None, _WHERE),)
    return ()


def fit_causes(case: Case) -> tuple[Cause, ...]:
    """Whether the port's array is the reference's times one factor, or plus one row."""
    if batched(case.got).ndim < 3 or case.site in ("positions", "attn_probs"):
        return ()
    sample = draw(case)
    difference, mask = sample.difference, sample.mask
    leading = (0, 1)
    if not np.isfinite(difference) or difference == 0 or mask.sum() < 4 * mask[0, 0].size:
        return ()
    found = []
    got, expected = (np.where(mask, array, 0.0) for array in (sample.got, sample.expected))
    square = float(np.vdot(expected, expected))
    factor = float(np.vdot(got, expected)) / square if square else 1.0
    explained = 1 - distance(factor * sample.expected, sample.got, mask) / difference
    if explained >= CONFIRMED:
        word = "negated" if abs(factor + 1) < 1e-3 else f"scaled by {factor:.6g}"
        evidence = (
            f"the port's array is the reference's times {factor:.6g}, which takes {100 * explained:.4g}% of the "
            "difference away"
        )
        found.append(Cause(f"the array is {word}", evidence, explained, "a factor; a sign"))
    row = (got - expected).sum(axis=leading) / np.maximum(mask.sum(axis=leading), 1)
    explained = 1 - distance(sample.expected + row, sample.got, mask) / difference
    if explained >= CONFIRMED:
        evidence = f"the difference is the same in every row, which takes {100 * explained:.4g}% of it away"
        name = "a bias is missing, added or another (one row is added everywhere)"
        found.append(Cause(name, evidence, explained, "biases"))
    return tuple(found)
