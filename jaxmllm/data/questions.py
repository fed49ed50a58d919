"""Question files in LLaVA's JSONL form, one question a line, with an ``answer`` field added.

    {"question_id": 7, "image": "0003.png", "text": "what colour is the ring ?", "category": "colour", "answer": "red",
     "boxes": [[10, 20, 30, 40]], "objects": [[10, 20, 30, 40], [50, 9, 70, 30]]}

``question_id`` and ``category`` may be left out; ``boxes`` (evidence) and ``objects`` (all that is in the scene), both
in pixels of the image, are read where they are given.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from jaxmllm.errors import InputError

Box = tuple[float, float, float, float]


@dataclasses.dataclass(frozen=True)
class Question:
    """One question about one image.

    Attributes:
      boxes: pixel boxes of the evidence; ``None`` where the file does not say, empty where there is none to see.
      objects: pixel boxes of all objects of the scene; ``None`` where the file does not say.
    """

    question_id: str
    image: Path
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
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise InputError(f"{path}: no such question file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text ({error})") from error
    if not image_folder.is_dir():
        raise InputError(f"{image_folder}: no such image folder")
    questions: list[Question] = []
    first_line: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        question = _parse(line, f"{path}, line {number}", number, image_folder)
        if question.question_id in first_line:
            raise InputError(
                f"{path}, line {number}: question_id {question.question_id} is already on line "
                f"{first_line[question.question_id]}"
            )
        first_line[question.question_id] = number
        questions.append(question)
    if not questions:
        raise InputError(f"{path}: holds no questions")
    return questions


def _parse(line: str, where: str, number: int, image_folder: Path) -> Question:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(fields, dict):
        raise InputError(f"{where}: expected a JSON object, found {type(fields).__name__}")
    for name in ("image", "text", "answer"):
        if not isinstance(fields.get(name), str) or not fields[name].strip():
            raise InputError(f"{where}: field {name!r} is {fields.get(name)!r}; expected text")
    image = image_folder / fields["image"]
    if not image.is_file():
        raise InputError(f"{where}: no image {image}")
    return Question(
        question_id=str(number if fields.get("question_id") is None else fields["question_id"]),
        image=image,
        text=fields["text"],
        category=str("all" if fields.get("category") is None else fields["category"]),
        answer=fields["answer"].strip(),
        boxes=_boxes(fields.get("boxes"), f"{where}: field 'boxes'"),
        objects=_boxes(fields.get("objects"), f"{where}: field 'objects'"),
    )


def _boxes(value: Any, where: str) -> tuple[Box, ...] | None:
    if value is None:
        return None
    try:
        if not isinstance(value, list):
            raise TypeError
        boxes = tuple((float(left), float(top), float(right), float(bottom)) for left, top, right, bottom in value)
    except (TypeError, ValueError):
        raise InputError(f"{where}: expected a list of [left, top, right, bottom] in pixels, found {value!r}") from None
    for box in boxes:
        if not (box[0] < box[2] and box[1] < box[3]):
            raise InputError(f"{where}: {list(box)} is not a box [left, top, right, bottom]")
    return boxes
