"""From a departure to its causes: what the diagnosis starts from, out of a port and a recording."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import numpy as np

from jaxmllm.convert import store
from jaxmllm.validation import components
from jaxmllm.validation.diagnosis import Case, likely_causes
from jaxmllm.validation.gather import Gathered
from jaxmllm.validation.port.model import Port
from jaxmllm.validation.recording import Recording
from jaxmllm.validation.report import Cause, Comparison
from jaxmllm.validation.tensors import read_tensor


def causes_of(port: Port, gathered: Gathered, departure: Comparison) -> tuple[Cause, ...]:
    """What may have made a component depart; a diagnosis that fails says so and no more."""
    recording, name = gathered.recording, departure.component
    layer = components.split(name)[1]
    expected, rows = recording.read(name), recording.rows(name)

    def read(wanted: str) -> np.ndarray | None:
        return recording.read(wanted) if wanted in recording else None

    def leaf(path: str) -> np.ndarray | None:
        with contextlib.suppress(KeyError, IndexError):
            return np.asarray(port.read(path, _place(port, path, layer)), np.float32)
        return None

    case = Case(
        component=name,
        kind=departure.kind,
        got=gathered.departing[name, departure.kind],
        expected=expected,
        mask=components.meaningful(name, expected.shape, rows, gathered.inputs),
        rows=rows,
        read=read,
        leaf=leaf,
        tensor=_tensors(port, recording, layer),
        inputs=gathered.inputs,
        config=port.config,
        departures=tuple(each.component for each in gathered.comparisons if each.kind == "own" and each.departs),
    )
    try:
        return likely_causes(case)
    except Exception as error:  # a broken port may hand in anything, and the departure stands without its cause
        return (Cause("the diagnosis itself failed", f"{type(error).__name__}: {error}"),)


def _place(port: Port, path: str, layer: int | None) -> int | None:
    """The number of a layer's part along the leading axis of a leaf; ``None`` where it is not stacked."""
    if "/layers/" in path:
        return layer or 0
    if path.startswith("qformer/cross/"):
        return (layer or 0) // port.config.qformer.cross_attention_frequency
    return None


def _tensors(port: Port, recording: Recording, layer: int | None) -> Callable[[str], np.ndarray | None]:
    """Reads what should fill a leaf from the checkpoint, where it is at hand and not laid out in another way."""
    if store.is_store(port.folder) or "tensors" not in recording.header:
        return lambda path: None
    read = read_tensor(port.folder)
    names = {port.table.canonical(name): name for name in recording.header["tensors"]}
    entries = {entry.leaf: entry for entry in port.table.entries}

    def tensor(path: str) -> np.ndarray | None:
        entry = entries.get(path)
        name = None if entry is None else names.get(entry.name.format(layer=layer))
        if name is None:
            return None
        array = np.asarray(read(name), np.float32)
        if array.ndim > 2:
            return None
        return array.T if path.endswith("/kernel") else array

    return tensor
