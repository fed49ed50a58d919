"""Counts compiled programs and the time they took, by JAX's own events."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
OTHER_EVENTS = ("/jax/core/compile/jaxpr_to_mlir_module_duration", "/jax/core/compile/jaxpr_trace_duration")


@dataclasses.dataclass
class Compilations:
    """Programs compiled so far, and the seconds spent on tracing, lowering and compiling."""

    programs: int = 0
    seconds: float = 0.0


@contextmanager
def count_compilations() -> Iterator[Compilations]:
    """Counts what is compiled in the block, in this process."""
    import jax

    counted = Compilations()

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == COMPILE_EVENT:
            counted.programs += 1
        if event == COMPILE_EVENT or event in OTHER_EVENTS:
            counted.seconds += duration_secs

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield counted
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
