"""Preprocessing against transformers' own processors: sound ports agree, and what is wrong is said in words."""

import json

import numpy as np
import pytest
from PIL import Image

from jaxmllm.models.registry import family_of
from jaxmllm.processing import loading
from jaxmllm.validation import preprocessing
from jaxmllm.validation.preprocessing import channels_of, compare_preprocessing, image_settings, record_preprocessing
from jaxmllm.validation.prompts import make_prompts
from jaxmllm.validation.recording import Recorder
from tests.support import tiny
from tests.support.checkpoints import FILES
from tests.support.tiny_checkpoints import write_checkpoint


def recorded(family, folder):
    """A checkpoint, its config, and a recording of its preprocessing."""
    write_checkpoint(family, folder / "model")
    fields = json.loads((folder / "model" / "config.json").read_text())
    config = family_of(fields).read_config(fields)
    prompts = make_prompts(folder / "model", config)
    recorder = Recorder(folder / "recording", prompts.inputs, "float32", None)
    header = record_preprocessing(recorder, folder / "model", prompts)
    return recorder.finish(header), folder / "model", config


@pytest.fixture(scope="module")
def of_family(tmp_path_factory):
    made = {}

    def make(family):
        if family not in made:
            made[family] = recorded(family, tmp_path_factory.mktemp(family))
        return made[family]

    return make


@pytest.mark.parametrize("family", sorted(FILES))
def test_every_family_agrees_with_transformers(of_family, family):
    recording, folder, config = of_family(family)
    phase = compare_preprocessing(recording, folder, config)
    assert (phase.verdict, phase.findings) == ("passes", ())
    (pixels,) = phase.comparisons
    assert pixels.component == "preprocessing.pixel_values" and pixels.errors.max == 0 and pixels.errors.scale > 0.1
    assert image_settings(folder)["image_mean"]
    said = recording.header["preprocessing"]
    assert said["templated"] == (FILES[family].prompt is not None)


def test_recorded_inputs_are_those_of_the_prompts(of_family):
    recording, _, _ = of_family("llava_next")
    inputs = recording.inputs()
    np.testing.assert_array_equal(recording.read("preprocessing.pixel_values"), inputs["pixel_values"])
    np.testing.assert_array_equal(recording.read("preprocessing.image_sizes"), inputs["image_sizes"])


def planted(monkeypatch, family, change):
    load = loading.LOADERS[family]

    def changed(folder, config):
        processor = load(folder, config)
        change(processor)
        return processor

    monkeypatch.setitem(loading.LOADERS, family, changed)


def with_images(**settings):
    def change(processor):
        for name, value in settings.items():
            setattr(processor.image_processor, name, value)

    return change


def without_template(processor):
    processor.chat_template = None
    processor.default_prompt = "Q: {images}{question} A:"


IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
# Family, what is done to the port's processor, what must be said.
MISTAKES = {
    "mean": ("llava", with_images(**IMAGENET), "mean and deviation are ImageNet's"),
    "mean of patches": ("qwen2_vl", with_images(**IMAGENET), "mean and deviation are ImageNet's"),
    "mean of tiles": ("llava_next", with_images(do_normalize=False), "mean and deviation are not taken off"),
    "factor": ("instructblip", with_images(rescale_factor=1 / 256), "divided by 256 instead of 255"),
    "filter": ("qwen2_5_vl", with_images(resample=Image.Resampling.BILINEAR), "resample is 2 in the port's"),
    "crop": ("llava", with_images(size={"height": 28, "width": 28}), "size is {'height': 28, 'width': 28} in the port"),
    "template": ("llava", without_template, "prompt 0: the text differs from character 0 on: 'Q: <image>"),
}


@pytest.mark.parametrize("mistake", sorted(MISTAKES))
def test_a_mistake_is_named(of_family, monkeypatch, mistake):
    family, change, said = MISTAKES[mistake]
    recording, folder, config = of_family(family)
    planted(monkeypatch, family, change)
    phase = compare_preprocessing(recording, folder, config)
    assert phase.verdict == "differs"
    assert any(said in finding for finding in phase.findings), phase.findings
    assert phase.summary == phase.findings[0]


def test_channels_in_another_order_are_recognised(of_family, monkeypatch):
    recording, folder, config = of_family("vipllava")
    original = preprocessing.prepare

    def reversed_channels(processor, images, *given):
        return original(processor, [np.ascontiguousarray(image[..., ::-1]) for image in images], *given)

    monkeypatch.setattr(preprocessing, "prepare", reversed_channels)
    phase = compare_preprocessing(recording, folder, config)
    assert any("its channels are in the order blue, green, red" in finding for finding in phase.findings)
    assert phase.departures


def test_the_first_token_that_differs_is_shown(of_family, monkeypatch):
    recording, folder, config = of_family("llava")
    original = preprocessing.prepare

    def other_token(*given):
        arrays = original(*given)
        arrays["input_ids"] = arrays["input_ids"].copy()
        arrays["input_ids"][0, 4] += 1
        return arrays

    monkeypatch.setattr(preprocessing, "prepare", other_token)
    findings = compare_preprocessing(recording, folder, config).findings
    assert findings[0].startswith("input_ids differs, first at example 0, position 4: ")
    assert "instead of" in findings[0] and "(ids " in findings[0]


def test_random_arrays_are_skipped(tmp_path):
    fields = tiny.config_fields("qwen2_vl")
    config = family_of(fields).read_config(fields)
    prompts = make_prompts(tmp_path, config)
    recorder = Recorder(tmp_path / "recording", prompts.inputs, "float32", None)
    assert record_preprocessing(recorder, tmp_path, prompts) == {}
    assert compare_preprocessing(recorder.finish({}), tmp_path, config).verdict == "skipped"


def test_channels_of_every_form_of_pixels():
    picture = np.arange(24.0).reshape(3, 2, 4)
    np.testing.assert_array_equal(channels_of(picture[None]), picture.reshape(3, -1))
    np.testing.assert_array_equal(channels_of(picture[None, None]), picture.reshape(3, -1))
    patches = np.stack([picture[:, :, :2].reshape(-1), picture[:, :, 2:].reshape(-1)])
    assert [set(row) for row in channels_of(patches)] == [set(channel.ravel()) for channel in picture]
