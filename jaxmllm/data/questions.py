"""Question files in LLaVA's JSONL form, one question a line, with an ``answer`` field added.

    {"question_id": 7, "image": "0003.png", "text": "what colour is the ring ?", "category": "colour", "answer": "red",
     "boxes": [[10, 20, 30, 40]], "objects": [[10, 20, 30, 40], [50, 9, 70, 30]]}

``question_id`` and ``category`` may be left out; ``boxes`` (evidence) and ``objects`` (all that is in the scene), both
in pixels of the image, are read where they are given.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxmllm.data.fields import Box, RecordError, boxes_field, mapping, text_field
from jaxmllm.data.records import Place, json_lines, open_binary
from jaxmllm.errors import InputError
from jaxmllm.processing.images import StoredImage


@dataclasses.dataclass(frozen=True)
class Question:
    """One question about one image.

    Attributes:
      boxes: pixel boxes of the evidence; ``None`` where the file does not say, empty where there is none to see.
      objects: pixel boxes of all objects of the scene; ``None`` where the file does not say.
    """

    question_id: str
    image: Path | StoredImage
    text: str
    category: str
    answer: str
    boxes: tuple[Box, ...] | None
    objects: tuple[Box, ...] | None


def read_questions(path: str | Path, image_folder: str | Path) -> list[Question]:
    """Reads a question file.

    Args:
      path: the JSONL file.
      image_folder: where the images it names are.

    Raises:
      InputError: naming the line, for malformed JSON, a missing or empty field, a doubled id, a missing image; or for
        a file without questions.
    """
    path, image_folder = Path(path), Path(image_folder)
    if not path.exists():
        raise InputError(f"{path}: no such question file")
    records = json_lines(path)
    if not image_folder.is_dir():
        raise InputError(f"{image_folder}: no such image folder")

    def find_image(where: str, name: str) -> Path:
        image = image_folder / name
        if not image.is_file():
            raise RecordError(where, f"no image {image}")
        return image

    questions: list[Question] = []
    first_line: dict[str, int] = {}
    with open_binary(path) as file:
        for number in range(len(records)):
            place = records.place(number)
            record = records.read(file, number)
            asked = question_parts(record, place, find_image)
            question = Question(**asked, answer=text_field(record, "answer", place.where).strip())
            if question.question_id in first_line:
                raise RecordError(
                    place.where,
                    f"question_id {question.question_id} is already on line {first_line[question.question_id]}",
                )
            first_line[question.question_id] = place.line
            questions.append(question)
    if not questions:
        raise InputError(f"{path}: holds no questions")
    return questions


def question_parts(record: Any, place: Place, find_image: Callable[[str, str], Path]) -> dict[str, Any]:
    """All that a line says of a question, its answer aside, by the names of ``Question``.

    Args:
      find_image: where the record stands, name of its image -> the image; raises ``RecordError``.

    Raises:
      RecordError: not a JSON object, a missing or empty field, boxes that are none, a missing image.
    """
    fields = mapping(record, place.where)
    name, text = (text_field(fields, field, place.where) for field in ("image", "text"))
    return {
        "question_id": str(place.line if fields.get("question_id") is None else fields["question_id"]),
        "image": find_image(place.where, name),
        "text": text,
        "category": str("all" if fields.get("category") is None else fields["category"]),
        "boxes": boxes_field(fields, "boxes", place.where),
        "objects": boxes_field(fields, "objects", place.where),
    }
