"""Runs a study unit by unit, so that it can be stopped, gone on with, and divided between processes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from jaxmllm.analysis.attention import attention_evolution
from jaxmllm.analysis.blocks import Cut, Setup, set_up
from jaxmllm.analysis.generated import Judge, judge_answers, of_one_structure
from jaxmllm.analysis.geometry import patch_boxes
from jaxmllm.analysis.masking import layer_edits
from jaxmllm.analysis.scores import in_order, join_scores
from jaxmllm.analysis.sharing.compilations import count_compilations
from jaxmllm.analysis.study import Study, parse_curve
from jaxmllm.analysis.sweeping import BATCH_SIZE, CACHE_LIMIT, SweepCost, Sweeper
from jaxmllm.analysis.units import Generating, from_arrays, join_looks, run_unit, to_arrays
from jaxmllm.data.questions import Question
from jaxmllm.decoding import batch_that_fits
from jaxmllm.errors import InputError
from jaxmllm.models.edits import Edits
from jaxmllm.models.sharding import rows_of_mesh
from jaxmllm.processing import encode_answers, image_size

DEFAULT_CURVES = ("erase", "blind", "blind:from", "knockout")
# Generated answers of up to so many tokens are tried on branches; longer ones are generated for each.
TRIED_TOKENS = 8


@runtime_checkable
class Keeper(Protocol):
    """Keeps the results of units, so that a study that was stopped goes on (``jaxmllm.parallel.parts``)."""

    def done(self) -> set[int]:
        """Numbers of the units that are kept."""

    def write(self, unit: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Keeps a unit's result."""

    def read(self, unit: int) -> dict[str, np.ndarray]:
        """A unit's result."""


class InMemory(dict[int, Any]):
    """Keeps results for as long as the process lives."""

    def done(self) -> set[int]:
        return set(self)

    def write(self, unit: int, arrays: Mapping[str, np.ndarray]) -> None:
        self[unit] = arrays

    def read(self, unit: int) -> dict[str, np.ndarray]:
        return self[unit]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A study that is ready to run.

    Attributes:
      model: a loaded model.
      questions: all of them.
      branches: the edits of all curves; ``place`` where each curve's are.
      answers: token ids of the reference answers.
      setup: how the questions are cut, and how memory is spent.
      judge: of generated answers; ``generating`` how they are generated; ``None`` where none are wanted.
    """

    model: Any
    questions: tuple[Question, ...]
    branches: list[Edits]
    place: dict[str, slice]
    answers: Sequence[Sequence[int]]
    setup: Setup
    judge: Judge | None
    generating: Generating | None


def prepare_study(
    model: Any,
    questions: Sequence[Question],
    curves: Sequence[str] = DEFAULT_CURVES,
    batch_size: int = BATCH_SIZE,
    *,
    plain: bool = False,
    budget: int | None = None,
    judge: Judge | None = None,
    cut: Cut | None = None,
) -> Prepared:
    """Plans a study and its memory.

    Args:
      model: a loaded model.
      questions: of ``read_questions``, one image each.
      curves: edits with their scope: ``erase``, ``blind``, ``knockout``, followed by ``:from``, ``:up_to`` or the width
        of a window where more than layer i is meant.
      batch_size: questions a chunk of each device, at most.
      plain: run everything for every branch instead of what changes.
      budget: bytes of a device's memory that may be taken, weights included; by default what the device grants.
      judge: where answers are to be generated under every branch, what scores them.
      cut: of a run that is gone on with; its numbers then stay what they were, on whatever devices.

    Raises:
      JaxmllmError: unknown curves, unreadable images, answers without tokens, a budget that is too small.
    """
    if not questions:
        raise InputError("no questions to study")
    branches, place = branches_of(curves, model.num_layers)
    answers = encode_answers(model.processor, [question.answer for question in questions])
    longest, generating = max(map(len, answers)), None
    if judge is not None:
        alike, idle = of_one_structure(branches)
        most = (batch_size if cut is None else cut.rows) * rows_of_mesh(model.mesh)
        size = _answers_together(model, questions, idle, judge.max_new_tokens, most, budget)
        generating = Generating(alike, idle, judge.max_new_tokens, size)
        # answers that were generated are tried on the branches, unless they are longer
        longest = max(longest, min(judge.max_new_tokens, TRIED_TOKENS))
    setup = set_up(model, questions, branches, longest, batch_size, plain, budget, cut)
    return Prepared(model, tuple(questions), branches, place, answers, setup, judge, generating)


def run_units(
    study: Prepared,
    keeper: Keeper,
    units: Sequence[int],
    *,
    cache: Path | None = None,
    cache_limit: int = CACHE_LIMIT,
    on_progress: Callable[[float], None] = lambda done: None,
    on_answers: Callable[[int], None] = lambda known: None,
    writes: bool = True,
) -> SweepCost:
    """Runs units of a study that are not kept yet.

    Args:
      study: the study.
      keeper: of results.
      units: their numbers.
      cache, cache_limit: folder for keys that serve every question, and the bytes it may take.
      on_progress: called with the number of these units' questions that are done.
      on_answers: called with the number of their generated answers known, of all branches and questions.
      writes: whether this process keeps what it computes.

    Returns:
      What it cost.
    """
    setup, done, kept = study.setup, 0, keeper.done()
    with count_compilations() as compilations:
        sweeper = Sweeper(
            study.model,
            study.branches,
            setup.cut.shapes,
            setup.plan,
            compilations,
            cache=cache,
            cache_limit=cache_limit,
        )
        for unit in units:
            rows = setup.units[unit]
            if unit not in kept:
                result = run_unit(
                    sweeper,
                    setup,
                    [study.questions[row] for row in rows],
                    [study.answers[row] for row in rows],
                    study.generating,
                    functools.partial(_add, on_progress, done),
                    functools.partial(_add, on_answers, done * len(study.branches)),
                )
                if writes:
                    keeper.write(unit, to_arrays(result))
            done += len(rows)
            on_progress(done)
            on_answers(done * len(study.branches))
        return sweeper.cost()


def _add(tell: Callable[[Any], None], before: int, now: float | int) -> None:
    tell(before + now)


def assemble(study: Prepared, keeper: Keeper, cost: SweepCost) -> Study:
    """Puts the results of all units together.

    Args:
      study: the study.
      keeper: which has all its units.
      cost: what it cost.
    """
    setup, questions = study.setup, study.questions
    results = [from_arrays(keeper.read(unit)) for unit in range(len(setup.units))]
    order = np.argsort(setup.order)
    scores = in_order(join_scores([result.scores for result in results]), order)
    looks, generated = join_looks(results), None
    if study.judge is not None:
        clean = [answer for result in results for answer in result.clean]
        by_branch = [
            [answer for result in results for answer in result.answers[branch]] for branch in range(len(study.branches))
        ]
        generated = judge_answers(
            study.judge,
            questions,
            [clean[at] for at in order],
            [[found[at] for at in order] for found in by_branch],
            study.place,
            sum(result.tried for result in results),
        )
    return Study(
        questions=questions,
        edited={name: jax.tree.map(lambda leaf, at=at: leaf[at], scores.edited) for name, at in study.place.items()},
        clean=scores.clean,
        early=scores.early,
        attention=scores.attention,
        hellinger=np.asarray(attention_evolution(scores.attention)),
        tokens=tuple(patch_boxes(study.model, [image_size(question.image) for question in questions])),
        looks=tuple(looks[at] for at in order),
        cost=cost,
        generated=generated,
    )


def run_study(
    model: Any, questions: Sequence[Question], curves: Sequence[str] = DEFAULT_CURVES, **options: Any
) -> Study:
    """Runs the clean pass and every masking curve over all questions, in this process and kept in its memory.

    Args:
      model, questions, curves, options: as for ``prepare_study``.

    Raises:
      JaxmllmError: as ``prepare_study``.
    """
    study, keeper = prepare_study(model, questions, curves, **options), InMemory()
    cost = run_units(study, keeper, range(len(study.setup.units)))
    return assemble(study, keeper, cost)


def _answers_together(
    model: Any,
    questions: Sequence[Question],
    edits: Edits,
    max_new_tokens: int,
    batch_size: int,
    budget: int | None,
) -> int:
    """How many questions are answered at a time, by the largest image with the longest question."""
    longest = max((question.text for question in questions), key=len)
    images = dict.fromkeys(question.image for question in questions)
    largest = max(images, key=lambda image: int(np.prod(image_size(image))))
    one = model.prepare([largest], [longest])
    most = min(batch_size, len(questions))
    return batch_that_fits(model, one, max_new_tokens, most=most, edits=edits, budget=budget)


def branches_of(curves: Sequence[str], num_layers: int) -> tuple[list[Edits], dict[str, slice]]:
    """The edits of all curves, one after another, and where each curve's are."""
    branches: list[Edits] = []
    place = {}
    for name in dict.fromkeys(curves):
        place[name] = slice(len(branches), len(branches) + num_layers)
        branches += layer_edits(*parse_curve(name), num_layers)
    return branches, place
