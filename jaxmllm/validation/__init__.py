"""Proof that the port computes what PyTorch computes on a checkpoint, component by component.

>>> from jaxmllm.validation import Settings, validate
>>> report = validate("llava-1.5-7b-hf", settings=Settings(dtype="bfloat16"))
>>> report.verdict, report.first, report.causes
"""

from jaxmllm.validation.phases import PHASES, Settings
from jaxmllm.validation.report import Report
from jaxmllm.validation.run import record, validate

__all__ = ["PHASES", "Report", "Settings", "record", "validate"]
