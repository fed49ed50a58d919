"""What a run comes to: the headline score with its interval, all metrics, and every breakdown of the benchmark."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from jaxmllm.analysis.bootstrap import mean_interval
from jaxmllm.data.benchmarks.base import Benchmark, Row, Unit


@dataclasses.dataclass(frozen=True)
class Score:
    """A mean over items, 0 to 1, with its 95% bootstrap interval (images drawn whole); ``count`` items."""

    value: float
    low: float
    high: float
    count: int


@dataclasses.dataclass(frozen=True)
class Summary:
    """The numbers of a run.

    Attributes:
      benchmark: its name.
      questions: answered; ``skipped`` left out.
      metric: name of the headline; ``None`` where the split has no references.
      score: the headline.
      metrics: all metrics, 0 to 1.
      categories: breakdown -> category -> score, the most frequent category first.
      stopped: share of answers that ended by themselves rather than at the limit of tokens.
      mean_tokens: tokens an answer.
      mean_log_probability: of an answer under the model, natural logarithm.
    """

    benchmark: str
    questions: int
    skipped: int
    metric: str | None
    score: Score | None
    metrics: dict[str, float]
    categories: dict[str, dict[str, Score]]
    stopped: float
    mean_tokens: float
    mean_log_probability: float


def summarise(benchmark: Benchmark, rows: Sequence[Row], skipped: int = 0) -> Summary:
    """Sums a run up.

    Args:
      benchmark: whose questions were asked.
      rows: the answers, one at least.
      skipped: questions that were left out.
    """
    metrics = benchmark.metrics(rows)
    units = benchmark.units(rows)
    return Summary(
        benchmark=benchmark.name,
        questions=len(rows),
        skipped=skipped,
        metric=next(iter(metrics), None),
        score=score_of(units) if units and metrics else None,
        metrics=metrics,
        categories={
            breakdown: {category: score_of(part) for category, part in parts.items()}
            for breakdown, parts in by_category(units, rows).items()
        },
        stopped=sum(row["stopped"] for row in rows) / len(rows),
        mean_tokens=sum(row["tokens"] for row in rows) / len(rows),
        mean_log_probability=math.fsum(row["log_probability"] for row in rows) / len(rows),
    )


def score_of(units: Sequence[Unit]) -> Score:
    """The mean of at least one item, with its interval."""
    values = np.array([unit.value for unit in units])
    low, high = mean_interval(values, [unit.cluster for unit in units])
    return Score(float(values.mean()), float(low), float(high), len(units))


def by_category(units: Sequence[Unit], rows: Sequence[Row]) -> dict[str, dict[str, list[Unit]]]:
    """Items by breakdown and category, the most frequent category first."""
    categories = {row["question_id"]: row["categories"] for row in rows}
    found: dict[str, dict[str, list[Unit]]] = {}
    for unit in units:
        for breakdown, category in categories[unit.key].items():
            found.setdefault(breakdown, {}).setdefault(category, []).append(unit)
    return {
        breakdown: dict(sorted(parts.items(), key=lambda part: (-len(part[1]), part[0])))
        for breakdown, parts in found.items()
    }
