"""VizWiz-VQA: ``val.json`` or ``test.json``, and the images of the split in a folder of its name."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

from jaxmllm.data.benchmarks.answers import scored_by, vqa_reference
from jaxmllm.data.benchmarks.base import Benchmark, Example, Part, Row, Source, Submission, open_source
from jaxmllm.data.benchmarks.files import ImageFolders, check_folder, choose_file
from jaxmllm.data.benchmarks.vqa import named_categories, ten_answers
from jaxmllm.data.fields import mapping, text_field
from jaxmllm.data.json_records import json_list
from jaxmllm.data.metrics import evalai_normalise, vizwiz_accuracy
from jaxmllm.data.records import Place


def open_vizwiz(
    data: Path | None, *, split: str | None = None, limit: int | None = None, skip_bad: bool = False
) -> Source:
    """Opens VizWiz: ``val`` where it is there, else ``test``.

    Raises:
      InputError: files are missing, or not of the official form.
    """
    folder = check_folder(data)
    path, split = choose_file(folder, r"(?P<split>train|val|test)\.json", "SPLIT.json", split, ("val", "test"))
    parser = VizWizParser(ImageFolders(folder, (split, f"images/{split}", "images")))
    return open_source([Part(json_list(path), parser)], limit=limit, skip_bad=skip_bad)


@dataclasses.dataclass(frozen=True)
class VizWizParser:
    """Makes an example of a question; its id is its image's name, for there is one question an image."""

    images: ImageFolders

    def __call__(self, record: Any, place: Place) -> Example:
        question = mapping(record, place.where)
        image, text = text_field(question, "image", place.where), text_field(question, "question", place.where)
        answered = question.get("answers") is not None
        return Example(
            question_id=image,
            where=place.where,
            image=self.images.find(place.where, image),
            text=text,
            answers=tuple(answer["answer"] for answer in ten_answers(question, place.where)) if answered else None,
            categories=named_categories(question, "answer_type", "answerable"),
        )


def _submission(rows: Sequence[Row]) -> Submission:
    entries = [{"image": PurePath(row["question_id"]).name, "answer": row["prediction"]} for row in rows]
    return Submission("vizwiz_submission.json", json.dumps(entries, ensure_ascii=False))


VIZWIZ = Benchmark(
    name="vizwiz",
    open=open_vizwiz,
    score=scored_by(vizwiz_accuracy),
    parse=lambda prediction, example: evalai_normalise(prediction),
    reference=vqa_reference,
    submission=_submission,
)
