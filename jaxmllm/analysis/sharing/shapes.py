"""The shapes that questions are padded to, so that a data set of mixed lengths shares a handful of programs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

# Questions are padded to one of so many lengths, unless images are shared: an image's questions then stay together.
LENGTH_CLASSES = 2


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The shapes that all chunks of a data set are padded to, so that they share programs.

    Attributes:
      questions: allowed lengths of the question segment, ascending.
      answer: length of the answer segment.
      contexts: contexts a chunk.
      rows: rows a chunk.
      bodies: allowed lengths of the body segment, ascending; none where all are alike.
    """

    questions: tuple[int, ...]
    answer: int
    contexts: int
    rows: int
    bodies: tuple[int, ...] = ()

    def question(self, length: int) -> int:
        """The shortest allowed length, or the length itself where it is longer than all."""
        return next((allowed for allowed in self.questions if allowed >= length), length)

    def body(self, length: int) -> int:
        """The same for the body segment."""
        return next((allowed for allowed in self.bodies if allowed >= length), length)


def choose_shapes(
    questions: Sequence[int],
    answer: int,
    num_contexts: int,
    batch_size: int,
    bodies: Sequence[int] = (),
) -> Shapes:
    """Shapes for a data set.

    Args:
      questions: length of every question segment.
      answer: length of the longest answer segment.
      num_contexts: how many unlike contexts the questions are about.
      batch_size: rows a chunk, at most.
      bodies: length of every body segment, where these differ.
    """
    a_context = len(questions) / num_contexts
    rows = min(batch_size, len(questions))
    classes = LENGTH_CLASSES if a_context < 2 else 1
    contexts = min(rows, max(1, round(rows / a_context)))
    of_bodies = length_classes(bodies, LENGTH_CLASSES) if len(bodies) else ()
    return Shapes(length_classes(questions, classes), answer, contexts, rows, of_bodies)


def length_classes(lengths: Sequence[int], classes: int) -> tuple[int, ...]:
    """The lengths (at most ``classes``) that waste least padding; fewer where one more saves under 5%."""
    unlike, counts = np.unique(np.asarray(lengths), return_counts=True)
    upto = np.concatenate([[0], np.cumsum(counts)])

    @functools.cache
    def least(kinds: int, classes: int) -> tuple[int, tuple[int, ...]]:
        """Least padded length of the ``kinds`` shortest kinds in so many classes, and the classes that reach it."""
        longest = int(unlike[kinds - 1])
        if classes == 1:
            return longest * int(upto[kinds]), (longest,)
        options = [
            (longest * int(upto[kinds] - upto[cut]), least(cut, classes - 1)) for cut in range(classes - 1, kinds)
        ]
        return min((own + padded, (*chosen, longest)) for own, (padded, chosen) in options)

    best = least(len(unlike), 1)
    for number in range(2, min(classes, len(unlike)) + 1):
        finer = least(len(unlike), number)
        if finer[0] > 0.95 * best[0]:
            break
        best = finer
    return best[1]
