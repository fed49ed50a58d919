"""DocVQA: ``val_v1.0_withQT.json`` or ``val_v1.0.json``, and the images of pages in ``documents``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

from jaxmllm.data.benchmarks.answers import first_answer, scored_by, submit
from jaxmllm.data.benchmarks.base import Benchmark, Example, Part, Row, Source, mean_score, open_source
from jaxmllm.data.benchmarks.files import ImageFolders, check_folder, choose_file
from jaxmllm.data.fields import mapping, text_field, texts_field, whole_number_field
from jaxmllm.data.json_records import json_list
from jaxmllm.data.metrics import anls
from jaxmllm.data.records import Place


def open_docvqa(
    data: Path | None, *, split: str | None = None, limit: int | None = None, skip_bad: bool = False
) -> Source:
    """Opens DocVQA: ``val`` where it is there, else ``test``.

    Raises:
      InputError: files are missing, or not of the official form.
    """
    folder = check_folder(data)
    path, split = choose_file(
        folder, r"(?P<split>train|val|test)_v1\.0\w*\.json", "SPLIT_v1.0*.json", split, ("val", "test")
    )
    images = ImageFolders(folder, (split, "spdocvqa_images", "images", "documents", f"{split}/documents"))
    return open_source([Part(json_list(path, "data"), DocVqaParser(images))], limit=limit, skip_bad=skip_bad)


@dataclasses.dataclass(frozen=True)
class DocVqaParser:
    """Makes an example of a question."""

    images: ImageFolders

    def __call__(self, record: Any, place: Place) -> Example:
        question = mapping(record, place.where)
        question_id = whole_number_field(question, "questionId", place.where)
        image, text = text_field(question, "image", place.where), text_field(question, "question", place.where)
        answered, types = question.get("answers") is not None, question.get("question_types")
        return Example(
            question_id=str(question_id),
            where=place.where,
            # The file says documents/PAGE.png; later archives of the images have no such folder.
            image=self.images.find(place.where, image, PurePath(image).name),
            text=text,
            answers=texts_field(question, "answers", place.where) if answered else None,
            categories={"question_types": ", ".join(map(str, types))} if isinstance(types, list) and types else {},
        )


def _metrics(rows: Sequence[Row]) -> dict[str, float]:
    return mean_score(rows, "anls")


DOCVQA = Benchmark(
    name="docvqa",
    open=open_docvqa,
    score=scored_by(anls),
    parse=lambda prediction, example: " ".join(prediction.lower().split()),
    reference=first_answer,
    metrics=_metrics,
    max_new_tokens=32,
    submission=lambda rows: submit("docvqa_submission.json", rows, "questionId", int, "answer"),
)
