"""From images and questions to arrays: prompts, and what the checkpoint's processor makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxmllm.errors import ProcessorError
from jaxmllm.processing.images import ImageLike, as_list, open_image

# LLaVA-1.5's prompt, for checkpoints that carry no chat template.
DEFAULT_PROMPT = "USER: {images}{question} ASSISTANT:"


@jax.tree_util.register_pytree_with_keys_class
class Prepared(dict):
    """A processor's arrays by name, as any dict of them.

    Attributes:
      image_sizes: width and height of every original image in pixels, upright; ``None`` after a transformation.
    """

    image_sizes: list[tuple[int, int]] | None = None

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], tuple[str, ...]]:
        names = tuple(sorted(self))
        return [(jax.tree_util.DictKey(name), self[name]) for name in names], names

    @classmethod
    def tree_unflatten(cls, names: tuple[str, ...], values: Sequence[Any]) -> Prepared:
        return cls(zip(names, values, strict=True))


def make_prompt(processor: Any, question: str, num_images: int) -> str:
    """The text a question is asked in: the checkpoint's chat template, or the family's own prompt where it has none.

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
    prompt = fill_template(processor, question, num_images)
    if prompt.count(token) != num_images:
        raise ProcessorError(
            f"the chat template made a prompt with {prompt.count(token)} {token} for {num_images} image(s)"
        )
    return prompt


def fill_template(processor: Any, question: str, num_images: int) -> str:
    """The chat template, or the family's own prompt where there is none, with a question and its images in it."""
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}] * num_images + [{"type": "text", "text": question}]
        return str(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))
    template = getattr(processor, "default_prompt", DEFAULT_PROMPT)
    images = f"{processor.image_token}\n" * num_images if num_images else ""
    return str(template.format(images=images, question=question))


def prepare(
    processor: Any,
    images: Sequence[ImageLike | Sequence[ImageLike]],
    questions: Sequence[str],
    padding_side: str | None = None,
) -> Prepared:
    """Model inputs for a batch of questions: what the checkpoint's Hugging Face processor returns, as NumPy arrays.

    Args:
      processor: of ``load_processor``.
      images: for each question one image, or a list of them (which may be empty).
      questions: plain questions, or whole prompts that hold the image placeholder.
      padding_side: ``left`` or ``right``; by default the tokenizer's. Numbers do not depend on it.

    Returns:
      ``input_ids`` and ``attention_mask`` ``[B, S]``, and what the family has of images, where there are any.

    Raises:
      ProcessorError: nothing to ask, unlike numbers of images and questions, an unreadable image, an empty question;
        or what the checkpoint's processor refuses.
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
    try:
        arrays = processor(
            images=flat or None,
            text=prompts,
            padding=True,
            padding_side=padding_side or processor.tokenizer.padding_side,
            return_tensors="np",
        )
    except ProcessorError:
        raise
    except ValueError as error:  # of transformers' processors
        raise ProcessorError(f"the checkpoint's processor refuses the images or prompts ({error})") from error
    prepared = Prepared((name, np.asarray(value)) for name, value in arrays.items())
    prepared.image_sizes = [image.size for image in flat]
    return prepared


def prompt_lengths(processor: Any, questions: Sequence[str]) -> list[tuple[int, int]]:
    """Tokens before the first image token and after the last one of a prompt with one image, for every question.

    The images themselves are not needed, so the lengths of a whole data set are known before any is opened.
    """
    prompts = [make_prompt(processor, question, 1) for question in questions]
    placeholder = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    lengths = []
    for ids in encode_prompts(processor, prompts):
        where = [place for place, token in enumerate(ids) if token == placeholder]
        lengths.append((where[0], len(ids) - 1 - where[-1]))
    return lengths


def encode_prompts(processor: Any, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of whole prompts, with one placeholder an image, in the places where the image tokens stand."""
    # where image tokens stand elsewhere than the prompt has them, the processor says so
    encode = getattr(processor, "encode_prompts", lambda prompts: processor.tokenizer(prompts)["input_ids"])
    return encode(list(prompts))
