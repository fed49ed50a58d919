"""MMBench: which option a reply means, and accuracy over the rotations of a question's options."""

from __future__ import annotations

import dataclasses
import operator
import re
import string
from collections.abc import Iterable, Mapping
from typing import Any

from jaxmllm.errors import InputError

ROTATION_STEP = 1_000_000
REFUSED = "Z"

_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_FAILURE = "Failed to obtain answer via API"
_SPACES_FOR_MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
# Without a word's end after the letter, as in the original: "the answer is black" reads as B.
_ANSWER_IS = re.compile(r"answer\s+is\s+\**([ABCD])", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class CircularAccuracy:
    """Accuracies on MMBench, each a share from 0 to 1.

    Attributes:
      circular: share of the base questions of which every rotation in the rows is right.
      vanilla: share of the base questions that are right as they stand, each asked once.
      vanilla_all: share of all rows that are right, rotations included.
    """

    circular: float
    vanilla: float
    vanilla_all: float


def mmbench_option(prediction: str, choices: Mapping[str, str]) -> str | None:
    """Finds the option that a reply means, by rules only.

    Source: ``can_infer`` of ``vlmeval/utils/matching_util.py`` (open-compass/VLMEvalKit), as of June 2026. In order:
      1. a reply with one of four refusals in it is "Z";
      2. with ``.()[],:;!*#{}`` as spaces, exactly one of the letters is among the words, and nowhere before the last
         four words: that letter. None of the letters is, but "Z": "Z";
      3. "answer is X", in any case, with X from A to D one of the letters: X;
      4. exactly one option's text is in the reply, both lowered, unless the reply is longer than twice all the options'
         texts together: its letter.

    Warts, all of the original: step 2 wants capitals, but takes the article in "A dog" for option A; step 3 does not
    ask for the end of a word ("the answer is dark" is D) and looks no further than its first match; an empty option is
    in every reply; a report of a failed call skips steps 1 to 3 but not 4.

    Args:
      prediction: the model's reply.
      choices: the options' texts by their letters.

    Returns:
      One of the letters, "Z" for a refusal, or ``None`` where no rule decides (the original's ``False``; without a
      language model as judge it counts as wrong, as "Z" does).

    Raises:
      InputError: for a key of ``choices`` that is not one capital letter.
    """
    for letter in choices:
        if len(letter) != 1 or letter not in string.ascii_uppercase:
            raise InputError(f"options must go by one capital letter each, A to Z, got {letter!r}")
    return _option_by_letter(prediction, choices) or _option_by_text(prediction, choices)


def _option_by_letter(prediction: str, choices: Mapping[str, str]) -> str | None:
    if _FAILURE in prediction:
        return None
    if any(refusal in prediction for refusal in _REFUSALS):
        return REFUSED
    words = prediction.translate(_SPACES_FOR_MARKS).split()
    found = [letter for letter in choices if letter in words]
    if len(found) == 1 and words.index(found[0]) > len(words) - 5:
        return found[0]
    if not found and REFUSED in words:
        return REFUSED
    named = _ANSWER_IS.search(prediction)
    return named[1].upper() if named and named[1].upper() in choices else None


def _option_by_text(prediction: str, choices: Mapping[str, str]) -> str | None:
    prediction = prediction.lower()
    if len(prediction) > 2 * sum(map(len, choices.values())):
        return None
    found = [letter for letter, text in choices.items() if text.lower() in prediction]
    return found[0] if len(found) == 1 else None


def mmbench_circular(rows: Iterable[Mapping[str, Any]]) -> float:
    """Circular accuracy, MMBench's own score: the share of base questions of which every rotation is right.

    Args:
      rows: as of :func:`mmbench_accuracies`.

    Raises:
      InputError: as :func:`mmbench_accuracies`.
    """
    return mmbench_accuracies(rows).circular


def mmbench_accuracies(rows: Iterable[Mapping[str, Any]]) -> CircularAccuracy:
    """Accuracies on questions that are asked again with their options rotated.

    A row's base question is ``index % 1_000_000``; the row whose index that is asks it as it stands.

    Source: ``mcq_circular_eval`` of ``vlmeval/dataset/utils/multiple_choice.py`` and ``vanilla_0`` and ``vanilla_all``
    of ``vlmeval/dataset/image_mcq.py`` (open-compass/VLMEvalKit). Wart: rotations whose base question is not among the
    rows count in ``vanilla_all`` only.

    Args:
      rows: one a question asked, each with ``index`` (an integer) and ``correct`` (true or false, or 1 or 0).

    Raises:
      InputError: for a row without an index or a flag of that kind, an index that comes twice, or no base question.
    """
    correct: dict[int, bool] = {}
    for row in rows:
        index, flag = _read_row(row)
        if index in correct:
            raise InputError(f"index {index} comes twice; expected one row a rotation")
        correct[index] = flag
    base = {index: flag for index, flag in correct.items() if index < ROTATION_STEP}
    if not base:
        raise InputError(f"expected rows of base questions (index below {ROTATION_STEP}), got none")
    failed = {index % ROTATION_STEP for index, flag in correct.items() if not flag}
    return CircularAccuracy(
        circular=sum(index not in failed for index in base) / len(base),
        vanilla=sum(base.values()) / len(base),
        vanilla_all=sum(correct.values()) / len(correct),
    )


def _read_row(row: Mapping[str, Any]) -> tuple[int, bool]:
    try:
        index, flag = operator.index(row["index"]), row["correct"]
    except (KeyError, TypeError):
        index, flag = -1, None
    if index < 0 or flag not in (True, False):
        raise InputError(f"a row needs 'index', an integer from 0, and 'correct', true or false; got {dict(row)!r}")
    return index, bool(flag)
