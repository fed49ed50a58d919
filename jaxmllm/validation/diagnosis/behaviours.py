"""Why answers, contrastive attention and generation depart: their formulas with one mistake each."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from jaxmllm.validation.diagnosis.case import Lookup
from jaxmllm.validation.diagnosis.hints import hints_for_phase
from jaxmllm.validation.diagnosis.hypotheses import PARTLY
from jaxmllm.validation.report import Cause

Arrays = Mapping[str, np.ndarray]
# A mistake, where to look, and what it makes of the array.
Mistake = tuple[str, str, np.ndarray]

TEMPERATURES = (0.2, 0.5, 0.6, 0.7, 0.8, 0.9, 1.1, 1.2, 1.5, 2.0)
_ROUNDING = (1e-4, 1e-2)  # differences over numbers, where these are rounded to half precision
_NEAR = 1e-3  # of the scale: a step of a generation that differs by more is taken for another one
_SCORE = "jaxmllm.analysis.scores.score"
_AT = "jaxmllm.processing.answers; answer_positions: jaxmllm.models.inputs"
_MEASURES = "jaxmllm.analysis.attention"
_READ = "jaxmllm.models.decoder.Tap.rows, Tap.keep_attention"
_CACHE = "jaxmllm.decoding.cache; jaxmllm.decoding.generate"


def behaviour_causes(
    phase: str, departing: Arrays, read: Lookup, inputs: Arrays, findings: Sequence[str]
) -> tuple[Cause, ...]:
    """What may have made a phase of behaviour depart.

    Args:
      phase: ``answer``, ``contrast``, ``generation`` or ``edits``.
      departing: the port's arrays that depart, in the order of computation.
      read: the reference's arrays.
      inputs: of the recording, and ``image_mask`` ``[B, S]``, true at image tokens.
      findings: of the phase, a line each.

    Returns:
      Mistakes that explain the first array that departs, else what to look at.
    """
    hints = hints_for_phase(phase, (*findings, *departing))
    if phase == "generation":
        return _generated(departing, read, findings) or hints
    build = {"answer": _answers, "contrast": _contrast}.get(phase)
    if build is None:
        return hints
    if not departing:
        where = _SCORE if phase == "answer" else _MEASURES
        return (
            tuple(Cause(said, "the arrays that this is made of agree", None, where) for said in findings[:3]) or hints
        )
    name, got = next(iter(departing.items()))
    return (*_explaining(got, read(name), build(name, read, inputs)), *hints)[:4]


def _explaining(got: np.ndarray, expected: np.ndarray | None, mistakes: Iterator[Mistake]) -> tuple[Cause, ...]:
    """The mistakes that make the port's array of the reference's, the nearest first."""
    if expected is None or got.shape != expected.shape or not np.isfinite(got).all():
        return ()
    difference = _rms(got - expected)
    found = []
    for name, where, array in mistakes:
        left = _rms(array - got)
        explained = max(0.0, 1 - left / difference)
        if explained >= PARTLY:
            evidence = f"computed so from the reference, {100 * explained:.4g}% of the difference goes away"
            found.append((left, Cause(name, evidence, explained, where)))
    relative = difference / (_rms(expected) or 1.0)
    if not found and _ROUNDING[0] < relative < _ROUNDING[1]:
        name = "computed or rounded in half precision (bfloat16, float16)"
        return (Cause(name, f"differences are {relative:.1g} of the numbers, as rounding makes them", None, _SCORE),)
    return tuple(cause for _, cause in sorted(found, key=lambda pair: pair[0]))[:2]


def _rms(array: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.asarray(array, np.float64) ** 2)))


# --- answers


def _answers(name: str, read: Lookup, inputs: Arrays) -> Iterator[Mistake]:
    logits = read("logits")
    ids, at = (np.asarray(inputs[each]) for each in ("answer_ids", "answer_positions"))
    if logits is None or logits.shape[1] != np.asarray(inputs["input_ids"]).shape[1]:
        return  # of long sequences some rows alone are kept
    there = ids >= 0
    make = {"answer.log_probability": lambda x: x, "answer.total": lambda x: x.sum(axis=-1)}.get(name)
    if make is None:
        return

    def of(at: np.ndarray = at, factor: float = 1.0, counted: np.ndarray = there, kind: Any = None) -> np.ndarray:
        chosen = logits[np.arange(len(at))[:, None], np.clip(at, 0, logits.shape[1] - 1)].astype(np.float64) * factor
        chosen = chosen if kind is None else chosen.astype(kind).astype(np.float64)
        top = chosen.max(axis=-1, keepdims=True)
        every = chosen - top - np.log(np.exp(chosen - top).sum(axis=-1, keepdims=True))
        every = every if kind is None else every.astype(kind).astype(np.float64)
        token = np.take_along_axis(every, np.maximum(ids, 0)[..., None], axis=-1)[..., 0]
        return make(np.where(counted, token, 0.0))

    for by, word in ((1, "late"), (-1, "early")):
        yield f"answer positions are off by one: read one position {word}", _AT, of(at + by)
    yield "padding of answers counted as token 0", _SCORE, of(counted=np.ones_like(there))
    for kind in (ml_dtypes.bfloat16, np.float16):
        yield f"log-probabilities in {np.dtype(kind).name}", _SCORE, of(kind=kind)
    for factor in TEMPERATURES:
        yield f"logits divided by a temperature of {factor}", _SCORE, of(factor=1 / factor)
    if name == "answer.total":
        yield "mean over the answer's tokens instead of their sum", _SCORE, of() / np.maximum(there.sum(axis=-1), 1)


# --- contrastive attention


def _shares(attention: np.ndarray) -> np.ndarray:
    total = attention.sum(axis=-1, keepdims=True)
    return np.divide(attention, total, out=np.full_like(attention, 1 / attention.shape[-1]), where=total > 0)


def _contrast(name: str, read: Lookup, inputs: Arrays) -> Iterator[Mistake]:
    stored = read("contrast.attention")
    if stored is None:
        return
    attention = stored.astype(np.float64)
    shares = _shares(attention)
    if name == "contrast.attention":
        yield from _read_otherwise(attention, read, inputs)
    elif name == "contrast.distance":
        yield from _distances(attention, shares)
    elif name == "contrast.map":
        pre = _between(shares, shares[-1:])[:-1].argmax(axis=0)
        examples = np.arange(len(pre))
        yield "attention not normalised over image tokens", _MEASURES, attention[-1] - attention[pre, examples]
        yield "map with its sign reversed (pre-fusion less last layer)", _MEASURES, shares[pre, examples] - shares[-1]
        yield "map of the last layer alone", _MEASURES, shares[-1]


def _between(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Hellinger's distance."""
    return np.sqrt(np.square(np.sqrt(p) - np.sqrt(q)).sum(axis=-1) / 2)


def _distances(attention: np.ndarray, shares: np.ndarray) -> Iterator[Mistake]:
    last, square = shares[-1:], np.square(_between(shares, shares[-1:]))
    euclid = np.square(shares - last).sum(axis=-1) / 2
    yield "Hellinger distance without its outer root", _MEASURES, square
    yield "Hellinger distance without roots of the shares", _MEASURES, np.sqrt(euclid)
    yield "Hellinger distance without any roots", _MEASURES, euclid
    yield "Hellinger distance not divided by the root of two", _MEASURES, np.sqrt(2 * square)
    yield "distance to the first layer instead of the last", _MEASURES, _between(shares, shares[:1])
    yield "attention not normalised over image tokens", _MEASURES, _between(attention, attention[-1:])


def _read_otherwise(attention: np.ndarray, read: Lookup, inputs: Arrays) -> Iterator[Mistake]:
    """Attention to the image with the tokens in another order, of other rows, or of heads taken otherwise."""
    mask = inputs["image_mask"]
    counts = mask.sum(axis=-1)
    reverse = np.zeros_like(attention)
    for example, count in enumerate(counts):
        reverse[:, example, :count] = attention[:, example, :count][:, ::-1]
    yield "image tokens in reverse order", "jaxmllm.models.layout.Layout.image_index", reverse
    weights = [read(f"decoder.{layer}.attn_probs") for layer in range(len(attention))]
    whole = [each for each in weights if each is not None and each.shape[2] == mask.shape[1]]
    if len(whole) < len(attention):
        return
    every = np.stack(whole).astype(np.float64)  # [L, B, H, S, S]
    at = np.asarray(inputs["answer_positions"])[:, 0]

    def of(join: Callable[[np.ndarray], np.ndarray], by: int = 0) -> np.ndarray:
        found = np.zeros_like(attention)
        for example, (row, count) in enumerate(zip(at, counts, strict=True)):
            of_row = join(every[:, example, :, min(max(row + by, 0), mask.shape[1] - 1)])
            found[:, example, :count] = of_row[:, mask[example]]
        return found

    yield "largest head instead of the mean over heads", _READ, of(lambda heads: heads.max(axis=1))
    yield "sum over heads instead of their mean", _READ, of(lambda heads: heads.sum(axis=1))
    yield "first head instead of the mean over heads", _READ, of(lambda heads: heads[:, 0])
    for by, word in ((-1, "before"), (1, "after")):
        yield f"attention of the row {word} the prompt's last one", _READ, of(lambda heads: heads.mean(axis=1), by)


# --- generation


def _generated(departing: Arrays, read: Lookup, findings: Sequence[str]) -> tuple[Cause, ...]:
    """From which generated token on the port departs, which tells the prompt's own pass from the steps behind it."""
    first = _first_steps(departing, read, findings)
    if not first:
        return ()
    step = min(first.values())
    evidence = "departs first at generated token " + ", ".join(f"{at} of prompt {row}" for row, at in first.items())
    name = (
        "the prompt's own pass: positions, the mask, or the row that is read"
        if step == 0
        else "places in the cache, positions or masks of generated tokens: the prompt's own pass agrees"
    )
    where = "jaxmllm.models.layout.make_layout; jaxmllm.decoding.generate" if step == 0 else _CACHE
    return (Cause(name, evidence, None, where),)


def _first_steps(departing: Arrays, read: Lookup, findings: Sequence[str]) -> dict[int, int]:
    """Prompt -> the first token that departs."""
    first: dict[int, int] = {}
    for row, at in (map(int, found) for found in re.findall(r"example (\d+), token (\d+)", "\n".join(findings))):
        first[row] = min(at, first.get(row, at))
    got, expected = departing.get("generation.log_probability"), read("generation.log_probability")
    if got is None or expected is None:
        return first
    for row, gaps in enumerate(np.abs(got - expected) > _NEAR * _rms(expected)):
        if gaps.any():
            at = int(gaps.argmax())
            first[row] = min(at, first.get(row, at))
    return dict(sorted(first.items()))
