"""Whether images and questions become the arrays that transformers' own processors make of them.

The reference is transformers' official classes, called plainly and not through ``jaxmllm.processing``. What
transformers can only build with torchvision (Qwen-VL's whole processor) is put together from its parts once more.
Pictures, questions and arrays are in the recording, so that another host can compare later.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jaxmllm.convert.checkpoint import read_json
from jaxmllm.models.registry import family_named
from jaxmllm.processing import load_processor, make_prompt, prepare
from jaxmllm.validation import floors
from jaxmllm.validation.distributions import measure
from jaxmllm.validation.prompts import Prompts
from jaxmllm.validation.recording import Recorder, Recording
from jaxmllm.validation.report import Comparison, Phase

PHASE = "preprocessing"
SIDES = ("right", "left")
OTHER_BACKEND = "torchvision"
TEXT_ARRAYS = ("input_ids", "attention_mask")
TOKENIZERS = {"input_ids": "tokenizer", "qformer_input_ids": "qformer_tokenizer"}

# A picture of one colour keeps it, however it is resized and cut: what becomes of it follows from mean and deviation.
FLAT = (200, 100, 50)
FLAT_SIZE = (120, 90)  # width, height
FLAT_TOLERANCE = 1e-3  # of a normalised pixel; a level of colour is about 15 times that
# Means and deviations of channels that other models take.
NORMALISATIONS = {
    "CLIP's": ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]),
    "ImageNet's": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    "one half": ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5]),
}

Arrays = dict[str, np.ndarray]


def reference_prompts(folder: Path, questions: Sequence[str]) -> tuple[str, ...] | None:
    """Questions with an image each in the checkpoint's chat template; ``None`` where it has none."""
    from transformers import AutoTokenizer, ProcessorMixin

    template = ProcessorMixin.get_processor_dict(folder, local_files_only=True)[0].get("chat_template")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    template = template or tokenizer.chat_template
    if isinstance(template, dict):  # several by name
        template = template.get("default")
    if not template:
        return None
    filled = []
    for question in questions:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        turns: list[Any] = [{"role": "user", "content": content}]
        options = {"chat_template": template, "tokenize": False, "add_generation_prompt": True}
        filled.append(str(tokenizer.apply_chat_template(turns, **options)))
    return tuple(filled)


def reference_arrays(
    folder: Path, images: Sequence[np.ndarray], prompts: Sequence[str], side: str = "right", backend: str = "pil"
) -> Arrays:
    """What transformers' processor makes of whole prompts with one image each.

    Args:
      folder: the checkpoint's.
      images: ``[H, W, 3]`` of uint8.
      prompts: with the image's placeholder.
      side: of the padding.
      backend: of the image processor: ``pil``, or ``torchvision`` where that is installed.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    config = read_json(folder / "config.json")
    pictures = [Image.fromarray(image) for image in images]
    arrays = REFERENCES[config["model_type"]](folder, config, pictures, list(prompts), side, backend)
    wanted = (*TEXT_ARRAYS, *family_named(config["model_type"]).image_inputs)
    return {name: np.asarray(arrays[name]) for name in wanted}


def record_preprocessing(recorder: Recorder, folder: Path, prompts: Prompts) -> dict[str, Any]:
    """Records pictures (``preprocessing.image.K``) and arrays (``preprocessing.NAME``) of transformers' processor.

    Where torchvision is installed, its image processors are the noise floor.

    Args:
      recorder: of the recording.
      folder: the checkpoint's.
      prompts: of the validation.

    Returns:
      For the header: ``preprocessing``: ``questions``, ``texts`` and ``templated``, whether the texts are of the
      checkpoint's own template; nothing where the prompts have no pictures.
    """
    if not prompts.images:
        return {}
    texts = reference_prompts(folder, prompts.questions)
    asked = texts or prompts.texts
    for number, image in enumerate(prompts.images):
        recorder.add(f"{PHASE}.image.{number}", image, whole=True)
    for side in SIDES:
        arrays = reference_arrays(folder, prompts.images, asked, side)
        for name, value in arrays.items():
            if side == "right":
                recorder.add(f"{PHASE}.{name}", value, whole=True)
            elif name in TEXT_ARRAYS:
                recorder.add(f"{PHASE}.left.{name}", value, whole=True)
    if importlib.util.find_spec("torchvision") is not None:
        other = reference_arrays(folder, prompts.images, asked, backend=OTHER_BACKEND)
        recorder.add_floor(f"{PHASE}.pixel_values", "run", OTHER_BACKEND, other["pixel_values"])
    recorder.flush()
    said = {"questions": list(prompts.questions), "texts": list(asked), "templated": texts is not None}
    return {PHASE: said}


def compare_preprocessing(recording: Recording, folder: Path, config: Any) -> Phase:
    """The port's arrays of the recording's pictures and questions against transformers'.

    Args:
      recording: of the reference.
      folder: the port's, with processor files.
      config: the family's.

    Raises:
      ProcessorError: the processor files are missing or cannot be read.
    """
    if PHASE not in recording.header:
        return Phase(PHASE, "skipped", "the recording's inputs are random arrays, which no processor made")
    said = recording.header[PHASE]
    processor = load_processor(folder, config)
    questions = said["questions"]
    images = [recording.read(f"{PHASE}.image.{number}") for number in range(len(questions))]
    texts = [make_prompt(processor, question, 1) for question in questions]
    findings = [
        f"prompt {number}: {_first_difference(ours, theirs)}"
        for number, (ours, theirs) in enumerate(zip(texts, said["texts"], strict=True))
        if said["templated"] and ours != theirs
    ]
    right, left = (prepare(processor, images, questions, side) for side in SIDES)
    comparisons = []
    for name in (*TEXT_ARRAYS, *family_named(config.model_type).image_inputs):
        expected = recording.read(f"{PHASE}.{name}")
        if name not in right:
            findings.append(f"{name} is missing; transformers' processor gives it")
        elif np.issubdtype(expected.dtype, np.integer):
            findings += _unlike(name, right[name], expected, processor)
        elif right[name].shape != expected.shape:
            findings.append(f"{name} has shape {list(right[name].shape)}; transformers gives {list(expected.shape)}")
        else:
            comparisons.append(_compared(recording, f"{PHASE}.{name}", right[name], expected))
    for name in () if findings else TEXT_ARRAYS:  # other tokens have been told of
        unlike = _unlike(name, left[name], recording.read(f"{PHASE}.left.{name}"), processor)
        findings += [f"padded on the left, {line}" for line in unlike]
    settings = image_settings(folder)
    findings += _flat_colour(processor, settings)
    if findings or any(each.departs for each in comparisons):
        findings += _unlike_settings(processor, folder)
    return _phase(tuple(comparisons), tuple(findings), len(questions))


def _phase(comparisons: tuple[Comparison, ...], findings: tuple[str, ...], prompts: int) -> Phase:
    departs = [each for each in comparisons if each.departs]
    if findings:
        return Phase(PHASE, "differs", findings[0], comparisons, findings)
    if departs:
        worst = max(departs, key=lambda each: each.ratio)
        summary = f"{worst.component} differs by up to {worst.errors.max:.3g}, at {worst.place}"
        return Phase(PHASE, "differs", summary, comparisons)
    return Phase(PHASE, "passes", f"tokens, masks and pixels of {prompts} prompts are transformers'", comparisons)


def _compared(recording: Recording, name: str, got: np.ndarray, expected: np.ndarray) -> Comparison:
    errors = measure(got, expected, np.ones(expected.shape[:1], bool), "float32")
    floor = recording.floor(name, "run")
    ratio = floors.ratio(errors, floor, "float32", (*floors.ALWAYS, OTHER_BACKEND))
    axes = {2: ("patch", "value"), 4: ("image", "channel", "row", "column")}
    names = axes.get(expected.ndim, ("image", "tile", "channel", "row", "column"))
    place = ", ".join(f"{axis} {at}" for axis, at in zip(names, errors.worst, strict=False))
    return Comparison(name, "run", errors, floor, ratio, place)


def _first_difference(ours: str, theirs: str) -> str:
    pairs = zip(ours, theirs, strict=False)
    at = next((number for number, (one, other) in enumerate(pairs) if one != other), min(len(ours), len(theirs)))
    around = slice(max(0, at - 20), at + 20)
    return f"the text differs from character {at} on: {ours[around]!r} instead of {theirs[around]!r}"


def _unlike(name: str, got: np.ndarray, expected: np.ndarray, processor: Any) -> list[str]:
    """The first place where whole numbers differ, in words; none where they do not."""
    if got.shape == expected.shape and np.array_equal(got, expected):
        return []
    shapes = "" if got.shape == expected.shape else f" (shape {list(got.shape)} instead of {list(expected.shape)})"
    if got.ndim != expected.ndim or len(got) != len(expected):
        return [f"{name} differs{shapes}"]
    shared = tuple(slice(0, min(sizes)) for sizes in zip(got.shape, expected.shape, strict=True))
    places = np.argwhere(got[shared] != expected[shared])
    if not len(places):
        return [f"{name} differs in length alone{shapes}"]
    row, *rest = places[0].tolist()
    ours, theirs = (int(array[tuple(places[0])]) for array in (got, expected))
    of_text = TOKENIZERS.get(name)
    shown = f"{ours} instead of {theirs}"
    if of_text:
        texts = [getattr(processor, of_text).decode([one]) for one in (ours, theirs)]
        shown = f"{texts[0]!r} instead of {texts[1]!r} (ids {ours} and {theirs})"
    return [f"{name} differs{shapes}, first at example {row}, position {', '.join(map(str, rest))}: {shown}"]


def _flat_colour(processor: Any, settings: Mapping[str, Any]) -> list[str]:
    """What a picture of one colour becomes, by the settings in the files and plain arithmetic."""
    if not {"image_mean", "image_std"} <= set(settings):
        return []
    picture = np.full((FLAT_SIZE[1], FLAT_SIZE[0], 3), FLAT, np.uint8)
    pixels = prepare(processor, [picture], ["What colour is this?"])["pixel_values"]
    expected, mistakes = _normalised(settings)
    got = channels_of(np.asarray(pixels, np.float64))
    if np.abs(got - expected[:, None]).max() <= FLAT_TOLERANCE:
        return []
    found = got.mean(axis=1)
    how = next((f"; {how}" for how, values in mistakes.items() if np.abs(found - values).max() <= FLAT_TOLERANCE), "")
    numbers = [", ".join(f"{value:.4f}" for value in values) for values in (found, expected)]
    return [f"a picture of the one colour {FLAT} becomes ({numbers[0]}) instead of ({numbers[1]}){how}"]


def _normalised(settings: Mapping[str, Any]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """What the channels of ``FLAT`` should become, and what they become by common mistakes."""
    colour, mean, std = np.array(FLAT, float), np.array(settings["image_mean"]), np.array(settings["image_std"])
    factor = settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 1.0
    normalises = settings.get("do_normalize", True)

    def become(colour: np.ndarray, factor: float, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
        return (colour * factor - mean) / std if normalises else colour * factor

    mistakes = {
        "its channels are in the order blue, green, red": become(colour[::-1], factor, mean, std),
        "mean and deviation are not taken off (image_mean, image_std)": colour * factor,
        "it is not divided by the deviation (image_std)": colour * factor - mean,
        "it is divided by 256 instead of 255 (rescale_factor)": become(colour, 1 / 256, mean, std),
        "it is not scaled to 0..1 (do_rescale)": become(colour, 1.0, mean, std),
        **{
            f"mean and deviation are {whose} (image_mean, image_std)": become(colour, factor, *map(np.array, both))
            for whose, both in NORMALISATIONS.items()
        },
    }
    return become(colour, factor, mean, std), mistakes


def _unlike_settings(processor: Any, folder: Path) -> list[str]:
    """Settings of the image processor that are not those that transformers reads of the files."""
    ours, theirs = processor.image_processor.to_dict(), _image_processor(folder, "pil").to_dict()
    return [
        f"{name} is {ours[name]} in the port's image processor, and {theirs[name]} by the checkpoint's files"
        for name in sorted(set(ours) & set(theirs))
        if ours[name] != theirs[name]
    ]


def channels_of(pixels: np.ndarray) -> np.ndarray:
    """Pixels of a first image by channel ``[3, n]``: of a picture, of the first of several tiles, or of patches."""
    if pixels.ndim == 2:  # patches [M, (channel, frame, row, column)]
        return np.moveaxis(pixels.reshape(len(pixels), 3, -1), 1, 0).reshape(3, -1)
    first = pixels[0, 0] if pixels.ndim == 5 else pixels[0]
    return first.reshape(3, -1)


def image_settings(folder: Path) -> dict[str, Any]:
    """The settings of a folder's image processor, whichever file they stand in; empty where none does."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = folder / name
        if path.is_file():
            fields = json.loads(path.read_text())
            fields = fields.get("image_processor", fields)
            if "image_mean" in fields:
                return dict(fields)
    return {}


# --- transformers' processors


def _image_processor(folder: Path, backend: str) -> Any:
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(folder, backend=backend, local_files_only=True)


def _whole(
    folder: Path, config: Mapping[str, Any], images: list[Image.Image], prompts: list[str], side: str, backend: str
) -> Mapping[str, Any]:
    """The LLaVA families: one call of the official processor, with what old files leave out."""
    from transformers import AutoConfig, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    read = AutoConfig.from_pretrained(folder, local_files_only=True)
    processor.image_processor = _image_processor(folder, backend)
    processor.patch_size = read.vision_config.patch_size
    processor.num_additional_image_tokens = 1  # CLIP's class token
    processor.vision_feature_select_strategy = config.get("vision_feature_select_strategy", "default")
    _let_pad(processor.tokenizer)
    return dict(processor(images=images, text=prompts, padding=True, padding_side=side, return_tensors="np"))


def _instructed(
    folder: Path, config: Mapping[str, Any], images: list[Image.Image], prompts: list[str], side: str, backend: str
) -> Mapping[str, Any]:
    """InstructBLIP: its text has no placeholders; the Q-Former's is padded on the right in any case.

    transformers pads both texts on one side; a question then has other numbers than it has alone.
    """
    from transformers import InstructBlipProcessor

    processor = InstructBlipProcessor.from_pretrained(folder, local_files_only=True)
    processor.image_processor = _image_processor(folder, backend)
    processor.num_query_tokens = config.get("num_query_tokens", 32)
    _let_pad(processor.tokenizer)
    texts = [prompt.removeprefix("<image>").removeprefix("\n") for prompt in prompts]
    both = {
        each: dict(processor(images=images, text=texts, padding=True, padding_side=each, return_tensors="np"))
        for each in {side, "right"}
    }
    return both[side] | {name: value for name, value in both["right"].items() if name.startswith("qformer")}


def _qwen(
    folder: Path, config: Mapping[str, Any], images: list[Image.Image], prompts: list[str], side: str, backend: str
) -> Mapping[str, Any]:
    """Qwen-VL: image processor and tokenizer; a placeholder is repeated for each token behind the tokenizer."""
    from transformers import AutoTokenizer

    processor = _image_processor(folder, backend)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    _let_pad(tokenizer)
    arrays = dict(processor(images=images, return_tensors="np"))
    placeholder = config.get("image_token_id", 151_655)
    counts = iter(int(frames * rows * columns) // processor.merge_size**2 for frames, rows, columns in
                  np.asarray(arrays["image_grid_thw"]))  # fmt: skip
    filled = []
    for ids in tokenizer(prompts)["input_ids"]:
        row: list[int] = []
        for token in ids:
            row += [token] * next(counts) if token == placeholder else [token]
        filled.append(row)
    longest = max(map(len, filled))
    ids = np.full((len(filled), longest), tokenizer.pad_token_id, np.int64)
    mask = np.zeros((len(filled), longest), np.int64)
    for number, row in enumerate(filled):
        start = longest - len(row) if side == "left" else 0
        ids[number, start : start + len(row)] = row
        mask[number, start : start + len(row)] = 1
    return arrays | {"input_ids": ids, "attention_mask": mask}


def _let_pad(tokenizer: Any) -> None:
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token


REFERENCES: dict[str, Callable[..., Mapping[str, Any]]] = {
    "instructblip": _instructed,
    "llava": _whole,
    "llava_next": _whole,
    "qwen2_5_vl": _qwen,
    "qwen2_vl": _qwen,
    "vipllava": _whole,
}
