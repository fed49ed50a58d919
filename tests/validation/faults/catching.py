"""Whether a validation catches a planted bug: what it names, and why."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from jaxmllm.validation import Report, Settings, record, validate
from jaxmllm.validation.compare import first_of
from jaxmllm.validation.phases import COMPONENT_PHASES
from jaxmllm.validation.recording import Recording
from jaxmllm.validation.report import Cause, Comparison, Phase
from tests.validation.faults.fault import Fault, planted
from tests.validation.faults.variants import write_variant

# What is validated for a bug that shows in one of them; each costs programs that are compiled anew.
TOGETHER = (("vision", "connector"), ("embedding", "decoder", "logits"))
CAUSES = 3  # the first ones, among which a bug's must be


@dataclasses.dataclass(frozen=True)
class Catch:
    """What a validation says of a port.

    Attributes:
      report: the whole of it.
      first: the component that departs first in the order of computation, own errors before those of a run; ``None``
        where none departs. Of a bug at load, ``report.first`` is the leaf.
    """

    report: Report
    first: Comparison | None

    @property
    def caught(self) -> bool:
        """Whether anything departs."""
        return self.report.verdict == "differs"

    @property
    def named(self) -> str:
        """The component that is named, else the phase or array."""
        return self.first.component if self.first else str(self.report.first)

    @property
    def causes(self) -> tuple[Cause, ...]:
        """The first causes: of a bug at load those of its tensors, then those of the component that is named."""
        differing = [phase for phase in self.report.phases if phase.verdict == "differs"]
        counted = 2 if differing and differing[0].name == "tensors" else 1
        return tuple(cause for phase in differing[:counted] for cause in _causes_of(phase))

    def at(self, fault: Fault) -> bool:
        """Whether what a bug must show in first is what is named."""
        return self.named.startswith(fault.first) or (self.caught and self.report.first == fault.first)

    def because(self, fault: Fault) -> bool:
        """Whether a bug's cause is among those that are named first."""
        return any(fault.cause.lower() in cause.name.lower() for cause in self.causes)


def _causes_of(phase: Phase) -> tuple[Cause, ...]:
    """The first causes of a phase; where the port fails, how it does."""
    return phase.causes[:CAUSES] or tuple(Cause(finding) for finding in phase.findings[:CAUSES])


class Bench:
    """Checkpoints and recordings of the variants, each made once, in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def validate(self, fault: Fault) -> Report:
        """The validation of a bug's variant in the phases that it takes to catch it; the bug is not planted."""
        checkpoint, reference = self._recorded(fault)
        return validate(checkpoint, reference=reference, settings=Settings(dtype=fault.dtype, phases=phases_of(fault)))

    def catch(self, fault: Fault) -> Catch:
        """Validates with the bug planted."""
        _, reference = self._recorded(fault)
        with planted(fault):
            report = self.validate(fault)
        departures = [each for phase in report.phases for each in phase.departures]
        return Catch(report, first_of(departures, Recording(reference)))

    def _recorded(self, fault: Fault) -> tuple[Path, Path]:
        checkpoint = self.folder / fault.on
        if not checkpoint.exists():
            write_variant(fault.on, checkpoint)
        reference = self.folder / f"{fault.on} {fault.dtype} {phases_of(fault)[-1]}"
        if not reference.exists():
            # components too: causes are computed from them
            recorded = (*COMPONENT_PHASES, *phases_of(fault))
            record(checkpoint, reference, settings=Settings(dtype=fault.dtype, phases=recorded))
        return checkpoint, reference


def phases_of(fault: Fault) -> tuple[str, ...]:
    """The phases that it takes to catch a bug."""
    for phases in TOGETHER:
        if fault.phase in phases:
            return ("tensors", *phases)
    return (fault.phase,)
