"""Bugs in what is made of images and questions, planted on checkpoints with the files of a processor."""

import functools
import importlib

from PIL import Image
from tokenizers.processors import TemplateProcessing

from jaxmllm.processing import loading
from tests.validation.faults.fault import Fault, Patch, around, listed

# by name: in its package, a function of the same name stands before the module
PREPARE = importlib.import_module("jaxmllm.processing.prepare")

FAULTS: list[Fault] = []
fault = functools.partial(listed, FAULTS, first="preprocessing")


def change_processor(patch: Patch, family: str, change) -> None:
    """``change(processor)`` once it is loaded."""
    load = loading.LOADERS[family]

    def changed(folder, config):
        processor = load(folder, config)
        change(processor)
        return processor

    patch.setitem(loading.LOADERS, family, changed)


def change_images(patch: Patch, family: str, **settings) -> None:
    """The image processor has other settings."""

    def change(processor):
        for name, value in settings.items():
            setattr(processor.image_processor, name, value)

    change_processor(patch, family, change)


@fault("images.open_image", "llava_prepared", cause="blue, green, red")
def images_as_bgr(patch):
    around(
        patch,
        PREPARE,
        "open_image",
        lambda original, image: Image.merge("RGB", original(image).split()[::-1]),
    )


@fault("loading.load_llava", "llava_prepared", cause="mean")
def mean_and_deviation_of_another_model(patch):
    change_images(patch, "llava", image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])


@fault("loading.load_llava", "llava_prepared", cause="rescale")
def pixels_divided_by_256(patch):
    change_images(patch, "llava", rescale_factor=1 / 256)


@fault("loading.load_llava", "llava_prepared", cause="crop")
def squeezed_instead_of_cropped(patch):
    change_images(patch, "llava", size={"height": 28, "width": 28})


@fault("loading.load_qwen", "qwen2_vl_prepared", cause="resampl")
def qwen_images_resized_bilinearly(patch):
    change_images(patch, "qwen2_vl", resample=Image.Resampling.BILINEAR)


@fault("loading.load_llava", "llava_prepared", cause="token")
def prompt_without_a_first_token(patch):
    def change(processor):
        processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])

    change_processor(patch, "llava", change)


@fault("prepare.make_prompt", "llava_prepared", cause="token")
def line_break_behind_the_image_missing(patch):
    around(
        patch,
        PREPARE,
        "make_prompt",
        lambda original, processor, *given: original(processor, *given).replace(
            f"{processor.image_token}\n", processor.image_token
        ),
    )


@fault("load_instructblip", "instructblip_prepared", cause="token")
def instruction_in_the_decoder_s_vocabulary(patch):
    change_processor(
        patch, "instructblip", lambda processor: setattr(processor, "qformer_tokenizer", processor.tokenizer)
    )
