"""Questions about scenes of small objects at a high resolution, where a right crop shows what the whole does not.

The pictures are 336 pixels wide and high and their objects 17 to 34 pixels; the embedded model sees them at 84 pixels,
an object in 4 to 8 of them, and a crop from the original at up to their full resolution. Nothing is read but the
digits that come with the package, and the seed decides everything.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from jaxmllm.data.digits import HALVES, held_out_digits
from jaxmllm.data.questions import Question
from jaxmllm.data.scene_questions import EVEN_MIX, ask_all
from jaxmllm.data.scenes import render, sample_scene, scale_box
from jaxmllm.errors import InputError
from jaxmllm.processing.images import StoredImage

SIDE = 336  # pixels of a picture's width and height
SCALE = 0.3  # of the objects, as a share of their usual size
OBJECTS = (2, 5)
A_SCENE = 8  # questions asked of each scene


def small_scene_questions(split: str, count: int = 30 * A_SCENE, seed: int = 0) -> list[Question]:
    """The first questions of a split: eight a scene, of all kinds about equally often.

    Every scene has random numbers of its own, so a longer list begins as a shorter one does.

    Args:
      split: ``validation`` to choose by, ``test`` to report on; neither scenes nor digits are shared.
      count: how many questions.
      seed: of the scenes.

    Returns:
      Questions with the boxes of their evidence and of all objects, in pixels; ``image`` names the scene.

    Raises:
      InputError: another split, fewer than one question, a negative seed.
    """
    if split not in HALVES:
        raise InputError(f"split is {split!r}; expected one of {', '.join(HALVES)}")
    if count < 1 or seed < 0:
        raise InputError(f"count={count}, seed={seed}; expected at least one question, and a seed from 0 on")
    digits = held_out_digits(split)
    questions: list[Question] = []
    for number in range(-(-count // A_SCENE)):
        rng = np.random.default_rng([HALVES.index(split), seed, number])
        scene = sample_scene(rng, digits, OBJECTS, scale=SCALE)
        image = StoredImage(f"{split}-{seed}-{number:04d}.png", _png(render(scene, SIDE)))
        objects = tuple(scale_box(item.box, SIDE) for item in scene.objects)
        questions += [
            Question(
                question_id=f"{split}-{seed}-{len(questions) + place:04d}",
                image=image,
                text=asked.text,
                category=asked.kind,
                answer=asked.answer,
                boxes=asked.scaled(SIDE),
                objects=objects,
            )
            for place, asked in enumerate(ask_all(rng, scene, A_SCENE, EVEN_MIX))
        ]
    return questions[:count]


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png", compress_level=1)
    return buffer.getvalue()
