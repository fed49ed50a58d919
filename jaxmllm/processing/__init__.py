"""From images and questions to arrays: the checkpoint's own Hugging Face processor, run without torch."""

from jaxmllm.processing.answers import append_answers, encode_answers
from jaxmllm.processing.images import ImageLike, StoredImage, as_list, image_size, open_image
from jaxmllm.processing.loading import load_processor
from jaxmllm.processing.prepare import Prepared, encode_prompts, make_prompt, prepare, prompt_lengths

__all__ = [
    "ImageLike",
    "Prepared",
    "StoredImage",
    "append_answers",
    "as_list",
    "encode_answers",
    "encode_prompts",
    "image_size",
    "load_processor",
    "make_prompt",
    "open_image",
    "prepare",
    "prompt_lengths",
]
