"""LLaVA's JSONL form, which is also the project's own; and the generated scenes, which come with the package in it."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxmllm.data.benchmarks.answers import first_answer
from jaxmllm.data.benchmarks.base import Benchmark, Example, Part, Row, Source, Submission, open_source
from jaxmllm.data.benchmarks.files import ImageFolders, check_folder, find_files, unpack_hint
from jaxmllm.data.fields import mapping, text_field
from jaxmllm.data.questions import question_parts
from jaxmllm.data.records import Place, json_lines
from jaxmllm.errors import InputError

SCENES = Path(__file__).parents[2] / "demo" / "questions"


def open_llava(
    data: Path | None, *, split: str | None = None, limit: int | None = None, skip_bad: bool = False
) -> Source:
    """Opens a question file in LLaVA's form: ``questions.jsonl``, or the only JSONL file; images are in ``images``.

    Args:
      split: the file's name without its ending.

    Raises:
      InputError: files are missing, or not of the form.
    """
    folder = check_folder(data)
    files = {path.stem: path for path in find_files(folder, r".*\.jsonl")}
    if split is None and len(files) > 1 and "questions" not in files:
        raise InputError(f"{folder}: several question files; name one with --split: {', '.join(sorted(files))}")
    name = split or ("questions" if "questions" in files else next(iter(files), "questions"))
    if name not in files:
        there = f", found {', '.join(sorted(files))}" if files else ""
        raise InputError(f"{folder}: holds no {name}.jsonl{there}{unpack_hint(folder)}")
    parser = LlavaParser(ImageFolders(folder, ("images",)))
    return open_source([Part(json_lines(files[name]), parser)], limit=limit, skip_bad=skip_bad)


def open_scenes(
    data: Path | None = None, *, split: str | None = None, limit: int | None = None, skip_bad: bool = False
) -> Source:
    """Opens generated scenes: by default the held-out questions that come with the package.

    Raises:
      InputError: as :func:`open_llava`.
    """
    return open_llava(SCENES if data is None else data, split=split, limit=limit, skip_bad=skip_bad)


@dataclasses.dataclass(frozen=True)
class LlavaParser:
    """Makes an example of a question, with its answer where it has one."""

    images: ImageFolders

    def __call__(self, record: Any, place: Place) -> Example:
        parts = question_parts(record, place, self.images.find)
        category = parts.pop("category")
        answered = mapping(record, place.where).get("answer") is not None
        return Example(
            **parts,
            where=place.where,
            answers=(text_field(record, "answer", place.where).strip(),) if answered else None,
            categories={"category": category},
        )


def plain(text: str) -> str:
    """A text as answers are compared: lowered, without white space or one period at its ends."""
    return text.strip().lower().removesuffix(".").strip()


def _score(prediction: str, example: Example) -> float | None:
    return float(plain(prediction) == plain(example.answers[0])) if example.answers else None


def _submission(rows: Sequence[Row]) -> Submission:
    """LLaVA's answer file; an ``answer_id`` there is random, here it follows from the question and the answer."""
    lines = [
        {
            "question_id": _number_or_text(row["question_id"]),
            "prompt": row["question"],
            "text": row["prediction"],
            "answer_id": _answer_id(row),
            "model_id": "jaxmllm",
            "metadata": {},
        }
        for row in rows
    ]
    return Submission("answers.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _number_or_text(question_id: str) -> int | str:
    """An id that reads as a whole number is written as one, as LLaVA's own files have it."""
    try:
        number = int(question_id)
    except ValueError:
        return question_id
    return number if str(number) == question_id else question_id


def _answer_id(row: Row) -> str:
    text = json.dumps([row["question_id"], row["question"], row["prediction"]])
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode()[:22]


LLAVA = Benchmark(
    name="llava",
    open=open_llava,
    score=_score,
    parse=lambda prediction, example: plain(prediction),
    reference=first_answer,
    max_new_tokens=128,
    submission=_submission,
)
SCENES_BENCHMARK = dataclasses.replace(LLAVA, name="scenes", open=open_scenes, max_new_tokens=16)
