"""The study of a question file: every curve of the paper's first part, over all its questions."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float

from jaxmllm.analysis.curves import Curves, curves_of
from jaxmllm.analysis.generated import Generated
from jaxmllm.analysis.maps import comparison_maps
from jaxmllm.analysis.masking import Scope, layer_edits
from jaxmllm.analysis.pointing import attention_mass, chance, pointing_hit
from jaxmllm.analysis.scores import Scores
from jaxmllm.analysis.sweeping import SweepCost
from jaxmllm.data.questions import Question
from jaxmllm.models.boxes import TokenBoxes


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
