"""Records of one file that belong to the records of another by an id."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import numpy as np

from jaxmllm.data.benchmarks.base import Skipped
from jaxmllm.data.fields import RecordError
from jaxmllm.data.records import Records, open_binary

Key = Callable[[Any, str], Hashable]
NONE = -1


def numbers_by_key(records: Records, key: Key) -> tuple[dict[Hashable, int], list[Skipped]]:
    """Number of the record of every key, and the records without a key or with one that another has.

    Args:
      key: record, where it stands -> its key; raises ``RecordError``.
    """
    numbers: dict[Hashable, int] = {}
    problems: list[Skipped] = []
    with open_binary(records.path) as file:
        for number in range(len(records)):
            place = records.place(number)
            try:
                found = key(records.read(file, number), place.where)
                if found in numbers:
                    raise RecordError(
                        place.where, f"id {found} is there twice, first at {records.place(numbers[found]).where}"
                    )
            except RecordError as problem:
                problems.append(Skipped(problem.where, problem.problem))
            else:
                numbers[found] = number
    return numbers, problems


def match(questions: Records, others: Records, key: Key, of_question: Key) -> tuple[np.ndarray, list[Skipped]]:
    """Which record of another file belongs to each question.

    Args:
      key: key of the other file's records.
      of_question: the key of a question.

    Returns:
      For every question the number of its record, -1 where there is none; and the bad records of the other file.
    """
    numbers, problems = numbers_by_key(others, key)
    found = np.full(len(questions), NONE, np.int64)
    with open_binary(questions.path) as file:
        for number in range(len(questions)):
            try:
                wanted = of_question(questions.read(file, number), questions.place(number).where)
            except RecordError:
                continue  # told of when the question itself is read
            found[number] = numbers.get(wanted, NONE)
    return found, problems


def left_over(others: Records, matched: np.ndarray, problem: str, problems: list[Skipped]) -> list[Skipped]:
    """The records of another file that belong to no question, those with a problem of their own aside."""
    told = {one.where for one in problems}
    left = np.setdiff1d(np.arange(len(others)), matched)
    places = [others.place(int(number)).where for number in left]
    return [Skipped(where, problem) for where in places if where not in told]
