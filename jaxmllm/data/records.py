"""Random access to the records of big files, which are never held whole.

One pass finds where every record is, by chunks: memory is bounded by a chunk, the largest record, and 24 bytes a
record. A record is parsed again from the file whenever it is asked for.
"""

from __future__ import annotations

import dataclasses
import json
import re
from array import array
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jaxmllm.data.fields import RecordError
from jaxmllm.errors import InputError

CHUNK = 1 << 22
UTF8_BOM = b"\xef\xbb\xbf"
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_MAGIC = {
    b"\x1f\x8b": "a gzip archive; unpack it first",
    b"PK\x03\x04": "a zip archive; unzip it first",
    b"PK\x05\x06": "an empty zip archive",
    b"7z\xbc\xaf": "a 7z archive; unpack it first",
    b"\xfd7zXZ": "an xz archive; unpack it first",
    b"BZh": "a bzip2 archive; unpack it first",
    b"\xff\xfe": "text in UTF-16; save it as UTF-8",
    b"\xfe\xff": "text in UTF-16; save it as UTF-8",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself; fetch it with git lfs pull",
}


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a record stands: its number from 0, its line from 1, and both with the file as messages name it."""

    number: int
    line: int
    where: str


@dataclasses.dataclass(frozen=True, eq=False)
class Records:
    """The records of one file.

    Attributes:
      path: the file.
      spans: offset and length in bytes and the line, from 1, of every record; int64 ``[N, 3]``.
      decode: turns a record's text into its value; raises ``ValueError``.
      header: what else a JSON file has at its top level, lists aside; or what a table's first row says.
    """

    path: Path
    spans: np.ndarray
    decode: Callable[[str], Any]
    header: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, number: int) -> Any:
        with open_binary(self.path) as file:
            return self.read(file, number)

    def read(self, file: BinaryIO, number: int) -> Any:
        """A record, through a file that is already open.

        Raises:
          RecordError: it is not UTF-8, or cannot be parsed.
        """
        offset, length = int(self.spans[number, 0]), int(self.spans[number, 1])
        file.seek(offset)
        try:
            return self.decode(file.read(length).decode("utf-8"))
        except UnicodeDecodeError as error:
            problem = f"not UTF-8 text ({error.reason} at byte {offset + error.start}); save the file as UTF-8"
        except json.JSONDecodeError as error:
            problem = f"not valid JSON ({error})"
        except RecursionError:
            problem = "not valid JSON (nested too deeply)"
        except ValueError as error:
            problem = str(error)
        raise RecordError(self.place(number).where, problem)

    def place(self, number: int) -> Place:
        """Where a record stands; its number is named where records share a line."""
        line = int(self.spans[number, 2])
        shared = any(0 <= other < len(self) and self.spans[other, 2] == line for other in (number - 1, number + 1))
        record = f"record {number + 1}, " if shared else ""
        return Place(number, line, f"{self.path}, {record}line {line}")


class Spans:
    """Where records are, while they are being found."""

    def __init__(self) -> None:
        self._numbers = array("q")

    def add(self, offset: int, length: int, line: int) -> None:
        self._numbers.extend((offset, length, line))

    def as_array(self) -> np.ndarray:
        return np.array(self._numbers, np.int64).reshape(-1, 3)


def json_lines(path: str | Path) -> Records:
    """The lines of a JSONL file, blank ones aside.

    Raises:
      InputError: the file is missing, or not a text file.
    """
    path, spans = Path(path), Spans()
    with open_text(path) as file:
        offset = file.tell()
        for line, text in enumerate(file, start=1):
            if text.strip():
                spans.add(offset, len(text), line)
            offset += len(text)
    return Records(path, spans.as_array(), decode_json)


def decode_json(text: str) -> Any:
    r"""Parses a record, and refuses texts that no file and no tokenizer could hold.

    JSON can write half of a surrogate pair (``\ud83d`` alone), and Python reads it.

    Raises:
      ValueError: it is not valid JSON, or holds such a text.
    """
    value = json.loads(text)
    if _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("a text in it holds half of a surrogate pair, which is no character") from None
    return value


def open_binary(path: Path) -> BinaryIO:
    """Opens a file for reading.

    Raises:
      InputError: it is missing or cannot be read.
    """
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read as text ({error})") from error


def open_text(path: Path) -> BinaryIO:
    """Opens a text file as bytes, behind its byte order mark if it has one.

    Raises:
      InputError: it is missing, cannot be read, or plainly is no UTF-8 text.
    """
    file = open_binary(path)
    start = file.read(4096)
    kind = next((kind for magic, kind in _MAGIC.items() if start.startswith(magic)), None)
    if kind is None and b"\0" in start:
        kind = "a binary file, or text in UTF-16 or UTF-32; expected UTF-8"
    if kind is not None:
        file.close()
        raise InputError(f"{path}: cannot be read as text: it is {kind}")
    file.seek(len(UTF8_BOM) if start.startswith(UTF8_BOM) else 0)
    return file
