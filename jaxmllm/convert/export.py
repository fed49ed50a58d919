"""Writing weights as a Hugging Face folder: safetensors in shards, an index, config and processor files.

Tensors have the canonical names of the tables, which are those of the hub's files. Shards are written in panels, so
that what is held on the host does not grow with them. The form of a file is that of safetensors
(https://huggingface.co/docs/safetensors/index): the length of a header, the header in JSON, tensors one after another.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jaxmllm.convert import store
from jaxmllm.convert.checkpoint import INDEX, NUMPY_TYPES, SINGLE, Header, SafetensorsWeights, open_tensors
from jaxmllm.convert.names import TRANSFORMS, Entry, NameTable
from jaxmllm.convert.pieces import Region
from jaxmllm.convert.plan import flatten
from jaxmllm.convert.streaming import Progress, crc32, forget
from jaxmllm.convert.transposing import transposed
from jaxmllm.convert.weights import Weights, open_weights
from jaxmllm.errors import CheckpointError, InputError, JaxmllmError

SHARD = 10**9  # bytes of a file, unless a single tensor is larger
PANEL = 128 * 2**20  # bytes that are read, laid out and written at once, about
SAFETENSORS_TYPES = {dtype: name for name, dtype in NUMPY_TYPES.items()}
# Bytes of a number; ``position_ids`` are whole numbers.
ITEM_SIZES = {**{name: dtype.itemsize for name, dtype in NUMPY_TYPES.items()}, "I64": 8, "I32": 4}

Span = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor to be written.

    Attributes:
      name: the canonical one.
      shape: torch's.
      kind: its type, as safetensors spells it.
      panels: spans of rows that are written one after another; ``None`` where the tensor is not cut.
      read: a span -> those rows in torch's layout.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    panels: tuple[Span, ...] | tuple[None]
    read: Callable[[Span | None], np.ndarray]

    @property
    def nbytes(self) -> int:
        """What it takes."""
        return math.prod(self.shape) * ITEM_SIZES[self.kind]


def write_folder(
    source: Path,
    destination: Path,
    table: NameTable,
    skeleton: Mapping[str, Any],
    dtype: str | None = None,
    on_progress: Progress = lambda done, total: None,
) -> tuple[str, ...]:
    """Writes a Hugging Face folder; every file is read back and compared before the folder appears.

    Tensors that fill no leaf (what comes after the vision layer that is read, buffers) are in no store. Where the
    source is a Hugging Face folder they are copied through.

    Args:
      source: a store or a Hugging Face folder.
      destination: a folder that does not exist yet; it appears whole or not at all.
      table: the family's names.
      skeleton: nested dict of leaves with a ``shape``.
      dtype: of the written weights; ``None`` keeps each as it is.
      on_progress: told of bytes written, and of all bytes.

    Returns:
      The patterns of tensors that the folder may lack, each with the reason; empty where they are copied.

    Raises:
      CheckpointError: the source is broken, or a file reads back unlike it was written.
      InputError: the destination cannot be written; nothing is left then.
    """
    weights = open_weights(source, table, skeleton)
    tensors = [*tensors_of_leaves(table, skeleton, weights, dtype), *_copied(table, weights)]
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{destination.name}-", dir=destination.parent))
    except OSError as error:
        raise InputError(f"{destination}: cannot be written ({error})") from error
    try:
        for name in ("config.json", *store.PROCESSOR_FILES):
            if (source / name).is_file():
                (building / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(source / name, building / name)
        write_shards(building, tensors, on_progress)
        building.chmod(0o755)  # mkdtemp's own is for its owner alone
        building.rename(destination)
    except JaxmllmError:
        raise
    except OSError as error:
        raise InputError(f"{destination}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    copies = isinstance(weights, SafetensorsWeights)
    return () if copies else tuple(f"{_readable(pattern)}: {why}" for pattern, why in table.ignored)


def _readable(pattern: str) -> str:
    return pattern.removesuffix(r"\Z").replace("\\.", ".")


def tensors_of_leaves(
    table: NameTable, skeleton: Mapping[str, Any], weights: Weights, dtype: str | None
) -> Iterator[Tensor]:
    """The tensors that leaves hold, in the table's order, layer by layer."""
    leaves = flatten(skeleton)
    for entry in table.entries:
        kind = np.dtype(dtype) if dtype is not None else weights.dtype(entry.leaf)
        shape = tuple(leaves[entry.leaf].shape)
        stacked = "{layer}" in entry.name
        layers: list[int | None] = list(entry.numbers(shape[0])) if stacked else [None]
        ours = shape[1:] if stacked else shape
        for place, layer in enumerate(layers):
            name = entry.name.format(layer=layer)
            theirs = table.torch_shapes.get(name, ours[::-1] if entry.transform == "linear" else ours)
            whole: Region = (((place, place + 1),) if stacked else ()) + tuple((0, size) for size in ours)
            read = functools.partial(_read_rows, weights, entry, whole, theirs, kind)
            cut = _panels(theirs, kind.itemsize) if entry.transform in ("keep", "linear") and ours else (None,)
            yield Tensor(name, theirs, SAFETENSORS_TYPES[kind], cut, read)


def _panels(shape: tuple[int, ...], itemsize: int) -> tuple[Span, ...]:
    """Spans of rows of about ``PANEL`` bytes."""
    count = shape[0]
    step = max(1, PANEL // (math.prod(shape[1:]) * itemsize))
    return tuple((start, min(start + step, count)) for start in range(0, count, step))


def _read_rows(
    weights: Weights, entry: Entry, whole: Region, shape: tuple[int, ...], dtype: np.dtype, span: Span | None
) -> np.ndarray:
    """Rows of a tensor in torch's layout; ``whole`` is where the tensor lies in its leaf."""
    if span is None:  # patches, which are small, and scalars
        part = weights.read(entry.leaf, whole, dtype)
        return TRANSFORMS[entry.transform].backward(part[0] if "{layer}" in entry.name else part, shape)
    if entry.transform == "linear":
        part = weights.read(entry.leaf, (*whole[:-1], span), dtype)
        return transposed(part.reshape(part.shape[-2:]))
    outer = len(whole) - len(shape)
    return weights.read(entry.leaf, (*whole[:outer], span, *whole[outer + 1 :]), dtype)


def _copied(table: NameTable, weights: Weights) -> Iterator[Tensor]:
    """The tensors of a Hugging Face folder that fill no leaf, unchanged."""
    if not isinstance(weights, SafetensorsWeights):
        return

    def read(name: str, header: Header, span: Span | None) -> np.ndarray:
        with open_tensors(header.file) as tensors:
            return tensors.get_tensor(name)

    for name in sorted(weights.ignored):
        header = weights.headers[name]
        yield Tensor(table.canonical(name), header.shape, header.dtype, (None,), functools.partial(read, name, header))


def write_shards(folder: Path, tensors: Sequence[Tensor], on_progress: Progress = lambda done, total: None) -> None:
    """Writes tensors as one file, or as several of about a gigabyte with an index.

    Args:
      folder: an existing folder.
      tensors: in the order in which they are written.
      on_progress: told of bytes written, and of all bytes.

    Raises:
      CheckpointError: a file reads back unlike it was written.
      OSError: a file cannot be written.
    """
    total, done = sum(tensor.nbytes for tensor in tensors), 0
    shards = _shards(tensors)
    names = [SINGLE] if len(shards) == 1 else [_shard_name(number, len(shards)) for number in range(len(shards))]
    on_progress(0, total)
    for name, shard in zip(names, shards, strict=True):
        for size in _write_shard(folder / name, shard):
            done += size
            on_progress(done, total)
    if len(shards) > 1:
        files = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _shards(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Tensors of one file each, in order."""
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > SHARD:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def _shard_name(number: int, count: int) -> str:
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _write_shard(path: Path, tensors: Sequence[Tensor]) -> Iterator[int]:
    """Writes a file, brings it to the disk and compares what it then holds; gives bytes as they are written."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        offsets = [end, end + tensor.nbytes]
        header[tensor.name] = {"dtype": tensor.kind, "shape": list(tensor.shape), "data_offsets": offsets}
        end += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # data begins at a multiple of 8
    checksums = {}
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            checksums[tensor.name] = _write_tensor(file, tensor)
            yield tensor.nbytes
        file.flush()
        os.fsync(file.fileno())
        forget(file.fileno())
    for tensor in tensors:
        if _checksum(path, tensor) != checksums[tensor.name]:
            raise CheckpointError(
                f"{path}: {tensor.name} reads back unlike it was written; the disk or the memory of this machine is at "
                "fault. Export again, to another disk if this comes again"
            )


def _write_tensor(file: BinaryIO, tensor: Tensor) -> int:
    """Appends a tensor panel by panel; gives its checksum."""
    checksum = 0
    for span in tensor.panels:
        panel = np.ascontiguousarray(tensor.read(span))
        checksum = crc32(panel, checksum)
        file.write(panel.reshape(-1).view(np.uint8).data)
    return checksum


def _checksum(path: Path, tensor: Tensor) -> int:
    """The checksum of a tensor in a file, read by the safetensors library."""
    checksum = 0
    for span in tensor.panels:
        with open_tensors(path) as tensors:
            part = tensors.get_tensor(tensor.name) if span is None else tensors.get_slice(tensor.name)[slice(*span)]
        checksum = crc32(part, checksum)
    return checksum
