"""One unit of a study: some of its questions under every branch, and how what comes of it is kept as arrays."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float
from PIL import Image

from jaxmllm.analysis.blocks import Setup, run_blocks
from jaxmllm.analysis.generated import Answer, answer_branches, generate_answers
from jaxmllm.analysis.geometry import looks_of
from jaxmllm.analysis.scores import BlockScores, Scores
from jaxmllm.analysis.sweeping import Sweeper
from jaxmllm.data.questions import Question
from jaxmllm.models.edits import Edits
from jaxmllm.models.inputs import Inputs

TABLES = ("edited", "clean", "early")


@dataclasses.dataclass(frozen=True)
class Generating:
    """How answers are generated under every branch.

    Attributes:
      edits: the branches, of one structure; ``idle`` what does nothing, of the same structure.
      max_new_tokens: tokens an answer may have.
      batch_size: questions answered together, at most.
    """

    edits: Sequence[Edits]
    idle: Edits
    max_new_tokens: int
    batch_size: int


@dataclasses.dataclass(frozen=True)
class UnitResult:
    """What a unit of R questions came to.

    Attributes:
      scores: of the reference answers.
      looks: for each question how much its image tokens looked at each patch, for families that look; else nothing.
      clean: the clean model's generated answers; ``answers`` those of every branch; both empty where none are wanted.
      tried: answers that were found without generating.
    """

    scores: BlockScores
    looks: tuple[Float[np.ndarray, "N P"], ...] = ()
    clean: tuple[Answer, ...] = ()
    answers: tuple[tuple[Answer, ...], ...] = ()
    tried: int = 0


def run_unit(
    sweeper: Sweeper,
    setup: Setup,
    questions: Sequence[Question],
    answers: Sequence[Sequence[int]],
    generating: Generating | None = None,
    on_progress: Callable[[float], None] = lambda done: None,
    on_answers: Callable[[int], None] = lambda known: None,
) -> UnitResult:
    """Runs a unit.

    Args:
      sweeper: the branches.
      setup: of the whole study.
      questions: of the unit.
      answers: token ids of the reference answer to each.
      generating: how answers are generated; ``None`` for not at all.
      on_progress: called with the number of questions done.
      on_answers: called with the number of generated answers known, of all branches and questions.
    """
    model, own = sweeper.model, setup.of_unit(len(questions))
    looks: dict[int, np.ndarray] = {}

    def look(rows: list[int], opened: list[Image.Image], inputs: Inputs) -> None:
        if model.family.patch_boxes is not None and inputs.images is not None:
            looks.update(zip(rows, looks_of(model, inputs.images), strict=True))

    scores = run_blocks(sweeper, own, questions, answers, on_progress=on_progress, on_block=look)
    looked = tuple(looks[row] for row in sorted(looks))
    if generating is None:
        return UnitResult(scores, looked)
    limit, size = generating.max_new_tokens, generating.batch_size
    clean = generate_answers(model, questions, range(len(questions)), generating.idle, limit, size)
    found, tried = answer_branches(sweeper, own, questions, generating.edits, clean, limit, size, on_answers)
    return UnitResult(scores, looked, tuple(clean), tuple(map(tuple, found)), tried)


def to_arrays(result: UnitResult) -> dict[str, np.ndarray]:
    """A unit's result as named arrays, to be written."""
    arrays = {
        f"{table}.{field.name}": np.asarray(getattr(getattr(result.scores, table), field.name))
        for table in TABLES
        for field in dataclasses.fields(Scores)
    }
    arrays["attention"] = result.scores.attention
    if result.looks:
        arrays["looks"] = np.stack(result.looks)
    if result.clean:
        told = {"clean": result.clean, "answers": result.answers}
        arrays["generated"] = np.array(json.dumps(told, default=dataclasses.asdict))
        arrays["tried"] = np.array(result.tried)
    return arrays


def from_arrays(arrays: Mapping[str, np.ndarray]) -> UnitResult:
    """The inverse of ``to_arrays``.

    Raises:
      KeyError: an array is missing.
    """
    tables = {
        table: Scores(**{field.name: arrays[f"{table}.{field.name}"] for field in dataclasses.fields(Scores)})
        for table in TABLES
    }
    scores = BlockScores(tables["edited"], tables["clean"], tables["early"], arrays["attention"])
    looks = tuple(arrays["looks"]) if "looks" in arrays else ()
    if "generated" not in arrays:
        return UnitResult(scores, looks)
    told = json.loads(str(arrays["generated"]))

    def answer(fields: Mapping[str, Any]) -> Answer:
        return Answer(tuple(fields["tokens"]), fields["text"])

    clean = tuple(map(answer, told["clean"]))
    answers = tuple(tuple(map(answer, branch)) for branch in told["answers"])
    return UnitResult(scores, looks, clean, answers, int(arrays["tried"]))


def join_looks(results: Sequence[UnitResult]) -> list[Float[np.ndarray, "N P"] | None]:
    """The looks of all units' questions, one after another; ``None`` for each where there are none."""
    found: list[Any] = []
    for result in results:
        many = len(jax.tree.leaves(result.scores.clean)[0])
        found += result.looks or [None] * many
    return found
