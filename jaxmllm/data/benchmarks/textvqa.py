"""TextVQA, with and without OCR tokens: ``TextVQA_0.5.1_SPLIT.json`` and, for the tokens, one of two files."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from jaxmllm.data.benchmarks.answers import scored_by, submit, vqa_reference
from jaxmllm.data.benchmarks.base import Benchmark, Example, Part, Skipped, Source, open_source
from jaxmllm.data.benchmarks.files import ImageFolders, check_folder, choose_file, missing, only_file
from jaxmllm.data.benchmarks.matching import NONE, match
from jaxmllm.data.benchmarks.vqa import ANSWERS
from jaxmllm.data.fields import RecordError, mapping, shortened, text_field, texts_field, whole_number_field
from jaxmllm.data.json_records import json_list
from jaxmllm.data.metrics import evalai_normalise, textvqa_accuracy
from jaxmllm.data.records import Place, Records, json_lines
from jaxmllm.errors import InputError

OCR_MARK = "Reference OCR token: "


def open_textvqa(
    data: Path | None,
    *,
    split: str | None = None,
    limit: int | None = None,
    skip_bad: bool = False,
    with_ocr: bool = False,
) -> Source:
    """Opens TextVQA: ``val`` where it is there, else the only split.

    Args:
      with_ocr: give each question the OCR tokens of its image, from LLaVA's ``llava_textvqa_SPLIT_v051_ocr.jsonl`` or,
        without it, from the official ``TextVQA_Rosetta_OCR_v0.2_SPLIT.json``.

    Raises:
      InputError: files are missing, or not of the official form.
    """
    folder = check_folder(data)
    path, split = choose_file(
        folder, r"TextVQA_[\d.]+_(?P<split>train|val|test)\.json", "TextVQA_0.5.1_SPLIT.json", split, ("val",)
    )
    questions = json_list(path, "data")
    # The images of the validation split are among those of the training split.
    images = ImageFolders(folder, ("test_images" if split == "test" else "train_images", "images"))
    parser, problems = TextVqaParser(images), list[Skipped]()
    if with_ocr:
        ocr = _ocr_file(folder, split)
        numbers, problems = match(questions, ocr, _image_of_ocr, _image_of)
        parser = TextVqaParser(images, ocr, numbers)
    return open_source([Part(questions, parser)], limit=limit, skip_bad=skip_bad, problems=problems)


def _ocr_file(folder: Path, split: str) -> Records:
    of_llava = only_file(folder, rf"llava_textvqa_{split}_v\w+_ocr\.jsonl")
    official = only_file(folder, rf"TextVQA_Rosetta_OCR_v[\d.]+_{split}\.json")
    if of_llava is not None:
        return json_lines(of_llava)
    if official is not None:
        return json_list(official, "data")
    raise InputError(
        missing(folder, f"TextVQA_Rosetta_OCR_v0.2_{split}.json or llava_textvqa_{split}_v051_ocr.jsonl (OCR tokens)")
    )


def _image_of(record: Any, where: str) -> str:
    return text_field(mapping(record, where), "image_id", where)


def _image_of_ocr(record: Any, where: str) -> str:
    """The image that a record's tokens are of: LLaVA's names the file, or the image without its ending."""
    record = mapping(record, where)
    if "image_id" in record:
        return text_field(record, "image_id", where)
    return PurePath(text_field(record, "image", where)).stem


def ocr_tokens(record: Mapping[str, Any], where: str) -> str:
    """The OCR tokens as LLaVA's prompt lists them, of a record of either file.

    Raises:
      RecordError: there are none.
    """
    if "ocr_tokens" not in record:
        text = text_field(record, "text", where)
        if OCR_MARK.strip() not in text:
            raise RecordError(where, f"field 'text' is {shortened(text)}; expected {OCR_MARK!r} in it")
        return text.split(OCR_MARK.strip(), 1)[1].split("\n")[0].strip()
    tokens = record["ocr_tokens"]
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise RecordError(where, f"field 'ocr_tokens' is {shortened(tokens)}; expected a list of texts")
    return ", ".join(tokens)


@dataclasses.dataclass(frozen=True, eq=False)
class TextVqaParser:
    """Makes an example of a question.

    Attributes:
      ocr: the file of OCR tokens, where they are wanted.
      numbers: the number in it of the record of every question.
    """

    images: ImageFolders
    ocr: Records | None = None
    numbers: np.ndarray | None = None

    def __call__(self, record: Any, place: Place) -> Example:
        question = mapping(record, place.where)
        question_id = whole_number_field(question, "question_id", place.where)
        image_id, text = _image_of(question, place.where), text_field(question, "question", place.where)
        fields = {}
        if self.ocr is not None and self.numbers is not None:
            number = int(self.numbers[place.number])
            if number == NONE:
                raise RecordError(place.where, f"image_id {image_id} has no OCR tokens in {self.ocr.path}")
            fields["ocr"] = ocr_tokens(self.ocr[number], self.ocr.place(number).where)
        answered = question.get("answers") is not None
        return Example(
            question_id=str(question_id),
            where=place.where,
            image=self.images.find(place.where, f"{image_id}.jpg"),
            text=text,
            answers=texts_field(question, "answers", place.where, ANSWERS) if answered else None,
            fields=fields,
        )


TEXTVQA = Benchmark(
    name="textvqa",
    open=open_textvqa,
    score=scored_by(textvqa_accuracy),
    parse=lambda prediction, example: evalai_normalise(prediction),
    reference=vqa_reference,
    submission=lambda rows: submit("textvqa_submission.json", rows, "question_id", int, "answer"),
)
TEXTVQA_OCR = dataclasses.replace(TEXTVQA, name="textvqa-ocr", open=functools.partial(open_textvqa, with_ocr=True))
