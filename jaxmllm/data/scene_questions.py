"""Questions asked of a scene, with one-word answers and the exact boxes of the evidence.

Every question is unambiguous for its scene: an object is only named by a colour or kind that no other object has, and
places are only compared where they clearly differ. Texts and answers are lower-case words divided by single spaces,
all of them in `VOCABULARY`.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from jaxmllm.data.digits import DigitBitmaps
from jaxmllm.data.scenes import (
    COLOUR_NAMES,
    DIGITS,
    KINDS,
    REFERENCE_SIZE,
    SHAPES,
    Box,
    Scene,
    SceneObject,
    render,
    sample_scene,
    scale_box,
)
from jaxmllm.errors import InputError

_T = TypeVar("_T")

NUMBER_WORDS: tuple[str, ...] = ("zero", "one", "two", "three", "four", "five", "six", "seven")
"""Answers to counting questions: words, so that a count is never the same token as a handwritten digit."""

# By how much, in unit coordinates, centres must differ before their order is asked for.
EXTREME_MARGIN = 6 / REFERENCE_SIZE
RELATION_MARGIN = 10 / REFERENCE_SIZE

_ATTEMPTS_PER_QUESTION = 6


@dataclass(frozen=True)
class Question:
    """A question of one of `QUESTION_KINDS`, its answer, and the unit boxes of the objects it is about."""

    kind: str
    text: str
    answer: str
    boxes: tuple[Box, ...]

    def scaled(self, size: int) -> tuple[Box, ...]:
        """The evidence boxes in pixels of a `size` by `size` image (not rounded)."""
        return tuple(scale_box(box, size) for box in self.boxes)


def _pick(rng: np.random.Generator, options: Sequence[_T]) -> _T:
    return options[int(rng.integers(len(options)))]


def _alone(scene: Scene, attribute: str) -> list[SceneObject]:
    """The objects whose colour or kind no other object shares."""
    tally = Counter(getattr(item, attribute) for item in scene.objects)
    return [item for item in scene.objects if tally[getattr(item, attribute)] == 1]


def _ask_colour(rng: np.random.Generator, scene: Scene) -> Question | None:
    return _ask_colour_of(rng, "colour", [item for item in _alone(scene, "kind") if not item.is_digit])


def _ask_digit_colour(rng: np.random.Generator, scene: Scene) -> Question | None:
    return _ask_colour_of(rng, "digit_colour", [item for item in _alone(scene, "kind") if item.is_digit])


def _ask_colour_of(rng: np.random.Generator, kind: str, items: list[SceneObject]) -> Question | None:
    if not items:
        return None
    item = _pick(rng, items)
    return Question(kind, f"what colour is the {item.kind} ?", item.colour, (item.box,))


def _ask_shape(rng: np.random.Generator, scene: Scene) -> Question | None:
    return _ask_kind_of(rng, "shape", [item for item in _alone(scene, "colour") if not item.is_digit])


def _ask_digit(rng: np.random.Generator, scene: Scene) -> Question | None:
    return _ask_kind_of(rng, "digit", [item for item in _alone(scene, "colour") if item.is_digit])


def _ask_kind_of(rng: np.random.Generator, kind: str, items: list[SceneObject]) -> Question | None:
    if not items:
        return None
    item = _pick(rng, items)
    return Question(kind, f"what {kind} is {item.colour} ?", item.kind, (item.box,))


def _ask_count(rng: np.random.Generator, scene: Scene) -> Question | None:
    counted: list[tuple[str, list[SceneObject]]] = [
        ("objects", list(scene.objects)),
        ("shapes", [item for item in scene.objects if not item.is_digit]),
        ("digits", [item for item in scene.objects if item.is_digit]),
    ]
    for colour in COLOUR_NAMES:
        counted.append((f"{colour} objects", [item for item in scene.objects if item.colour == colour]))
    # The answer is drawn before the question: most colours are absent, so otherwise most answers would be "zero".
    by_number: dict[int, list[tuple[str, list[SceneObject]]]] = defaultdict(list)
    for entry in counted:
        by_number[len(entry[1])].append(entry)
    number = _pick(rng, sorted(by_number))
    name, items = _pick(rng, by_number[number])
    return Question("count", f"how many {name} are there ?", NUMBER_WORDS[number], tuple(item.box for item in items))


def _ask_presence(rng: np.random.Generator, scene: Scene) -> Question | None:
    families: list[tuple[str, tuple[str, ...], str]] = [
        ("colour", COLOUR_NAMES, " object"),
        ("kind", SHAPES, ""),
        ("kind", DIGITS, ""),
    ]
    choices = []
    for attribute, words, suffix in families:
        present = {getattr(item, attribute) for item in scene.objects}.intersection(words)
        # A family without both answers would give the answer away, e.g. digits asked for where there are none.
        if present and len(present) < len(words):
            choices.append((attribute, words, suffix, present))
    attribute, words, suffix, present = _pick(rng, choices)
    answer = bool(rng.integers(2))
    word = _pick(rng, [word for word in words if (word in present) == answer])
    article = "an" if word in ("orange", "8") else "a"
    boxes = tuple(item.box for item in scene.objects if getattr(item, attribute) == word)
    return Question("presence", f"is there {article} {word}{suffix} ?", "yes" if answer else "no", boxes)


def _ask_extreme(rng: np.random.Generator, scene: Scene) -> Question | None:
    if len(scene.objects) < 2:
        return None
    options: list[tuple[str, SceneObject]] = []
    for axis, first, last in ((0, "leftmost", "rightmost"), (1, "topmost", "bottommost")):
        ordered = sorted(scene.objects, key=lambda item: item.centre[axis])
        if ordered[1].centre[axis] - ordered[0].centre[axis] >= EXTREME_MARGIN:
            options.append((first, ordered[0]))
        if ordered[-1].centre[axis] - ordered[-2].centre[axis] >= EXTREME_MARGIN:
            options.append((last, ordered[-1]))
    if not options:
        return None
    word, item = _pick(rng, options)
    if rng.integers(2):
        return Question("extreme", f"what is the {word} object ?", item.kind, (item.box,))
    return Question("extreme", f"what colour is the {word} object ?", item.colour, (item.box,))


def _ask_above_below(rng: np.random.Generator, scene: Scene) -> Question | None:
    return _ask_relation(rng, scene, "above_below", 1, "is the {} above or below the {} ?", ("above", "below"))


def _ask_left_right(rng: np.random.Generator, scene: Scene) -> Question | None:
    return _ask_relation(rng, scene, "left_right", 0, "is the {} left or right of the {} ?", ("left", "right"))


def _ask_relation(
    rng: np.random.Generator, scene: Scene, kind: str, axis: int, template: str, answers: tuple[str, str]
) -> Question | None:
    """Compare two objects along an axis; answers[0] where the first named has the smaller coordinate."""
    names = {item: [f"{item.colour} object"] for item in _alone(scene, "colour")}
    for item in _alone(scene, "kind"):
        names.setdefault(item, []).append(item.kind)
    # Every pair stands here in both orders, which balances the two answers.
    pairs = [
        (one, other)
        for one in names
        for other in names
        if abs(one.centre[axis] - other.centre[axis]) >= RELATION_MARGIN
    ]
    if not pairs:
        return None
    one, other = _pick(rng, pairs)
    answer = answers[0] if one.centre[axis] < other.centre[axis] else answers[1]
    text = template.format(_pick(rng, names[one]), _pick(rng, names[other]))
    return Question(kind, text, answer, (one.box, other.box))


_ASKERS: Mapping[str, Callable[[np.random.Generator, Scene], Question | None]] = {
    "colour": _ask_colour,
    "shape": _ask_shape,
    "digit": _ask_digit,
    "digit_colour": _ask_digit_colour,
    "count": _ask_count,
    "presence": _ask_presence,
    "extreme": _ask_extreme,
    "above_below": _ask_above_below,
    "left_right": _ask_left_right,
}

QUESTION_KINDS: tuple[str, ...] = tuple(_ASKERS)

_FRAME_WORDS = (
    "? what colour is the shape digit how many shapes digits objects are there a an object leftmost rightmost topmost "
    "bottommost above or below left right of yes no"
)

VOCABULARY: tuple[str, ...] = tuple(sorted({*_FRAME_WORDS.split(), *COLOUR_NAMES, *KINDS, *NUMBER_WORDS}))
"""Every word of every question and answer, sorted; "?" is a word."""


EVEN_MIX: Mapping[str, float] = {
    "colour": 2.04, "shape": 2.48, "digit": 3.77, "digit_colour": 2.32, "count": 1.0, "presence": 1.01,
    "extreme": 1.06, "above_below": 1.16, "left_right": 1.09,
}  # fmt: skip
"""Weights for `ask_all` under which every kind makes up about a ninth of the questions.

Few scenes admit a question about a digit and all admit one about a count, so equal weights would not; these were found
by counting.
"""


def ask(rng: np.random.Generator, scene: Scene, kind: str) -> Question | None:
    """Draw a question of one of `QUESTION_KINDS`, or None if the scene admits none.

    Raises InputError for an unknown kind.
    """
    if kind not in _ASKERS:
        raise InputError(f"unknown question kind {kind!r}; there are {', '.join(QUESTION_KINDS)}")
    return _ASKERS[kind](rng, scene)


def ask_all(
    rng: np.random.Generator, scene: Scene, count: int, weights: Mapping[str, float] | None = None
) -> list[Question]:
    """Draw exactly `count` questions, their kinds in proportion to `weights` (all alike when None; 0 where missing).

    Kinds the scene does not admit are passed over. The texts differ as far as the scene has that many questions to
    offer; after that they repeat. Raises InputError for an unknown kind, a negative weight, or when the scene admits
    no question of any kind with a weight ("count" and "presence" are admitted by every scene).
    """
    weights = dict.fromkeys(QUESTION_KINDS, 1.0) if weights is None else dict(weights)
    unknown = set(weights) - set(QUESTION_KINDS)
    if unknown:
        raise InputError(f"unknown question kinds {sorted(unknown)}; there are {', '.join(QUESTION_KINDS)}")
    if any(weight < 0 for weight in weights.values()):
        raise InputError("weights must not be negative")
    kinds = [kind for kind in QUESTION_KINDS if weights.get(kind, 0.0) > 0]
    limits = np.cumsum([weights[kind] for kind in kinds]).tolist()
    questions: list[Question] = []
    seen: set[str] = set()
    repeats = 0
    while len(questions) < count:
        if not kinds:
            raise InputError("the scene admits no question of the kinds with a weight")
        drawn = rng.random() * limits[-1]
        kind = next(kind for kind, limit in zip(kinds, limits, strict=True) if drawn < limit)
        question = ask(rng, scene, kind)
        if question is None:
            kinds.remove(kind)
            limits = np.cumsum([weights[kind] for kind in kinds]).tolist()
        elif question.text not in seen or repeats >= _ATTEMPTS_PER_QUESTION * count:
            seen.add(question.text)
            questions.append(question)
        else:
            repeats += 1
    return questions


def majority_baseline(questions: Iterable[Question]) -> float:
    """Fraction answered right by giving, for each question kind, the most frequent answer of that kind.

    Raises InputError without questions.
    """
    tallies: dict[str, Counter[str]] = defaultdict(Counter)
    for question in questions:
        tallies[question.kind][question.answer] += 1
    if not tallies:
        raise InputError("no questions")
    best = sum(max(tally.values()) for tally in tallies.values())
    return best / sum(sum(tally.values()) for tally in tallies.values())


def write_question_set(
    directory: str | Path,
    rng: np.random.Generator,
    digits: DigitBitmaps,
    scenes: int = 64,
    questions_per_scene: int = 8,
    size: int = REFERENCE_SIZE,
) -> Path:
    """Write scenes as `images/NNNN.png` and their questions as `questions.jsonl`; return the latter's path.

    The kinds of questions are about equally frequent. One JSON object a line: question_id, image (file name), text,
    category (the question kind), answer, boxes (the evidence) and objects (all objects of the scene), both lists of
    [x0, y0, x1, y1] in pixels. The directory appears complete or not at all.

    Raises InputError when it is there already.
    """
    directory = Path(directory)
    if directory.exists():
        raise InputError(f"{directory} is already there; remove it or name another directory")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=directory.parent) as holder:
        partial = Path(holder) / directory.name
        (partial / "images").mkdir(parents=True)
        lines: list[str] = []
        for number in range(scenes):
            scene = sample_scene(rng, digits)
            name = f"{number:04d}.png"
            Image.fromarray(render(scene, size)).save(partial / "images" / name, optimize=True)
            for question in ask_all(rng, scene, questions_per_scene, EVEN_MIX):
                record = {
                    "question_id": len(lines),
                    "image": name,
                    "text": question.text,
                    "category": question.kind,
                    "answer": question.answer,
                    "boxes": _rounded(question.scaled(size)),
                    "objects": _rounded(scale_box(item.box, size) for item in scene.objects),
                }
                lines.append(json.dumps(record) + "\n")
        (partial / "questions.jsonl").write_text("".join(lines), encoding="utf-8")
        os.rename(partial, directory)
    return directory / "questions.jsonl"


def _rounded(boxes: Iterable[Box]) -> list[list[float]]:
    return [[round(edge, 2) for edge in box] for box in boxes]
