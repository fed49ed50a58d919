"""Methods side by side over the same questions: who answers right, what it costs, and where they looked.

Where maps point is told by patches: a patch is on the evidence when it shows any of it. By the centres of patches, as
``jaxmllm.analysis.pointing`` does for objects larger than a patch, even a perfect map would seldom hit a smaller one.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
from PIL import Image

from jaxmllm.analysis.geometry import patch_boxes
from jaxmllm.analysis.pointing import evidence_share
from jaxmllm.data.benchmarks.base import Unit
from jaxmllm.data.benchmarks.llava import plain
from jaxmllm.data.questions import Question
from jaxmllm.errors import InputError
from jaxmllm.evaluation.compare import Difference, difference_of
from jaxmllm.evaluation.contestants import Contestant
from jaxmllm.evaluation.summary import Score, score_of
from jaxmllm.methods import Method
from jaxmllm.methods.answering import Answered, answer
from jaxmllm.methods.first import Count
from jaxmllm.methods.regions import Box, ImageMap
from jaxmllm.model import Model
from jaxmllm.models.boxes import TokenBoxes, box_areas
from jaxmllm.processing import open_image

# Questions and answers that are done, those of the whole contest, and the label of the contestant at work.
OnProgress = Callable[[int, int, str], None]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One question answered by one contestant.

    Attributes:
      prediction: the answer; ``correct`` whether it is the reference.
      box: what part of the picture was shown in the second place.
      inside: share of the evidence in that part, 0 to 1.
      hit, mass: of its map: whether the highest patch is on evidence, and the share of its positive mass on such
        patches.
    """

    prediction: str
    correct: bool
    box: Box | None = None
    inside: float | None = None
    hit: bool | None = None
    mass: float | None = None


@dataclasses.dataclass(frozen=True)
class Shown:
    """What a contestant looked by and showed in the second place for one question, to be drawn."""

    map: ImageMap | None = None
    box: Box | None = None
    picture: Image.Image | None = None


@dataclasses.dataclass(frozen=True)
class Run:
    """All answers of one method.

    Attributes:
      outcomes: one a question.
      seconds: a question, the picture's preparation included: the median over batches, the first aside, in which
        programs are compiled; ``None`` where there is no other.
      count: passes a question.
      shown: by the number of the question, for those that were asked for.
    """

    outcomes: tuple[Outcome, ...]
    seconds: float | None
    count: Count
    shown: dict[int, Shown]


@dataclasses.dataclass(frozen=True)
class Result:
    """What a contestant comes to.

    Attributes:
      contestant: who.
      run: its answers.
      accuracy: over all questions; ``kinds`` by kind of question.
      gain: over the first contestant, paired by question; ``None`` of that one.
      hits, mass, inside: means of ``Outcome``'s over the questions with evidence; ``None`` without map or crop.
    """

    contestant: Contestant
    run: Run
    accuracy: Score
    kinds: dict[str, Score]
    gain: Difference | None
    hits: float | None
    mass: float | None
    inside: float | None


@dataclasses.dataclass(frozen=True)
class Contest:
    """A finished contest.

    Attributes:
      questions: what was asked.
      results: one a contestant, in their order.
      pointed: questions with evidence that can be pointed at.
      patch_chance, object_chance: chance of a hit on it, by a random patch and by the patch of a random object.
    """

    questions: tuple[Question, ...]
    results: tuple[Result, ...]
    pointed: int
    patch_chance: float
    object_chance: float

    @property
    def scenes(self) -> int:
        """How many pictures the questions are about."""
        return len({str(question.image) for question in self.questions})

    @property
    def groups(self) -> list[str]:
        """The contestants' groups, in order."""
        return list(dict.fromkeys(result.contestant.group for result in self.results))

    def of_group(self, group: str) -> list[Result]:
        """The contestants of a group, behind the first of all, which they are held against."""
        return [result for result in self.results if result.gain is None or result.contestant.group == group]


def run_contest(
    model: Model,
    questions: Sequence[Question],
    contestants: Sequence[Contestant],
    batch_size: int = 16,
    max_new_tokens: int = 4,
    on_progress: OnProgress = lambda done, total, label: None,
    drawn: Collection[int] = (),
) -> Contest:
    """Asks every question of every contestant.

    Batches have one size, the last one padded with its last question, so that each kind of method compiles once.
    Contestants that do the same share their answers.

    Args:
      model: the loaded model.
      questions: with one-word answers, and evidence where it is known.
      contestants: who takes part; the others are held against the first.
      batch_size: questions computed together.
      max_new_tokens: tokens an answer may have.
      on_progress: called after every batch.
      drawn: numbers of the questions of which maps and crops are kept.

    Raises:
      InputError: nothing to ask or nobody to answer, doubled labels; or a method that does not fit the model.
    """
    labels = [contestant.label for contestant in contestants]
    if not questions or not contestants or len(set(labels)) < len(labels) or batch_size < 1:
        raise InputError(
            f"{len(questions)} questions, contestants {', '.join(labels) or 'none'}, batch_size={batch_size}; expected "
            "at least one question, contestants with labels of their own, and a batch size from 1"
        )
    total = len({contestant.spec for contestant in contestants}) * len(questions)
    opened = {str(question.image): open_image(question.image) for question in questions}
    pictures = [opened[str(question.image)] for question in questions]
    runs: dict[str, Run] = {}

    def advance(before: int, label: str, done: int) -> None:
        on_progress(before + done, total, label)

    for contestant in contestants:
        if contestant.spec not in runs:
            progress = functools.partial(advance, len(runs) * len(questions), contestant.label)
            runs[contestant.spec] = _answer_all(
                model, questions, pictures, contestant.method, batch_size, max_new_tokens, progress, drawn
            )
    base = runs[contestants[0].spec]
    results = [
        _result(questions, contestant, runs[contestant.spec], None if place == 0 else base)
        for place, contestant in enumerate(contestants)
    ]
    patches = patch_boxes(model, [picture.size for picture in pictures])
    chances = [
        chances_of(tokens, question.boxes, question.objects or ())
        for tokens, question in zip(patches, questions, strict=True)
        if question.boxes
    ]
    by_patch, by_object = np.mean(chances, axis=0).tolist() if chances else (0.0, 0.0)
    return Contest(tuple(questions), tuple(results), len(chances), by_patch, by_object)


def _answer_all(
    model: Model,
    questions: Sequence[Question],
    pictures: Sequence[Image.Image],
    method: Method,
    batch_size: int,
    max_new_tokens: int,
    on_progress: Callable[[int], None],
    drawn: Collection[int],
) -> Run:
    """All questions answered by one method."""
    outcomes: list[Outcome] = []
    shown: dict[int, Shown] = {}
    seconds, counts = [], []
    for start in range(0, len(questions), batch_size):
        places = [min(start + row, len(questions) - 1) for row in range(batch_size)]
        began = time.perf_counter()
        answers = answer(
            model,
            [pictures[place] for place in places],
            [questions[place].text for place in places],
            method=method,
            evidence=[questions[place].boxes for place in places],
            max_new_tokens=max_new_tokens,
            row_numbers=places,
        )
        seconds.append((time.perf_counter() - began) / batch_size)
        own = min(batch_size, len(questions) - start)
        counts.append((own, answers.details.count))
        for row in range(own):
            outcomes.append(_outcome(questions[start + row], answers[row], answers.details, row))
            if start + row in drawn:
                shown[start + row] = _shown(answers.details, row)
        on_progress(len(outcomes))
    return Run(
        outcomes=tuple(outcomes),
        seconds=float(np.median(seconds[1:])) if len(seconds) > 1 else None,
        count=Count(
            **{
                field.name: sum(own * getattr(count, field.name) for own, count in counts) / len(questions)
                for field in dataclasses.fields(Count)
            }
        ),
        shown=shown,
    )


def _outcome(question: Question, prediction: str, details: Answered, row: int) -> Outcome:
    box = None if details.boxes is None else details.boxes[row]
    evidence = question.boxes
    hit, mass = pointing(details.maps[row], evidence) if evidence and details.maps is not None else (None, None)
    return Outcome(
        prediction=prediction,
        correct=plain(prediction) == plain(question.answer),
        box=box,
        inside=share_inside(evidence, box) if evidence and box is not None else None,
        hit=hit,
        mass=mass,
    )


def _shown(details: Answered, row: int) -> Shown:
    return Shown(
        map=None if details.maps is None else details.maps[row],
        box=None if details.boxes is None else details.boxes[row],
        picture=None if details.pictures is None else details.pictures[row],
    )


def pointing(found: ImageMap, evidence: Sequence[Box]) -> tuple[bool, float]:
    """Whether the highest patch (the first of equals) shows evidence, and the share of the map's positive mass on such
    patches, 0 where the map is nowhere positive; patches that saw no pixel do not count."""
    seen = found.tokens.areas > 0
    shows = evidence_share(found.tokens, evidence) > 0
    hit = bool(shows[np.argmax(np.where(seen, found.values, -np.inf))])
    positive = np.where(seen, np.maximum(found.values, 0.0), 0.0)
    return hit, float(positive[shows].sum() / positive.sum()) if positive.any() else 0.0


def chances_of(tokens: TokenBoxes, evidence: Sequence[Box], objects: Sequence[Box]) -> tuple[float, float]:
    """The chance of a hit by a random patch, and by a patch that holds the centre of a random object (0 without
    objects)."""
    shows = evidence_share(tokens, evidence) > 0
    centres = (np.asarray(objects, float).reshape(-1, 2, 2)).mean(axis=1)[:, None]
    holds = ((tokens.boxes[:, :2] <= centres) & (centres < tokens.boxes[:, 2:])).all(axis=-1)  # [objects, N]
    by_object = (holds & shows).any(axis=1).mean() if len(objects) else 0.0
    return float(shows[tokens.areas > 0].mean()), float(by_object)


def share_inside(evidence: Sequence[Box], box: Box) -> float:
    """The share of the area of evidence boxes, one at least, that lies in a box."""
    edges = np.asarray(evidence, float)
    areas = box_areas(edges)
    shares = evidence_share(TokenBoxes(edges, (1, len(edges)), (0, 0)), [box])
    return float(shares @ areas / areas.sum())


def _result(questions: Sequence[Question], contestant: Contestant, run: Run, base: Run | None) -> Result:
    units = [
        Unit(question.question_id, str(question.image), float(outcome.correct))
        for question, outcome in zip(questions, run.outcomes, strict=True)
    ]
    kinds: dict[str, list[Unit]] = {}
    for question, unit in zip(questions, units, strict=True):
        kinds.setdefault(question.category, []).append(unit)
    gain = None
    if base is not None:
        gain = difference_of(
            [
                dataclasses.replace(unit, value=unit.value - float(before.correct))
                for unit, before in zip(units, base.outcomes, strict=True)
            ]
        )
    return Result(
        contestant=contestant,
        run=run,
        accuracy=score_of(units),
        kinds={kind: score_of(part) for kind, part in sorted(kinds.items())},
        gain=gain,
        hits=_mean([outcome.hit for outcome in run.outcomes]),
        mass=_mean([outcome.mass for outcome in run.outcomes]),
        inside=_mean([outcome.inside for outcome in run.outcomes]),
    )


def _mean(values: Sequence[float | bool | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def result_rows(contest: Contest) -> list[dict[str, Any]]:
    """One row a number: ``method, group, spec, metric, category, value, low, high, questions``.

    ``difference`` is that of the accuracy to the first contestant's. ``low`` and ``high`` bound the 95% bootstrap
    interval, where there is one.
    """
    rows: list[dict[str, Any]] = []
    everything, located = len(contest.questions), contest.pointed

    def add(
        who: tuple[str, str, str],
        metric: str,
        value: float | None,
        questions: int,
        interval: tuple[float | None, float | None] = (None, None),
        category: str = "all",
    ) -> None:
        if value is not None:
            rows.append(
                {"method": who[0], "group": who[1], "spec": who[2], "metric": metric, "category": category,
                 "value": float(value), "low": interval[0], "high": interval[1], "questions": questions}
            )  # fmt: skip

    for result in contest.results:
        who = result.contestant.label, result.contestant.group, result.contestant.spec
        for category, score in {"all": result.accuracy, **result.kinds}.items():
            add(who, "accuracy", score.value, score.count, (score.low, score.high), category)
        if result.gain is not None:
            add(who, "difference", result.gain.value, everything, (result.gain.low, result.gain.high))
        add(who, "seconds", result.run.seconds, everything)
        for name, value in dataclasses.asdict(result.run.count).items():
            add(who, f"passes_{name}", value, everything)
        add(who, "pointing_hits", result.hits, located)
        add(who, "pointing_mass", result.mass, located)
        add(who, "evidence_in_crop", result.inside, located)
    for name, value in (("random patch", contest.patch_chance), ("random object", contest.object_chance)):
        add((f"chance: {name}", "chance", ""), "pointing_hits", value, located)
    return rows


def outcome_rows(contest: Contest) -> list[dict[str, Any]]:
    """One row a question and contestant: what was answered, and where the contestant looked."""
    rows = []
    for result in contest.results:
        for question, outcome in zip(contest.questions, result.run.outcomes, strict=True):
            row = {
                "question_id": question.question_id,
                "image": str(question.image),
                "category": question.category,
                "question": question.text,
                "reference": question.answer,
                "method": result.contestant.label,
                **dataclasses.asdict(outcome),
            }
            row["box"] = None if outcome.box is None else [float(edge) for edge in outcome.box]
            rows.append(row)
    return rows
