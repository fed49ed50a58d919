"""jaxmllm: multimodal LLMs in JAX/Flax for interpretability.

Names are imported on first use, so that ``import jaxmllm`` is quick and starts no backend.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxmllm.analysis.sweeping import SweepResult, sweep
    from jaxmllm.decoding.generate import Generated, generate
    from jaxmllm.decoding.sampling import Sampling
    from jaxmllm.errors import CheckpointError, ConfigError, InputError, JaxmllmError, ProcessorError
    from jaxmllm.methods.answering import Answers, answer
    from jaxmllm.model import Model, load
    from jaxmllm.models.capture import Capture
    from jaxmllm.models.edits import Edits
    from jaxmllm.models.forward import Output

__version__ = "0.1.0"

_HOMES = {
    "Answers": "jaxmllm.methods.answering",
    "Capture": "jaxmllm.models.capture",
    "CheckpointError": "jaxmllm.errors",
    "ConfigError": "jaxmllm.errors",
    "Edits": "jaxmllm.models.edits",
    "Generated": "jaxmllm.decoding.generate",
    "InputError": "jaxmllm.errors",
    "JaxmllmError": "jaxmllm.errors",
    "Model": "jaxmllm.model",
    "Output": "jaxmllm.models.forward",
    "ProcessorError": "jaxmllm.errors",
    "Sampling": "jaxmllm.decoding.sampling",
    "SweepResult": "jaxmllm.analysis.sweeping",
    "answer": "jaxmllm.methods.answering",
    "generate": "jaxmllm.decoding.generate",
    "load": "jaxmllm.model",
    "sweep": "jaxmllm.analysis.sweeping",
}

# Rooms that are reached as ``jaxmllm.methods`` without an import of their own.
_ROOMS = ("methods",)

__all__ = [
    "Answers",
    "Capture",
    "CheckpointError",
    "ConfigError",
    "Edits",
    "Generated",
    "InputError",
    "JaxmllmError",
    "Model",
    "Output",
    "ProcessorError",
    "Sampling",
    "SweepResult",
    "answer",
    "generate",
    "load",
    "sweep",
]


def __getattr__(name: str) -> Any:
    """Imports a public name from the module that holds it; ``sweep`` the function, not the module, and so on."""
    if name in _ROOMS:
        return importlib.import_module(f"jaxmllm.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxmllm' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_ROOMS})
