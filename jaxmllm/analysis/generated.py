"""Generated answers while the image is hidden: every branch of a masking sweep answers every question.

Most branches give an answer that is known already: where the image is hidden behind the layers that read it, the clean
model's; where it is hidden before them, what the model says blindly. So an answer that was generated once is tried on
all branches by a fast sweep, which forces it upon them and sees whether each of its tokens would have been chosen
(``Scores.correct``); greedy decoding would then have generated that very answer. Only branches that no known answer
fits generate one. Nothing is approximated: the plain way generates everywhere, and gives the same answers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from jaxmllm.analysis.blocks import Setup, run_blocks
from jaxmllm.analysis.sweeping import Sweeper
from jaxmllm.data.benchmarks.base import Row, Unit
from jaxmllm.data.questions import Question
from jaxmllm.decoding import generate
from jaxmllm.models.edits import Edits

# Answers are tried where at least so many branches a question are open: a fast sweep costs about two passes a question,
# and finds some of them.
TRY_ABOVE = 4


@dataclasses.dataclass(frozen=True)
class Judge:
    """How generated answers are judged.

    Attributes:
      max_new_tokens: tokens an answer may have.
      rows: a prediction for every question -> a benchmark's rows of results, in the same order.
      units: rows -> the items whose mean value is the score (see ``jaxmllm.data.benchmarks.base``).
      metric: the score's name.
    """

    max_new_tokens: int
    rows: Callable[[Sequence[str]], list[Row]]
    units: Callable[[Sequence[Row]], list[Unit]]
    metric: str = "accuracy"


@dataclasses.dataclass(frozen=True)
class Answer:
    """A generated answer: its token ids, the stop token included, and its text."""

    tokens: tuple[int, ...]
    text: str


@dataclasses.dataclass(frozen=True)
class Generated:
    """What was answered under every branch; U is the number of items that the benchmark scores (mostly questions).

    Attributes:
      metric: the score's name.
      clean: the clean model's answers ``[Q]``.
      answers: curve name -> the answers of each layer ``[L][Q]``.
      clean_values ``[U]``, values: curve name -> ``[L, U]``: scores, 0..1.
      question ``[U]``: number of the question that stands for each item.
      clusters ``[U]``: the items' images.
      generated: answers that were generated, the clean ones included; ``tried`` how many were found without.
    """

    metric: str
    clean: list[str]
    answers: dict[str, list[list[str]]]
    clean_values: Float[np.ndarray, " U"]
    values: dict[str, Float[np.ndarray, "L U"]]
    question: Int[np.ndarray, " U"]
    clusters: list[str]
    generated: int
    tried: int


KINDS = ("erase", "blind", "knockout", "head_scale")


def of_one_structure(branches: Sequence[Edits]) -> tuple[list[Edits], Edits]:
    """Branches as edits of one structure, so that they share programs; and the edits of it that do nothing.

    A kind of edit that a branch lacks is there at strength 0, which changes no bit.
    """
    with_kind = {kind: next((edits for edits in branches if getattr(edits, kind)), Edits()) for kind in KINDS}
    idle = Edits(**{kind: tuple(_idle(term) for term in getattr(edits, kind)) for kind, edits in with_kind.items()})
    alike = [
        dataclasses.replace(idle, **{kind: getattr(edits, kind) for kind in KINDS if getattr(edits, kind)})
        for edits in branches
    ]
    return alike, idle


def _idle(term: Any) -> Any:
    return dataclasses.replace(term, layers=dataclasses.replace(term.layers, strength=0 * term.layers.strength))


def generate_answers(
    model: Any,
    questions: Sequence[Question],
    rows: Sequence[int],
    edits: Edits | None,
    max_new_tokens: int,
    batch_size: int,
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[Answer]:
    """Greedy answers to some of the questions, a batch at a time, or a quarter of one where few are left.

    Args:
      model: a loaded model.
      questions: all of them.
      rows: numbers of those that are asked.
      edits: interventions.
      max_new_tokens: tokens an answer may have.
      batch_size: questions answered together, at most.
      on_progress: called with the number of questions done.
    """
    found: list[Answer] = []
    while len(found) < len(rows):
        left = rows[len(found) :][:batch_size]
        quarter = max(1, batch_size // 4)
        size = quarter if len(left) <= quarter else batch_size
        asked = [questions[row] for row in (*left, *[left[-1]] * (size - len(left)))]
        inputs = model.prepare([question.image for question in asked], [question.text for question in asked])
        batch = generate(model, inputs, max_new_tokens=max_new_tokens, edits=edits)
        for row, length, text in zip(batch.tokens, batch.lengths, batch.texts or (), strict=True):
            found.append(Answer(tuple(row[:length].tolist()), text))
        del found[len(rows) :]
        on_progress(len(found))
    return found


def answer_branches(
    sweeper: Sweeper,
    setup: Setup,
    questions: Sequence[Question],
    edits: Sequence[Edits],
    clean: Sequence[Answer],
    max_new_tokens: int,
    batch_size: int,
    on_progress: Callable[[int], None] = lambda done: None,
) -> tuple[list[list[Answer]], int]:
    """The answer of every branch to every question.

    Args:
      sweeper: the branches, set up for these questions.
      setup: of the questions; the plain way tries no answers.
      questions: all of them.
      edits: the branches again, of one structure.
      clean: the clean model's answers.
      max_new_tokens: tokens an answer may have.
      batch_size: questions answered together, at most.
      on_progress: called with the number of answers known, of branches times questions.

    Returns:
      Answers ``[branches][Q]``, and how many of them were found without generating.
    """
    many = len(questions)
    known: dict[tuple[int, int], Answer] = {}
    open_ = np.ones((len(sweeper.branches), many), bool)
    tried = 0

    def settle(branch: int, row: int, answer: Answer) -> None:
        known[branch, row], open_[branch, row] = answer, False

    def try_answers(candidates: Sequence[Answer]) -> int:
        """Tries an answer to each question on all branches that are open; how many it fits."""
        # all questions are asked, also those of no interest: blocks keep their shapes, so nothing is compiled anew
        fitting = [answer.tokens[: setup.cut.answer_length] for answer in candidates]
        fits = np.asarray(run_blocks(sweeper, setup, questions, fitting).edited.correct)
        whole = np.array([len(answer.tokens) <= setup.cut.answer_length for answer in candidates])
        found = np.argwhere(fits & open_ & whole)
        for branch, row in found.tolist():
            settle(branch, row, candidates[row])
        on_progress(int((~open_).sum()))
        return len(found)

    if setup.plan is not None:
        tried += try_answers(clean)
    while open_.any():
        branch = int(open_.sum(axis=1).argmax())
        rows = np.flatnonzero(open_[branch]).tolist()
        found = generate_answers(sweeper.model, questions, rows, edits[branch], max_new_tokens, batch_size)
        for row, answer in zip(rows, found, strict=True):
            settle(branch, row, answer)
        on_progress(int((~open_).sum()))
        if setup.plan is not None and open_[:, rows].sum() >= TRY_ABOVE * many:
            latest = dict(zip(rows, found, strict=True))
            tried += try_answers([latest.get(row, answer) for row, answer in enumerate(clean)])
    return [[known[branch, row] for row in range(many)] for branch in range(len(sweeper.branches))], tried


def judge_answers(
    judge: Judge,
    questions: Sequence[Question],
    clean: Sequence[Answer],
    answers: Sequence[Sequence[Answer]],
    place: dict[str, slice],
    tried: int,
) -> Generated:
    """Scores the answers of all branches as the benchmark does.

    Args:
      judge: of the benchmark.
      questions: all of them.
      clean: the clean model's answers.
      answers: ``[branches][Q]``.
      place: where each curve's branches are.
      tried: answers that were found without generating.
    """
    number = {question.question_id: row for row, question in enumerate(questions)}

    def units(found: Sequence[Answer]) -> list[Unit]:
        return judge.units(judge.rows([answer.text for answer in found]))

    def values(found: Sequence[Answer]) -> np.ndarray:
        return np.array([unit.value for unit in units(found)], float)

    of_clean = units(clean)
    by_branch = [values(found) for found in answers]
    texts = [[answer.text for answer in found] for found in answers]
    return Generated(
        metric=judge.metric,
        clean=[answer.text for answer in clean],
        answers={name: texts[at] for name, at in place.items()},
        clean_values=np.array([unit.value for unit in of_clean], float),
        values={name: np.stack(by_branch[at]) for name, at in place.items()},
        question=np.array([number[unit.key] for unit in of_clean]),
        clusters=[unit.cluster for unit in of_clean],
        generated=len(clean) + len(answers) * len(clean) - tried,
        tried=tried,
    )
