"""What benchmarks share of scoring and submitting answers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from jaxmllm.data.benchmarks.base import Example, Row, Submission


def scored_by(metric: Callable[[str, Any], float]) -> Callable[[str, Example], float | None]:
    """A score by a metric that takes all the answers of a question."""

    def score(prediction: str, example: Example) -> float | None:
        return None if example.answers is None else metric(prediction, list(example.answers))

    return score


def vqa_reference(example: Example) -> str | None:
    """The answer that most people gave, the first of them where several lead; ``None`` where all are blank."""
    texts = [answer["answer"] if isinstance(answer, dict) else answer for answer in example.answers or ()]
    counted = Counter(text for text in texts if text.strip())
    return counted.most_common(1)[0][0] if counted else None


def first_answer(example: Example) -> str | None:
    """The first answer that is not blank."""
    return next((answer for answer in example.answers or () if answer.strip()), None)


def submit(
    filename: str, rows: Sequence[Row], id_name: str, id_type: Callable[[str], int | str], answer_name: str
) -> Submission:
    """A JSON list of ids and answers, the answers as the model gave them."""
    entries = [{id_name: id_type(row["question_id"]), answer_name: row["prediction"]} for row in rows]
    return Submission(filename, json.dumps(entries, ensure_ascii=False))
