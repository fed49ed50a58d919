"""Files that appear whole or not at all, and locks on them."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxmllm.errors import InputError


def lock(descriptor: int, place: str | Path, busy: str) -> None:
    """Locks an open file or folder until it is closed.

    Args:
      descriptor: of what is locked.
      place: its name, for errors; ``busy`` what it means that another process has the lock.

    Raises:
      InputError: another process has the lock, or there are no locks on this file system.
    """
    import fcntl  # not on every platform, and needed here only

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{place}: {busy}") from None
    except OSError as error:
        raise InputError(f"{place}: cannot be locked ({error.strerror}); take a folder on a local disk") from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a file of JSON that appears whole or not at all; infinite and undefined numbers are refused."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """As ``write_bytes``, of text in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file that appears whole or not at all; it is on the disk when this returns.

    Raises:
      InputError: it cannot be written.
    """
    temporary = None
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's own is for its owner alone
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error
