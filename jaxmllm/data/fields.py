"""Fields of a record of a question file, checked one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxmllm.errors import InputError

Box = tuple[float, float, float, float]


class RecordError(InputError):
    """One record of a file cannot be used; the others can.

    Attributes:
      where: the file and the line.
      problem: what is wrong with it, what was expected, and what to do.
    """

    def __init__(self, where: str, problem: str):
        super().__init__(f"{where}: {problem}")
        self.where, self.problem = where, problem

    def __reduce__(self) -> tuple[type[RecordError], tuple[str, str]]:
        return RecordError, (self.where, self.problem)


def mapping(value: Any, where: str) -> Mapping[str, Any]:
    """A record that is a JSON object.

    Raises:
      RecordError: anything else.
    """
    if not isinstance(value, dict):
        raise RecordError(where, f"expected a JSON object, found {type(value).__name__}")
    return value


def text_field(record: Mapping[str, Any], name: str, where: str) -> str:
    """A field that holds text.

    Raises:
      RecordError: it is missing, empty or of another type.
    """
    value = record.get(name)
    if not isinstance(value, str) or not value.strip():
        raise RecordError(where, f"field {name!r} is {shortened(value)}; expected text")
    return value


def whole_number_field(record: Mapping[str, Any], name: str, where: str) -> int:
    """A field that holds a whole number.

    Raises:
      RecordError: it is missing or of another type.
    """
    value = record.get(name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise RecordError(where, f"field {name!r} is {shortened(value)}; expected a whole number")
    return value


def texts_field(record: Mapping[str, Any], name: str, where: str, count: int | None = None) -> tuple[str, ...]:
    """A field that holds a list of texts, which may be empty ones.

    Args:
      count: how many there must be; by default one or more.

    Raises:
      RecordError: it is missing, of another type or of another length.
    """
    value = record.get(name)
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise RecordError(where, f"field {name!r} is {shortened(value)}; expected a list of texts")
    check_count(value, name, where, count)
    return tuple(value)


def check_count(value: list[Any], name: str, where: str, count: int | None) -> None:
    """Refuses a list that has not the expected number of entries, or none.

    Raises:
      RecordError: so it is.
    """
    if count is not None and len(value) != count:
        raise RecordError(where, f"field {name!r} holds {len(value)} entries; expected exactly {count}")
    if not value:
        raise RecordError(where, f"field {name!r} holds no entries; expected at least one")


def boxes_field(record: Mapping[str, Any], name: str, where: str) -> tuple[Box, ...] | None:
    """A field that holds boxes in pixels, or ``None`` where there is no such field.

    Raises:
      RecordError: it is not a list of ``[left, top, right, bottom]``, or a box has no area.
    """
    value = record.get(name)
    if value is None:
        return None
    try:
        if not isinstance(value, list):
            raise TypeError
        boxes = tuple((float(left), float(top), float(right), float(bottom)) for left, top, right, bottom in value)
    except (TypeError, ValueError):
        raise RecordError(
            where, f"field {name!r}: expected a list of [left, top, right, bottom] in pixels, found {value!r}"
        ) from None
    for box in boxes:
        if not (box[0] < box[2] and box[1] < box[3]):
            raise RecordError(where, f"field {name!r}: {list(box)} is not a box [left, top, right, bottom]")
    return boxes


def shortened(value: Any) -> str:
    """A value as a message shows it."""
    shown = repr(value)
    return shown if len(shown) <= 100 else f"{shown[:100]}..."
