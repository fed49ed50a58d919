"""The tokens that end an answer, by the files of a checkpoint, are those that transformers takes."""

import json

import pytest
from transformers import AutoConfig, GenerationConfig

from jaxmllm.decoding.stopping import Endings, read_endings
from jaxmllm.errors import ConfigError


def write(folder, name, fields):
    (folder / name).write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("fields", "stop"),
    [
        ({"model_type": "llava", "text_config": {"model_type": "llama"}}, (2,)),
        ({"model_type": "llava", "text_config": {"model_type": "llama", "eos_token_id": 7, "pad_token_id": 3}}, (7,)),
        ({"model_type": "llava_next", "text_config": {"model_type": "mistral"}}, (2,)),
        ({"model_type": "llava_next", "text_config": {"model_type": "qwen2"}}, ()),
        ({"model_type": "llava", "text_config": {"model_type": "llama", "eos_token_id": [4, 5]}}, (4, 5)),
        ({"model_type": "instructblip", "text_config": {"model_type": "llama", "eos_token_id": 9}}, (9,)),
        ({"model_type": "qwen2_vl", "text_config": {"model_type": "qwen2_vl_text", "eos_token_id": 11}}, (11,)),
    ],
)
def test_of_the_config(tmp_path, fields, stop):
    write(tmp_path, "config.json", fields)
    found = read_endings(tmp_path, fields["model_type"])
    assert found.stop_tokens == stop
    options = dict(fields)
    of_transformers = GenerationConfig.from_model_config(AutoConfig.for_model(options.pop("model_type"), **options))
    wanted = of_transformers.eos_token_id
    assert stop == (() if wanted is None else tuple(wanted) if isinstance(wanted, list) else (wanted,))
    if "pad_token_id" in fields["text_config"]:
        assert found.pad_token == of_transformers.pad_token_id == 3


def test_generation_config_comes_first(tmp_path):
    write(tmp_path, "config.json", {"model_type": "llava", "text_config": {"eos_token_id": 2}})
    write(tmp_path, "generation_config.json", {"eos_token_id": [151645, 151643], "pad_token_id": 151643})
    assert read_endings(tmp_path, "llava") == Endings((151645, 151643), 151643)
    write(tmp_path, "generation_config.json", {"max_length": 20})
    assert read_endings(tmp_path, "llava") == Endings((), 0)


@pytest.mark.parametrize("value", ["2", [2, "x"], -1, True])
def test_what_is_no_id_is_refused(tmp_path, value):
    write(tmp_path, "generation_config.json", {"eos_token_id": value})
    with pytest.raises(ConfigError, match=r"generation_config\.json: eos_token_id is"):
        read_endings(tmp_path, "llava")


def test_without_files_the_default_of_the_decoder(tmp_path):
    assert read_endings(tmp_path, "qwen2_vl").stop_tokens == (151645,)
    assert read_endings(tmp_path, "vipllava").stop_tokens == (2,)
