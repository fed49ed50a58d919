"""Departures of the run from the prompts on, while every component departs from nothing by itself."""

from __future__ import annotations

import numpy as np

from jaxmllm.validation.diagnosis.case import Case
from jaxmllm.validation.diagnosis.hypotheses import MEETS
from jaxmllm.validation.diagnosis.sample import batched, distance, draw
from jaxmllm.validation.report import Cause

_SCAN = "jaxmllm.models.decoder.Decoder.run (the scan over layers); order of the stacked weights"


def run_causes(case: Case) -> tuple[Cause, ...]:
    """What the port's run holds in place of what it should hold at this layer."""
    found = []
    if case.layer is not None:
        found = [cause for cause in (_other_layer(case),) if cause is not None]
    if case.departures:
        names = ", ".join(case.departures[:4]) + (", ..." if len(case.departures) > 4 else "")
        first = Cause(
            f"follows from {case.departures[0]}, which departs from its own input",
            f"components that depart by themselves: {names}",
            None,
            case.departures[0],
        )
        found.append(first)
    return tuple(found)


def _other_layer(case: Case) -> Cause | None:
    """The layer of the reference that the port's run has here, if there is one."""
    sample = draw(case)
    if sample.difference == 0:
        return None
    assert case.layer is not None
    nearest: tuple[float, int] | None = None
    for layer in range(_depth(case)):
        array = None if layer == case.layer else case.read(f"{case.part}.{layer}.{case.site}")
        if array is None or case.site == "attn_probs":
            continue
        left = distance(sample.rows_of(batched(array)), sample.got, sample.mask)
        nearest = min(nearest or (left, layer), (left, layer))
    if nearest is None or nearest[0] > MEETS * sample.difference:
        return None
    left, layer = nearest
    by = abs(layer - case.layer)
    guess = (
        f"{by} layer(s) skipped or in another order" if layer > case.layer else f"{by} layer(s) run late, or not at all"
    )
    evidence = (
        f"the port's array is the reference's of layer {layer} (off by {left:.3g}), not of layer {case.layer} (off by "
        f"{sample.difference:.3g})"
    )
    return Cause(
        f"the run has at layer {case.layer} what belongs to layer {layer}: {guess}",
        evidence,
        float(np.clip(1 - left / sample.difference, 0, 1)),
        _SCAN,
    )


def _depth(case: Case) -> int:
    if case.part == "decoder":
        return int(case.config.text.num_layers)
    return int(case.config.vision.num_layers if case.part == "vision" else case.config.qformer.num_layers)
