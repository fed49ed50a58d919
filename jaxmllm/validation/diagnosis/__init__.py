"""From a departure to its cause: the layer is written once more with one mistake at a time."""

from jaxmllm.validation.diagnosis.case import Case
from jaxmllm.validation.diagnosis.causes import likely_causes
from jaxmllm.validation.diagnosis.hints import hints_for_phase

__all__ = ["Case", "hints_for_phase", "likely_causes"]
