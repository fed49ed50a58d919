"""The study of a question file: every curve of the paper's first part, over all its questions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float
from PIL import Image

from jaxmllm.analysis.attention import attention_evolution
from jaxmllm.analysis.blocks import run_blocks, set_up
from jaxmllm.analysis.curves import Curves, curves_of
from jaxmllm.analysis.generated import (
    Answer,
    Generated,
    Judge,
    answer_branches,
    generate_answers,
    judge_answers,
    of_one_structure,
)
from jaxmllm.analysis.geometry import looks_of, patch_boxes
from jaxmllm.analysis.maps import comparison_maps
from jaxmllm.analysis.masking import Scope, layer_edits
from jaxmllm.analysis.pointing import attention_mass, chance, pointing_hit
from jaxmllm.analysis.scores import Scores
from jaxmllm.analysis.sharing.budget import SweepPlan
from jaxmllm.analysis.sharing.compilations import count_compilations
from jaxmllm.analysis.sweeping import BATCH_SIZE, CACHE_LIMIT, SweepCost, Sweeper
from jaxmllm.data.questions import Question
from jaxmllm.decoding import batch_that_fits
from jaxmllm.errors import InputError
from jaxmllm.models.boxes import TokenBoxes
from jaxmllm.models.edits import Edits
from jaxmllm.models.inputs import Inputs
from jaxmllm.processing import encode_answers, image_size

DEFAULT_CURVES = ("erase", "blind", "blind:from", "knockout")


@dataclasses.dataclass(frozen=True)
class Study:
    """Results for every question; Q is the number of questions.

    Attributes:
      edited: curve name -> scores ``[L, Q]``.
      clean: scores ``[Q]``.
      early: scores ``[L, Q]``.
      attention: ``[L, Q, N]``, head mean, last prompt token to image tokens.
      hellinger: ``[L, Q]``, its distance to the last layer's.
      tokens: for each question the pixel boxes that a map over its image tokens is laid on: those of the tokens, or of
        the patches they look at by cross-attention.
      looks: there, how much each image token looked at each patch ``[N, P]``; ``None`` where tokens are patches.
      cost: what it cost, apart from generated answers.
      generated: answers that were generated under every branch, where a judge was given.
    """

    questions: tuple[Question, ...]
    edited: dict[str, Scores]
    clean: Scores
    early: Scores
    attention: Float[np.ndarray, "L Q N"]
    hellinger: Float[np.ndarray, "L Q"]
    tokens: tuple[TokenBoxes, ...]
    looks: tuple[Float[np.ndarray, "N P"] | None, ...]
    cost: SweepCost
    generated: Generated | None = None

    @property
    def num_layers(self) -> int:
        return self.attention.shape[0]

    @property
    def categories(self) -> list[str]:
        """Kinds of questions, in order of their first appearance."""
        return list(dict.fromkeys(question.category for question in self.questions))

    def on_image(self, row: int, values: Float[np.ndarray, "*axes N"]) -> Float[np.ndarray, "*axes P"]:
        """A map over a question's image tokens as one over ``tokens[row]``, without what is padding."""
        looks = self.looks[row]
        return values[..., : len(self.tokens[row].boxes)] if looks is None else values[..., : len(looks)] @ looks

    def of(self, category: str | None) -> np.ndarray:
        """Which questions are of a category, ``[Q]``; ``None`` means all."""
        return np.array([category in (None, question.category) for question in self.questions])


def parse_curve(name: str) -> tuple[str, Scope]:
    """``erase``, ``blind:from``, ``knockout:9`` ... as edit and scope.

    Raises:
      InputError: an unknown edit or scope.
    """
    edit, _, scope = name.partition(":")
    parsed: Scope = int(scope) if scope.isdigit() else (scope or "single")
    layer_edits(edit, parsed, 1)
    return edit, parsed


def run_study(
    model: Any,
    questions: Sequence[Question],
    curves: Sequence[str] = DEFAULT_CURVES,
    batch_size: int = BATCH_SIZE,
    on_progress: Callable[[float], None] = lambda done: None,
    *,
    plain: bool = False,
    budget: int | None = None,
    cache: Path | None = None,
    cache_limit: int = CACHE_LIMIT,
    on_plan: Callable[[SweepPlan], None] = lambda plan: None,
    judge: Judge | None = None,
    on_answers: Callable[[int], None] = lambda known: None,
) -> Study:
    """Runs the clean pass and every masking curve over all questions.

    Args:
      model: a loaded model.
      questions: of ``read_questions``, one image each.
      curves: edits with their scope: ``erase``, ``blind``, ``knockout``, followed by ``:from``, ``:up_to`` or the width
        of a window where more than layer i is meant.
      batch_size: questions a chunk, at most.
      on_progress: called with the number of questions done.
      plain: run everything for every branch instead of what changes.
      budget: bytes of device memory that may be taken, weights included; by default what the device grants.
      cache, cache_limit: folder for keys that serve every question, and the bytes it may take.
      on_plan: called with the plan before the sweep runs.
      judge: where answers are to be generated under every branch, what scores them.
      on_answers: called with the number of answers known, of all branches and questions.

    Raises:
      JaxmllmError: unknown curves, unreadable images, answers without tokens, a budget that is too small.
    """
    if not questions:
        raise InputError("no questions to study")
    branches, place = branches_of(curves, model.num_layers)
    answers = encode_answers(model.processor, [question.answer for question in questions])
    clean: list[Answer] = []
    size, (alike, idle) = batch_size, of_one_structure(branches)
    if judge is not None:
        size = _answers_together(model, questions, idle, judge.max_new_tokens, batch_size, budget)
        clean = generate_answers(model, questions, range(len(questions)), idle, judge.max_new_tokens, size)
    longest = max(len(tokens) for tokens in (*answers, *(answer.tokens for answer in clean)))
    setup = set_up(model, questions, branches, longest, batch_size, plain, budget)
    if setup.plan is not None:
        on_plan(setup.plan)
    tokens: dict[int, TokenBoxes] = {}
    looks: dict[int, np.ndarray] = {}

    def look(rows: list[int], opened: list[Image.Image], inputs: Inputs) -> None:
        tokens.update(zip(rows, patch_boxes(model, [image.size for image in opened]), strict=True))
        if model.family.patch_boxes is not None and inputs.images is not None:
            looks.update(zip(rows, looks_of(model, inputs.images), strict=True))

    with count_compilations() as compilations:
        sweeper = Sweeper(model, branches, setup.shapes, setup.plan, compilations, cache=cache, cache_limit=cache_limit)
        scores = run_blocks(sweeper, setup, questions, answers, on_progress=on_progress, on_block=look)
        cost = sweeper.cost()
        generated = None
        if judge is not None:
            found, tried = answer_branches(
                sweeper, setup, questions, alike, clean, judge.max_new_tokens, size, on_answers
            )
            generated = judge_answers(judge, questions, clean, found, place, tried)
    edited = {name: jax.tree.map(lambda leaf, at=at: leaf[at], scores.edited) for name, at in place.items()}
    return Study(
        questions=tuple(questions),
        edited=edited,
        clean=scores.clean,
        early=scores.early,
        attention=scores.attention,
        hellinger=np.asarray(attention_evolution(scores.attention)),
        tokens=tuple(tokens[number] for number in range(len(questions))),
        looks=tuple(looks.get(number) for number in range(len(questions))),
        cost=cost,
        generated=generated,
    )


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


@dataclasses.dataclass(frozen=True)
class Pointing:
    """Scores of one map against the evidence boxes.

    Attributes:
      hits: share of questions whose highest token is on the evidence, 0..1.
      mass: mean share of the map's positive mass that is on the evidence, 0..1.
    """

    hits: float
    mass: float


@dataclasses.dataclass(frozen=True)
class PointingTable:
    """The pointing game over one half of the images; what had to be chosen was chosen on the other half.

    Attributes:
      maps: map name -> scores.
      by_layer: ``[L]`` scores of each layer's attention.
      area_chance: chance of a random pixel; ``object_chance``: of a random object of the scene.
      single_layer: the layer of "best single layer".
      questions: how many were scored.
    """

    maps: dict[str, Pointing]
    by_layer: list[Pointing]
    area_chance: float
    object_chance: float
    single_layer: int
    questions: int


def pointing_table(study: Study) -> PointingTable | None:
    """Scores attention maps against evidence boxes; ``None`` where the questions have none.

    Questions that are about exactly one object are scored. Every second image serves to choose (the best single layer,
    the fusion layers), the others are reported.
    """
    single = np.array([question.boxes is not None and len(question.boxes) == 1 for question in study.questions])
    images = {image: number for number, image in enumerate(dict.fromkeys(q.image for q in study.questions))}
    to_choose = np.array([images[question.image] % 2 == 0 for question in study.questions])
    chosen, reported = single & to_choose, single & ~to_choose
    if not chosen.any() or not reported.any():
        return None
    layers = range(study.num_layers)
    best = max(layers, key=lambda layer: _pointing(study, study.attention[layer], chosen).hits)
    overall = curves_of(study, chosen=to_choose)
    fusion_of_kind = np.zeros(len(study.questions), int)
    for category in study.categories:
        rows = study.of(category)
        curves = curves_of(study, category, to_choose) if (rows & to_choose).any() else overall
        fusion_of_kind[rows] = _main_fusion_layer(curves)
    maps = comparison_maps(study.attention, best, overall.fusion or [], fusion_of_kind)
    chances = np.array(
        [
            chance(study.tokens[row], study.questions[row].boxes or (), study.questions[row].objects or ())
            for row in np.flatnonzero(reported)
        ]
    )
    return PointingTable(
        maps={name: _pointing(study, values, reported) for name, values in maps.items()},
        by_layer=[_pointing(study, study.attention[layer], reported) for layer in layers],
        area_chance=float(chances[:, 0].mean()),
        object_chance=float(chances[:, 1].mean()),
        single_layer=best,
        questions=int(reported.sum()),
    )


def _main_fusion_layer(curves: Curves) -> int:
    """The layer whose reading of the image gains most accuracy."""
    erased = curves.accuracy.get("erase")
    if erased is None:
        return len(curves.hellinger) - 1
    return int(np.argmax(np.diff(np.append(erased, curves.clean_accuracy))))


def _pointing(study: Study, values: Float[np.ndarray, "Q N"], rows: np.ndarray) -> Pointing:
    numbers = np.flatnonzero(rows)
    cases = [
        (study.on_image(row, values[row]), study.tokens[row], study.questions[row].boxes or ())
        for row in numbers.tolist()
    ]
    return Pointing(
        hits=float(np.mean([pointing_hit(*case) for case in cases])),
        mass=float(np.mean([attention_mass(*case) for case in cases])),
    )
