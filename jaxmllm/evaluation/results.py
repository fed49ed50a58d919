"""A file of JSON lines that a run appends to as it goes, and takes up again after it was killed.

A line counts once it ends in a line break. What stands behind the last line break was cut off while it was written, and
is dropped; anything else that is damaged is an error. While a run writes the file, the file is locked.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxmllm.errors import InputError
from jaxmllm.files import lock
from jaxmllm.parallel.record import BUSY


@dataclasses.dataclass(frozen=True)
class Form:
    """What the lines of a file have in common.

    Attributes:
      name: of the file.
      key: the field that tells lines apart.
      kind: the type of its values.
      fields: what every line must have.
    """

    name: str
    key: str
    kind: type
    fields: tuple[str, ...]


# The fields are those of ``jaxmllm.data.benchmarks.base.Row``; index is the place in the source.
RESULTS = Form(
    "results.jsonl", "index", int,
    ("index", "question_id", "where", "question", "prompt", "prediction", "parsed", "score", "answers", "reference",
     "categories", "image", "log_probability", "tokens", "stopped"),
)  # fmt: skip
# Questions that were left out; index is missing (null) of records that could not be read at all.
SKIPPED = Form("skipped.jsonl", "where", str, ("where", "problem", "index"))


def of_process(form: Form, process: int) -> Form:
    """The same lines in the file of one process of several; process 0 writes the file that all end up in."""
    stem, _, ending = form.name.partition(".")
    return form if process == 0 else dataclasses.replace(form, name=f"{stem}-{process}.{ending}")


def take_in(file: LineFile, folder: Path) -> None:
    """Takes the lines of other processes' files into the one that all end up in, and removes those files.

    A kill between the two leaves lines in both, which the next call takes for one.

    Raises:
      InputError: as ``read_lines``, or the disk takes no more.
    """
    stem, _, ending = file.form.name.partition(".")
    for path in sorted(folder.glob(f"{stem}-*.{ending}")):
        if not re.fullmatch(rf"{stem}-\d+\.{ending}", path.name):
            continue
        rows = read_lines(folder, dataclasses.replace(file.form, name=path.name))
        file.append([row for row in rows if row[file.form.key] not in file.present])
        path.unlink()


@dataclasses.dataclass(frozen=True)
class LineFile:
    """An open, locked file of JSON lines.

    Attributes:
      path: where it is.
      form: of its lines.
      descriptor: the open file.
      present: the keys of the lines it holds; grows with every line.
    """

    path: Path
    form: Form
    descriptor: int
    present: set[Any]

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Adds lines, and returns when they are on the disk.

        Raises:
          InputError: a key is there already, or the disk takes no more; the file then ends where it ended before.
        """
        keys = [row[self.form.key] for row in rows]
        doubled = [key for number, key in enumerate(keys) if key in self.present or key in keys[:number]]
        if doubled:
            raise InputError(f"{self.path}: {self.form.key} {doubled[0]!r} is written already")
        data = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode()
        end = os.fstat(self.descriptor).st_size
        try:
            written = 0
            while written < len(data):
                written += os.write(self.descriptor, data[written:])
            os.fsync(self.descriptor)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self.descriptor, end)
            raise InputError(
                f"{self.path}: cannot be written ({error.strerror}); the {len(self.present)} lines before are kept. "
                "Make room, and give the same command again to go on"
            ) from error
        self.present.update(keys)


@contextlib.contextmanager
def appending(folder: Path, form: Form) -> Iterator[LineFile]:
    """Opens a file of a run to go on with it, made where it does not exist, and locks it while the block lasts.

    A last line that was cut off is removed.

    Raises:
      InputError: another process writes the file, it cannot be written, or as ``read_lines``.
    """
    path = folder / form.name
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error
    try:
        lock(descriptor, path, BUSY)
        rows, whole = _whole_lines(path, form)
        if os.fstat(descriptor).st_size > whole:
            os.ftruncate(descriptor, whole)
        yield LineFile(path, form, descriptor, {row[form.key] for row in rows})
    finally:
        os.close(descriptor)


def read_lines(folder: Path, form: Form) -> list[dict[str, Any]]:
    """The whole lines of a run's file, in its order; none where there is no file. A last line cut off is left out.

    Raises:
      InputError: naming the line, for one that is damaged, lacks a field, or has the key of an earlier one.
    """
    return _whole_lines(folder / form.name, form)[0]


def read_results(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run, in the order of the benchmark's questions.

    Raises:
      InputError: as ``read_lines``.
    """
    return sorted(read_lines(folder, RESULTS), key=lambda row: row["index"])


def _whole_lines(path: Path, form: Form) -> tuple[list[dict[str, Any]], int]:
    """The whole lines, and how many bytes they take."""
    rows: list[dict[str, Any]] = []
    first_line: dict[Any, int] = {}
    whole = 0
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                row = _parse(line, f"{path}, line {number}", form)
                key = row[form.key]
                if key in first_line:
                    raise InputError(
                        f"{path}, line {number}: {form.key} {key!r} is already on line {first_line[key]}; "
                        "remove one of them"
                    )
                first_line[key] = number
                rows.append(row)
                whole += len(line)
    except FileNotFoundError:
        return [], 0
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    return rows, whole


def _parse(line: bytes, where: str, form: Form) -> dict[str, Any]:
    again = "remove the line to compute it again"
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: damaged, not valid JSON ({error}); {again}") from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected a JSON object, found {type(row).__name__}; {again}")
    missing = [name for name in form.fields if name not in row]
    if missing:
        raise InputError(f"{where}: field {missing[0]!r} is missing; {again}")
    if type(row[form.key]) is not form.kind:
        raise InputError(f"{where}: field {form.key!r} is {row[form.key]!r}; expected {form.kind.__name__}; {again}")
    return row
