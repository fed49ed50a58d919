"""MMBench: a TSV file with its images in it, in which questions come again with their options rotated."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import hashlib
import io
import re
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from jaxmllm.data.benchmarks.answers import first_answer
from jaxmllm.data.benchmarks.base import Benchmark, Example, Part, Row, Source, Unit, open_source
from jaxmllm.data.benchmarks.files import ImageFolders, check_folder, choose_file
from jaxmllm.data.fields import RecordError, shortened, text_field
from jaxmllm.data.metrics import mmbench_accuracies, mmbench_option
from jaxmllm.data.metrics.mmbench import ROTATION_STEP
from jaxmllm.data.records import Place, Records, open_binary
from jaxmllm.data.tsv_records import tsv_rows
from jaxmllm.errors import InputError
from jaxmllm.processing.images import ImageLike, StoredImage, describe

# A shorter cell is not an image, but the index of the row that holds it (VLMEvalKit's ``ImageBaseDataset``).
LONGEST_INDEX = 64
_INDEX = re.compile("[0-9]{1,18}")
CATEGORIES = ("category", "l2-category")


def open_mmbench(
    data: Path | None, *, split: str | None = None, limit: int | None = None, skip_bad: bool = False
) -> Source:
    """Opens MMBench: the only TSV file, or the one that ``split`` names, without its ending.

    Raises:
      InputError: the file is missing, or not of the official form.
    """
    folder = check_folder(data)
    path, _ = choose_file(folder, r"(?P<split>.+)\.tsv", "*.tsv", split)
    rows = tsv_rows(path)
    columns = rows.header["columns"]
    missing = [name for name in ("index", "question", "A") if name not in columns]
    if missing or not {"image", "image_path"} & set(columns):
        raise InputError(
            f"{path}: holds no column {' or '.join(missing) or 'image or image_path'}; found {', '.join(columns)}"
        )
    letters = [letter for letter in string.ascii_uppercase if letter in columns]
    parser = MmbenchParser(rows, _holders(rows), ImageFolders(folder, ("images",)), tuple(letters))
    return open_source([Part(rows, parser)], limit=limit, skip_bad=skip_bad)


def _holders(rows: Records) -> dict[str, int]:
    """Number of the row of every index whose image is in the row itself."""
    holders: dict[str, int] = {}
    with open_binary(rows.path) as file:
        for number in range(len(rows)):
            try:
                row = rows.read(file, number)
            except RecordError:
                continue  # told of when the row itself is read
            if len(row.get("image", "")) > LONGEST_INDEX:
                holders.setdefault(row["index"], number)
    return holders


@dataclasses.dataclass(frozen=True, eq=False)
class MmbenchParser:
    """Makes an example of a row.

    Attributes:
      holders: number of the row of every index whose image is in the row itself.
      letters: the columns of options.
    """

    rows: Records
    holders: Mapping[str, int]
    images: ImageFolders
    letters: tuple[str, ...]

    def __call__(self, record: dict[str, str], place: Place) -> Example:
        index = record["index"]
        if not _INDEX.fullmatch(index):
            raise RecordError(place.where, f"field 'index' is {shortened(index)}; expected a whole number from 0")
        text = text_field(record, "question", place.where)
        options = _options(record, self.letters)
        if not options:
            raise RecordError(place.where, "field 'A' is ''; expected the text of an option")
        answer = record.get("answer", "")
        if answer and answer not in options:
            raise RecordError(
                place.where, f"field 'answer' is {shortened(answer)}; expected one of {', '.join(options)}"
            )
        return Example(
            question_id=str(int(index)),
            where=place.where,
            image=self._image(record, place.where),
            text=text,
            answers=(answer,) if answer else None,
            categories={name: record[name] for name in CATEGORIES if record.get(name)},
            fields={
                "hint": record.get("hint", ""),
                "options": "\n".join(f"{letter}. {option}" for letter, option in options.items()),
            },
            options=options,
        )

    def _image(self, record: Mapping[str, str], where: str) -> ImageLike:
        cell = record.get("image", "")
        if not cell and record.get("image_path"):
            return self.images.find(where, record["image_path"])
        if len(cell) <= LONGEST_INDEX:
            if cell not in self.holders:
                raise RecordError(
                    where, f"field 'image' is {shortened(cell)}; expected base64, or the index of a row that has it"
                )
            cell = self.rows[self.holders[cell]]["image"]
        return stored_image(cell, where)


def _options(row: Mapping[str, str], letters: Sequence[str]) -> dict[str, str]:
    """The options up to the first empty one; "None" and "NA" are options, not missing values."""
    options: dict[str, str] = {}
    for letter in letters:
        if not row[letter]:
            break
        options[letter] = row[letter]
    return options


def stored_image(text: str, where: str) -> StoredImage:
    """The image that a base64 text holds; its header is read, its pixels are not.

    Raises:
      RecordError: it is not base64, or no image.
    """
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
        with Image.open(io.BytesIO(data)):
            pass
    except binascii.Error as error:
        raise RecordError(where, f"field 'image' is not base64 ({error}): {shortened(text)}") from None
    except (OSError, SyntaxError, ValueError, RuntimeError, Image.DecompressionBombError) as error:
        problem = f"field 'image' is base64, but not of an image ({describe(error)}): {shortened(text)}"
        raise RecordError(where, problem) from None
    # One image goes by one name, whichever rows it is in.
    return StoredImage(f"base64:{hashlib.sha256(data).hexdigest()[:16]}", data)


def _score(prediction: str, example: Example) -> float | None:
    return float(mmbench_option(prediction, example.options) == example.answers[0]) if example.answers else None


def _groups(rows: Sequence[Row]) -> dict[int, list[Row]]:
    """The scored rows of every base question that is among them, itself first."""
    scored = sorted((row for row in rows if row["score"] is not None), key=lambda row: int(row["question_id"]))
    groups = {int(row["question_id"]): [row] for row in scored if int(row["question_id"]) < ROTATION_STEP}
    for row in scored:
        index = int(row["question_id"])
        if index >= ROTATION_STEP and index % ROTATION_STEP in groups:
            groups[index % ROTATION_STEP].append(row)
    return groups


def _units(rows: Sequence[Row]) -> list[Unit]:
    """One a base question: right where every rotation is."""
    return [
        Unit(group[0]["question_id"], group[0]["image"], float(all(row["score"] == 1 for row in group)))
        for group in _groups(rows).values()
    ]


def _metrics(rows: Sequence[Row]) -> dict[str, float]:
    flags: list[dict[str, Any]] = [
        {"index": int(row["question_id"]), "correct": row["score"] == 1} for row in rows if row["score"] is not None
    ]
    if not any(flag["index"] < ROTATION_STEP for flag in flags):
        return {}
    accuracies = mmbench_accuracies(flags)
    return {
        "circular_accuracy": accuracies.circular,
        "vanilla_accuracy": accuracies.vanilla,
        "vanilla_accuracy_all": accuracies.vanilla_all,
    }


MMBENCH = Benchmark(
    name="mmbench",
    open=open_mmbench,
    score=_score,
    parse=lambda prediction, example: mmbench_option(prediction, example.options) or "",
    reference=first_answer,
    units=_units,
    metrics=_metrics,
    max_new_tokens=64,
)
