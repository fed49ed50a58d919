"""What a validation found, as data: for the console, for pages, for TensorBoard and for machines."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from jaxmllm.validation.distributions import Errors

Verdict = Literal["passes", "differs", "skipped", "failed"]
VERDICTS: tuple[Verdict, ...] = ("passes", "differs", "skipped", "failed")

# How a component was computed: ``own``: from the reference's input, so the error is its own; ``run``: from the prompts
# on, so that errors of what comes before are in it.
Kind = Literal["own", "run"]

REPORT_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Floor:
    """What PyTorch differs from itself by, where it computes the same thing otherwise.

    Attributes:
      of: name of the other way (``float64``, ``other order``, ...) -> its differences.
    """

    of: Mapping[str, Errors]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One array of the port against the reference's.

    Attributes:
      component: see ``jaxmllm.validation.components``.
      kind: from which input the port computed it.
      errors: the differences.
      floor: what PyTorch differs from itself by.
      ratio: the differences over the floor, the worst of mean, 99th percentile and maximum, each over what is allowed
        of it (``jaxmllm.validation.floors``): above 1, the component departs.
      place: where the largest difference is, in words.
      details: further figures, such as the agreement of output distributions.
    """

    component: str
    kind: Kind
    errors: Errors
    floor: Floor
    ratio: float
    place: str = ""
    details: Mapping[str, float | int] = dataclasses.field(default_factory=dict)

    @property
    def departs(self) -> bool:
        """Whether the port differs by more than the noise."""
        return not self.ratio <= 1.0


@dataclasses.dataclass(frozen=True)
class Cause:
    """A likely cause of a departure.

    Attributes:
      name: in a few words: ``gate and up projections are swapped``.
      evidence: what speaks for it, with figures; empty where it was not tried.
      explained: share of the difference that goes away if the cause is assumed (0..1); ``None`` where it was not tried.
      where: what to look at: a config field, a leaf, a tensor, a function.
    """

    name: str
    evidence: str = ""
    explained: float | None = None
    where: str = ""


@dataclasses.dataclass(frozen=True)
class Phase:
    """One phase of a validation.

    Attributes:
      name: ``tensors``, ``preprocessing``, ``vision``, ...
      verdict: see ``VERDICTS``.
      summary: one line.
      comparisons: of arrays.
      findings: what else was found, a line each; where the verdict is ``differs``, what differs.
      causes: likely causes of the first departure, most likely first.
      seconds: that it took.
    """

    name: str
    verdict: Verdict
    summary: str
    comparisons: tuple[Comparison, ...] = ()
    findings: tuple[str, ...] = ()
    causes: tuple[Cause, ...] = ()
    seconds: float = 0.0

    @property
    def departures(self) -> tuple[Comparison, ...]:
        return tuple(each for each in self.comparisons if each.departs)


@dataclasses.dataclass(frozen=True)
class Report:
    """A whole validation.

    Attributes:
      model: what was validated, as it was named.
      reference: what it was compared with.
      settings: dtype, precision, device, prompts, rows, ... name -> value.
      versions: package -> version, of both sides.
      command: that makes this report again.
      phases: in the order in which they ran.
      first: the component that departs first, in the order of computation, or the phase where it compares none;
        ``None`` where nothing departs.
      samples: ``KIND/COMPONENT`` -> some absolute differences, for histograms; not part of the JSON.
    """

    model: str
    reference: str
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    command: str
    phases: tuple[Phase, ...]
    first: str | None = None
    samples: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    @property
    def verdict(self) -> Verdict:
        """``differs`` where a phase does, else ``failed`` where one could not run or none did, else ``passes``."""
        found = {phase.verdict for phase in self.phases}
        if "differs" in found:
            return "differs"
        return "passes" if "passes" in found and "failed" not in found else "failed"

    @property
    def exit_code(self) -> int:
        """0 passes, 1 differs, 2 could not run."""
        return {"passes": 0, "differs": 1}.get(self.verdict, 2)

    def phase(self, name: str) -> Phase:
        """The phase of that name."""
        return next(phase for phase in self.phases if phase.name == name)

    @property
    def causes(self) -> tuple[Cause, ...]:
        """Likely causes of the first departure."""
        return next((phase.causes for phase in self.phases if phase.verdict == "differs" and phase.causes), ())

    def to_json(self) -> dict[str, Any]:
        """As JSON, with a format number."""
        return {
            "format": REPORT_FORMAT,
            "verdict": self.verdict,
            "exit_code": self.exit_code,
            "first": self.first,
            "model": self.model,
            "reference": self.reference,
            "settings": dict(self.settings),
            "versions": dict(self.versions),
            "command": self.command,
            "phases": [_phase_json(phase) for phase in self.phases],
        }


def _finite(value: float | int) -> float | int | str:
    """A number as JSON has it; one that is not finite becomes text."""
    return value if math.isfinite(value) else str(value)


def _phase_json(phase: Phase) -> dict[str, Any]:
    return {
        "name": phase.name,
        "verdict": phase.verdict,
        "summary": phase.summary,
        "seconds": round(phase.seconds, 3),
        "findings": list(phase.findings),
        "causes": [dataclasses.asdict(cause) for cause in phase.causes],
        "comparisons": [
            {
                "component": each.component,
                "kind": each.kind,
                "departs": each.departs,
                "ratio": _finite(each.ratio),
                "place": each.place,
                "errors": each.errors.to_json(),
                "floor": {name: errors.to_json() for name, errors in each.floor.of.items()},
                "details": {name: _finite(value) for name, value in each.details.items()},
            }
            for each in phase.comparisons
        ],
    }
