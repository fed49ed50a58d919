"""A benchmark as the questions of a masking study: what is asked, and how generated answers are judged."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxmllm.analysis.generated import Judge
from jaxmllm.data.benchmarks.base import Benchmark, Example, Row, Skipped, Source, judged_row
from jaxmllm.data.prompts import fill_prompt
from jaxmllm.data.questions import Question
from jaxmllm.errors import InputError, ProcessorError
from jaxmllm.processing import StoredImage, open_image

# A study shows kinds of questions side by side: of a benchmark's breakdowns the first that has no more than so many.
MOST_KINDS = 12


@dataclasses.dataclass(frozen=True)
class Asked:
    """A benchmark's questions, ready for a study.

    Attributes:
      questions: with the filled prompt as text, and one reference answer each.
      judge: of what is generated.
      skipped: what was left out: questions without a reference, and pictures that cannot be opened.
    """

    questions: list[Question]
    judge: Judge
    skipped: tuple[Skipped, ...]


def questions_of(
    benchmark: Benchmark, source: Source, template: str, image_token: str, max_new_tokens: int, skip_bad: bool = False
) -> Asked:
    """Makes a study's questions of a benchmark.

    Args:
      benchmark: whose score and reference answers are used.
      source: its examples.
      template: of the prompts.
      image_token: of the model's processor.
      max_new_tokens: tokens an answer may have.
      skip_bad: open every picture now, and leave out those that are broken.

    Raises:
      InputError: no question has a reference answer.
    """
    examples, skipped = [], list(source.skipped)
    for place in range(len(source)):
        example = source[place]
        problem = _problem(benchmark, example, skip_bad)
        if problem is None:
            examples.append(example)
        else:
            skipped.append(Skipped(example.where, problem))
    if not examples:
        raise InputError(
            f"{benchmark.name}: no question of this split has a reference answer, which a sweep needs; name another "
            "with --split"
        )
    prompts = [fill_prompt(template, example, image_token) for example in examples]
    kinds = breakdown_of(examples)
    questions = [
        Question(
            question_id=example.question_id,
            image=_image(example),
            text=prompt,
            category=example.categories.get(kinds, "other") if kinds else "all",
            answer=benchmark.reference(example) or "",
            boxes=example.boxes,
            objects=example.objects,
        )
        for example, prompt in zip(examples, prompts, strict=True)
    ]

    def rows(predictions: Sequence[str]) -> list[Row]:
        asked = enumerate(zip(examples, prompts, predictions, strict=True))
        return [judged_row(benchmark, index, *one) for index, one in asked]

    metric = next(iter(benchmark.metrics(rows([question.answer for question in questions]))), "accuracy")
    return Asked(questions, Judge(max_new_tokens, rows, benchmark.units, metric), tuple(skipped))


def _problem(benchmark: Benchmark, example: Example, open_pictures: bool) -> str | None:
    if benchmark.reference(example) is None:
        return "it has no reference answer"
    try:
        if open_pictures:
            open_image(example.image)
    except ProcessorError as error:
        return str(error)
    return None


def _image(example: Example) -> Path | StoredImage:
    assert isinstance(example.image, (Path, StoredImage)), "benchmarks give paths and stored images"
    return example.image


def breakdown_of(examples: Sequence[Example]) -> str | None:
    """The first of the benchmark's breakdowns that has several kinds, yet few enough to be shown side by side."""
    names: dict[str, Any] = dict.fromkeys(name for example in examples for name in example.categories)
    for name in names:
        kinds = {example.categories.get(name) for example in examples}
        if 1 < len(kinds) <= MOST_KINDS:
            return name
    return None
