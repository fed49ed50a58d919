"""The Orbax store: params as Orbax writes them, beside the checkpoint's config and processor files.

A store is a folder::

    jaxmllm.json     what the folder is: format version, parameter dtype
    config.json      of the Hugging Face checkpoint, unchanged
    params/          the params pytree, written by Orbax
    ...              tokenizer and processor files, unchanged
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jaxmllm.errors import CheckpointError, InputError

MARKER = "jaxmllm.json"
PARAMS = "params"
FORMAT = 1

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
)


def is_store(folder: Path) -> bool:
    """Whether a folder was written by ``write_store``."""
    return (folder / MARKER).is_file()


def write_store(source: Path, destination: Path, params: Mapping[str, Any]) -> None:
    """Writes params with the config and processor files of ``source``; the folder appears whole or not at all.

    Raises:
      InputError: the destination exists, or cannot be written.
    """
    import orbax.checkpoint as ocp

    if destination.exists():
        raise InputError(f"{destination} exists already; name a new folder or remove it")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{destination.name}-", dir=destination.parent))
    except OSError as error:
        raise InputError(f"{destination}: cannot be written ({error})") from error
    try:
        for name in ("config.json", *PROCESSOR_FILES):
            if (source / name).is_file():
                shutil.copyfile(source / name, building / name)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save((building / PARAMS).absolute(), dict(params))
        dtypes = sorted({str(leaf.dtype) for leaf in jax.tree.leaves(params)})
        (building / MARKER).write_text(json.dumps({"format": FORMAT, "param_dtype": dtypes}, indent=2) + "\n")
        building.rename(destination)
    except OSError as error:
        raise InputError(f"{destination}: cannot be written ({error})") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def read_store(folder: Path, skeleton: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the params of a store, cast to the skeleton's dtypes.

    Raises:
      CheckpointError: another format version, or params that do not fit the config.
    """
    import orbax.checkpoint as ocp

    try:
        version = json.loads((folder / MARKER).read_text()).get("format")
    except (json.JSONDecodeError, AttributeError) as error:
        raise CheckpointError(f"{folder / MARKER}: not a store's marker ({error})") from None
    if version != FORMAT:
        raise CheckpointError(f"{folder}: store format {version!r}; this version reads format {FORMAT}. Convert again.")
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    placed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), dict(skeleton))
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore((folder / PARAMS).absolute(), placed)
    except (ValueError, KeyError, OSError, TypeError) as error:
        summary = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{folder / PARAMS}: does not hold the weights that config.json describes ({summary})"
        ) from error
