"""The port against a recording: phases, verdicts, the component that departs first, and why."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from jaxmllm.convert import store
from jaxmllm.errors import InputError
from jaxmllm.validation import components, floors
from jaxmllm.validation.behaviours import compare_behaviour
from jaxmllm.validation.diagnosis import hints_for_phase
from jaxmllm.validation.explain import causes_of
from jaxmllm.validation.gather import Gathered, is_of_the_machine, judged, told
from jaxmllm.validation.phases import BEHAVIOUR_PHASES, COMPONENT_PHASES, PHASES, Progress, check_phases
from jaxmllm.validation.port.model import Port
from jaxmllm.validation.preprocessing import compare_preprocessing
from jaxmllm.validation.prompts import has_processor
from jaxmllm.validation.recording import Recording, RecordingError
from jaxmllm.validation.report import Cause, Comparison, Phase, Report
from jaxmllm.validation.tensors import compare_tensors, read_tensor
from jaxmllm.validation.walk import walk

# Where to look when a leaf is not what its tensor is.
WEIGHTS = "jaxmllm.convert.tables (names), jaxmllm.convert.names.TRANSFORMS (layout), the checkpoint's files"
# The same of pixels and ids.
PROCESSING = "preprocessor_config.json, tokenizer files; jaxmllm.processing"


def compare(
    port: Port,
    recording: Recording,
    *,
    phases: Iterable[str] = PHASES,
    precision: str = "highest",
    settings: Mapping[str, Any] | None = None,
    versions: Mapping[str, str] | None = None,
    command: str = "",
    on_progress: Progress = lambda what: None,
) -> Report:
    """Compares a port with a recording of PyTorch.

    Args:
      port: of the same checkpoint.
      recording: of the reference.
      phases: some of ``PHASES``; those that the recording does not hold are skipped.
      precision: of products, as ``jax.default_matmul_precision`` takes it; it decides which ways of the floor count.
      settings, versions, command: what the report says of how it was made.
      on_progress: told what is compared next.

    Raises:
      InputError: the recording is of another model or cannot be read.
    """
    asked = check_phases(phases)
    check_model(port, recording)
    backend = jax.default_backend()
    gathered = Gathered(recording, recording.inputs(), floors.ways_that_count(backend, precision))
    done: list[Phase] = []
    with jax.default_matmul_precision(precision):
        if "tensors" in asked:
            on_progress("tensors")
            done.append(_timed(lambda: _tensors(port, recording)))
        if "preprocessing" in asked:
            on_progress("preprocessing")
            done.append(_timed(lambda: _preprocessing(port, recording)))
        if set(asked) & set(COMPONENT_PHASES):
            started = time.perf_counter()
            walk(port, gathered, asked, on_progress)
            seconds = time.perf_counter() - started
            done += _component_phases(port, gathered, asked, seconds)
        for name in BEHAVIOUR_PHASES:
            if name in asked:
                on_progress(name)
                done.append(_timed(functools.partial(compare_behaviour, name, port, gathered)))
    return Report(
        model=str(port.folder.name),
        reference=str(recording.header.get("model", recording.folder.name)),
        settings={**(settings or {}), "precision": precision, "backend": backend, "ways": list(gathered.ways)},
        versions=dict(versions or {}),
        command=command,
        phases=tuple(done),
        first=first_departure(done, recording),
        samples=gathered.samples,
    )


def check_model(port: Port, recording: Recording) -> None:
    """Raises InputError where a recording is of another model or was computed in another type."""
    theirs = recording.header.get("model_type")
    if theirs != port.config.model_type:
        raise InputError(f"{recording.folder}: is of a {theirs} model; this one is {port.config.model_type}")
    if recording.dtype != port.dtype:
        raise InputError(
            f"{recording.folder}: PyTorch computed in {recording.dtype}, the port computes in {port.dtype}; "
            f"give --dtype {recording.dtype}, or record the reference in {port.dtype}"
        )


def first_departure(phases: Iterable[Phase], recording: Recording) -> str | None:
    """What departs first: the first phase that differs, and of components the first in the order of computation.

    A component's own error comes before errors of runs, which add up, unless the run departs at an earlier component.
    """
    differing = [phase for phase in phases if phase.verdict == "differs"]
    for phase in differing:
        if phase.name in COMPONENT_PHASES and phase.departures:
            break
        # of tensors, the leaf; of preprocessing, the array
        named = [finding.split()[0] for finding in phase.findings if phase.name == "tensors"]
        return named[0] if named else phase.departures[0].component if phase.departures else phase.name
    departures = [each for phase in differing for each in phase.departures]
    found = first_of(departures, recording)
    return found.component if found else (differing[0].name if differing else None)


def first_of(departures: Iterable[Comparison], recording: Recording) -> Comparison | None:
    """The first of some departures in the order of computation; own errors before those of runs."""
    order = {name: place for place, name in enumerate(recording.names())}
    last = len(order)
    return min(departures, key=lambda each: (order.get(each.component, last), each.kind != "own"), default=None)


def _timed(run: Callable[[], Phase]) -> Phase:
    started = time.perf_counter()
    phase = run()
    return dataclasses.replace(phase, seconds=time.perf_counter() - started)


def _tensors(port: Port, recording: Recording) -> Phase:
    if "tensors" not in recording.header:
        return Phase("tensors", "skipped", "the recording holds no checksums")
    try:
        at_hand = None if store.is_store(port.folder) else read_tensor(port.folder)
        phase = compare_tensors(recording.header["tensors"], port.table, port.read, port.dtype, at_hand)
        found = tuple(Cause(finding, "by checksum, name or shape", where=WEIGHTS) for finding in phase.findings[:3])
        return dataclasses.replace(phase, causes=(*found, *hints_for_phase("tensors", phase.findings))[:6])
    except InputError:
        raise
    except Exception as error:  # a broken port may fail in any way
        return _failing("tensors", error)


def _preprocessing(port: Port, recording: Recording) -> Phase:
    if "preprocessing" in recording.header and not has_processor(port.folder):
        return Phase("preprocessing", "skipped", f"{port.folder.name} holds no processor files")
    try:
        phase = compare_preprocessing(recording, port.folder, port.config)
    except RecordingError:
        raise
    except Exception as error:  # a broken port may fail in any way
        return _failing("preprocessing", error)
    if phase.verdict != "differs":
        return phase
    said = (*phase.findings, *(each.component for each in phase.departures))
    found = tuple(
        Cause(finding, "by what the processors are and do", where=PROCESSING) for finding in phase.findings[:3]
    )
    return dataclasses.replace(phase, causes=(*found, *hints_for_phase("preprocessing", said))[:6])


def _failing(name: str, error: Exception) -> Phase:
    """A phase in which the port failed, or the machine."""
    return Phase(name, "failed" if is_of_the_machine(error) else "differs", told(error), findings=(told(error),))


# --- components


def _component_phases(port: Port, gathered: Gathered, asked: tuple[str, ...], seconds: float) -> list[Phase]:
    found = []
    for name in COMPONENT_PHASES:
        if name not in asked:
            continue
        own = [each for each in gathered.comparisons if components.phase_of(each.component) == name]
        phase = judged(name, own, gathered)
        departure = first_of(phase.departures, gathered.recording)
        if departure is not None:
            phase = dataclasses.replace(phase, causes=causes_of(port, gathered, departure))
        found.append(phase)
    spent = max(1, sum(len(phase.comparisons) for phase in found))
    return [dataclasses.replace(phase, seconds=seconds * len(phase.comparisons) / spent) for phase in found]
