"""POPE: ``coco_pope_random.json``, ``..._popular.json`` and ``..._adversarial.json``, JSONL all, and COCO's val2014."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxmllm.data.benchmarks.answers import first_answer
from jaxmllm.data.benchmarks.base import Benchmark, Example, Part, Row, Source, open_source
from jaxmllm.data.benchmarks.files import ImageFolders, check_folder, missing, only_file
from jaxmllm.data.fields import RecordError, mapping, shortened, text_field, whole_number_field
from jaxmllm.data.metrics import pope_label, pope_scores
from jaxmllm.data.records import Place, json_lines
from jaxmllm.errors import InputError

SUBSETS = ("random", "popular", "adversarial")


def open_pope(
    data: Path | None, *, split: str | None = None, limit: int | None = None, skip_bad: bool = False
) -> Source:
    """Opens POPE: one of its subsets, or all that are there, one after another.

    Raises:
      InputError: files are missing, or not of the official form; or no subset is called so.
    """
    folder = check_folder(data)
    if split is not None and split not in SUBSETS:
        raise InputError(f"split is {split!r}; POPE has {', '.join(SUBSETS)}")
    images = ImageFolders(folder, ("val2014", "images/val2014", "coco/val2014", "images"))
    parts = []
    for subset in SUBSETS if split is None else (split,):
        path = only_file(folder, rf"(?:coco_pope_|pope_)?{subset}\.jsonl?")
        if path is not None:
            parts.append(Part(json_lines(path), PopeParser(images, subset)))
    if not parts:
        raise InputError(missing(folder, f"coco_pope_{split or 'SUBSET'}.json or .jsonl"))
    return open_source(parts, limit=limit, skip_bad=skip_bad)


@dataclasses.dataclass(frozen=True)
class PopeParser:
    """Makes an example of a question; its id has the subset before it, for each subset counts from 1."""

    images: ImageFolders
    subset: str

    def __call__(self, record: Any, place: Place) -> Example:
        question = mapping(record, place.where)
        question_id = whole_number_field(question, "question_id", place.where)
        image, text = text_field(question, "image", place.where), text_field(question, "text", place.where)
        label = question.get("label")
        if label not in ("yes", "no", None):
            raise RecordError(place.where, f"field 'label' is {shortened(label)}; expected 'yes' or 'no'")
        return Example(
            question_id=f"{self.subset}/{question_id}",
            where=place.where,
            image=self.images.find(place.where, image),
            text=text,
            answers=None if label is None else (label,),
            categories={"subset": self.subset},
        )


def _score(prediction: str, example: Example) -> float | None:
    return float(pope_label(prediction) == example.answers[0]) if example.answers else None


def _metrics(rows: Sequence[Row]) -> dict[str, float]:
    """POPE's scores over all subsets, then of each."""
    scored = [row for row in rows if row["answers"]]
    if not scored:
        return {}
    metrics = _scores(scored)
    subsets = [subset for subset in SUBSETS if any(row["categories"]["subset"] == subset for row in scored)]
    for subset in subsets:
        of_subset = _scores([row for row in scored if row["categories"]["subset"] == subset])
        metrics |= {f"{subset}/{name}": value for name, value in of_subset.items()}
    return metrics


def _scores(rows: Sequence[Row]) -> dict[str, float]:
    scores = pope_scores([row["answers"][0] for row in rows], [row["prediction"] for row in rows])
    return dataclasses.asdict(scores)


POPE = Benchmark(
    name="pope",
    open=open_pope,
    score=_score,
    parse=lambda prediction, example: pope_label(prediction),
    reference=first_answer,
    metrics=_metrics,
    max_new_tokens=32,
)
