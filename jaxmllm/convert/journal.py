"""The journal of a conversion: which pieces are written, with checksums, so that a conversion that stopped goes on.

The first line says what is converted to what; every other line is a finished piece. A line counts once it ends in a
line break, and a piece counts only if what the store holds of it has the checksum of its line. While a process
converts, the journal is locked.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxmllm.errors import CheckpointError, InputError
from jaxmllm.files import lock

JOURNAL = "journal.jsonl"
SHOWN_DIFFERENCES = 6


@dataclasses.dataclass(frozen=True)
class Record:
    """A finished piece.

    Attributes:
      file: which, as ``jaxmllm.convert.pieces.Piece`` has it.
      bytes: of its file.
      crc32: of them.
      source_crc32: of the bytes that were read for it, in the order in which they were read.
    """

    file: str
    bytes: int
    crc32: int
    source_crc32: int

    def line(self) -> str:
        """The record as a line of JSON."""
        return json.dumps(dataclasses.asdict(self)) + "\n"


def read_record(line: str) -> Record:
    """The inverse of ``Record.line``.

    Raises:
      ValueError: the line is no record.
    """
    try:
        fields = json.loads(line)
        return Record(str(fields["file"]), int(fields["bytes"]), int(fields["crc32"]), int(fields["source_crc32"]))
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a record of a piece ({error!r})") from None


@dataclasses.dataclass(frozen=True)
class Journal:
    """An open, locked journal.

    Attributes:
      folder: of the unfinished work.
      descriptor: the open file.
      done: the pieces on record, by file; grows with every record.
    """

    folder: Path
    descriptor: int
    done: dict[str, Record]

    def append(self, records: Sequence[Record]) -> None:
        """Adds pieces, and returns when they are on record on the disk."""
        _write(self.descriptor, "".join(record.line() for record in records))
        self.done.update({record.file: record for record in records})


@contextlib.contextmanager
def locked(folder: Path, settings: Mapping[str, Any]) -> Iterator[Journal]:
    """Opens the journal of unfinished work, made where it does not exist, and locks it while the block lasts.

    Args:
      folder: of the unfinished work.
      settings: what is converted to what, as a flat mapping that JSON can hold; those on record must be the same.

    Raises:
      InputError: another process is at work, or the folder holds work with other settings.
      OSError: the journal cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / JOURNAL, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        lock(descriptor, folder, "another process is converting into it; wait for it, or name another destination")
        yield Journal(folder, descriptor, _take_up(folder, descriptor, dict(settings)))
    finally:
        os.close(descriptor)


def _take_up(folder: Path, descriptor: int, settings: dict[str, Any]) -> dict[str, Record]:
    """The pieces on record. What follows the last whole line is cut off: it was being written when work stopped."""
    text = (folder / JOURNAL).read_bytes()
    lines = text.split(b"\n")[:-1]
    if not lines:
        os.ftruncate(descriptor, 0)
        _write(descriptor, json.dumps(settings) + "\n")
        return {}
    try:
        before = json.loads(lines[0])
        if not isinstance(before, dict):
            raise ValueError(f"its first line is a {type(before).__name__}")
        records = [read_record(line.decode()) for line in lines[1:]]
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{folder / JOURNAL}: damaged ({error}); remove {folder} to begin anew") from None
    _refuse_differences(folder, before, settings)
    os.ftruncate(descriptor, sum(len(line) + 1 for line in lines))
    return {record.file: record for record in records}


def _refuse_differences(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    names = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    if names:
        listed = [f"{name}: {before.get(name, 'none')}, now {now.get(name, 'none')}" for name in names]
        shown = "; ".join(listed[:SHOWN_DIFFERENCES])
        more = f"; and {len(names) - SHOWN_DIFFERENCES} more" if len(names) > SHOWN_DIFFERENCES else ""
        raise InputError(
            f"{folder} holds an unfinished conversion of something else ({shown}{more}). Give the same source and "
            f"options to go on with it, or remove {folder} to begin anew"
        )


def _write(descriptor: int, text: str) -> None:
    data = text.encode()
    written = 0
    while written < len(data):
        written += os.write(descriptor, data[written:])
    os.fsync(descriptor)
