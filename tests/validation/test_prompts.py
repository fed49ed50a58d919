"""Prompts of a validation: every family's form, from files of a processor or made up, for tiny and published sizes."""

import json

import numpy as np
import pytest

from jaxmllm.errors import InputError
from jaxmllm.models.inputs import as_inputs
from jaxmllm.models.registry import family_of
from jaxmllm.validation.prompts import QUESTIONS, draw_picture, generation_inputs, has_processor, make_prompts
from jaxmllm.validation.recording import Recorder
from tests.support import tiny
from tests.support.checkpoints import FILES, FIXTURES, published_config
from tests.support.families import VARIANTS
from tests.support.tiny_checkpoints import write_checkpoint

PUBLISHED = [
    name.stem
    for name in sorted((FIXTURES / "configs").glob("*.json"))
    if name.stem not in ("hub-names", "instructblip-flan-t5-xl")
]


@pytest.fixture(scope="module", params=sorted(FILES))
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / request.param
    write_checkpoint(request.param, folder)
    return folder


def config_of(folder):
    fields = json.loads((folder / "config.json").read_text())
    return family_of(fields).read_config(fields)


def assert_fit(prompts, config):
    """Both batches are what the model takes; answers stand behind the prompts, whose tokens are the same in both."""
    inputs, generation = prompts.inputs, prompts.generation
    as_inputs({name: value for name, value in inputs.items() if name != "answer_ids"}, config)
    as_inputs(generation, config)
    lengths = generation["attention_mask"].sum(axis=-1)
    assert len(set(lengths.tolist())) == len(lengths) > 1
    # InstructBLIP's image tokens stand even before the padding
    assert generation["attention_mask"][:, -1].all() and not generation["attention_mask"].all()
    assert inputs["attention_mask"][:, 0].all()
    for row, length in enumerate(lengths):
        prompt = generation["input_ids"][row][generation["attention_mask"][row] == 1]
        np.testing.assert_array_equal(inputs["input_ids"][row, :length], prompt)
        answer = inputs["answer_ids"][row]
        answer = answer[answer >= 0]
        assert len(answer) > 1
        positions = inputs["answer_positions"][row, : len(answer)]
        assert positions[0] == length - 1
        np.testing.assert_array_equal(inputs["input_ids"][row, positions + 1], answer)
        assert inputs["attention_mask"][row].sum() == length + len(answer)
    for name in set(generation) - {"input_ids", "attention_mask"}:
        np.testing.assert_array_equal(inputs[name], generation[name])
    assert all(value.dtype in (np.int64, np.float32) for value in (*inputs.values(), *generation.values()))


def test_prompts_are_asked_where_there_are_processor_files(checkpoint):
    config = config_of(checkpoint)
    assert has_processor(checkpoint)
    prompts = make_prompts(checkpoint, config)
    assert_fit(prompts, config)
    assert len(prompts.images) == 2 and prompts.images[0].shape != prompts.images[1].shape
    assert prompts.questions == QUESTIONS
    assert all(question in text for question, text in zip(prompts.questions, prompts.texts, strict=True))
    again, other = make_prompts(checkpoint, config), make_prompts(checkpoint, config, seed=1)
    np.testing.assert_array_equal(prompts.inputs["pixel_values"], again.inputs["pixel_values"])
    assert not np.array_equal(prompts.inputs["pixel_values"], other.inputs["pixel_values"])
    assert json.loads(json.dumps(prompts.to_json()))["answers"] == list(prompts.answers)


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_prompts_are_made_up_for_every_variant(variant, tmp_path):
    fields = tiny.config_fields(variant)
    config = family_of(fields).read_config(fields)
    prompts = make_prompts(tmp_path, config)
    assert_fit(prompts, config)
    assert prompts.images == prompts.questions == prompts.texts == prompts.answers == ()
    # one of the prompts holds two images
    image = prompts.inputs["input_ids"] == config.image_token_id
    starts = np.diff(image.astype(int), axis=-1, prepend=0) == 1
    assert starts.sum(axis=-1).tolist() == [2, 1]
    special = {fields.get(name) for name in ("video_token_id", "vision_start_token_id", "vision_end_token_id")}
    assert not special & set(prompts.inputs["input_ids"].ravel().tolist())


@pytest.mark.parametrize("name", PUBLISHED)
def test_prompts_of_published_sizes_are_moderate(name, tmp_path):
    fields = published_config(name)
    config = family_of(fields).read_config(fields)
    prompts = make_prompts(tmp_path, config)
    assert_fit(prompts, config)
    assert prompts.inputs["input_ids"].size <= 4000


def test_images_and_questions_of_ones_own_are_added(tmp_path):
    write_checkpoint("llava", tmp_path / "llava")
    config = config_of(tmp_path / "llava")
    picture = draw_picture(np.random.default_rng(5), 40, 30)
    prompts = make_prompts(tmp_path / "llava", config, images=[picture], questions=["What is this?"])
    assert_fit(prompts, config)
    assert prompts.questions == (*QUESTIONS, "What is this?") and len(prompts.answers) == 3
    np.testing.assert_array_equal(prompts.images[2], picture)
    with pytest.raises(InputError, match="give one question an image"):
        make_prompts(tmp_path / "llava", config, images=[picture])
    with pytest.raises(InputError, match="copy preprocessor_config"):
        make_prompts(tmp_path, config, images=[picture], questions=["What is this?"])


def test_pictures_have_shapes_in_all_their_parts():
    picture = draw_picture(np.random.default_rng(0), 448, 336)
    assert picture.shape == (336, 448, 3) and picture.dtype == np.uint8
    for half in (picture[:168], picture[168:], picture[:, :224], picture[:, 224:]):
        assert (half.std(axis=(0, 1)) > 20).all()
    assert len(set(picture.mean(axis=(0, 1)).round(1).tolist())) == 3  # channels are told apart


def test_prompts_to_generate_from_are_read_of_a_recording(tmp_path):
    fields = tiny.config_fields("qwen2_vl")
    prompts = make_prompts(tmp_path, family_of(fields).read_config(fields))
    recorder = Recorder(tmp_path / "recording", prompts.inputs, "float32", None)
    for name in ("input_ids", "attention_mask"):
        recorder.add(f"generation.{name}", prompts.generation[name], whole=True)
    read = generation_inputs(recorder.finish({}))
    assert set(read) == set(prompts.generation)
    for name, value in prompts.generation.items():
        np.testing.assert_array_equal(read[name], value)
