"""The phases of a validation and how it is done, as both sides take it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Callable, Iterable

from jaxmllm.errors import InputError
from jaxmllm.parallel.record import made_by
from jaxmllm.processing import ImageLike
from jaxmllm.validation.distributions import DTYPES

COMPONENT_PHASES = ("vision", "connector", "embedding", "decoder", "logits")
# What users read of a model; each takes whole runs, so that the whole model has to be in memory.
BEHAVIOUR_PHASES = ("answer", "generation", "edits", "contrast")
PHASES = ("tensors", "preprocessing", *COMPONENT_PHASES, *BEHAVIOUR_PHASES)
PRECISIONS = ("default", "high", "highest")

Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a validation is done.

    Attributes:
      dtype: what both sides compute in: ``float32``, ``bfloat16`` or ``float16``.
      precision: JAX's matmul precision: ``default``, ``high`` or ``highest``.
      streamed: whether to hold one decoder layer at a time; ``None`` decides by the memory of the machine.
      phases: some of ``PHASES``.
      images, questions: added to the drawn pictures and their questions.
      seed: of pictures and made up inputs.
      new_tokens: that are generated greedily.
      accelerators: also measure what products that accelerators round make of PyTorch's results, so that a recording
        can be compared with on a GPU or TPU.
    """

    dtype: str = "float32"
    precision: str = "highest"
    streamed: bool | None = None
    phases: tuple[str, ...] = PHASES
    images: tuple[ImageLike, ...] = ()
    questions: tuple[str, ...] = ()
    seed: int = 0
    new_tokens: int = 8
    accelerators: bool = False

    def check(self) -> None:
        """Raises InputError for what does not exist."""
        for name, value, known in (("dtype", self.dtype, tuple(DTYPES)), ("precision", self.precision, PRECISIONS)):
            if value not in known:
                raise InputError(f"{name} is {value!r}; expected one of {', '.join(known)}")
        check_phases(self.phases)
        if self.new_tokens < 1:
            raise InputError(f"new_tokens is {self.new_tokens}; expected at least 1")


def check_phases(phases: Iterable[str]) -> tuple[str, ...]:
    """The phases asked for, in order.

    Raises:
      InputError: one that does not exist, or none.
    """
    asked = set(phases)
    unknown = sorted(asked - set(PHASES))
    if unknown or not asked:
        raise InputError(f"phases are {', '.join(unknown) or 'none'}; expected some of {', '.join(PHASES)}")
    return tuple(phase for phase in PHASES if phase in asked)


def versions(*also: str) -> dict[str, str]:
    """What computes: packages, the revision of jaxmllm, devices; and the versions of further packages."""
    made = made_by()
    packages = {**made["packages"], **{name: importlib.metadata.version(name) for name in also}}
    found = {"python": made["python"], **packages, "revision": made["revision"], "devices": made["devices"]}
    return {name: str(value) for name, value in found.items() if value is not None}
