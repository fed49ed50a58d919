"""The curves of a study: means over questions by layer, with bootstrap intervals."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from jaxmllm.analysis.bootstrap import mean_interval
from jaxmllm.analysis.fusion import fusion_layers, review_layer
from jaxmllm.errors import InputError

if TYPE_CHECKING:
    from jaxmllm.analysis.generated import Generated
    from jaxmllm.analysis.study import Study


@dataclasses.dataclass(frozen=True)
class Curves:
    """Means over the questions of one category (or all).

    Attributes:
      accuracy: curve name -> ``[L]``, 0..1; ``early`` is the early output.
      log_probability: likewise, natural logarithm of the whole answer; ``change`` is the same less the clean one.
      intervals: 95% bootstrap intervals ``[2, L]`` by measure (``accuracy``, ``log_probability``, ``change``,
        ``generated``) and curve; images are resampled, with all their questions.
      hellinger: ``[L]``, distance of attention to the last layer's.
      fusion: fusion layers by ``fusion_layers`` on the accuracy under erasure; ``None`` where that was not run.
      review: the review layer by ``review_layer`` on the accuracy with one layer blinded.
      generated: curve name -> ``[L]``: the benchmark's score of generated answers, 0..1; empty where none were.
      clean_generated: that of the clean model's; NaN where there is none.
    """

    questions: int
    clean_accuracy: float
    clean_log_probability: float
    accuracy: dict[str, Float[np.ndarray, " L"]]
    log_probability: dict[str, Float[np.ndarray, " L"]]
    change: dict[str, Float[np.ndarray, " L"]]
    intervals: dict[str, dict[str, Float[np.ndarray, "2 L"]]]
    hellinger: Float[np.ndarray, " L"]
    fusion: list[int] | None
    review: int | None
    generated: dict[str, Float[np.ndarray, " L"]]
    clean_generated: float


def curves_of(study: Study, category: str | None = None, chosen: np.ndarray | None = None) -> Curves:
    """The curves of one category; ``chosen [Q]`` restricts them to some questions.

    Raises:
      InputError: no question is left.
    """
    rows = study.of(category) & (True if chosen is None else chosen)
    if not rows.any():
        raise InputError(f"no question of category {category!r}")
    scores = {**study.edited, "early": study.early}
    clean = float(np.asarray(study.clean.correct)[rows].mean())
    clean_log_probability = np.asarray(study.clean.log_probability)[rows]
    by_question = {
        "accuracy": {name: np.asarray(score.correct, float)[:, rows] for name, score in scores.items()},
        "log_probability": {name: np.asarray(score.log_probability)[:, rows] for name, score in scores.items()},
    }
    by_question["change"] = {
        name: values - clean_log_probability for name, values in by_question["log_probability"].items()
    }
    images = [question.image for question, chosen in zip(study.questions, rows, strict=True) if chosen]
    means = {
        measure: {name: values.mean(axis=1) for name, values in of_measure.items()}
        for measure, of_measure in by_question.items()
    }
    accuracy = means["accuracy"]
    intervals = {
        measure: {name: mean_interval(values, images) for name, values in of_measure.items()}
        for measure, of_measure in by_question.items()
    }
    generated, clean_generated, intervals["generated"] = _generated(study.generated, rows)
    return Curves(
        questions=int(rows.sum()),
        clean_accuracy=clean,
        clean_log_probability=float(clean_log_probability.mean()),
        **means,
        intervals=intervals,
        hellinger=study.hellinger[:, rows].mean(axis=1),
        fusion=fusion_layers(accuracy["erase"], clean) if "erase" in accuracy else None,
        review=review_layer(accuracy["blind"], clean) if "blind" in accuracy else None,
        generated=generated,
        clean_generated=clean_generated,
    )


def _generated(
    found: Generated | None, rows: np.ndarray
) -> tuple[dict[str, Float[np.ndarray, " L"]], float, dict[str, Float[np.ndarray, "2 L"]]]:
    """Means by curve, the clean one, and intervals, over what is scored of the questions ``rows [Q]``."""
    if found is None or not rows[found.question].any():
        return {}, float("nan"), {}
    chosen = rows[found.question]
    images = [image for image, kept in zip(found.clusters, chosen, strict=True) if kept]
    values = {name: scores[:, chosen] for name, scores in found.values.items()}
    means = {name: scores.mean(axis=1) for name, scores in values.items()}
    bounds = {name: mean_interval(scores, images) for name, scores in values.items()}
    return means, float(found.clean_values[chosen].mean()), bounds
