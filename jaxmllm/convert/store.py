"""The Orbax store: params as Orbax lays them out, beside the checkpoint's config and processor files.

A store is a folder::

    jaxmllm.json     what the folder is: format version, parameter dtype
    config.json      of the Hugging Face checkpoint, unchanged
    params/          the params pytree, an Orbax checkpoint: a folder an array, a file a piece
    checksums.jsonl  what every piece was made of and what it holds
    ...              tokenizer and processor files, unchanged

``jaxmllm.convert.streaming`` writes stores. Those of format 1 have no checksums, and their arrays are packed (OCDBT).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmllm.convert.pieces import Layout, Region, shape_of, slices
from jaxmllm.convert.plan import flatten
from jaxmllm.errors import CheckpointError

MARKER = "jaxmllm.json"
PARAMS = "params"
CHECKSUMS = "checksums.jsonl"
FORMAT = 2
READABLE = (1, 2)
SHARDING = "_sharding"  # Orbax's file of where arrays were

# InstructBLIP's second tokenizer has a folder of its own.
_QFORMER_TOKENIZER = tuple(
    f"qformer_tokenizer/{name}"
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt")
)
# Files of a Hugging Face folder that describe the processor rather than the weights.
PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
    "generation_config.json",
    *_QFORMER_TOKENIZER,
)


def is_store(folder: Path) -> bool:
    """Whether a folder is a store."""
    return (folder / MARKER).is_file()


def create_arrays(params: Path, layouts: Sequence[Layout]) -> None:
    """Lets TensorStore make arrays in the form of Orbax without OCDBT (zarr 2): a folder an array, a file a piece.

    Arrays are not compressed, so the file of a piece is its numbers in C order. Arrays that are there are left.

    Args:
      params: the store's folder of them.
      layouts: one an array.

    Raises:
      ValueError: an array cannot be made, or one of another layout is there.
    """
    import tensorstore

    opening = [tensorstore.open(_zarr(params, layout), create=True, open=True) for layout in layouts]
    for future in opening:
        future.result()


def _zarr(params: Path, layout: Layout) -> dict[str, Any]:
    return {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": str((params / layout.folder).absolute())},
        "metadata": {
            "zarr_format": 2,
            "shape": list(layout.shape),
            "chunks": list(layout.chunk),
            "dtype": "bfloat16" if layout.dtype.name == "bfloat16" else layout.dtype.newbyteorder("<").str,
            "order": "C",
            "compressor": None,
            "filters": None,
            "fill_value": None,
            "dimension_separator": ".",
        },
    }


def write_tree(folder: Path, skeleton: Mapping[str, Any]) -> None:
    """Lets Orbax write everything of a checkpoint but its arrays, for which there is ``create_arrays``.

    Args:
      folder: a new folder.
      skeleton: nested dict of leaves with ``shape`` and ``dtype``.
    """
    import orbax.checkpoint as ocp

    class InPlace(ocp.type_handlers.TypeHandler):
        """Stands for arrays that are written by someone else."""

        def typestr(self) -> str:
            return "jax.Array"

        async def metadata(self, infos: Any) -> Any:
            raise NotImplementedError

        async def serialize(self, values: Any, infos: Any, args: Any = None) -> Any:
            return []

        async def deserialize(self, infos: Any, args: Any = None) -> Any:
            raise NotImplementedError

    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), dict(skeleton))
    registry = ocp.type_handlers.create_type_handler_registry((jax.ShapeDtypeStruct, InPlace()))
    # On which device arrays were is known to Orbax's own handler of arrays alone; scalars tell it as well.
    sample = folder.with_name(f"{folder.name}-sample")
    scalars = jax.tree.map(lambda leaf: jax.numpy.zeros((), leaf.dtype), shapes)
    with quiet_orbax():
        in_place = ocp.PyTreeCheckpointHandler(use_ocdbt=False, type_handler_registry=registry)
        with ocp.Checkpointer(in_place) as checkpointer:
            checkpointer.save(folder.absolute(), shapes)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(sample.absolute(), scalars)
    if (sample / SHARDING).is_file():
        shutil.copyfile(sample / SHARDING, folder / SHARDING)
    shutil.rmtree(sample)


def read_marker(folder: Path) -> int:
    """The format of a store.

    Raises:
      CheckpointError: the marker is broken, or of a format that this version does not know.
    """
    try:
        version = json.loads((folder / MARKER).read_text()).get("format")
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: not a store; expected a folder that jaxmllm convert wrote") from None
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder / MARKER}: not a store's marker ({error})") from None
    if version not in READABLE:
        known = " and ".join(map(str, READABLE))
        raise CheckpointError(f"{folder}: store format {version!r}; this version reads formats {known}. Convert again.")
    return version


def read_store(folder: Path, skeleton: Mapping[str, Any], shardings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Reads the params of a store, cast to the skeleton's dtypes.

    Args:
      folder: the store.
      skeleton: nested dict of leaves with ``shape`` and ``dtype``.
      shardings: nested dict like ``skeleton``, a ``jax.sharding.Sharding`` a leaf: each process then reads the pieces
        that its own devices need. ``None`` puts everything on the first device.

    Raises:
      CheckpointError: another format version, or params that do not fit the config.
    """
    import orbax.checkpoint as ocp

    read_marker(folder)
    if shardings is None:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda leaf: device, dict(skeleton))
    placed = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        dict(skeleton),
        dict(shardings),
    )
    _compare_shapes(folder, skeleton)
    with _naming(folder), quiet_orbax(), ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore((folder / PARAMS).absolute(), placed)


@dataclasses.dataclass(frozen=True)
class StoreWeights:
    """The weights of a store.

    Attributes:
      folder: the store.
      arrays: leaf -> its open array.
    """

    folder: Path
    arrays: Mapping[str, Any]

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file of the params."""
        return tuple(sorted(path for path in (self.folder / PARAMS).rglob("*") if path.is_file()))

    def dtype(self, leaf: str) -> np.dtype:
        """The type that a leaf is stored in."""
        return np.dtype(self.arrays[leaf].dtype.numpy_dtype)

    def read(
        self, leaf: str, region: Region, dtype: np.dtype, seen: Callable[[np.ndarray], None] | None = None
    ) -> np.ndarray:
        """A part of a leaf; see ``jaxmllm.convert.weights.Weights``."""
        with _naming(self.folder):
            array = np.asarray(self.arrays[leaf][slices(region)].read().result())
        if seen is not None:
            seen(array)
        return np.ascontiguousarray(array.astype(dtype, copy=False)).reshape(shape_of(region))


def open_arrays(folder: Path, skeleton: Mapping[str, Any]) -> StoreWeights:
    """Opens the arrays of a store of any format.

    Args:
      folder: the store.
      skeleton: nested dict of leaves with a ``shape``.

    Raises:
      CheckpointError: as ``read_store`` does.
    """
    import tensorstore

    read_marker(folder)
    _compare_shapes(folder, skeleton)
    params = (folder / PARAMS).absolute()
    with _naming(folder):
        packed = json.loads((params / "_METADATA").read_text()).get("use_ocdbt", True)

        def spec(leaf: str) -> dict[str, Any]:
            name = leaf.replace("/", ".")
            files = {"driver": "file", "path": str(params if packed else params / name)}
            return {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": files, "path": name} if packed else files}

        opening = {leaf: tensorstore.open(spec(leaf), open=True, read=True) for leaf in flatten(skeleton)}
        return StoreWeights(folder, {leaf: future.result() for leaf, future in opening.items()})


@contextlib.contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """Makes whatever reading params raises an error that names the store."""
    try:
        yield
    except Exception as error:  # Orbax and its storage raise many kinds for broken files
        summary = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{folder / PARAMS}: the weights cannot be read ({summary}); convert the checkpoint again"
        ) from error


def _compare_shapes(folder: Path, skeleton: Mapping[str, Any]) -> None:
    """Raises CheckpointError that lists the leaves which are missing, left over or misshaped."""
    import orbax.checkpoint as ocp

    with _naming(folder), quiet_orbax(), ocp.StandardCheckpointer() as checkpointer:
        stored = dict(checkpointer.metadata((folder / PARAMS).absolute()).item_metadata)
    have = {leaf: tuple(value.shape) for leaf, value in flatten(stored).items()}
    want = {leaf: tuple(value.shape) for leaf, value in flatten(skeleton).items()}
    wrong = sorted(leaf for leaf in have.keys() | want.keys() if have.get(leaf) != want.get(leaf))
    if wrong:
        shown = "; ".join(f"{leaf}: {have.get(leaf, 'none')}, not {want.get(leaf, 'none')}" for leaf in wrong[:6])
        raise CheckpointError(
            f"{folder / PARAMS}: {len(wrong)} weight(s) do not fit config.json: {shown}. "
            "Check that config.json belongs to this store."
        )


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Keeps pages of Orbax's log off the console; what went wrong is in the exception."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
