"""What every benchmark is made of: examples from official files, a score, metrics over a run's rows, a submission."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, SupportsIndex

import numpy as np

from jaxmllm.data.fields import Box, RecordError
from jaxmllm.data.records import Place, Records, open_binary
from jaxmllm.errors import InputError
from jaxmllm.processing.images import ImageLike

# One line of a run's results file: index, question_id, where, question, prompt, prediction, parsed, score, answers,
# reference, categories, image, log_probability, tokens, stopped. All of it is JSON.
Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Example:
    """One question of a benchmark, as its file has it.

    Attributes:
      question_id: the file's own id as text, unique within the source; POPE's has its subset before it.
      where: file and line, for messages.
      image: a path, or an image stored in the benchmark's file; not opened yet.
      text: the question.
      answers: references in the form that the metric takes; ``None`` where the split has none.
      categories: the benchmark's own breakdowns, each with this question's category.
      fields: what prompt templates may use besides the question: ``hint``, ``options``, ``ocr``.
      options: texts by their letters, for multiple choice; else empty.
      boxes: pixel boxes of the evidence; ``None`` where the file does not say.
      objects: pixel boxes of all objects; ``None`` where the file does not say.
    """

    question_id: str
    where: str
    image: ImageLike
    text: str
    answers: tuple[Any, ...] | None
    categories: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    boxes: tuple[Box, ...] | None = None
    objects: tuple[Box, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A record that was left out, and why."""

    where: str
    problem: str


@dataclasses.dataclass(frozen=True)
class Unit:
    """One independent item of the headline score, whose mean over items is the score.

    Attributes:
      key: the question_id of the row that stands for it, whose categories are the item's.
      cluster: its image; items of one image are drawn together by a bootstrap.
      value: from 0 to 1.
    """

    key: str
    cluster: str
    value: float


@dataclasses.dataclass(frozen=True)
class Submission:
    """A file in the form that the benchmark's test server, or its evaluator, takes."""

    filename: str
    text: str


@dataclasses.dataclass(frozen=True)
class Part:
    """One file of records, and what turns a record of it into an example.

    Attributes:
      parse: record, where it stands -> example; raises ``RecordError``. It can be pickled.
    """

    records: Records
    parse: Callable[[Any, Place], Example]


@dataclasses.dataclass(frozen=True)
class Source:
    """Random access to the examples of a benchmark: each is read again from its file when it is asked for.

    Attributes:
      parts: the files, in order.
      places: number of the part and of the record in it, for every example.
      skipped: bad records that were left out, in the order they were found.
    """

    parts: tuple[Part, ...]
    places: np.ndarray
    skipped: tuple[Skipped, ...] = ()

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: SupportsIndex) -> Example:
        number_of_part, number = (int(value) for value in self.places[index])
        part = self.parts[number_of_part]
        return part.parse(part.records[number], part.records.place(number))


def open_source(
    parts: Sequence[Part], *, limit: int | None = None, skip_bad: bool = False, problems: Sequence[Skipped] = ()
) -> Source:
    """Checks every record once and makes a source of the good ones.

    Args:
      parts: the files, in order.
      limit: stop after so many examples.
      skip_bad: leave bad records out and list them, in place of raising an error at the first.
      problems: bad records of files beside these; they are told of last.

    Raises:
      RecordError: the first bad record, unless they are skipped.
      InputError: a limit below 1, or no (good) record at all.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; expected at least 1 question, or none given to take all")
    skipped: list[Skipped] = []
    places: dict[str, tuple[int, int]] = {}
    for number_of_part, part in enumerate(parts):
        with open_binary(part.records.path) as file:
            for number in range(len(part.records)):
                if len(places) == limit:
                    break
                place = part.records.place(number)
                try:
                    example = part.parse(part.records.read(file, number), place)
                    if example.question_id in places:
                        raise RecordError(place.where, _doubled(example.question_id, parts, places))
                except RecordError as problem:
                    if not skip_bad:
                        raise
                    skipped.append(Skipped(problem.where, problem.problem))
                else:
                    places[example.question_id] = number_of_part, number
    if problems and not skip_bad:
        raise RecordError(problems[0].where, problems[0].problem)
    skipped += problems
    if not places:
        files = ", ".join(str(part.records.path) for part in parts)
        raise InputError(f"{files}: no question could be read; {_reason(skipped)}")
    return Source(tuple(parts), np.asarray(list(places.values()), np.int64), tuple(skipped))


def _doubled(question_id: str, parts: Sequence[Part], places: Mapping[str, tuple[int, int]]) -> str:
    part, number = places[question_id]
    return f"question_id {question_id} is there twice, first at {parts[part].records.place(number).where}"


def _reason(skipped: Sequence[Skipped]) -> str:
    if not skipped:
        return "there is no record in it"
    return f"all {len(skipped)} records are bad, the first at {skipped[0].where}: {skipped[0].problem}"


def one_unit_a_row(rows: Sequence[Row]) -> list[Unit]:
    """Every scored row is an item of its own."""
    return [Unit(row["question_id"], row["image"], float(row["score"])) for row in rows if row["score"] is not None]


def mean_score(rows: Sequence[Row], name: str = "accuracy") -> dict[str, float]:
    """The mean score of the scored rows under a name; nothing where no row is scored."""
    scores = [row["score"] for row in rows if row["score"] is not None]
    return {name: sum(scores) / len(scores)} if scores else {}


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A benchmark: its reader, its metric and its forms.

    Attributes:
      name: as the command line has it.
      open: ``open(data, *, split=None, limit=None, skip_bad=False) -> Source``, with ``data`` a folder.
      score: prediction, example -> 0 to 1; ``None`` where there is nothing to compare with.
      parse: prediction, example -> what the metric reads the prediction as, for display.
      reference: one reference answer, for teacher forcing; ``None`` where there is none.
      units: the independent items of the headline score.
      metrics: all metrics by name, 0 to 1; the first is the headline. Empty where nothing could be scored.
      max_new_tokens: tokens an answer may have.
      submission: the official form, where there is one.
    """

    name: str
    open: Callable[..., Source]
    score: Callable[[str, Example], float | None]
    parse: Callable[[str, Example], str]
    reference: Callable[[Example], str | None]
    units: Callable[[Sequence[Row]], list[Unit]] = one_unit_a_row
    metrics: Callable[[Sequence[Row]], dict[str, float]] = mean_score
    max_new_tokens: int = 16
    submission: Callable[[Sequence[Row]], Submission] | None = None


def judged_row(benchmark: Benchmark, index: int, example: Example, prompt: str, prediction: str) -> dict[str, Any]:
    """A row of results, as far as it follows from the question and the answer.

    Args:
      benchmark: what scores it.
      index: of the example in its source.
      example: the question.
      prompt: what was asked.
      prediction: what was answered.
    """
    return {
        "index": index,
        "question_id": example.question_id,
        "where": example.where,
        "question": example.text,
        "prompt": prompt,
        "prediction": prediction,
        "parsed": benchmark.parse(prediction, example),
        "score": benchmark.score(prediction, example),
        "answers": None if example.answers is None else list(example.answers),
        "reference": benchmark.reference(example),
        "categories": dict(example.categories),
        "image": str(example.image),
    }
