"""Probabilities of answers and contrastive attention of PyTorch's side, against the suite and against the port."""

import dataclasses

import numpy as np
import pytest
import torch

from jaxmllm.analysis import attention_evolution, contrastive_attention
from jaxmllm.validation.port import behaviour
from jaxmllm.validation.prompts import make_prompts
from jaxmllm.validation.recording import Recorder
from jaxmllm.validation.torch_side.answers import (
    distribution,
    hellinger_to_last,
    of_image_tokens,
    record_answers,
    run_answers,
)
from jaxmllm.validation.torch_side.loading import load_reference
from tests.support import reference as suite


@pytest.fixture(scope="module")
def case(pair):
    """A variant, PyTorch's model, and prompts."""
    return pair, load_reference(pair.folder, "float32"), make_prompts(pair.folder, pair.jax.config)


def test_answers_and_attention_are_those_of_the_suite(case):
    pair, reference, prompts = case
    inputs = {name: value for name, value in prompts.inputs.items() if not name.startswith("answer")}
    expected = suite.run(dataclasses.replace(pair, torch=reference.model), inputs)
    got = run_answers(reference, prompts.inputs)
    logs = torch.from_numpy(expected.logits).log_softmax(-1).numpy()
    for row, positions in enumerate(prompts.inputs["answer_positions"]):
        answer = prompts.inputs["answer_ids"][row]
        many = int((answer >= 0).sum())
        np.testing.assert_allclose(
            got["answer.log_probability"][row, :many], logs[row, positions[:many], answer[:many]], atol=1e-6
        )
        assert not got["answer.log_probability"][row, many:].any()
        image = inputs["input_ids"][row] == pair.image_token
        weights = expected.attention[:, row, :, positions[0]].mean(axis=1)[:, image]
        np.testing.assert_allclose(got["contrast.attention"][:, row, : image.sum()], weights, atol=1e-7)
        assert not got["contrast.attention"][:, row, image.sum() :].any()


def test_what_is_recorded_is_what_the_port_finds(plain_pair, tmp_path):
    reference = load_reference(plain_pair.folder, "float32")
    prompts = make_prompts(plain_pair.folder, plain_pair.jax.config)
    recorder = Recorder(tmp_path / "recording", prompts.inputs, "float32", None)
    recording = recorder.finish(record_answers(recorder, reference))
    assert list(recording.names()) == [
        "answer.log_probability",
        "answer.total",
        "answer.early_logits",
        "contrast.attention",
        "contrast.distance",
        "contrast.map",
    ]
    logits = behaviour.answer_logits(plain_pair.jax, prompts.inputs)
    total = behaviour.scored(logits, prompts.inputs["answer_ids"]).log_probability
    np.testing.assert_allclose(total, recording.read("answer.log_probability").sum(axis=-1), atol=4e-6)
    np.testing.assert_allclose(total, recording.read("answer.total"), atol=4e-6)
    early = behaviour.early_logits(plain_pair.jax, prompts.inputs)
    np.testing.assert_allclose(early, recording.read("answer.early_logits"), atol=4e-6)
    attention = behaviour.image_attention(plain_pair.jax, prompts.inputs)
    np.testing.assert_allclose(attention, recording.read("contrast.attention"), atol=1e-7)
    pre = np.asarray(recording.header["contrast"]["pre"])
    found = behaviour.contrast(attention, pre)
    np.testing.assert_array_equal(found["layer"], pre)
    np.testing.assert_allclose(found["map"], recording.read("contrast.map"), atol=1e-6)
    np.testing.assert_allclose(found["distance"], recording.read("contrast.distance"), atol=1e-6)
    for name in recording.names():
        assert recording.floor(name, "run").of["other order"].max < 1e-5


def test_formulas_are_the_paper_s():
    rng = np.random.default_rng(0)
    attention = rng.uniform(size=(5, 2, 7)).astype(np.float32)
    attention[3, 1] = 0  # none at all
    shares = distribution(attention)
    np.testing.assert_allclose(shares.sum(axis=-1), 1)
    np.testing.assert_allclose(shares[3, 1], 1 / 7)
    distances = hellinger_to_last(attention)
    by_hand = np.sqrt(((np.sqrt(shares[1, 0]) - np.sqrt(shares[4, 0])) ** 2).sum() / 2)
    assert distances[1, 0] == pytest.approx(by_hand)
    assert (distances[-1] == 0).all()
    np.testing.assert_allclose(distances, attention_evolution(attention), atol=1e-6)
    pre = distances[:-1].argmax(axis=0)
    expected = shares[-1] - shares[pre, [0, 1]]
    np.testing.assert_allclose(expected, contrastive_attention(attention), atol=1e-6)


def test_weights_are_taken_of_image_tokens_in_order():
    weights = np.arange(8.0).reshape(2, 4)
    image = np.array([[False, True, True, True], [True, False, False, True]])
    np.testing.assert_array_equal(of_image_tokens(weights, image), [[1, 2, 3], [4, 7, 0]])
