"""How params are cut into pieces: what a conversion reads, writes, checks and takes up again as one.

A piece is one chunk of one array of the store. Small leaves are one piece. Larger ones are cut into layers, and a large
layer along the axis that devices share (``jaxmllm.models.sharding``), so that a process which holds a share of it reads
little more than its share.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxmllm.convert.names import Entry, NameTable
from jaxmllm.convert.plan import flatten

# First and last + 1 along every axis of a leaf.
Region = tuple[tuple[int, int], ...]

WHOLE = 4 * 2**20  # bytes; what is smaller is not cut
LARGEST = 64 * 2**20  # bytes of a piece, at most
PARTS = 8  # of a large layer, at least: devices that commonly share one
ROW_PARALLEL = ("out/kernel", "down/kernel")  # kernels that devices share along the axis that is summed over

WORKERS = 4  # pieces in work at once: some wait for the disk while others compute
# Resident size of a process that converts, beside its pieces: the interpreter, JAX, Orbax and TensorStore.
BASE_MEMORY = 600 * 10**6


@dataclasses.dataclass(frozen=True)
class Piece:
    """A chunk of a leaf.

    Attributes:
      leaf: its path, joined by ``/``.
      region: what of the leaf it covers.
      file: where it is stored, below the folder of all arrays: the array's folder, the piece's number along every axis.
      nbytes: of its file.
    """

    leaf: str
    region: Region
    file: str
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a leaf lies in the store.

    Attributes:
      leaf: its path, joined by ``/``.
      shape, dtype: of the array.
      chunk: the shape of its pieces as they are stored; at the end of an axis they may cover less of the array.
    """

    leaf: str
    shape: tuple[int, ...]
    dtype: np.dtype
    chunk: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all its files."""
        return sum(piece.nbytes for piece in self.pieces())

    @property
    def folder(self) -> str:
        """Orbax's folder of the array."""
        return self.leaf.replace("/", ".")

    def pieces(self) -> Iterator[Piece]:
        """All pieces, in the array's order."""
        counts = [range(-(-size // part)) for size, part in zip(self.shape, self.chunk, strict=True)]
        for place in itertools.product(*counts):
            region = tuple(
                (at * part, min((at + 1) * part, size))
                for at, part, size in zip(place, self.chunk, self.shape, strict=True)
            )
            nbytes = math.prod(self.chunk) * self.dtype.itemsize
            yield Piece(self.leaf, region, f"{self.folder}/{'.'.join(map(str, place)) or '0'}", nbytes)


def slices(region: Region) -> tuple[slice, ...]:
    """A region as an index of an array."""
    return tuple(slice(start, stop) for start, stop in region)


def region_of(index: Sequence[slice], shape: Sequence[int]) -> Region:
    """An index of whole slices as a region.

    Args:
      index: a slice of step 1 an axis; its ends may be missing.
      shape: of the array.
    """
    spans = [part.indices(size) for part, size in zip(index, shape, strict=True)]
    return tuple((start, stop) for start, stop, _ in spans)


def shape_of(region: Region) -> tuple[int, ...]:
    """The shape of what a region covers."""
    return tuple(stop - start for start, stop in region)


def lay_out(table: NameTable, skeleton: Mapping[str, Any]) -> list[Layout]:
    """How every leaf lies in the store.

    Args:
      table: the family's names, which say what is stacked.
      skeleton: nested dict of leaves with ``shape`` and ``dtype``.
    """
    leaves = flatten(skeleton)
    layouts = []
    for entry in table.entries:
        shape, dtype = tuple(leaves[entry.leaf].shape), np.dtype(leaves[entry.leaf].dtype)
        layouts.append(Layout(entry.leaf, shape, dtype, _chunk(entry, shape, dtype.itemsize)))
    return layouts


def _chunk(entry: Entry, shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    if math.prod(shape) * itemsize <= WHOLE:
        return shape
    stacked = "{layer}" in entry.name
    chunk = [1, *shape[1:]] if stacked else list(shape)
    layer = math.prod(chunk) * itemsize
    if layer <= WHOLE or len(chunk) - stacked < 2 or entry.transform not in ("keep", "linear"):
        return tuple(chunk)
    column_parallel = entry.transform == "linear" and not entry.leaf.endswith(ROW_PARALLEL)
    axis = len(chunk) - 1 if column_parallel else len(chunk) - 2
    parts = PARTS
    while layer > parts * LARGEST:
        parts *= 2
    chunk[axis] = -(-chunk[axis] // parts)
    return tuple(chunk)


@dataclasses.dataclass(frozen=True)
class ConversionPlan:
    """What a conversion will do. Sizes are bytes.

    Attributes:
      leaves: arrays of the store.
      pieces: pieces, each a file.
      bytes: of all arrays.
      largest_piece: of the largest piece as it is stored.
      peak_memory: what the converting process will hold resident at most, about.
    """

    leaves: int
    pieces: int
    bytes: int
    largest_piece: int
    peak_memory: int


def conversion_plan(table: NameTable, skeleton: Mapping[str, Any], source_itemsize: int = 4) -> ConversionPlan:
    """Plans a conversion from shapes alone, before anything is read.

    A worker holds a piece as it is stored, and up to twice its bytes of the source: mapped pages of the file, of which
    a piece may need half.

    Args:
      table: the family's names.
      skeleton: nested dict of leaves with ``shape`` and ``dtype`` (``jaxmllm.model.make_skeleton``).
      source_itemsize: bytes of a number in the source.
    """
    layouts = lay_out(table, skeleton)
    pieces = [(math.prod(shape_of(piece.region)), layout) for layout in layouts for piece in layout.pieces()]
    held = max(size * (layout.dtype.itemsize + 2 * source_itemsize) for size, layout in pieces)
    return ConversionPlan(
        leaves=len(layouts),
        pieces=len(pieces),
        bytes=sum(layout.nbytes for layout in layouts),
        largest_piece=max(size * layout.dtype.itemsize for size, layout in pieces),
        peak_memory=BASE_MEMORY + WORKERS * held,
    )
