"""Rows of a table with tabs between its cells, as spreadsheet programs and pandas write it."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from jaxmllm.data.records import CHUNK, Records, Spans, open_text
from jaxmllm.errors import InputError

_END_OF_CELL = re.compile(rb"[\t\r\n]")
_QUOTE, _TAB, _RETURN, _NEWLINE = b'"'[0], b"\t"[0], b"\r"[0], b"\n"[0]


def tsv_rows(path: str | Path, *, chunk: int = CHUNK) -> Records:
    r"""The rows of a TSV file with a header, each as a dict of texts by the header's names.

    A cell that begins with a quotation mark ends with one, may hold tabs and line breaks, and has its own quotation
    marks doubled. Rows end with ``\n``, ``\r\n`` or ``\r``; empty lines are no rows. What is missing at a row's end is
    empty. These are the texts of ``pandas.read_csv(sep="\t", dtype=str, keep_default_na=False)``.

    Args:
      chunk: bytes read at a time.

    Returns:
      The records; their header has the names under ``columns``.

    Raises:
      InputError: the file is missing or no text file, has no header or a name in it twice, or a quotation mark is never
        closed.
    """
    path, spans = Path(path), Spans()
    with open_text(path) as file:
        offset, line = file.tell(), 1
        buffer, at, ended = b"", 0, False
        columns: tuple[str, ...] | None = None
        while not (ended and at == len(buffer)):
            row = split_row(buffer, at)
            if row is None:
                if ended:
                    raise InputError(
                        f"{path}, line {line}: a quotation mark opens a cell of this row and is never closed"
                    )
                offset, buffer, at = offset + at, buffer[at:], 0
                read = file.read(max(chunk, len(buffer)))
                ended = not read
                # The last row need not end with a line break.
                buffer += read or (b"" if buffer.endswith(b"\n") else b"\n")
                continue
            cells, end, following = row
            if buffer[at:end].strip(b" "):
                if columns is None:
                    columns = _columns(cells, f"{path}, line {line}")
                else:
                    spans.add(offset + at, end - at, line)
            line += max(1, buffer.count(b"\n", at, following))
            at = following
    if columns is None:
        raise InputError(f"{path}: empty; expected a header row with the names of columns")
    return Records(path, spans.as_array(), RowDecoder(columns), {"columns": columns})


def split_row(buffer: bytes, at: int) -> tuple[list[bytes], int, int] | None:
    """The cells of the row that starts at a place, where it ends, and where the next one starts.

    Returns:
      ``None`` where the buffer ends before the row does.
    """
    cells: list[bytes] = []
    while True:
        parts: list[bytes] = []
        if at < len(buffer) and buffer[at] == _QUOTE:
            quoted = _quoted(buffer, at + 1, parts)
            if quoted is None:
                return None
            at = quoted
        found = _END_OF_CELL.search(buffer, at)
        if found is None:
            return None
        end = found.start()
        cells.append(b"".join([*parts, buffer[at:end]]))
        at = end + 1
        if buffer[end] == _TAB:
            continue
        if buffer[end] == _RETURN:
            if at == len(buffer):
                return None  # a line feed may follow
            at += buffer[at] == _NEWLINE
        return cells, end, at


def _quoted(buffer: bytes, at: int, parts: list[bytes]) -> int | None:
    """Collects a quoted text from behind its opening mark, and returns the place behind its closing mark."""
    while True:
        close = buffer.find(b'"', at)
        if close < 0 or close + 1 == len(buffer):
            return None
        parts.append(buffer[at:close])
        if buffer[close + 1] != _QUOTE:
            return close + 1
        parts.append(b'"')
        at = close + 2


def _columns(cells: list[bytes], where: str) -> tuple[str, ...]:
    try:
        names = tuple(cell.decode("utf-8") for cell in cells)
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 text ({error.reason}); save the file as UTF-8") from None
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"{where}: the column {twice!r} is there twice")
    return names


@dataclasses.dataclass(frozen=True)
class RowDecoder:
    """Turns a row's text into a dict of its cells."""

    columns: tuple[str, ...]

    def __call__(self, text: str) -> dict[str, Any]:
        row = split_row(text.encode("utf-8") + b"\n", 0)
        if row is None:
            raise ValueError("a quotation mark opens a cell and is never closed")
        cells = [cell.decode("utf-8") for cell in row[0]]
        if len(cells) > len(self.columns):
            raise ValueError(f"the row has {len(cells)} cells; the header names {len(self.columns)} columns")
        return dict(zip(self.columns, [*cells, *[""] * (len(self.columns) - len(cells))], strict=True))
