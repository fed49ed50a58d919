"""Two runs over the same questions: what the second gains, by a paired bootstrap, and the questions it won and lost."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmllm.analysis.bootstrap import mean_interval
from jaxmllm.data.benchmarks import benchmark_named
from jaxmllm.data.benchmarks.base import Row, Unit
from jaxmllm.errors import InputError
from jaxmllm.evaluation.results import read_results
from jaxmllm.evaluation.settings import Settings, differences, read_settings
from jaxmllm.evaluation.summary import Score, by_category, score_of


@dataclasses.dataclass(frozen=True)
class Difference:
    """The second run's score less the first's over the same items, -1 to 1, with its 95% paired bootstrap interval.

    Attributes:
      won, lost, tied: items that the second run scores higher, lower, alike.
    """

    value: float
    low: float
    high: float
    won: int
    lost: int
    tied: int


@dataclasses.dataclass(frozen=True)
class Changed:
    """A question that one run scores higher than the other: its references, predictions and scores, first and second.

    Of an item that several questions make up (a circular group), the question that stands for it.
    """

    question_id: str
    question: str
    references: Any
    predictions: tuple[str, str]
    scores: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two runs side by side.

    Attributes:
      benchmark, metric: what is compared.
      settings: those in which the runs differ, first and second.
      first, second: scores over the items that both have.
      difference: second less first; ``categories`` the same by breakdown and category.
      questions: that both answered; ``only_first`` and ``only_second`` name those that one alone did.
      won, lost: questions that the second run scores higher or lower, the largest change first.
    """

    benchmark: str
    metric: str
    settings: dict[str, tuple[Any, Any]]
    first: Score
    second: Score
    difference: Difference
    categories: dict[str, dict[str, Difference]]
    questions: int
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    won: tuple[Changed, ...]
    lost: tuple[Changed, ...]


def compare(first: str | Path, second: str | Path) -> Comparison:
    """Compares two runs of ``evaluate`` over the questions that both answered.

    Args:
      first, second: their folders. They may differ in anything but the benchmark, its split and its questions.

    Raises:
      InputError: no run is there, a file of it is damaged, the runs are not over the same questions, have none in
        common, or have no scores.

    Source: the paired bootstrap, Efron and Tibshirani (1993), chapter 8; both runs are resampled by the same images.
    """
    folders = Path(first), Path(second)
    settings = read_settings(folders[0]), read_settings(folders[1])
    _check_alike(folders, settings)
    found = tuple({row["question_id"]: row for row in read_results(folder)} for folder in folders)
    common = [name for name in found[0] if name in found[1]]
    for name in common:
        one, other = found[0][name], found[1][name]
        if (one["question"], one["answers"]) != (other["question"], other["answers"]):
            raise InputError(
                f"question {name} is {one['question']!r} (answers {one['answers']}) in {folders[0]}, and "
                f"{other['question']!r} (answers {other['answers']}) in {folders[1]}; compare runs over the same data"
            )
    if not common:
        raise InputError(f"{folders[0]} and {folders[1]} have no question in common; are they of one split?")
    benchmark = benchmark_named(settings[0].benchmark)
    rows = tuple([answers[name] for name in common] for answers in found)
    units = tuple({unit.key: unit for unit in benchmark.units(part)} for part in rows)
    pairs = [(units[0][key], units[1][key]) for key in units[0] if key in units[1]]
    if not pairs:
        raise InputError(f"{folders[0]} and {folders[1]} have no scores: the split comes without references")
    gained = [Unit(one.key, one.cluster, other.value - one.value) for one, other in pairs]
    changed = sorted((unit for unit in gained if unit.value), key=lambda unit: -abs(unit.value))
    return Comparison(
        benchmark=benchmark.name,
        metric=next(iter(benchmark.metrics(rows[0]))),
        settings=differences(*settings, without=("weights", "files", "data", "split", "limit")),
        first=score_of([one for one, _ in pairs]),
        second=score_of([other for _, other in pairs]),
        difference=difference_of(gained),
        categories={
            breakdown: {category: difference_of(part) for category, part in parts.items()}
            for breakdown, parts in by_category(gained, rows[0]).items()
        },
        questions=len(common),
        only_first=tuple(name for name in found[0] if name not in found[1]),
        only_second=tuple(name for name in found[1] if name not in found[0]),
        won=tuple(_changed(unit, found, units) for unit in changed if unit.value > 0),
        lost=tuple(_changed(unit, found, units) for unit in changed if unit.value < 0),
    )


def difference_of(gained: Sequence[Unit]) -> Difference:
    """The mean gain of at least one item, with its interval.

    Over the same items, the difference of two means is the mean of the differences, so drawing differences by their
    images is the paired bootstrap.
    """
    values = np.array([unit.value for unit in gained])
    low, high = mean_interval(values, [unit.cluster for unit in gained])
    won, lost = int((values > 0).sum()), int((values < 0).sum())
    return Difference(float(values.mean()), float(low), float(high), won, lost, len(values) - won - lost)


def _check_alike(folders: tuple[Path, Path], settings: tuple[Settings, Settings]) -> None:
    one, other = settings
    named = {"benchmark": (one.benchmark, other.benchmark)}
    if one.split is not None and other.split is not None:
        named["split"] = (one.split, other.split)
    for name, pair in named.items():
        if pair[0] != pair[1]:
            raise InputError(
                f"{folders[0]} is a run over {name} {pair[0]!r}, {folders[1]} over {pair[1]!r}; "
                f"compare runs of one {name}"
            )


def _changed(unit: Unit, found: Sequence[Mapping[str, Row]], units: Sequence[Mapping[str, Unit]]) -> Changed:
    one, other = found[0][unit.key], found[1][unit.key]
    return Changed(
        question_id=unit.key,
        question=one["question"],
        references=one["answers"],
        predictions=(one["prediction"], other["prediction"]),
        scores=(units[0][unit.key].value, units[1][unit.key].value),
    )
