"""Whether every tensor of a checkpoint stands, bit by bit, where the port keeps it.

``checksums`` is what a recording holds of the files; ``compare_tensors`` holds the port's weights against it, wherever
they came from. Neither uses the layouts of ``jaxmllm.convert.names`` or needs more than one tensor in memory.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmllm.convert.checkpoint import NUMPY_TYPES, Header, open_tensors, read_headers, weight_files
from jaxmllm.convert.names import NameTable
from jaxmllm.errors import InputError
from jaxmllm.validation.distributions import DTYPES
from jaxmllm.validation.report import Phase
from jaxmllm.validation.tensor_names import known, layer_of, means, pattern_of, unused_for_a_reason

# Leaf, number along its leading axis (``None``: not stacked) -> the part of it, in our layout, as the port holds it.
LeafReader = Callable[[str, int | None], np.ndarray]
# Name -> a tensor of the checkpoint.
TensorReader = Callable[[str], np.ndarray]

PANEL = 4 * 2**20  # numbers that are converted at once
PROBES = 4
MOST_FINDINGS = 60
# What lies in a kernel over patches behind the outputs, by the number of its axes in torch.
PATCH_AXES = {4: ("channel", "row", "column"), 5: ("channel", "frame", "row", "column")}
SOURCES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # names of the types in files


def checksums(
    folder: Path, kept: str = "float32", on_progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, dict[str, Any]]:
    """What tells the tensors of a checkpoint apart, for a recording's header.

    Args:
      folder: holds safetensors.
      kept: the type that weights are kept in, ``float32``, ``bfloat16`` or ``float16``.
      on_progress: told of tensors done, and of all.

    Returns:
      For each tensor ``shape``, ``dtype`` (as in the file), ``digests``: checksums of its numbers rounded to a type,
      then as float32 (types that change nothing are left out), ``mean``, ``std``, and ``probes``: some places of the
      flat tensor, each with its number.

    Raises:
      CheckpointError: no weights, or a broken file.
    """
    headers = read_headers(weight_files(folder))
    found = {}
    for number, (name, header) in enumerate(sorted(headers.items())):
        found[name] = {"shape": list(header.shape), "dtype": header.dtype}
        if header.dtype in NUMPY_TYPES:
            found[name] |= _describe(name, header, kept)
        on_progress(number + 1, len(headers))
    return found


def read_tensor(folder: Path) -> TensorReader:
    """Reads tensors of a checkpoint by name.

    Raises:
      CheckpointError: no weights, or a broken file.
    """
    headers = read_headers(weight_files(folder))

    def read(name: str) -> np.ndarray:
        with open_tensors(headers[name].file) as tensors:
            return tensors.get_tensor(name)

    return read


def _describe(name: str, header: Header, kept: str) -> dict[str, Any]:
    narrower = {"bfloat16", "float16"} if header.dtype in ("F32", "F64") else set()
    kinds = ({"float32", kept} | narrower) - ({SOURCES.get(header.dtype, "")} - {"float32"})
    hashes = {kind: hashlib.blake2b(digest_size=8) for kind in sorted(kinds)}
    size, total, squares = math.prod(header.shape), 0.0, 0.0
    places = sorted({round(place) for place in np.linspace(0, size - 1, PROBES)}) if size else []
    probes, start = [], 0
    with open_tensors(header.file) as tensors:
        for part in _parts(tensors, name, header.shape):
            for kind, digest in hashes.items():
                digest.update(_bytes(part, kind))
            wide = part.astype(np.float64)
            total, squares = total + float(wide.sum()), squares + float(np.square(wide).sum())
            probes += [(at, float(wide.flat[at - start])) for at in places if start <= at < start + part.size]
            start += part.size
    mean = total / max(size, 1)
    spread = math.sqrt(max(squares / max(size, 1) - mean**2, 0.0)) if math.isfinite(squares) else squares
    return {
        "digests": {kind: digest.hexdigest() for kind, digest in hashes.items()},
        "mean": _number(mean),
        "std": _number(spread),
        "probes": [[at, _number(value)] for at, value in probes],
    }


def _number(value: float) -> float | str:
    """JSON has no numbers that are not finite."""
    return value if math.isfinite(value) else str(value)


def _parts(tensors: Any, name: str, shape: Sequence[int]) -> Iterator[np.ndarray]:
    """A tensor of a file, some rows at a time."""
    if not shape:
        yield tensors.get_tensor(name)
        return
    view = tensors.get_slice(name)
    rows = max(1, PANEL // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], rows):
        yield view[start : min(start + rows, shape[0])]


def _bytes(part: np.ndarray, kind: str) -> bytes:
    with np.errstate(over="ignore", invalid="ignore"):
        return np.ascontiguousarray(part.astype(DTYPES[kind]).astype(np.float32)).tobytes()


def digest_of(array: np.ndarray) -> str:
    """The checksum of an array's numbers as float32, in the order of its axes, however it lies in memory."""
    digest = hashlib.blake2b(digest_size=8)
    if array.ndim == 0:
        array = array[None]
    rows = max(1, PANEL // max(1, math.prod(array.shape[1:])))
    for start in range(0, len(array), rows):
        digest.update(_bytes(array[start : start + rows], "float32"))
    return digest.hexdigest()


def torch_layout(leaf: str, part: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """A part of a leaf laid out as torch has it: a view where it can be.

    Args:
      leaf: its path; a ``kernel`` is ``[in, out]``, all else is laid out as in torch.
      part: the leaf, or one layer of it.
      shape: torch's. Of four axes (output, channel, row, column) is a kernel over patches of pixels whose channels we
        have last; of five, one over patches that come flattened.
    """
    if leaf.rpartition("/")[2] != "kernel":
        return part.reshape(shape)
    if len(shape) == 4:
        out, channels, rows, columns = shape
        return part.reshape(rows, columns, channels, out).transpose(3, 2, 0, 1)
    return part.T.reshape(shape)


def compare_tensors(
    recorded: Mapping[str, Mapping[str, Any]],
    table: NameTable,
    read: LeafReader,
    dtype: str,
    tensor: TensorReader | None = None,
) -> Phase:
    """Holds the port's weights against a checkpoint.

    Args:
      recorded: what ``checksums`` gave.
      table: the names that the port loads by.
      read: the port's weights.
      dtype: what they are kept in.
      tensor: the checkpoint's tensors, where it is at hand: differences are then counted.

    Returns:
      The phase ``tensors``; a finding for each way in which leaves are not what they should be.

    Raises:
      InputError: the checksums are of weights kept in another type.
    """
    placed, findings = _place(recorded, table)
    of_digest: dict[str, list[str]] = {}
    for name, entry in recorded.items():
        for digest in set(entry.get("digests", {}).values()):
            of_digest.setdefault(digest, []).append(name)
    numbers = 0
    for leaf, places in placed.items():
        for place, name in places.items():
            try:
                part = np.asarray(read(leaf, place))
            except (KeyError, IndexError):
                findings.append((leaf, place, f"is not there, though {pattern_of(name)} should fill it"))
                continue
            numbers += part.size
            how = _fault(leaf, part, name, recorded[name], dtype, of_digest, tensor)
            if how:
                findings.append((leaf, place, f"{how}; it should hold {pattern_of(name)}"))
    lines = _lines(findings)
    if not lines:
        summary = f"{len(recorded)} tensors, {numbers:,} numbers in {dtype}: every checksum and every name agrees"
        return Phase("tensors", "passes", summary)
    wrong = len({(leaf, place) for leaf, place, _ in findings})
    summary = f"{wrong} of {len(recorded)} tensors are not where they should be, or not what they should be"
    return Phase("tensors", "differs", summary, findings=lines)


Finding = tuple[str, int | None, str]  # leaf or tensor, number along the leading axis, what is wrong


def _place(
    recorded: Mapping[str, Mapping[str, Any]], table: NameTable
) -> tuple[dict[str, dict[int | None, str]], list[Finding]]:
    """The tensor that fills each part of each leaf by the port's table, and what speaks against it."""
    placed: dict[str, dict[int | None, str]] = {entry.leaf: {} for entry in table.entries}
    findings: list[Finding] = []
    ignored = []
    patterns = [(entry, entry.pattern) for entry in table.entries]
    for name in sorted(recorded, key=lambda name: (layer_of(name) or 0, name)):
        canonical = table.canonical(name)
        if any(re.match(pattern, canonical) for pattern, _ in table.ignored):
            ignored.append(name)
            continue
        entry = next((entry for entry, pattern in patterns if pattern.match(canonical)), None)
        if entry is None:
            findings.append((name, None, "fills no leaf"))
            continue
        place = layer_of(name) if "{layer}" in entry.name else None
        if place is not None and entry.layers is not None:
            if place not in entry.layers:
                findings.append((name, None, f"is of a layer that {entry.leaf} does not have"))
                continue
            place = sorted(entry.layers).index(place)  # layers stand in the order of the model
        if place in placed[entry.leaf]:
            findings.append((entry.leaf, place, f"is filled twice, from {placed[entry.leaf][place]} and {name}"))
            continue
        placed[entry.leaf][place] = name
        if not known(entry.leaf):
            findings.append((entry.leaf, place, f"is in no list of names; is it what {pattern_of(name)} means?"))
        elif not means(entry.leaf, name):
            findings.append((entry.leaf, place, f"is filled from {pattern_of(name)}, whose name means something else"))
    blocks = max((len(places) for leaf, places in placed.items() if leaf.startswith("vision/layers/")), default=0)
    for name in ignored:
        if not unused_for_a_reason(name, placed, blocks):
            findings.append((name, None, "is ignored, though the model needs it"))
        elif name.endswith("lm_head.weight"):
            findings += _tied(name, placed["decoder/embed/embedding"], recorded)
    for leaf, places in placed.items():
        last = max((place for place in places if place is not None), default=None)
        missing = [] if last is None else sorted(set(range(last + 1)) - set(places))
        findings += [(leaf, place, "is filled from no tensor") for place in ([None] if not places else missing)]
    return placed, findings


def _tied(head: str, embedding: Mapping[int | None, str], recorded: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """A head that is ignored as tied to the embedding must hold the same numbers."""
    other = embedding.get(None)
    if other is None or recorded[head]["digests"]["float32"] == recorded[other]["digests"]["float32"]:
        return []
    return [(head, None, f"is ignored as tied to the embedding, but holds other numbers than {other}")]


def _fault(
    leaf: str,
    part: np.ndarray,
    name: str,
    entry: Mapping[str, Any],
    dtype: str,
    of_digest: Mapping[str, list[str]],
    tensor: TensorReader | None,
) -> str | None:
    """How a part of a leaf differs from the tensor that fills it, in words; ``None`` where it does not."""
    digests = entry["digests"]
    if dtype not in digests and dtype != SOURCES.get(entry["dtype"]):
        raise InputError(
            f"{name}: the recording has checksums of weights in {', '.join(digests)}; these are kept in {dtype}. "
            f"Record the reference again in {dtype}"
        )
    expected = digests.get(dtype, digests["float32"])
    if part.size != math.prod(entry["shape"]):
        return f"has shape {list(part.shape)}, and the tensor {entry['shape']}"
    array = torch_layout(leaf, part, entry["shape"])
    got = digest_of(array)
    if got == expected:
        return None
    rounded = next((kind for kind, digest in digests.items() if digest == got), None)
    if rounded:
        return f"is rounded to {rounded}" if rounded != "float32" else f"is not rounded to {dtype}"
    if not np.any(part):
        return "is all zeros"
    own = set(digests.values())
    for how, variant in _variants(leaf, part, array, entry["shape"]):
        digest = digest_of(variant)
        if digest in own:
            return how
        if digest in of_digest:
            return _of_another(of_digest[digest], name) + ("" if how == "as it is" else f", and {how}")
    return _compared(array, entry, None if tensor is None else tensor(name))


def _variants(leaf: str, part: np.ndarray, array: np.ndarray, shape: Sequence[int]) -> Iterator[tuple[str, np.ndarray]]:
    """Mistakes of layout and sign that an array in torch's layout could have come by, with what it was before."""
    yield "as it is", array
    if array.ndim == 2:
        yield "is transposed", array.T
        yield "is read column by column", part.reshape(shape)
    yield "is negated", -array
    if array.ndim > 1:
        yield "has its rows one place late", np.roll(array, -1, axis=0)
        yield "has its rows one place early", np.roll(array, 1, axis=0)
    if len(shape) > 3:
        names = PATCH_AXES[len(shape)]
        kernel = part.T.reshape(shape[0], -1)
        for axes in itertools.permutations(range(1, len(shape))):
            laid = kernel.reshape(shape[0], *(shape[axis] for axis in axes))
            back = laid.transpose(0, *(1 + axes.index(axis) for axis in range(1, len(shape))))
            yield f"has its patches in the order {', '.join(names[axis - 1] for axis in axes)}", back
    if "qkv" in leaf:
        thirds = np.split(array, 3)
        for order in itertools.permutations(range(3)):
            yield f"has query, key and value in the order {order}", np.concatenate([thirds[at] for at in order])


def _of_another(names: Sequence[str], name: str) -> str:
    """Whose numbers they are."""
    alike = [other for other in names if pattern_of(other) == pattern_of(name)]
    if alike:
        return f"holds that of layer {layer_of(alike[0])}"
    same_layer = [other for other in names if layer_of(other) == layer_of(name)]
    return f"holds {pattern_of(same_layer[0])}" if same_layer else f"holds {names[0]}"


def _compared(array: np.ndarray, entry: Mapping[str, Any], tensor: np.ndarray | None) -> str:
    """Figures of a difference that nothing explains."""
    got = array.astype(np.float64)
    if tensor is None:
        wrong = sum(1 for at, value in entry["probes"] if got[np.unravel_index(at, got.shape)] != float(value))
        mean, std = (float(entry[name]) for name in ("mean", "std"))
        return (
            f"differs: mean {got.mean():.6g} and deviation {got.std():.6g} instead of {mean:.6g} and {std:.6g}, "
            f"and {wrong} of {len(entry['probes'])} numbers that were looked up differ"
        )
    expected = tensor.astype(np.float64).reshape(got.shape)
    many = int(np.count_nonzero(got != expected))
    if many > 1 and np.array_equal(np.sort(got, axis=None), np.sort(expected, axis=None)):
        rows = got.ndim > 1 and np.array_equal(_sorted_rows(got), _sorted_rows(expected))
        return f"holds the same numbers in another order{' of rows' if rows else ''}"
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = (got / expected)[expected != 0]
    if ratios.size > 1 and np.allclose(ratios, ratios[0], rtol=1e-2, atol=0):
        return f"is multiplied by about {ratios[0]:.6g}"
    return f"differs in {many:,} of {got.size:,} numbers, by up to {np.abs(got - expected).max():.3g}"


def _sorted_rows(array: np.ndarray) -> np.ndarray:
    rows = array.reshape(len(array), -1)
    return rows[np.lexsort(rows.T[::-1])]


def _lines(findings: Sequence[Finding]) -> tuple[str, ...]:
    """Findings a line each; what is the same in several layers is said once."""
    layers: dict[tuple[str, str], list[int]] = {}
    for leaf, place, how in findings:
        layers.setdefault((leaf, how), []).extend([] if place is None else [place])
    lines = [f"{leaf}{_layers(places)} {how}" for (leaf, how), places in layers.items()]
    more = len(lines) - MOST_FINDINGS
    return (*lines[:MOST_FINDINGS], f"... and {more} more") if more > 0 else tuple(lines)


def _layers(places: Sequence[int]) -> str:
    if not places:
        return ""
    ordered = sorted(places)
    if len(ordered) == 1:
        return f"[{ordered[0]}]"
    if ordered == list(range(ordered[0], ordered[-1] + 1)):
        return f"[{ordered[0]}..{ordered[-1]}]"
    return f"[{', '.join(map(str, ordered))}]"
