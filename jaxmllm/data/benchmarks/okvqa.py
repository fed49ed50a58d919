"""OKVQA: ``OpenEnded_mscoco_val2014_questions.json`` and ``mscoco_val2014_annotations.json``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxmllm.data.benchmarks.answers import scored_by, submit, vqa_reference
from jaxmllm.data.benchmarks.base import Benchmark, Source
from jaxmllm.data.benchmarks.vqa import VqaForm, open_vqa
from jaxmllm.data.metrics import evalai_normalise, okvqa_accuracy


def _answers(answers: list[dict[str, Any]]) -> tuple[Any, ...]:
    return tuple(answer["answer"] for answer in answers)


def _categories(annotation: Mapping[str, Any], header: Mapping[str, Any]) -> dict[str, str]:
    """The kind of knowledge by its name: the annotations have a word for it, and their file says what it stands for."""
    kind, names = annotation.get("question_type"), header.get("question_types")
    if not isinstance(kind, str):
        return {}
    return {"question_type": str(names.get(kind, kind)) if isinstance(names, dict) else kind}


FORM = VqaForm("", "", _answers, _categories)


def open_okvqa(
    data: Path | None, *, split: str | None = None, limit: int | None = None, skip_bad: bool = False
) -> Source:
    """Opens OKVQA: ``val2014`` where it is there, else the only split.

    Raises:
      InputError: files are missing, or not of the official form.
    """
    return open_vqa(FORM, data, split, limit, skip_bad)


OKVQA = Benchmark(
    name="okvqa",
    open=open_okvqa,
    score=scored_by(okvqa_accuracy),
    parse=lambda prediction, example: evalai_normalise(prediction),
    reference=vqa_reference,
    submission=lambda rows: submit("okvqa_submission.json", rows, "question_id", int, "answer"),
)
