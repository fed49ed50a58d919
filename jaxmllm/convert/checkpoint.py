"""Reading a Hugging Face folder of safetensors, without torch and tensor by tensor.

At any moment one leaf of the model (a weight of all its layers) is held on the host beside what is already placed; of a
leaf that is laid over several devices, only what this process's devices hold.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes  # also registers bfloat16 with NumPy, which safetensors needs
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxmllm.convert.names import TRANSFORMS, NameTable
from jaxmllm.convert.pieces import Region, region_of, shape_of, slices
from jaxmllm.convert.plan import Fill, flatten, make_plan, unflatten
from jaxmllm.convert.transposing import transpose_into
from jaxmllm.errors import CheckpointError, ConfigError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      ConfigError: the file is missing or does not hold a JSON object.
    """
    try:
        fields = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; a checkpoint folder needs it") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid JSON ({error})") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(fields).__name__}")
    return fields


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, by its index where it has one.

    Raises:
      CheckpointError: no weights, weights in another format, or a shard that the index names is not there.
    """
    if (folder / INDEX).exists():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{folder / INDEX}: holds no weight_map")
        if not all(isinstance(shard, str) for shard in weight_map.values()):
            raise CheckpointError(f"{folder / INDEX}: its weight_map does not name files")
        shards = sorted(set(weight_map.values()))
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if missing:
            raise CheckpointError(
                f"{folder}: {len(missing)} of {len(shards)} shards are missing: {', '.join(missing)}; "
                "fetch the checkpoint again"
            )
        return [folder / shard for shard in shards]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    other = sorted(path.name for path in folder.glob("*.bin")) + sorted(path.name for path in folder.glob("*.pt"))
    hint = f"found {', '.join(other)}: save it as safetensors first" if other else "nothing to load"
    raise CheckpointError(f"{folder}: neither {SINGLE} nor {INDEX} is there; {hint}")


@dataclasses.dataclass(frozen=True)
class Header:
    """Where a tensor is and what it looks like."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


# The types of tensors that are read.
NUMPY_TYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


def read_headers(files: list[Path]) -> dict[str, Header]:
    """Shape and type of every tensor.

    Raises:
      CheckpointError: a file that is truncated or no safetensors file, a tensor in two files, or one that is not of
        floating point.
    """
    headers: dict[str, Header] = {}
    for file in files:
        with open_tensors(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118  not a dict
                view = tensors.get_slice(name)
                if name in headers:
                    raise CheckpointError(f"{file}: tensor {name} is also in {headers[name].file.name}")
                if view.get_dtype() not in NUMPY_TYPES and not name.endswith("position_ids"):
                    raise CheckpointError(
                        f"{file}: tensor {name} is of type {view.get_dtype()}; expected {', '.join(NUMPY_TYPES)} "
                        "(quantised checkpoints are not supported)"
                    )
                headers[name] = Header(file, tuple(view.get_shape()), view.get_dtype())
    return headers


@contextlib.contextmanager
def open_tensors(file: Path) -> Iterator[Any]:
    """An open safetensors file; failures name it."""
    try:
        with safe_open(file, framework="numpy") as tensors:
            yield tensors
    except SafetensorError as error:
        size = file.stat().st_size
        raise CheckpointError(
            f"{file}: truncated or not a safetensors file ({size} bytes; {error}); fetch it again"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error})") from error


PANEL = 2**20  # bytes that are read, cast and laid out at once, so that they stay in the cache
ROWS = 64  # a panel has a multiple of so many rows


@dataclasses.dataclass(frozen=True)
class SafetensorsWeights:
    """The weights of a Hugging Face folder.

    Attributes:
      fills: leaf -> how it is filled.
      headers: where every tensor is, also of those that are not read.
      ignored: tensors that fill no leaf, each with the reason.
    """

    fills: Mapping[str, Fill]
    headers: Mapping[str, Header]
    ignored: Mapping[str, str]

    @property
    def files(self) -> tuple[Path, ...]:
        """The safetensors files."""
        return tuple(sorted({header.file for header in self.headers.values()}))

    def dtype(self, leaf: str) -> np.dtype:
        """The type of the tensors that fill a leaf; of several the one that holds all."""
        kinds = {NUMPY_TYPES[self.headers[source].dtype] for source in self.fills[leaf].sources}
        return functools.reduce(np.promote_types, sorted(kinds, key=str))

    def read(
        self, leaf: str, region: Region, dtype: np.dtype, seen: Callable[[np.ndarray], None] | None = None
    ) -> np.ndarray:
        """A part of a leaf; see ``jaxmllm.convert.weights.Weights``. Of a file only that part is read."""
        fill = self.fills[leaf]
        part = np.empty(shape_of(region), dtype)
        if not fill.stacked:
            self._read_into(part, fill.sources[0], fill.transform, region, seen)
            return part
        for number, layer in enumerate(range(*region[0])):
            # [number, ...] is an array even where a layer is one number
            self._read_into(part[number, ...], fill.sources[layer], fill.transform, region[1:], seen)
        return part

    def _read_into(
        self,
        part: np.ndarray,
        source: str,
        transform: str,
        region: Region,
        seen: Callable[[np.ndarray], None] | None,
    ) -> None:
        """Fills a part of one layer. The file is open no longer than this, so that its pages do not add up."""
        header = self.headers[source]
        with open_tensors(header.file) as tensors:
            if transform not in ("keep", "linear") or not region:
                array = tensors.get_tensor(source)
                if seen is not None:
                    seen(array)
                part[...] = TRANSFORMS[transform].forward(array)[slices(region)]
                return
            view = tensors.get_slice(source)
            (first, last), *rest = region if transform == "keep" else region[::-1]
            row = math.prod(stop - start for start, stop in rest) * NUMPY_TYPES[header.dtype].itemsize
            step = max(1, PANEL // (ROWS * row)) * ROWS
            for start in range(first, last, step):
                stop = min(start + step, last)
                array = view[(slice(start, stop), *slices(tuple(rest)))]
                if seen is not None:
                    seen(array)
                if transform == "linear":
                    transpose_into(part[:, start - first : stop - first], array.astype(part.dtype, copy=False))
                else:
                    part[start - first : stop - first] = array


def open_safetensors(folder: Path, table: NameTable, skeleton: Mapping[str, Any]) -> SafetensorsWeights:
    """Opens the weights of a Hugging Face folder.

    Args:
      folder: the checkpoint.
      table: the family's names.
      skeleton: nested dict of leaves with a ``shape``.

    Raises:
      CheckpointError: as ``weight_files``, ``read_headers`` and ``make_plan`` do.
    """
    headers = read_headers(weight_files(folder))
    shapes = {name: header.shape for name, header in headers.items()}
    fills, ignored = make_plan(table, skeleton, shapes, str(folder))
    return SafetensorsWeights({fill.leaf: fill for fill in fills}, headers, ignored)


def read_params(
    folder: Path,
    table: NameTable,
    skeleton: Mapping[str, Any],
    shardings: Mapping[str, Any] | None = None,
    place: Callable[[np.ndarray], jax.Array] = jax.numpy.asarray,
) -> dict[str, Any]:
    """Fills a params pytree from a folder of safetensors.

    Args:
      folder: the checkpoint.
      table: the family's names.
      skeleton: nested dict of leaves with ``shape`` and ``dtype``; tensors are cast to that dtype.
      shardings: nested dict like ``skeleton``, a ``jax.sharding.Sharding`` a leaf: each process then reads what its own
        devices hold, and what several of them hold once. ``None`` reads all.
      place: without shardings, puts a finished leaf on its device.

    Raises:
      CheckpointError: as ``open_safetensors`` does.
    """
    weights = open_safetensors(folder, table, skeleton)
    leaves = flatten(skeleton)
    if shardings is None:
        whole = {leaf: tuple((0, size) for size in value.shape) for leaf, value in leaves.items()}
        return unflatten({leaf: place(weights.read(leaf, whole[leaf], leaves[leaf].dtype)) for leaf in weights.fills})
    laid = flatten(shardings)
    return unflatten({leaf: _read_shards(weights, leaf, leaves[leaf], laid[leaf]) for leaf in weights.fills})


def _read_shards(weights: SafetensorsWeights, leaf: str, value: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """One leaf over its devices; those of other processes are not read."""
    shards: dict[Region, np.ndarray] = {}

    def shard(index: tuple[slice, ...] | None) -> np.ndarray:
        region = region_of(index or (), value.shape)
        if region not in shards:
            shards[region] = weights.read(leaf, region, value.dtype)
        return shards[region]

    return jax.make_array_from_callback(tuple(value.shape), sharding, shard, dtype=value.dtype)
