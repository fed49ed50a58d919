"""The likely causes of a departure, most likely first."""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxmllm.validation.diagnosis.case import Case
from jaxmllm.validation.diagnosis.decoder import decoder_study
from jaxmllm.validation.diagnosis.frequencies import frequency_causes
from jaxmllm.validation.diagnosis.hints import hints_for
from jaxmllm.validation.diagnosis.hypotheses import Study, confirmed, tried
from jaxmllm.validation.diagnosis.images import connector_study, embedding_study
from jaxmllm.validation.diagnosis.pattern import pattern_causes, spans
from jaxmllm.validation.diagnosis.pixels import embed_study, features_study
from jaxmllm.validation.diagnosis.precision import fit_causes, precision_causes
from jaxmllm.validation.diagnosis.qformer import qformer_study, words_study
from jaxmllm.validation.diagnosis.rotary import study_positions, study_rotary
from jaxmllm.validation.diagnosis.runs import run_causes
from jaxmllm.validation.diagnosis.sample import draw
from jaxmllm.validation.diagnosis.tiles import tile_causes
from jaxmllm.validation.diagnosis.token_order import order_causes
from jaxmllm.validation.diagnosis.vision import block_study
from jaxmllm.validation.diagnosis.weights import weight_causes
from jaxmllm.validation.report import Cause

MOST = 6  # causes that are named
WHOLE = 0.99  # share from which on nothing is left to explain of rotary tables
MOST_PARTLY = 3  # of them, such as explain a part

_ALONE = {
    "vision.embed": embed_study,
    "qformer.embed": words_study,
    "vision.features": features_study,
    "connector": connector_study,
    "positions": study_positions,
    "rotary": study_rotary,
    "embedding": embedding_study,
}
_LAYERS = {"decoder": decoder_study, "vision": block_study, "qformer": qformer_study}


def study_of(case: Case) -> Study | None:
    """The hypotheses of a component; ``None`` where there are none or what they start from is not at hand."""
    build = _ALONE.get(case.component) or _LAYERS.get(case.part)
    build = decoder_study if case.component in ("final_norm", "logits") else build
    return None if build is None else build(case)


def likely_causes(case: Case) -> tuple[Cause, ...]:
    """Names what may have made a component depart.

    Args:
      case: the departure, and what it was computed from.

    Returns:
      At most ``MOST`` causes: tried ones that explain the difference, with evidence, then what else was seen, then
      what was not tried.
    """
    unlike = _unlike(case)
    if case.got.shape != case.expected.shape:
        return (*_first(order_causes(case) if case.component == "image_tokens" else ()), *unlike)[:MOST]
    # features are not computed from the blocks' own outputs, yet these are what they are read from
    if case.kind == "run" and case.component != "vision.features":
        computed = run_causes(case)
    else:
        study = study_of(case)
        computed = (*weight_causes(case, study_of), *(tried(study) if study else ()))
        if case.component in ("image_tokens", "vision.embed", "connector"):
            flat = dataclasses.replace(case, got=_flat(case.got), expected=_flat(case.expected))
            computed = (*computed, *order_causes(flat))
        if case.component == "image_tokens":
            computed = (*tile_causes(case), *computed)
        if case.component == "rotary" and max((cause.explained or 0.0 for cause in computed), default=0.0) < WHOLE:
            computed = (*frequency_causes(case), *computed)
    narrow = () if case.component == "positions" else precision_causes(draw(case))
    computed = (*computed, *narrow)
    if case.kind == "own" and not any(map(confirmed, computed)):
        computed = (*fit_causes(case), *computed)
    sure = _first(tuple(cause for cause in computed if confirmed(cause)))
    seen = (*unlike, *pattern_causes(case))
    if sure:
        return (*sure, *seen)[:MOST]
    return (*computed[:MOST_PARTLY], *seen, *hints_for(case))[:MOST]


def _first(causes: tuple[Cause, ...]) -> tuple[Cause, ...]:
    """Those that explain most, first; what explains as much stays in the order in which it was tried."""
    return tuple(sorted(causes, key=lambda cause: -round(cause.explained or 0.0, 2)))[:3]


def _flat(array: np.ndarray) -> np.ndarray:
    """Rows of all pictures, one after another."""
    return array.reshape(-1, array.shape[-1])


def _unlike(case: Case) -> tuple[Cause, ...]:
    """Shapes that differ, and numbers that are not finite."""
    if case.got.shape != case.expected.shape:
        evidence = f"the port's is {case.got.shape}, the reference's {case.expected.shape}"
        return (Cause("the array has another shape", evidence, None, case.component),)
    mask = np.asarray(case.mask, bool)
    bad = ~np.isfinite(case.got[mask]) & np.isfinite(case.expected[mask])
    if not bad.any():
        return ()
    places = np.flatnonzero(bad.reshape(len(bad), -1).any(axis=1))
    evidence = f"{int(bad.sum())} of {bad.size} numbers are not finite where the reference's are; rows {spans(places)}"
    return (
        Cause("the port's numbers are not finite", evidence, None, "an overflow, or a row that may attend to nothing"),
    )
