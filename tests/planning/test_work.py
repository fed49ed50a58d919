"""Inputs of a typical question, for every family, from its config alone."""

import numpy as np
import pytest

from jaxmllm.errors import InputError
from jaxmllm.planning.work import Work, one_question
from tests.planning.cases import published

# Image tokens of an image of 640 x 480 pixels.
TOKENS = {
    "llava-1.5-7b-hf": 576,
    "vip-llava-7b-hf": 576,
    "llava-v1.6-34b-hf": 576 + 36 * 49,  # two by two tiles without the padding, a newline a row
    "instructblip-vicuna-7b": 32,
    "qwen2-vl-7b-instruct": 17 * 23,
    "qwen2.5-vl-7b-instruct": 17 * 23,
}


@pytest.mark.parametrize("name", TOKENS)
def test_an_image_takes_the_tokens_that_its_processor_would_give_it(name):
    config = published(name)
    inputs = one_question(config, Work("forward"), answered=True, bucketed=False)
    ids = np.asarray(inputs.input_ids)
    assert (ids == config.image_token_id).sum() == TOKENS[name]
    assert ids.shape == (1, 8 + TOKENS[name] + 32 + 4)
    assert np.asarray(inputs.answer_positions).tolist() == [[ids.shape[1] - 5 + step for step in range(4)]]
    assert len(inputs.images) == 1


def test_image_tokens_stand_for_an_image_of_that_many():
    config = published("qwen2.5-vl-7b-instruct")
    inputs = one_question(config, Work("forward", image_tokens=1024), answered=False)
    assert inputs.images.counts.tolist() == [1024]
    with pytest.raises(InputError, match="takes 576 tokens here, not 100"):
        one_question(published("llava-1.5-7b-hf"), Work("forward", image_tokens=100), answered=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"job": "train"}, "job is 'train'; expected one of sweep, evaluate, forward"),
        ({"questions": 0}, "questions is 0"),
        ({"image": (0, 3)}, "image is 0 x 3"),
        ({"rows": 0}, "batch size is 0"),
    ],
)
def test_numbers_out_of_range_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        Work(**{"job": "forward"} | changes).check()
