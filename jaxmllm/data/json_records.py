"""Records inside one JSON document: the entries of a list, or the members of the document itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from jaxmllm.data.records import CHUNK, Records, Spans, decode_json, open_text
from jaxmllm.errors import InputError

WHITESPACE = " \t\n\r"
# A number, a literal or an escape that ends this close to the end of what was read may go on behind it.
MARGIN = 16
_DECODER = json.JSONDecoder()


def json_list(path: str | Path, key: str | None = None, *, chunk: int = CHUNK) -> Records:
    """The entries of a list: of the document itself, or under a key of it.

    Args:
      key: where the list is; by default the document is the list.
      chunk: bytes read at a time.

    Returns:
      The records; their header has the document's other values, lists aside.

    Raises:
      InputError: the file is missing, not a text file, not valid JSON, cut off, or has no such list.
    """
    path, spans = Path(path), Spans()
    header: dict[str, Any] = {}
    found: list[str] = []
    with open_text(path) as file:
        text = _Text(path, file, chunk)
        if key is None:
            text.expect("[", "a list at the top level")
            text.walk(spans)
        else:
            text.expect("{", f"an object with a list under {key!r}")

            def member(name: str, start: int, line: int) -> None:
                if name == key and name in found:
                    text.fail(f"the list {key!r} is there twice")
                found.append(name)
                if name == key:
                    text.expect("[", f"a list under {key!r}")
                    text.walk(spans)
                elif text.peek() == "[":
                    text.walk(None)
                else:
                    header[name] = text.value_as_utf8()

            text.walk_members(member)
        text.finish()
    if key is not None and key not in found:
        raise InputError(f"{path}: holds no {key!r}; expected a list under it, found {', '.join(found) or 'nothing'}")
    return Records(path, spans.as_array(), decode_json, header)


def json_members(path: str | Path, *, chunk: int = CHUNK) -> Records:
    """The members of a document that is one object, each as ``(key, value)``.

    Raises:
      InputError: the file is missing, not a text file, not valid JSON, cut off, or no object.
    """
    path, spans = Path(path), Spans()
    with open_text(path) as file:
        text = _Text(path, file, chunk)
        text.expect("{", "an object at the top level")

        def member(name: str, start: int, line: int) -> None:
            text.value()
            spans.add(start, text.offset - start, line)

        text.walk_members(member)
        text.finish()
    return Records(path, spans.as_array(), _member)


def _member(text: str) -> tuple[str, Any]:
    return next(iter(decode_json(f"{{{text}}}").items()))


class _Text:
    """A JSON text read by chunks as Latin-1: what counts in JSON is ASCII, and so one character is one byte."""

    def __init__(self, path: Path, file: BinaryIO, chunk: int):
        self.path = path
        self._file, self._chunk = file, chunk
        self._before = file.tell()  # bytes of the file before the buffer
        self._buffer, self._at, self._ended = "", 0, False
        self._line, self._counted = 1, 0  # the line at a place of the buffer

    @property
    def offset(self) -> int:
        """Bytes of the file that are read and done with."""
        return self._before + self._at

    def line(self) -> int:
        """The line that is being read."""
        self._line += self._buffer.count("\n", self._counted, self._at)
        self._counted = self._at
        return self._line

    def peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            while self._at < len(self._buffer) and self._buffer[self._at] in WHITESPACE:
                self._at += 1
            if self._at < len(self._buffer):
                return self._buffer[self._at]
            if self._ended:
                return ""
            self._fill()

    def expect(self, mark: str, what: str) -> None:
        """Refuses anything but a mark as the next character."""
        if self.peek() != mark:
            self.fail(f"expected {what}, found {self.peek()!r}" if self.peek() else f"expected {what}; the file ends")

    def value(self) -> str:
        """Steps over a value, and returns its text in Latin-1."""
        self.peek()
        while True:
            try:
                _, end = _DECODER.raw_decode(self._buffer, self._at)
                if end <= len(self._buffer) - MARGIN or self._ended:
                    break
            except json.JSONDecodeError as error:
                unclosed = error.msg.startswith("Unterminated string")
                if self._ended or not (unclosed or error.pos > len(self._buffer) - MARGIN):
                    self._at = len(self._buffer) if unclosed else error.pos
                    self.fail(error.msg)
            except (RecursionError, ValueError) as error:  # nested too deeply; a number of thousands of digits
                self.fail(str(error))
            self._fill()
        text, self._at = self._buffer[self._at : end], end
        return text

    def value_as_utf8(self) -> Any:
        """Reads a value."""
        try:
            return json.loads(self.value().encode("latin-1").decode("utf-8"))
        except UnicodeDecodeError as error:
            self.fail(f"{error.reason}; expected UTF-8")

    def walk(self, spans: Spans | None) -> None:
        """Steps over a list, and notes where its entries are."""

        def entry() -> None:
            self.peek()
            line, start = self.line(), self.offset
            self.value()
            if spans is not None:
                spans.add(start, self.offset - start, line)

        self._walk("]", entry)

    def walk_members(self, member: Callable[[str, int, int], None]) -> None:
        """Steps over an object; ``member`` is told each key, where it starts and its line, and reads the value."""

        def entry() -> None:
            if self.peek() != '"':
                self.fail("expected a key in quotation marks")
            line, start = self.line(), self.offset
            name = self.value_as_utf8()
            self.expect(":", "a colon behind a key")
            self._at += 1
            member(name, start, line)

        self._walk("}", entry)

    def finish(self) -> None:
        """Refuses anything behind the document."""
        if self.peek():
            self.fail("something follows the document")

    def fail(self, problem: str) -> NoReturn:
        """Raises an error that names the line."""
        if self._ended and self._at >= len(self._buffer):
            problem += "; the file ends here: is it cut off?"
        raise InputError(f"{self.path}, line {self.line()}: not valid JSON ({problem}), at byte {self.offset}")

    def _walk(self, closing: str, entry: Callable[[], None]) -> None:
        self._at += 1
        if self.peek() != closing:
            entry()
            while self.peek() == ",":
                self._at += 1
                entry()
        self.expect(closing, f"',' or '{closing}'")
        self._at += 1

    def _fill(self) -> None:
        """Lets go of what is done with and reads on: as much again as is left, so long values cost their length."""
        self.line()
        self._before += self._at
        self._buffer = self._buffer[self._at :]
        read = self._file.read(max(self._chunk, len(self._buffer)))
        self._ended = not read
        self._buffer += read.decode("latin-1")
        self._at = self._counted = 0
