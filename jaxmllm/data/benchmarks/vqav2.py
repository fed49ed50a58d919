"""VQAv2: ``v2_OpenEnded_mscoco_SPLIT_questions.json`` and ``v2_mscoco_SPLIT_annotations.json``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxmllm.data.benchmarks.answers import scored_by, submit, vqa_reference
from jaxmllm.data.benchmarks.base import Benchmark, Source
from jaxmllm.data.benchmarks.vqa import VqaForm, named_categories, open_vqa
from jaxmllm.data.metrics import vqa_accuracy, vqa_normalise


def _answers(answers: list[dict[str, Any]]) -> tuple[Any, ...]:
    return tuple(answers)


def _categories(annotation: Mapping[str, Any], header: Mapping[str, Any]) -> dict[str, str]:
    return named_categories(annotation, "answer_type", "question_type")


FORM = VqaForm("v2_", "v2_", _answers, _categories)


def open_vqav2(
    data: Path | None, *, split: str | None = None, limit: int | None = None, skip_bad: bool = False
) -> Source:
    """Opens VQAv2: ``val2014`` where it is there, else the only split.

    Raises:
      InputError: files are missing, or not of the official form.
    """
    return open_vqa(FORM, data, split, limit, skip_bad)


VQAV2 = Benchmark(
    name="vqav2",
    open=open_vqav2,
    score=scored_by(vqa_accuracy),
    parse=lambda prediction, example: vqa_normalise(prediction),
    reference=vqa_reference,
    submission=lambda rows: submit("vqav2_submission.json", rows, "question_id", int, "answer"),
)
