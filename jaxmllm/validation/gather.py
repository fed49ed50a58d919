"""Collects comparisons while a validation runs: judges each array, keeps samples, goes on after failures."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from jaxmllm.validation import components, floors
from jaxmllm.validation.distributions import Agreement, agreement, measure
from jaxmllm.validation.recording import Recording, RecordingError
from jaxmllm.validation.report import Comparison, Kind, Phase, Verdict

SAMPLE = 512  # differences of an array that are kept for histograms


@dataclasses.dataclass
class Gathered:
    """What has been compared so far.

    Attributes:
      recording: of the reference.
      inputs: that both models were given.
      ways: of the reference's floor that count.
      comparisons: in the order in which they were made.
      samples: ``KIND/COMPONENT`` -> some absolute differences.
      broken: phase -> how the port failed, a line each.
      failures: phase -> what this machine could not run, a line each.
    """

    recording: Recording
    inputs: Mapping[str, np.ndarray]
    ways: tuple[str, ...]
    comparisons: list[Comparison] = dataclasses.field(default_factory=list)
    samples: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    broken: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    failures: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    departing: dict[tuple[str, Kind], np.ndarray] = dataclasses.field(default_factory=dict)

    def note(self, name: str, kind: Kind, got: np.ndarray) -> None:
        """Compares one array of the port, whole or at the kept rows, with the reference's; others are passed over."""
        if name not in self.recording:
            return
        expected, rows = self.recording.read(name), self.recording.rows(name)
        got = fit(name, got, rows, expected.shape)
        mask = components.meaningful(name, expected.shape, rows, self.inputs)
        errors = measure(got, expected, mask, self.recording.dtype)
        floor = self.recording.floor(name, kind)
        ratio = floors.ratio(errors, floor, self.recording.dtype, self.ways)
        details = {}
        if name.split(".")[-1] == "logits":
            noise = floors.tolerance(floor, errors.scale, self.recording.dtype, self.ways)["max"]
            details = dataclasses.asdict(_agreement(got, expected, mask, noise))
        comparison = Comparison(name, kind, errors, floor, ratio, self.place(name, errors.worst), details)
        self.comparisons.append(comparison)
        self.samples[f"{kind}/{name}"] = _sample(got, expected, mask)
        if comparison.departs:
            self.departing[name, kind] = got

    def place(self, name: str, worst: tuple[int, ...]) -> str:
        """Where a difference is, in words."""
        if not worst:
            return ""
        rows = self.recording.rows(name)
        if not components.along_sequence(name):
            axes = ("picture", "row", "feature")[-len(worst) :] if len(worst) <= 3 else ()
            return ", ".join(f"{axis} {at}" for axis, at in zip(axes, _unkept(worst, -2, rows), strict=False))
        axis = -2 if name.endswith("attn_probs") else 1
        at = _unkept(worst, axis, rows)
        position = at[axis]
        role = self.role(at[0], position)
        words = [f"example {at[0]}", f"position {position} ({role})"]
        if name.endswith("attn_probs"):
            words += [f"head {at[1]}", f"key {at[3]} ({self.role(at[0], at[3])})"]
        elif name.endswith((".keys", ".values")):
            words += [f"head {at[2]}", f"feature {at[3]}"]
        elif len(at) > 2:
            words.append(f"{'token' if name.endswith('logits') else 'feature'} {at[2]}")
        return ", ".join(words)

    def role(self, example: int, position: int) -> str:
        """The part that a position plays: image, text, before or behind it."""
        image = np.asarray(self.inputs["input_ids"])[example] == self.recording.header["image_token_id"]
        if image[position]:
            return "image token"
        return "text behind the image" if image[:position].any() else "text"

    @contextlib.contextmanager
    def attempt(self, phase: str) -> Iterator[None]:
        """Goes on after a failure, which the phase will tell of.

        A broken port may fail in any way, and where PyTorch computed, a port that fails differs. What this machine
        could not do says nothing of the port.

        Raises:
          RecordingError: the recording cannot be read.
        """
        try:
            yield
        except RecordingError:
            raise
        except Exception as error:
            said = told(error)
            where = self.failures if is_of_the_machine(error) else self.broken
            if said not in where.setdefault(phase, []):
                where[phase].append(said)


def told(error: Exception) -> str:
    """An error in a line."""
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"{type(error).__name__}: {first[:300]}"


def is_of_the_machine(error: Exception) -> bool:
    """Whether an error comes of too little memory rather than of what is computed."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


def judged(name: str, comparisons: Iterable[Comparison], gathered: Gathered) -> Phase:
    """A phase from its comparisons and from what could not be run."""
    compared = tuple(comparisons)
    broken, failed = (tuple(found.get(name, ())) for found in (gathered.broken, gathered.failures))
    departures = [each for each in compared if each.departs]
    worst = max(departures or compared, key=lambda each: each.ratio, default=None)
    verdict: Verdict
    if departures and worst is not None:
        verdict = "differs"
        summary = f"{len(departures)} of {len(compared)} comparisons depart; worst {worst.component} ({worst.kind})"
    elif broken:
        verdict, summary = "differs", f"the port fails: {broken[0]}"
    elif failed:
        verdict, summary = "failed", failed[0]
    elif worst is not None:
        verdict = "passes"
        at = f"{worst.component} ({worst.kind}) at {worst.ratio:.2f} of what is allowed"
        summary = f"{len(compared)} comparisons; worst {at}"
    else:
        verdict, summary = "skipped", "nothing to compare"
    return Phase(name, verdict, summary, compared, (*broken, *failed))


def fit(name: str, got: np.ndarray, rows: tuple[int, ...] | None, shape: tuple[int, ...]) -> np.ndarray:
    """The port's array at the kept rows.

    Raises:
      ValueError: its shape is not the reference's.
    """
    if rows is not None and got.shape != tuple(shape):
        got = components.keep(name, got, rows)
    if got.shape != tuple(shape):
        raise ValueError(f"{name} has shape {got.shape} in the port and {tuple(shape)} in PyTorch")
    return got


def _unkept(worst: tuple[int, ...], axis: int, rows: tuple[int, ...] | None) -> list[int]:
    at = list(worst)
    if rows is not None and len(at) >= 2:
        at[axis] = rows[at[axis]]
    return at


def _agreement(got: np.ndarray, expected: np.ndarray, mask: np.ndarray, noise: float) -> Agreement:
    return agreement(got[mask], expected[mask], noise)


def _sample(got: np.ndarray, expected: np.ndarray, mask: np.ndarray) -> np.ndarray:
    gaps = np.abs(np.asarray(got)[mask].astype(np.float64) - np.asarray(expected)[mask].astype(np.float64)).ravel()
    return gaps[:: max(1, len(gaps) // SAMPLE)][:SAMPLE].copy()  # a view would keep all of them
