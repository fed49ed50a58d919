"""What a job asks: how many questions, how long, about which images; and inputs of that shape for every family."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxmllm.analysis.masking import layer_edits
from jaxmllm.analysis.study import parse_curve
from jaxmllm.errors import InputError
from jaxmllm.models.edits import Edits
from jaxmllm.models.inputs import Inputs, as_inputs
from jaxmllm.models.qwen2_vl import smart_resize
from jaxmllm.models.registry import family_named

JOBS = ("sweep", "evaluate", "forward")
GQA_QUESTIONS = 12_578  # of GQA's testdev-balanced split

# Bounds of an image's pixels in the published preprocessor files of Qwen2-VL and Qwen2.5-VL.
QWEN_PIXELS = (3136, 12_845_056)


@dataclasses.dataclass(frozen=True)
class Work:
    """A job and the questions it is about.

    Attributes:
      job: ``sweep``: the image hidden at every layer, the fast way; ``evaluate``: answers generated greedily;
        ``forward``: one clean pass with the captures of a study.
      questions: how many.
      image: width and height of a typical image, in pixels.
      image_tokens: of a typical image, where its size is not given and decides nothing else (Qwen-VL).
      prefix_tokens: tokens of the prompt before the image; ``question_tokens`` those behind it.
      answer_tokens: of a reference answer, which ``sweep`` and ``forward`` read.
      new_tokens: that ``evaluate`` generates.
      edits: curves of a sweep, as ``jaxmllm.analysis.study.parse_curve`` has them.
      a_context: questions an image.
      dtype: what weights are kept in and the model computes in.
      rows: questions that each row of the mesh takes together; ``None`` for as many as fit.
    """

    job: str
    questions: int = GQA_QUESTIONS
    image: tuple[int, int] = (640, 480)
    image_tokens: int | None = None
    prefix_tokens: int = 8
    question_tokens: int = 32
    answer_tokens: int = 4
    new_tokens: int = 16
    edits: tuple[str, ...] = ("erase",)
    a_context: float = 1.0
    dtype: str = "bfloat16"
    rows: int | None = None

    def check(self) -> None:
        """Raises InputError where there is no such job, or a number is out of range."""
        if self.job not in JOBS:
            raise InputError(f"job is {self.job!r}; expected one of {', '.join(JOBS)}")
        for name in ("questions", "prefix_tokens", "question_tokens", "answer_tokens", "new_tokens", "a_context"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; expected at least 1")
        if min(self.image) < 1:
            raise InputError(f"image is {self.image[0]} x {self.image[1]} pixels; expected at least 1 x 1")
        if self.rows is not None and self.rows < 1:
            raise InputError(f"batch size is {self.rows}; expected at least 1")

    def branches(self, num_layers: int) -> list[Edits]:
        """The edits of a sweep, one a branch."""
        return [branch for curve in self.edits for branch in layer_edits(*parse_curve(curve), num_layers)]


def one_question(config: Any, work: Work, answered: bool, bucketed: bool = True) -> Inputs:
    """Inputs of one typical question, as a processor's would be.

    Args:
      config: of the model.
      work: says how long the question and how large its image is.
      answered: whether a reference answer follows.
      bucketed: as in ``as_inputs``.

    Raises:
      InputError: an image that the family does not take.
    """
    family = family_named(config.model_type)
    arrays = IMAGES[config.model_type](config, work)
    images = family.pack_images(config, arrays, lambda size: size)
    assert images is not None
    tokens = int(images.counts[0])
    if work.image_tokens not in (None, tokens):
        raise InputError(
            f"an image of {config.model_type} takes {tokens} tokens here, not {work.image_tokens}; its size decides, "
            "so give --image WIDTHxHEIGHT instead of --image-tokens"
        )
    prompt = work.prefix_tokens + tokens + work.question_tokens
    length = prompt + (work.answer_tokens if answered else 0)
    ids = np.full((1, length), int(config.image_token_id == 0), np.int32)
    ids[:, work.prefix_tokens : work.prefix_tokens + tokens] = config.image_token_id
    arrays |= {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    if answered:
        # the last prompt token predicts the first answer token
        arrays["answer_positions"] = prompt - 1 + np.arange(work.answer_tokens)[None]
    return as_inputs(arrays, config, bucketed=bucketed)


def _square(config: Any, work: Work) -> dict[str, np.ndarray]:
    vision = config.vision
    return {"pixel_values": np.zeros((1, vision.num_channels, vision.image_size, vision.image_size), np.float32)}


def _tiled(config: Any, work: Work) -> dict[str, np.ndarray]:
    width, height = work.image
    (picture,) = _square(config, work)["pixel_values"]
    tiles = config.tiling((height, width)).num_tiles
    return {"pixel_values": np.stack([picture] * tiles)[None], "image_sizes": np.array([[height, width]])}


def _read_by_question(config: Any, work: Work) -> dict[str, np.ndarray]:
    ids = np.ones((1, work.question_tokens), np.int32)
    return _square(config, work) | {"qformer_input_ids": ids, "qformer_attention_mask": np.ones_like(ids)}


def _patches(config: Any, work: Work) -> dict[str, np.ndarray]:
    vision = config.vision
    if work.image_tokens is None:
        unit = vision.patch_size * vision.merge
        width, height = smart_resize(*work.image, unit, *QWEN_PIXELS)
        rows, columns = height // unit, width // unit
    else:
        rows = max(row for row in range(1, int(work.image_tokens**0.5) + 1) if work.image_tokens % row == 0)
        columns = work.image_tokens // rows
    grid = (1, rows * vision.merge, columns * vision.merge)
    return {
        "pixel_values": np.zeros((int(np.prod(grid)), vision.patch_values), np.float32),
        "image_grid_thw": np.array([grid]),
    }


# What each family's processor makes of one image.
IMAGES: dict[str, Callable[[Any, Work], dict[str, np.ndarray]]] = {
    "instructblip": _read_by_question,
    "llava": _square,
    "llava_next": _tiled,
    "qwen2_5_vl": _patches,
    "qwen2_vl": _patches,
    "vipllava": _square,
}
