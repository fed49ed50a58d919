"""The phases that compare what users read of a model, by the production functions from the prompts on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from jaxmllm.model import Model
from jaxmllm.validation import floors
from jaxmllm.validation.diagnosis.behaviours import behaviour_causes
from jaxmllm.validation.distributions import measure
from jaxmllm.validation.edit_cases import edit_cases
from jaxmllm.validation.gather import Gathered, judged
from jaxmllm.validation.port import behaviour
from jaxmllm.validation.port.model import Port
from jaxmllm.validation.prompts import generation_inputs
from jaxmllm.validation.report import Cause, Phase

STREAMED = "needs the whole model in memory; one layer was held at a time"
# What a recording holds where a phase can be compared.
RECORDED = {
    "answer": "answer.log_probability",
    "generation": "generation.input_ids",
    "edits": "edit.erase.logits",
    "contrast": "contrast.map",
}


def compare_behaviour(name: str, port: Port, gathered: Gathered) -> Phase:
    """One of the phases ``answer``, ``generation``, ``edits`` and ``contrast``."""
    if port.model is None:
        return Phase(name, "skipped", STREAMED)
    if RECORDED[name] not in gathered.recording:
        return Phase(name, "skipped", "the recording does not hold it")
    before = len(gathered.comparisons)
    findings: list[str] = []
    with gathered.attempt(name):
        findings = PHASES[name](port.model, gathered)
    phase = judged(name, gathered.comparisons[before:], gathered)
    if findings:
        phase = dataclasses.replace(
            phase, verdict="differs", findings=(*findings, *phase.findings), summary=findings[0]
        )
    if phase.verdict == "differs":
        phase = dataclasses.replace(phase, causes=_causes(name, phase, gathered))
    return phase


def _causes(name: str, phase: Phase, gathered: Gathered) -> tuple[Cause, ...]:
    """What may have made a phase depart; a diagnosis that fails says so and no more."""
    recording = gathered.recording
    image = np.asarray(gathered.inputs["input_ids"]) == recording.header["image_token_id"]
    try:
        return behaviour_causes(
            name,
            {each.component: gathered.departing[each.component, each.kind] for each in phase.departures},
            lambda wanted: recording.read(wanted) if wanted in recording else None,
            {**gathered.inputs, "image_mask": image},
            phase.findings,
        )
    except Exception as error:  # a broken port may hand in anything, and the departure stands without its cause
        return (Cause("the diagnosis itself failed", f"{type(error).__name__}: {error}"),)


def _answer(model: Model, gathered: Gathered) -> list[str]:
    """Log-probabilities against PyTorch's; rank and correctness against what follows from the port's own logits, since
    near ties may fall either way."""
    answer_ids = np.asarray(gathered.inputs["answer_ids"])
    there = answer_ids >= 0
    logits = behaviour.answer_logits(model, gathered.inputs)
    chosen = np.take_along_axis(logits, np.maximum(answer_ids, 0)[..., None], axis=-1)[..., 0]
    each = np.where(there, chosen - _logsumexp(logits), 0.0)
    scores = behaviour.scored(logits, answer_ids)
    gathered.note("answer.log_probability", "run", each.astype(np.float32))
    gathered.note("answer.total", "run", np.asarray(scores.log_probability, np.float32))
    gathered.note("answer.early_logits", "run", behaviour.early_logits(model, gathered.inputs))
    rank = (logits[:, 0] > chosen[:, :1]).sum(axis=-1)
    correct = ((logits.argmax(axis=-1) == answer_ids) | ~there).all(axis=-1)
    return [
        f"answer.{what}: the port says {got.tolist()}, its own logits say {expected.tolist()}"
        for what, got, expected in (("rank", scores.rank, rank), ("correct", scores.correct, correct))
        if not np.array_equal(got, expected)
    ]


def _logsumexp(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    top = wide.max(axis=-1)
    return top + np.log(np.exp(wide - top[..., None]).sum(axis=-1))


def _generation(model: Model, gathered: Gathered) -> list[str]:
    """Tokens are PyTorch's, unless its own choice is a tie within the noise; also where one of them ends the answer."""
    recording = gathered.recording
    said, prompts = recording.header["generation"], generation_inputs(recording)
    expected = np.asarray(said["tokens"])
    found = behaviour.generated(model, prompts, expected.shape[1])
    findings, agreed = [], np.ones_like(expected, bool)
    noise = _noise_of_logits(gathered)
    for row, (ours, theirs) in enumerate(zip(found.tokens, expected, strict=True)):
        other = np.flatnonzero(ours != theirs)
        if not len(other):
            continue
        at = int(other[0])
        agreed[row, at:] = False  # what follows another token is another text
        lead = float(said["leads"][row][at])
        if lead > 2 * noise:
            findings.append(
                f"example {row}, token {at}: the port says {ours[at]}, PyTorch {theirs[at]}, which leads by {lead:.3g} "
                f"(logits may differ by {noise:.1e})"
            )
    same = np.where(agreed, found.log_probabilities, recording.read("generation.log_probability"))
    gathered.note("generation.log_probability", "run", np.asarray(same, np.float32))
    if agreed.all():
        findings += _stopped(model, prompts, expected)
    return findings


def _stopped(model: Model, prompts: behaviour.Arrays, expected: np.ndarray) -> list[str]:
    """Whether answers end with a token that PyTorch generated early on, when that is asked for."""
    stop = int(expected[0, min(1, expected.shape[1] - 1)])
    ends = [np.flatnonzero(row == stop) for row in expected]
    wanted = [row[: end[0] + 1].tolist() if len(end) else row.tolist() for row, end in zip(expected, ends, strict=True)]
    found = behaviour.generated(model, prompts, expected.shape[1], (stop,))
    return [
        f"example {row}: with stop token {stop} the port says {ours}, PyTorch's tokens up to it are {theirs}"
        for row, theirs in enumerate(wanted)
        if (ours := found.tokens[row, : found.lengths[row]].tolist()) != theirs
    ]


def _noise_of_logits(gathered: Gathered) -> float:
    """The largest difference of a logit that means nothing."""
    recording = gathered.recording
    if "logits" not in recording:
        return 0.0
    expected = recording.read("logits")
    scale = measure(expected, expected, np.ones(expected.shape[:1], bool), recording.dtype).scale
    return floors.tolerance(recording.floor("logits", "run"), scale, recording.dtype, gathered.ways)["max"]


def _edits(model: Model, gathered: Gathered) -> list[str]:
    for case in edit_cases(model.num_layers):
        with gathered.attempt("edits"):
            state, logits = behaviour.edited(model, gathered.inputs, case)
            gathered.note(f"edit.{case.name}.resid_post", "run", state)
            gathered.note(f"edit.{case.name}.logits", "run", logits)
    return []


def _contrast(model: Model, gathered: Gathered) -> list[str]:
    """Attention, distances and the map against PyTorch's, the map for the layers that PyTorch found; the port's own
    choice against its own distances, since near ties may fall either way."""
    attention = behaviour.image_attention(model, gathered.inputs)
    gathered.note("contrast.attention", "run", attention)
    pre = np.asarray(gathered.recording.header["contrast"]["pre"])
    found = behaviour.contrast(attention, pre)
    gathered.note("contrast.distance", "run", found["distance"])
    gathered.note("contrast.map", "run", found["map"])
    farthest = found["distance"][:-1].argmax(axis=0)
    if np.array_equal(found["layer"], farthest):
        return []
    return [
        f"pre-fusion layer: the port says {found['layer'].astype(int).tolist()}, farthest from the last layer by its "
        f"own distances are {farthest.tolist()}"
    ]


PHASES: dict[str, Callable[[Model, Gathered], list[str]]] = {
    "answer": _answer,
    "generation": _generation,
    "edits": _edits,
    "contrast": _contrast,
}
