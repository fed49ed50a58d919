"""What both models are given: images with questions and answers, or random arrays of the family's form.

Where a checkpoint has its processor's files, pictures are drawn and questions asked in plain words. Where it has not,
the arrays that the processor would return are made up: pixels of unit normal noise, and ids that are no special tokens.
All of it follows from a seed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmllm.errors import InputError
from jaxmllm.models.images import pad_rows
from jaxmllm.models.registry import family_named
from jaxmllm.processing import (
    ImageLike,
    append_answers,
    encode_answers,
    load_processor,
    make_prompt,
    open_image,
    prepare,
)
from jaxmllm.processing.loading import IMAGE_PROCESSOR_FILES, TOKENIZER_FILES
from jaxmllm.validation.recording import Recording

# Width and height of the drawn pictures: one wide and one tall, so that no side stands for the other.
SIZES = ((448, 336), (260, 390))
QUESTIONS = ("What is in the picture?", "Which colours do you see, and where are they?")
ANSWERS = ("a red bicycle", "blue and white stripes on the left")

# Of random prompts: words before the first image, between two images, and at the end; tokens of the answers.
WORDS = ((5, 2, 9), (3, 2, 4))
ANSWER_TOKENS = (4, 2)
# Three images are made up where they take no more tokens than this (then one prompt has two), else two.
FEW_TOKENS = 600


@dataclasses.dataclass(frozen=True)
class Prompts:
    """A batch of prompts.

    Attributes:
      inputs: prompts followed by their answers, padded on the right: ``input_ids``, ``attention_mask`` ``[B, S]``,
        ``answer_ids``, ``answer_positions`` ``[B, A]`` (see ``jaxmllm.processing.append_answers``), and what the family
        has of images.
      generation: the prompts alone, padded on the left: ``input_ids``, ``attention_mask`` ``[B, P]``, and the images.
      images: the pictures ``[H, W, 3]`` uint8, one a prompt; empty where the arrays are random.
      questions: as asked, one a prompt; empty where the arrays are random.
      texts: the whole prompts, images' placeholders included; likewise.
      answers: likewise.
    """

    inputs: Mapping[str, np.ndarray]
    generation: Mapping[str, np.ndarray]
    images: tuple[np.ndarray, ...] = ()
    questions: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The texts, for a recording's header."""
        return {name: list(getattr(self, name)) for name in ("questions", "texts", "answers")}


def has_processor(folder: Path) -> bool:
    """Whether a checkpoint folder has what images and questions are prepared by."""
    groups = (IMAGE_PROCESSOR_FILES, TOKENIZER_FILES)
    return all(any((folder / name).is_file() for name in group) for group in groups)


def make_prompts(
    folder: Path,
    config: Any,
    seed: int = 0,
    images: Sequence[ImageLike] = (),
    questions: Sequence[str] = (),
) -> Prompts:
    """The prompts of a validation: two of unlike lengths with unlike images, and a caller's own.

    Args:
      folder: the checkpoint's.
      config: the family's.
      seed: of pictures, ids and pixels.
      images: pictures to add, one a prompt.
      questions: what is asked of them.

    Raises:
      InputError: images or questions of one's own where the folder has no processor files; not one question an image.
      ProcessorError: the processor files, an image or a question cannot be read.
    """
    if len(images) != len(questions):
        raise InputError(f"{len(images)} image(s) for {len(questions)} question(s); give one question an image")
    if has_processor(folder):
        return _asked(load_processor(folder, config), config, seed, images, questions)
    if images:
        raise InputError(
            f"{folder}: there are no processor files, so that images and questions cannot be prepared; copy "
            f"{IMAGE_PROCESSOR_FILES[0]}, {TOKENIZER_FILES[0]} and tokenizer_config.json from the checkpoint"
        )
    return _made_up(config, np.random.default_rng(seed))


def generation_inputs(recording: Recording) -> dict[str, np.ndarray]:
    """The prompts that were generated from, out of a recording: padded on the left, with the images of its inputs."""
    of_images = {
        name: value
        for name, value in recording.inputs().items()
        if name not in ("input_ids", "attention_mask", "answer_ids", "answer_positions")
    }
    return of_images | {name: recording.read(f"generation.{name}") for name in ("input_ids", "attention_mask")}


def draw_picture(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """A picture ``[height, width, 3]`` of uint8: gradients, coloured boxes and discs, stripes and some noise."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    slopes = rng.uniform(-1, 1, (3, 2))
    picture = np.stack([128 + 90 * (down * y / height + across * x / width) for down, across in slopes], axis=-1)
    for number in range(8):
        colour = rng.uniform(0, 255, 3)
        middle = rng.uniform(0.1, 0.9, 2) * (height, width)
        reach = rng.uniform(0.05, 0.25, 2) * min(height, width)
        away = np.abs(y - middle[0]) / reach[0], np.abs(x - middle[1]) / reach[1]
        inside = np.hypot(*away) < 1 if number % 2 else np.maximum(*away) < 1
        picture[inside] = colour
    striped = (x + 2 * y) % 24 < 6
    picture[striped & (x < width / 3)] *= 0.6
    picture += rng.normal(scale=12, size=picture.shape)
    return np.clip(picture, 0, 255).round().astype(np.uint8)


def _asked(processor: Any, config: Any, seed: int, images: Sequence[ImageLike], questions: Sequence[str]) -> Prompts:
    rng = np.random.default_rng(seed)
    drawn = [draw_picture(rng, *size) for size in SIZES]
    pictures = (*drawn, *(np.asarray(open_image(image)) for image in images))
    asked = (*QUESTIONS, *questions)
    answers = tuple(ANSWERS[number % len(ANSWERS)] for number in range(len(asked)))
    wanted = ("input_ids", "attention_mask", *family_named(config.model_type).image_inputs)

    def prepared(side: str) -> dict[str, np.ndarray]:
        arrays = prepare(processor, list(pictures), asked, side)
        return {name: value for name, value in arrays.items() if name in wanted}

    forced = append_answers(
        prepared("right"), encode_answers(processor, answers), int(processor.tokenizer.pad_token_id or 0)
    )
    texts = tuple(make_prompt(processor, question, 1) for question in asked)
    return Prompts(_wide(forced), _wide(prepared("left")), pictures, asked, texts, answers)


def _made_up(config: Any, rng: np.random.Generator) -> Prompts:
    make = RANDOM_IMAGES[config.model_type]
    arrays, tokens = make(config, rng, 3)
    if sum(tokens) > FEW_TOKENS:
        arrays, tokens = make(config, rng, 2)
    special = {config.image_token_id, getattr(config, "video_token_id", None)}
    vocabulary = config.text.vocab_size
    # special tokens stand at either end of a vocabulary
    words = [word for word in range(max(3, vocabulary // 20), vocabulary * 9 // 10) if word not in special]
    left = list(tokens)
    rows = []
    for (before, between, after), many in zip(WORDS, (len(tokens) - 1, 1), strict=True):
        row = rng.choice(words, before).tolist()
        for number in range(many):
            row += rng.choice(words, between).tolist() if number else []
            row += [config.image_token_id] * left.pop(0)
        rows.append(np.array(row + rng.choice(words, after).tolist()))
    answers = [rng.choice(words, many).tolist() for many in ANSWER_TOKENS]
    filler = words[0]
    forced = append_answers(_padded(rows, "right", filler) | arrays, answers, filler)
    return Prompts(_wide(forced), _wide(_padded(rows, "left", filler) | arrays))


def _padded(rows: Sequence[np.ndarray], side: str, filler: int) -> dict[str, np.ndarray]:
    turn = slice(None, None, -1 if side == "left" else 1)
    length = max(map(len, rows))
    ids = pad_rows([row[turn] for row in rows], length, filler)[:, turn]
    mask = pad_rows([np.ones(len(row), np.int64) for row in rows], length)[:, turn]
    return {"input_ids": ids, "attention_mask": mask}


def _wide(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Whole numbers as int64, as Hugging Face's processors give them."""
    return {
        name: value.astype(np.int64) if np.issubdtype(value.dtype, np.integer) else value
        for name, value in arrays.items()
    }


Arrays = dict[str, np.ndarray]


def _square_images(config: Any, rng: np.random.Generator, count: int) -> tuple[Arrays, list[int]]:
    """Images of the vision tower's size."""
    vision = config.vision
    shape = (count, getattr(vision, "num_channels", 3), vision.image_size, vision.image_size)
    return {"pixel_values": _noise(rng, shape)}, [config.tokens_per_image] * count


def _instructed_images(config: Any, rng: np.random.Generator, count: int) -> tuple[Arrays, list[int]]:
    """Images with what the Q-Former reads beside them, of unlike lengths."""
    arrays, tokens = _square_images(config, rng, count)
    lengths = [4 + 3 * (number % 2) for number in range(count)]
    ids = [rng.integers(1, config.qformer.vocab_size, length) for length in lengths]
    mask = [np.ones(length, np.int64) for length in lengths]
    both = {"qformer_input_ids": ids, "qformer_attention_mask": mask}
    return arrays | {name: pad_rows(rows, max(lengths)) for name, rows in both.items()}, tokens


def _tiled_images(config: Any, rng: np.random.Generator, count: int) -> tuple[Arrays, list[int]]:
    """Wide, tall and large images, each as the whole of it and its tiles."""
    side = config.vision.image_size
    sizes = [(side, side * 4 // 3), (side * 5 // 3, side * 3 // 4), (side * 2 - 3, side * 5 // 3)][:count]
    tilings = [config.tiling(size) for size in sizes]
    most = max(each.num_tiles for each in tilings)
    pixels = _noise(rng, (count, most, config.vision.num_channels, side, side))
    for image, each in zip(pixels, tilings, strict=True):
        image[each.num_tiles :] = 0
    return {"pixel_values": pixels, "image_sizes": np.array(sizes)}, [len(each.order) for each in tilings]


def _patches(config: Any, rng: np.random.Generator, count: int) -> tuple[Arrays, list[int]]:
    """Wide, tall and small images, cut into patches."""
    merge = config.vision.merge
    tokens = [(8, 12), (9, 4), (2, 3)][:count]
    grids = np.array([(1, rows * merge, columns * merge) for rows, columns in tokens])
    pixels = _noise(rng, (int(grids.prod(axis=1).sum()), config.vision.patch_values))
    return {"pixel_values": pixels, "image_grid_thw": grids}, [rows * columns for rows, columns in tokens]


def _noise(rng: np.random.Generator, shape: Sequence[int]) -> np.ndarray:
    return rng.normal(size=tuple(shape)).astype(np.float32)


# Config, generator, number of images -> what a processor returns of random images, and the tokens of each.
RANDOM_IMAGES: dict[str, Callable[[Any, np.random.Generator, int], tuple[Arrays, list[int]]]] = {
    "instructblip": _instructed_images,
    "llava": _square_images,
    "llava_next": _tiled_images,
    "qwen2_5_vl": _patches,
    "qwen2_vl": _patches,
    "vipllava": _square_images,
}
