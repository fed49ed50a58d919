"""Reading a Hugging Face folder of safetensors, without torch and tensor by tensor.

At any moment one leaf of the model (a weight of all its layers) is held on the host beside what is already placed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes  # noqa: F401  registers bfloat16 with NumPy, which safetensors needs
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxmllm.convert.names import TRANSFORMS, NameTable
from jaxmllm.convert.plan import Fill, flatten, make_plan, unflatten
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


FLOAT_TYPES = ("F64", "F32", "F16", "BF16")


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
                if view.get_dtype() not in FLOAT_TYPES and not name.endswith("position_ids"):
                    raise CheckpointError(
                        f"{file}: tensor {name} is of type {view.get_dtype()}; expected {', '.join(FLOAT_TYPES)} "
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


def read_params(
    folder: Path,
    table: NameTable,
    skeleton: Mapping[str, Any],
    place: Callable[[np.ndarray], jax.Array] = jax.numpy.asarray,
) -> dict[str, Any]:
    """Fills a params pytree from a folder of safetensors.

    Args:
      folder: the checkpoint.
      table: the family's names.
      skeleton: nested dict of leaves with ``shape`` and ``dtype``; tensors are cast to that dtype.
      place: puts a finished leaf on its device.

    Raises:
      CheckpointError: as ``weight_files``, ``read_headers`` and ``make_plan`` do.
    """
    headers = read_headers(weight_files(folder))
    shapes = {name: header.shape for name, header in headers.items()}
    fills, _ = make_plan(table, skeleton, shapes, str(folder))
    dtypes = {leaf: value.dtype for leaf, value in flatten(skeleton).items()}
    with contextlib.ExitStack() as stack:
        files = {file: stack.enter_context(open_tensors(file)) for file in {h.file for h in headers.values()}}

        def read(name: str) -> np.ndarray:
            return files[headers[name].file].get_tensor(name)

        return unflatten({fill.leaf: place(read_leaf(fill, read, dtypes[fill.leaf])) for fill in fills})


def read_leaf(fill: Fill, read: Callable[[str], np.ndarray], dtype: np.dtype) -> np.ndarray:
    """One leaf, its layers stacked; ``read`` gives a tensor by its name in the file."""
    transform = TRANSFORMS[fill.transform].forward
    if not fill.stacked:
        return transform(read(fill.sources[0])).astype(dtype)
    leaf = np.empty(fill.shape, dtype)
    for layer, source in enumerate(fill.sources):
        leaf[layer] = transform(read(source)).astype(dtype)
    return leaf
