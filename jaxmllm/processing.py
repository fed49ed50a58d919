"""From images and questions to arrays: the checkpoint's own Hugging Face processor, run without torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from jaxmllm.errors import ProcessorError

# Anything that shows one picture: a PIL image, an array [H, W, C] of uint8, or the path of an image file.
ImageLike = Image.Image | np.ndarray | str | Path

IMAGE_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")

# LLaVA-1.5's prompt, for checkpoints that carry no chat template.
DEFAULT_PROMPT = "USER: {images}{question} ASSISTANT:"


def load_processor(folder: Path, config: Any) -> Any:
    """The Hugging Face processor of a checkpoint folder.

    Args:
      folder: holds the tokenizer and the image processor's files.
      config: the family's config; what old processor files leave out (the patch size, say) is taken from it.

    Raises:
      ProcessorError: naming the files that are missing, or the one that cannot be read.
    """
    missing = []
    if not any((folder / name).is_file() for name in IMAGE_PROCESSOR_FILES):
        missing.append(IMAGE_PROCESSOR_FILES[0])
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        missing.append(f"{TOKENIZER_FILES[0]} (with tokenizer_config.json)")
    if missing:
        raise ProcessorError(
            f"{folder}: cannot prepare images and questions without {' and '.join(missing)}; copy them from the "
            "checkpoint, or give forward() the arrays of a processor of your own"
        )
    # transformers advises to install torch and torchvision, which nothing here needs
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds for a bad file
        raise ProcessorError(f"{folder}: the processor files cannot be read ({error})") from error
    if getattr(processor, "tokenizer", None) is None or getattr(processor, "image_processor", None) is None:
        raise ProcessorError(f"{folder}: the processor files describe a {type(processor).__name__}, not a processor")
    # Files older than transformers 4.46 leave these out, and the processor then fails deep inside.
    if getattr(processor, "patch_size", None) is None:
        processor.patch_size = config.vision.patch_size
    if not getattr(processor, "num_additional_image_tokens", None):
        processor.num_additional_image_tokens = 1
    if getattr(processor, "vision_feature_select_strategy", None) is None:
        processor.vision_feature_select_strategy = "full" if config.keep_class_token else "default"
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token or processor.tokenizer.unk_token
    return processor


def open_image(image: ImageLike) -> Image.Image:
    """An image as RGB, upright by its EXIF orientation.

    Raises:
      ProcessorError: a file that is missing, broken or of no known format; an image without pixels.
    """
    if isinstance(image, (str, Path)):
        try:
            with Image.open(image) as opened:
                opened.load()
                picture: Image.Image = opened
        except FileNotFoundError:
            raise ProcessorError(f"{image}: no such image") from None
        except (OSError, SyntaxError, ValueError, RuntimeError, Image.DecompressionBombError) as error:
            # Pillow's decoders raise any of these on a broken file
            raise ProcessorError(f"{image}: broken, or not an image ({error})") from error
        where = str(image)
    elif isinstance(image, np.ndarray):
        where = f"image array of shape {image.shape}"
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3, 4)):
            raise ProcessorError(f"{where} and type {image.dtype}: expected uint8 of shape (height, width, 3)")
        if image.size == 0:
            raise ProcessorError(f"{where}: it has no pixels")
        picture = Image.fromarray(image.squeeze(-1) if image.ndim == 3 and image.shape[2] == 1 else image)
    elif isinstance(image, Image.Image):
        where, picture = "image", image
    else:
        raise ProcessorError(f"an image is a {type(image).__name__}; expected a PIL image, an array or a path")
    if 0 in picture.size:
        raise ProcessorError(f"{where}: it has no pixels ({picture.width} x {picture.height})")
    upright = ImageOps.exif_transpose(picture)
    if upright.mode.startswith("I;16"):  # Pillow would clip 16 bits to white rather than scale them
        upright = Image.fromarray((np.asarray(upright, np.float32) / 257).round().astype(np.uint8))
    elif upright.mode in ("I", "F"):
        raise ProcessorError(f"{where}: pixels of mode {upright.mode} have no known range; save it with 8 or 16 bits")
    if upright.mode == "P" and "transparency" in upright.info:
        upright = upright.convert("RGBA")
    return upright.convert("RGB")


def make_prompt(processor: Any, question: str, num_images: int) -> str:
    """The text a question is asked in: the checkpoint's chat template, or LLaVA-1.5's prompt where it has none.

    A question that already holds the image placeholder is taken as the whole prompt.

    Raises:
      ProcessorError: the number of placeholders is not the number of images.
    """
    token = processor.image_token
    if token in question:
        if question.count(token) != num_images:
            raise ProcessorError(
                f"the prompt {question[:80]!r} holds {question.count(token)} {token}, but has {num_images} image(s)"
            )
        return question
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}] * num_images + [{"type": "text", "text": question}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    else:
        prompt = DEFAULT_PROMPT.format(images=f"{token}\n" * num_images, question=question)
    if prompt.count(token) != num_images:
        raise ProcessorError(
            f"the chat template made a prompt with {prompt.count(token)} {token} for {num_images} image(s)"
        )
    return prompt


def prepare(
    processor: Any,
    images: Sequence[ImageLike | Sequence[ImageLike]],
    questions: Sequence[str],
    padding_side: str | None = None,
) -> dict[str, np.ndarray]:
    """Model inputs for a batch of questions: what the checkpoint's Hugging Face processor returns, as NumPy arrays.

    Args:
      processor: of ``load_processor``.
      images: for each question one image, or a list of them (which may be empty).
      questions: plain questions, or whole prompts that hold the image placeholder.
      padding_side: ``left`` or ``right``; by default the tokenizer's. Numbers do not depend on it.

    Returns:
      ``input_ids`` and ``attention_mask`` ``[B, S]``, and ``pixel_values`` ``[I, C, Y, X]`` where there are images.

    Raises:
      ProcessorError: nothing to ask, unlike numbers of images and questions, an unreadable image, an empty question.
    """
    if isinstance(questions, str) or not questions:
        raise ProcessorError("questions must be a list with at least one question")
    if not isinstance(images, (list, tuple)):
        raise ProcessorError(f"images must be a list with one entry a question, found {type(images).__name__}")
    if len(images) != len(questions):
        raise ProcessorError(f"{len(images)} image entries for {len(questions)} questions; give one entry a question")
    if padding_side not in (None, "left", "right"):
        raise ProcessorError(f"padding_side is {padding_side!r}; expected 'left' or 'right'")
    empty = [number for number, question in enumerate(questions) if not question.strip()]
    if empty:
        raise ProcessorError(f"question {empty[0]} is empty")
    opened = [[open_image(image) for image in as_list(entry)] for entry in images]
    prompts = [make_prompt(processor, question, len(entry)) for question, entry in zip(questions, opened, strict=True)]
    flat = [image for entry in opened for image in entry]
    arrays = processor(
        images=flat or None,
        text=prompts,
        padding=True,
        padding_side=padding_side or processor.tokenizer.padding_side,
        return_tensors="np",
    )
    return {
        name: np.asarray(arrays[name]) for name in ("input_ids", "attention_mask", "pixel_values") if name in arrays
    }


def prompt_lengths(processor: Any, questions: Sequence[str]) -> list[tuple[int, int]]:
    """Tokens before the first image token and after the last one of a prompt with one image, for every question.

    The images themselves are not needed, so the lengths of a whole data set are known before any is opened.
    """
    prompts = [make_prompt(processor, question, 1) for question in questions]
    placeholder = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    lengths = []
    for ids in processor.tokenizer(prompts)["input_ids"]:
        where = [place for place, token in enumerate(ids) if token == placeholder]
        lengths.append((where[0], len(ids) - 1 - where[-1]))
    return lengths


def as_list(entry: ImageLike | Sequence[ImageLike]) -> list[ImageLike]:
    """One image, or several, as a list."""
    return list(entry) if isinstance(entry, (list, tuple)) else [entry]  # type: ignore[list-item]


ANSWER_ANCHOR = "ASSISTANT:"


def encode_answers(processor: Any, answers: Sequence[str]) -> list[list[int]]:
    """Token ids of answers as they continue a prompt, after a space and without an end token.

    Tokenizers mark word starts, so an answer is tokenized behind the words a prompt ends with, which are then removed.

    Raises:
      ProcessorError: an answer without tokens.
    """
    tokenizer = processor.tokenizer
    anchor = tokenizer(ANSWER_ANCHOR, add_special_tokens=False)["input_ids"]
    encoded = []
    for answer in answers:
        ids = tokenizer(f"{ANSWER_ANCHOR} {answer.strip()}", add_special_tokens=False)["input_ids"]
        if ids[: len(anchor)] != anchor or len(ids) == len(anchor):
            raise ProcessorError(f"the answer {answer!r} has no tokens of its own")
        encoded.append(ids[len(anchor) :])
    return encoded


def append_answers(
    inputs: Mapping[str, np.ndarray],
    answers: Sequence[Sequence[int]],
    pad_token_id: int = 0,
    *,
    answer_length: int | None = None,
    bucket: int = 1,
) -> dict[str, np.ndarray]:
    """Prompts followed by their answers, for log-probabilities of given answers (teacher forcing).

    Args:
      inputs: what ``prepare`` returns, padded on either side.
      answers: token ids of each answer, from ``encode_answers``.
      pad_token_id: id at padding.
      answer_length: A, where batches of unlike answers should share one shape; by default the longest answer's.
      bucket: S is rounded up to a multiple of this, so that few programs are compiled.

    Returns:
      The inputs right-padded, with ``answer_ids`` ``[B, A]`` (-1 past an answer's end) and ``answer_positions``
      ``[B, A]``, the positions whose logits predict them (the last one repeated past the end).

    Raises:
      ProcessorError: not one answer a question, or an empty one.
    """
    ids, mask = np.asarray(inputs["input_ids"]), np.asarray(inputs["attention_mask"])
    if len(answers) != len(ids):
        raise ProcessorError(f"{len(answers)} answers for {len(ids)} questions")
    if not all(len(answer) for answer in answers):
        raise ProcessorError("an answer has no tokens")
    prompts = [row[keep.astype(bool)] for row, keep in zip(ids, mask, strict=True)]
    longest = max(len(answer) for answer in answers)
    if answer_length is not None and longest > answer_length:
        raise ProcessorError(f"an answer has {longest} tokens; answer_length is {answer_length}")
    longest = longest if answer_length is None else answer_length
    length = -(-(ids.shape[1] + longest) // bucket) * bucket
    batch = len(ids)
    out_ids = np.full((batch, length), pad_token_id, np.int32)
    out_mask = np.zeros((batch, length), np.int32)
    answer_ids = np.full((batch, longest), -1, np.int32)
    positions = np.zeros((batch, longest), np.int32)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        out_ids[row, :end] = [*prompt, *answer]
        out_mask[row, :end] = 1
        answer_ids[row, : len(answer)] = answer
        positions[row] = len(prompt) - 1 + np.minimum(np.arange(longest), len(answer) - 1)
    kept = {"pixel_values": inputs["pixel_values"]} if "pixel_values" in inputs else {}
    return kept | {
        "input_ids": out_ids,
        "attention_mask": out_mask,
        "answer_ids": answer_ids,
        "answer_positions": positions,
    }
