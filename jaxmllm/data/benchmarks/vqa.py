"""Files in the form of VQA: a list of questions, and a list of annotations with ten answers each; of COCO's images."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxmllm.data.benchmarks.base import Example, Part, Skipped, Source, open_source
from jaxmllm.data.benchmarks.files import ImageFolders, check_folder, choose_file, missing, only_file
from jaxmllm.data.benchmarks.matching import NONE, left_over, match
from jaxmllm.data.fields import (
    RecordError,
    check_count,
    mapping,
    shortened,
    text_field,
    whole_number_field,
)
from jaxmllm.data.json_records import json_list
from jaxmllm.data.records import Place, Records
from jaxmllm.errors import InputError

ANSWERS = 10


@dataclasses.dataclass(frozen=True)
class VqaForm:
    """What VQAv2 and OKVQA do not share.

    Attributes:
      prefix: what the names of question files begin with, before ``mscoco_``.
      annotations_prefix: likewise of annotation files.
      answers: the ten official dicts -> answers as the metric takes them.
      categories: annotation, header of its file -> breakdown -> category.
    """

    prefix: str
    annotations_prefix: str
    answers: Callable[[list[dict[str, Any]]], tuple[Any, ...]]
    categories: Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, str]]


def open_vqa(form: VqaForm, data: Path | None, split: str | None, limit: int | None, skip_bad: bool) -> Source:
    """Opens question and annotation files of VQA's form.

    Raises:
      InputError: files are missing, or not of the form.
    """
    folder = check_folder(data)
    path, split = choose_file(
        folder,
        rf"{form.prefix}OpenEnded_mscoco_(?P<split>\w[\w-]*)_questions\.json",
        f"{form.prefix}OpenEnded_mscoco_SPLIT_questions.json",
        split,
        ("val2014",),
    )
    questions = json_list(path, "questions")
    annotations = _annotations(form, folder, split)
    numbers, problems = None, list[Skipped]()
    if annotations is not None:
        numbers, problems = match(questions, annotations, _id_of, _id_of)
        if limit is None:
            what = f"annotation of a question that is not in {path}"
            problems += left_over(annotations, numbers, what, problems)
    subtype = "test2015" if split.startswith("test") else split
    images = ImageFolders(folder, (subtype, f"images/{subtype}", f"coco/{subtype}", "images"))
    parser = VqaParser(form, images, f"COCO_{subtype}_", annotations, numbers)
    return open_source([Part(questions, parser)], limit=limit, skip_bad=skip_bad, problems=problems)


def _annotations(form: VqaForm, folder: Path, split: str) -> Records | None:
    name = f"{form.annotations_prefix}mscoco_{split}_annotations.json"
    found = only_file(folder, name.replace(".", r"\."))
    if found is not None:
        return json_list(found, "annotations")
    if split.startswith("test"):
        return None
    raise InputError(missing(folder, f"{name} (the answers of split {split!r})"))


def _id_of(record: Any, where: str) -> int:
    return whole_number_field(mapping(record, where), "question_id", where)


@dataclasses.dataclass(frozen=True, eq=False)
class VqaParser:
    """Makes an example of a question and its annotation.

    Attributes:
      image_prefix: what names of images begin with, before the id in twelve digits.
      annotations: ``None`` where the split has none.
      numbers: the annotation's number for every question.
    """

    form: VqaForm
    images: ImageFolders
    image_prefix: str
    annotations: Records | None
    numbers: np.ndarray | None

    def __call__(self, record: Any, place: Place) -> Example:
        question = mapping(record, place.where)
        question_id = _id_of(question, place.where)
        text = text_field(question, "question", place.where)
        image_id = whole_number_field(question, "image_id", place.where)
        answers, categories = None, dict[str, str]()
        if self.annotations is not None and self.numbers is not None:
            number = int(self.numbers[place.number])
            if number == NONE:
                raise RecordError(
                    place.where, f"question_id {question_id} has no annotation in {self.annotations.path}"
                )
            where = self.annotations.place(number).where
            annotation = mapping(self.annotations[number], where)
            if annotation.get("image_id", image_id) != image_id:
                raise RecordError(where, f"image_id {annotation['image_id']!r}; its question has {image_id}")
            answers = self.form.answers(ten_answers(annotation, where))
            categories = self.form.categories(annotation, self.annotations.header)
        return Example(
            question_id=str(question_id),
            where=place.where,
            image=self.images.find(place.where, f"{self.image_prefix}{image_id:012d}.jpg"),
            text=text,
            answers=answers,
            categories=categories,
        )


def ten_answers(record: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """The official list of ten dicts, each with a text under ``answer``.

    Raises:
      RecordError: it is anything else.
    """
    answers = record.get("answers")
    if not isinstance(answers, list):
        raise RecordError(where, f"field 'answers' is {shortened(answers)}; expected a list of {ANSWERS} answers")
    check_count(answers, "answers", where, ANSWERS)
    for number, answer in enumerate(answers):
        if not isinstance(answer, dict) or not isinstance(answer.get("answer"), str):
            raise RecordError(
                where, f"answers[{number}] is {shortened(answer)}; expected an object with a text under 'answer'"
            )
    return answers


def named_categories(record: Mapping[str, Any], *names: str) -> dict[str, str]:
    """Those of the fields that a record has, as text."""
    return {name: str(record[name]) for name in names if record.get(name) is not None}
