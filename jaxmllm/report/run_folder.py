"""The folder of a run: it appears whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jaxmllm.errors import InputError


@contextmanager
def building(destination: Path) -> Iterator[Path]:
    """A temporary folder beside ``destination``: takes its name when the block ends well, and goes when it does not.

    Raises:
      InputError: the destination holds something already, or cannot be written; found out before any work is done.
    """
    destination = Path(destination)
    try:
        if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
            raise InputError(f"{destination} exists already and is not empty; name a new folder")
        destination.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{destination.name}-", dir=destination.parent))
    except OSError as error:
        raise InputError(f"{destination}: cannot be written ({error})") from error
    try:
        yield folder
        folder.chmod(0o755)
        try:
            if destination.exists():
                destination.rmdir()
            folder.rename(destination)
        except OSError as error:
            raise InputError(f"{destination}: cannot be written ({error})") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
