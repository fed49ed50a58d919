"""The study of a question file: every curve of the paper's first part, over all its questions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxmllm.analysis.attention import attention_evolution
from jaxmllm.analysis.edits import stack_edits
from jaxmllm.analysis.fusion import fusion_layers, review_layer
from jaxmllm.analysis.geometry import TokenBoxes, token_boxes
from jaxmllm.analysis.maps import comparison_maps
from jaxmllm.analysis.masking import Scope, Scores, layer_edits, sweep_batch
from jaxmllm.analysis.pointing import attention_mass, chance, pointing_hit
from jaxmllm.data.questions import Question
from jaxmllm.errors import InputError
from jaxmllm.models.edits import Edits
from jaxmllm.processing import append_answers, encode_answers, open_image

# Sequences are padded to a multiple of this, so that a data set of mixed lengths compiles a handful of programs.
SEQUENCE_BUCKET = 32

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
      tokens: the pixel boxes of each question's image tokens.
    """

    questions: tuple[Question, ...]
    edited: dict[str, Scores]
    clean: Scores
    early: Scores
    attention: Float[np.ndarray, "L Q N"]
    hellinger: Float[np.ndarray, "L Q"]
    tokens: tuple[TokenBoxes, ...]

    @property
    def num_layers(self) -> int:
        return self.attention.shape[0]

    @property
    def categories(self) -> list[str]:
        """Kinds of questions, in order of their first appearance."""
        return list(dict.fromkeys(question.category for question in self.questions))

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
    batch_size: int = 32,
    on_progress: Callable[[int], None] = lambda done: None,
) -> Study:
    """Runs the clean pass and every masking curve over all questions.

    Args:
      model: a loaded model.
      questions: of ``read_questions``, one image each.
      curves: edits with their scope: ``erase``, ``blind``, ``knockout``, followed by ``:from``, ``:up_to`` or the width
        of a window where more than layer i is meant.
      batch_size: questions a batch.
      on_progress: called with the number of questions done.

    Raises:
      JaxmllmError: unknown curves, unreadable images, answers without tokens.
    """
    if not questions:
        raise InputError("no questions to study")
    branches, place = stack_curves(curves, model.num_layers)
    answers = encode_answers(model.processor, [question.answer for question in questions])
    answer_length = max(map(len, answers))
    parts, tokens = [], []
    for rows in batches(len(questions), batch_size):
        images = [open_image(questions[row].image) for row in rows]
        prompts = append_answers(
            model.prepare(images, [questions[row].text for row in rows]),
            [answers[row] for row in rows],
            answer_length=answer_length,
            bucket=SEQUENCE_BUCKET,
        )
        result = sweep_batch(
            model.graphdef, model.params, model.as_inputs(prompts), jnp.asarray(prompts["answer_ids"]), branches
        )
        kept = len(set(rows))
        parts.append((*take_questions(result[:3], kept), np.asarray(result[3])[:, :kept]))
        tokens += token_boxes(model, [image.size for image in images[:kept]])
        on_progress(min(rows[-1] + 1, len(questions)))
    edited, clean, early = (
        jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=-1), *[part[item] for part in parts])
        for item in range(3)
    )
    attention = np.concatenate([part[3] for part in parts], axis=1)
    by_curve = {name: take_branches(edited[kind], branches_of_it) for name, (kind, branches_of_it) in place.items()}
    evolution = np.asarray(attention_evolution(attention))
    return Study(tuple(questions), by_curve, clean, early, attention, evolution, tuple(tokens))


def take_questions(scores: Any, count: int) -> Any:
    """The first questions of a pytree of scores, as NumPy arrays."""
    return jax.tree.map(lambda leaf: np.asarray(leaf)[..., :count], scores)


def take_branches(scores: Scores, branches: slice) -> Scores:
    """Some branches of stacked scores."""
    return jax.tree.map(lambda leaf: leaf[branches], scores)


def stack_curves(curves: Sequence[str], num_layers: int) -> tuple[dict[str, Edits], dict[str, tuple[str, slice]]]:
    """Stacks the edits of all curves, those of one kind together, so that each kind is compiled once.

    Returns:
      Stacked edits by kind; and for each curve its kind and its branches there.
    """
    edits: dict[str, list[Edits]] = {}
    place = {}
    for name in dict.fromkeys(curves):
        kind, scope = parse_curve(name)
        stack = edits.setdefault(kind, [])
        place[name] = (kind, slice(len(stack), len(stack) + num_layers))
        stack += layer_edits(kind, scope, num_layers)
    return {kind: stack_edits(stack) for kind, stack in edits.items()}, place


def batches(count: int, size: int) -> Iterator[list[int]]:
    """Row numbers of each batch; the last one is filled up with its last row, so that all have one shape."""
    size = min(size, count)
    for start in range(0, count, size):
        rows = list(range(start, min(start + size, count)))
        yield rows + [rows[-1]] * (size - len(rows))


@dataclasses.dataclass(frozen=True)
class Curves:
    """Means over the questions of one category (or all).

    Attributes:
      accuracy: curve name -> ``[L]``, 0..1; ``early`` is the early output.
      log_probability: likewise, natural logarithm of the whole answer.
      hellinger: ``[L]``, distance of attention to the last layer's.
      fusion: fusion layers by ``fusion_layers`` on the accuracy under erasure; ``None`` where that was not run.
      review: the review layer by ``review_layer`` on the accuracy with one layer blinded.
    """

    questions: int
    clean_accuracy: float
    clean_log_probability: float
    accuracy: dict[str, Float[np.ndarray, " L"]]
    log_probability: dict[str, Float[np.ndarray, " L"]]
    hellinger: Float[np.ndarray, " L"]
    fusion: list[int] | None
    review: int | None


def curves_of(study: Study, category: str | None = None, chosen: np.ndarray | None = None) -> Curves:
    """The curves of one category; ``chosen [Q]`` restricts them to some questions.

    Raises:
      InputError: no question is left.
    """
    rows = study.of(category) & (True if chosen is None else chosen)
    if not rows.any():
        raise InputError(f"no question of category {category!r}")
    scores = {**study.edited, "early": study.early}
    accuracy = {name: np.asarray(score.correct)[:, rows].mean(axis=1) for name, score in scores.items()}
    clean = float(np.asarray(study.clean.correct)[rows].mean())
    return Curves(
        questions=int(rows.sum()),
        clean_accuracy=clean,
        clean_log_probability=float(np.asarray(study.clean.log_probability)[rows].mean()),
        accuracy=accuracy,
        log_probability={
            name: np.asarray(score.log_probability)[:, rows].mean(axis=1) for name, score in scores.items()
        },
        hellinger=study.hellinger[:, rows].mean(axis=1),
        fusion=fusion_layers(accuracy["erase"], clean) if "erase" in accuracy else None,
        review=review_layer(accuracy["blind"], clean) if "blind" in accuracy else None,
    )


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
    cases = [(values[row], study.tokens[row], study.questions[row].boxes or ()) for row in numbers]
    return Pointing(
        hits=float(np.mean([pointing_hit(*case) for case in cases])),
        mass=float(np.mean([attention_mass(*case) for case in cases])),
    )
