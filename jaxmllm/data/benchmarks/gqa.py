"""GQA: ``testdev_balanced_questions.json`` and its images ``IMAGEID.jpg``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxmllm.data.benchmarks.answers import first_answer, submit
from jaxmllm.data.benchmarks.base import Benchmark, Example, Part, Row, Source, mean_score, open_source
from jaxmllm.data.benchmarks.files import ImageFolders, check_folder, choose_file
from jaxmllm.data.fields import RecordError, mapping, shortened, text_field
from jaxmllm.data.json_records import json_members
from jaxmllm.data.metrics import gqa_match
from jaxmllm.data.records import Place

TYPES = ("structural", "semantic", "detailed")


def open_gqa(
    data: Path | None, *, split: str | None = None, limit: int | None = None, skip_bad: bool = False
) -> Source:
    """Opens GQA: ``testdev_balanced`` where it is there, else ``val_balanced``, else the only balanced split.

    Raises:
      InputError: files are missing, or not of the official form.
    """
    folder = check_folder(data)
    # GQA's eval.py counts balanced questions only.
    path, _ = choose_file(
        folder,
        r"(?P<split>\w+_balanced)_questions\.json",
        "SPLIT_balanced_questions.json",
        split,
        ("testdev_balanced", "val_balanced"),
    )
    parser = GqaParser(ImageFolders(folder, ("images",)))
    return open_source([Part(json_members(path), parser)], limit=limit, skip_bad=skip_bad)


@dataclasses.dataclass(frozen=True)
class GqaParser:
    """Makes an example of a question."""

    images: ImageFolders

    def __call__(self, record: tuple[str, Any], place: Place) -> Example:
        question_id, value = record
        if not question_id.strip():
            raise RecordError(place.where, "its key is empty; expected the question's id")
        question = mapping(value, place.where)
        text, image = text_field(question, "question", place.where), text_field(question, "imageId", place.where)
        answered = question.get("answer") is not None
        return Example(
            question_id=question_id,
            where=place.where,
            image=self.images.find(place.where, f"{image}.jpg"),
            text=text,
            answers=(text_field(question, "answer", place.where),) if answered else None,
            categories=_categories(question.get("types"), place.where),
        )


def _categories(types: Any, where: str) -> dict[str, str]:
    """The official types, and whether the question is binary or open.

    Source: GQA's ``eval.py``: what is not of the structural type "query" is binary.
    """
    if types is None:
        return {}
    if not isinstance(types, dict):
        raise RecordError(where, f"field 'types' is {shortened(types)}; expected an object with {', '.join(TYPES)}")
    categories = {name: str(types[name]) for name in TYPES if types.get(name) is not None}
    if "structural" in categories:
        categories["kind"] = "open" if categories["structural"] == "query" else "binary"
    return categories


def _metrics(rows: Sequence[Row]) -> dict[str, float]:
    metrics = mean_score(rows)
    for kind in ("binary", "open"):
        metrics |= mean_score([row for row in rows if row["categories"].get("kind") == kind], kind)
    return metrics


GQA = Benchmark(
    name="gqa",
    open=open_gqa,
    score=lambda prediction, example: gqa_match(prediction, example.answers[0]) if example.answers else None,
    parse=lambda prediction, example: prediction.rstrip(".").lower(),
    reference=first_answer,
    metrics=_metrics,
    submission=lambda rows: submit("gqa_predictions.json", rows, "questionId", str, "prediction"),
)
