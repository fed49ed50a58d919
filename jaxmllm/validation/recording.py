"""The reference's side of a validation on disk: written where torch is, compared wherever the port runs.

A recording is a folder: ``recording.json`` and files of safetensors, one a stage of the model, so that neither side
holds more than a stage. It appears whole or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxmllm.errors import InputError
from jaxmllm.files import write_json
from jaxmllm.validation import components
from jaxmllm.validation.distributions import Errors, measure
from jaxmllm.validation.report import Floor, Kind

FORMAT = 1
HEADER = "recording.json"
INPUTS = "inputs/"  # before the names of the arrays that both models are given


class RecordingError(InputError):
    """A recording is missing, of another format, or broken."""


class Recording:
    """A recording that is being read.

    Attributes:
      folder: where it lies.
      header: what ``recording.json`` holds beside the arrays: versions, config, checksums, tokens, ...
      dtype: what the reference was computed in.
    """

    def __init__(self, folder: Path):
        """Opens a recording.

        Raises:
          RecordingError: it is missing, of another format, or broken.
        """
        self.folder = folder
        path = folder / HEADER
        try:
            self.header: dict[str, Any] = json.loads(path.read_text())
        except FileNotFoundError:
            raise RecordingError(
                f"{path}: no such file; expected a folder written by `jaxmllm validate --save`"
            ) from None
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise RecordingError(f"{path}: cannot be read ({error}); record the reference again") from None
        found = self.header.get("format") if isinstance(self.header, dict) else None
        if found != FORMAT:
            raise RecordingError(
                f"{path}: format is {found!r}; this version reads format {FORMAT}. Record the reference again with "
                "`jaxmllm validate --save`, or compare with the version of jaxmllm that wrote it"
            )
        lacking = sorted({"dtype", "arrays"} - self.header.keys())
        if lacking:
            raise RecordingError(f"{path}: lacks {', '.join(lacking)}; record the reference again")
        self._arrays: dict[str, dict[str, Any]] = self.header["arrays"]
        missing = sorted({entry["file"] for entry in self._arrays.values()} - {each.name for each in folder.iterdir()})
        if missing:
            raise RecordingError(f"{folder}: {', '.join(missing)} missing, which {HEADER} names; copy the whole folder")

    @property
    def dtype(self) -> str:
        return str(self.header["dtype"])

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def names(self) -> Iterator[str]:
        """The arrays, in the order in which they were computed; not the inputs."""
        return (name for name in self._arrays if not name.startswith(INPUTS))

    def read(self, name: str) -> np.ndarray:
        """An array, the rows of it that are kept.

        Raises:
          RecordingError: it is not there or cannot be read.
        """
        if name not in self._arrays:
            raise RecordingError(f"{self.folder}: holds no {name}")
        path = self.folder / self._arrays[name]["file"]
        try:
            with safe_open(path, framework="numpy") as tensors:
                return tensors.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise RecordingError(f"{path}: {name} cannot be read ({error}); copy the recording again") from error

    def rows(self, name: str) -> tuple[int, ...] | None:
        """The rows of an array that are kept; ``None`` where all are."""
        rows = self._arrays[name]["rows"]
        return None if rows is None else tuple(rows)

    def floor(self, name: str, kind: Kind) -> Floor:
        """What the reference differs from itself by."""
        floors = self._arrays[name]["floors"].get(kind, {})
        return Floor({way: Errors.from_json(fields) for way, fields in floors.items()})

    def inputs(self) -> dict[str, np.ndarray]:
        """The arrays that both models are given."""
        return {name.removeprefix(INPUTS): self.read(name) for name in self._arrays if name.startswith(INPUTS)}


class Recorder:
    """A recording that is being written; leave it with ``finish``, or with ``discard`` where something failed.

    Attributes:
      inputs: the arrays that both models are given.
      dtype: what the reference computes in.
    """

    def __init__(self, folder: Path, inputs: Mapping[str, np.ndarray], dtype: str, rows: Sequence[int] | None):
        """Starts a recording.

        Args:
          folder: does not exist yet.
          inputs: see there.
          dtype: ``float32``, ``bfloat16`` or ``float16``.
          rows: the positions of sequences that are kept; ``None`` for all.

        Raises:
          InputError: the folder exists or cannot be made.
        """
        if folder.exists():
            raise InputError(f"{folder}: exists already; name a new folder for the recording")
        self._folder = folder
        self._partial = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
        try:
            self._partial.mkdir(parents=True)
        except OSError as error:
            raise InputError(f"{folder}: cannot be made ({error.strerror})") from error
        self.inputs = {name: np.ascontiguousarray(value) for name, value in inputs.items()}
        self.dtype = dtype
        self._rows = None if rows is None else tuple(rows)
        self._arrays: dict[str, dict[str, Any]] = {}
        self._waiting: dict[str, np.ndarray] = {}
        self._files = 0
        for name, value in self.inputs.items():
            self._hold(INPUTS + name, value, None)
        self.flush()

    def add(self, name: str, array: np.ndarray, whole: bool = False) -> None:
        """Records a whole array of the reference.

        Args:
          name: of the component.
          array: all of it, float32 (or whole numbers).
          whole: keep all rows, because the port starts from it.
        """
        rows = None
        if not whole:
            rows = self._rows if components.along_sequence(name) else components.other_rows(array.shape)
        self._hold(name, components.keep(name, array, rows), rows)

    def add_floor(self, name: str, kind: Kind, way: str, array: np.ndarray) -> None:
        """Records what the reference gives for a component when it is computed in another way.

        Args:
          name: of a component that was added.
          kind: from which input it was computed; see ``Kind``.
          way: ``float64``, ``other order``, ...
          array: all of it.
        """
        rows = self._arrays[name]["rows"]
        kept = components.keep(name, array, rows)
        expected = self._read(name)
        mask = components.meaningful(name, expected.shape, rows, self.inputs)
        errors = measure(kept, expected, mask, self.dtype)
        self._arrays[name]["floors"].setdefault(kind, {})[way] = errors.to_json()

    def flush(self) -> None:
        """Writes what was added since the last time as one file, so that memory is free again.

        Raises:
          InputError: the disk is full or cannot be written.
        """
        if not self._waiting:
            return
        file = f"arrays-{self._files:05d}.safetensors"
        try:
            save_file(self._waiting, self._partial / file)
            with open(self._partial / file, "rb+") as written:
                os.fsync(written.fileno())
        except (OSError, SafetensorError) as error:
            self.discard()
            raise InputError(f"{self._folder}: cannot be written ({error})") from error
        for name in self._waiting:
            self._arrays[name]["file"] = file
        self._waiting = {}
        self._files += 1

    def finish(self, header: Mapping[str, Any]) -> Recording:
        """Writes the header and puts the folder in its place.

        Args:
          header: all that is not an array; JSON.

        Raises:
          InputError: the disk is full or cannot be written.
        """
        self.flush()
        try:
            write_json(
                self._partial / HEADER, {"format": FORMAT, "dtype": self.dtype, **header, "arrays": self._arrays}
            )
            self._partial.rename(self._folder)
        except (InputError, OSError) as error:
            self.discard()
            raise InputError(f"{self._folder}: cannot be written ({error})") from error
        return Recording(self._folder)

    def discard(self) -> None:
        """Removes what was written."""
        shutil.rmtree(self._partial, ignore_errors=True)

    def _hold(self, name: str, array: np.ndarray, rows: Sequence[int] | None) -> None:
        if name in self._arrays:
            raise ValueError(f"{name} is recorded twice")
        # a copy, since hooks hand in views of arrays that a model goes on to use
        self._waiting[name] = np.array(array, order="C")
        self._arrays[name] = {"file": "", "rows": None if rows is None else list(rows), "floors": {}}

    def _read(self, name: str) -> np.ndarray:
        if name in self._waiting:
            return self._waiting[name]
        with safe_open(self._partial / self._arrays[name]["file"], framework="numpy") as tensors:
            return tensors.get_tensor(name)
