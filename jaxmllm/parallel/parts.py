"""The finished parts of a run: one immutable file each, which appears whole or not at all.

A part is what one unit of work came to. The files are all the progress there is: a run that was stopped at any moment
goes on with the units that have no file, on as many processes and devices as there are then.
"""

from __future__ import annotations

import dataclasses
import io
import re
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from jaxmllm.errors import InputError
from jaxmllm.files import write_bytes

PARTS = "parts"

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Parts:
    """The parts of a run.

    Attributes:
      folder: of the run; parts lie in a folder of their own in it.
      on_written: called after each part that this process writes.
    """

    folder: Path
    on_written: Callable[[], None] = lambda: None

    def done(self) -> set[int]:
        """Numbers of the units that have their part."""
        found = (re.fullmatch(r"unit-(\d+)\.npz", path.name) for path in (self.folder / PARTS).glob("*.npz"))
        return {int(name[1]) for name in found if name}

    def path(self, unit: int) -> Path:
        return self.folder / PARTS / f"unit-{unit:06d}.npz"

    def write(self, unit: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Writes the part of a unit; the part is on the disk when this returns.

        Raises:
          InputError: it cannot be written.
        """
        content = io.BytesIO()
        np.savez_compressed(content, **arrays)  # type: ignore[arg-type]  # its stub takes no mapping
        path = self.path(unit)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{path.parent}: cannot be written ({error.strerror})") from error
        write_bytes(path, content.getvalue())
        self.on_written()

    def read(self, unit: int) -> Arrays:
        """The part of a unit.

        Raises:
          InputError: it is missing or damaged.
        """
        path = self.path(unit)
        try:
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise InputError(
                f"{path}: damaged or missing ({error}); remove the file, and give the same command again to compute it"
            ) from error

    def remove(self) -> None:
        """Removes all parts, once what they came to is written elsewhere."""
        shutil.rmtree(self.folder / PARTS, ignore_errors=True)
