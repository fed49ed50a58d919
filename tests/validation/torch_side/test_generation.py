"""What transformers generates, against the suite's own call of it and against the port."""

import dataclasses

import numpy as np
import pytest
import torch

from jaxmllm.validation.port import behaviour
from jaxmllm.validation.prompts import generation_inputs, make_prompts
from jaxmllm.validation.recording import Recorder
from jaxmllm.validation.torch_side.generation import log_probabilities, record_generation, run_generate
from jaxmllm.validation.torch_side.loading import load_reference
from tests.support import generation as suite

NEW_TOKENS = 5


@pytest.fixture(scope="module")
def case(pair):
    """A variant, PyTorch's model, and prompts."""
    return pair, load_reference(pair.folder, "float32"), make_prompts(pair.folder, pair.jax.config)


def test_tokens_are_those_that_the_suite_gets(case):
    pair, reference, prompts = case
    fresh = dataclasses.replace(pair, torch=reference.model)
    expected = suite.hugging_face(fresh, dict(prompts.generation), NEW_TOKENS)
    logits, tokens = run_generate(reference, prompts.generation, NEW_TOKENS)
    np.testing.assert_array_equal(tokens, expected)
    np.testing.assert_array_equal(logits.argmax(axis=-1), tokens)


def test_forced_tokens_have_the_same_logits(case):
    _, reference, prompts = case
    logits, tokens = run_generate(reference, prompts.generation, NEW_TOKENS)
    forced, same = run_generate(reference, prompts.generation, NEW_TOKENS, forced=tokens)
    np.testing.assert_array_equal(forced, logits)
    np.testing.assert_array_equal(same, tokens)
    other = (tokens + 1) % logits.shape[-1]
    assert np.array_equal(run_generate(reference, prompts.generation, NEW_TOKENS, forced=other)[1], other)


def test_what_a_checkpoint_says_of_sampling_is_left_out(plain_pair):
    reference = load_reference(plain_pair.folder, "float32")
    prompts = make_prompts(plain_pair.folder, plain_pair.jax.config)
    _, tokens = run_generate(reference, prompts.generation, NEW_TOKENS)
    settings = reference.model.generation_config
    settings.update(repetition_penalty=5.0, eos_token_id=int(tokens[0, 1]), do_sample=True, temperature=3.0)
    _, again = run_generate(reference, prompts.generation, NEW_TOKENS)
    np.testing.assert_array_equal(again, tokens)
    assert reference.model.generation_config is settings


def test_what_is_recorded_is_what_the_port_generates(plain_pair, tmp_path):
    reference = load_reference(plain_pair.folder, "float32")
    prompts = make_prompts(plain_pair.folder, plain_pair.jax.config)
    recorder = Recorder(tmp_path / "recording", prompts.inputs, "float32", None)
    recording = recorder.finish(record_generation(recorder, reference, prompts.generation, NEW_TOKENS))
    said = recording.header["generation"]
    chosen = recording.read("generation.log_probability")
    np.testing.assert_allclose(chosen, said["log_probabilities"], rtol=1e-6)
    assert 0 < recording.floor("generation.log_probability", "run").of["other order"].max < 1e-5
    assert np.min(said["leads"]) > 0
    found = behaviour.generated(plain_pair.jax, generation_inputs(recording), NEW_TOKENS)
    tokens, ours = found.tokens, found.log_probabilities
    np.testing.assert_array_equal(tokens, said["tokens"])
    np.testing.assert_allclose(ours, chosen, atol=2e-6)


def test_leads_are_those_over_the_next_best(plain_pair, tmp_path):
    reference = load_reference(plain_pair.folder, "float32")
    prompts = make_prompts(plain_pair.folder, plain_pair.jax.config)
    recorder = Recorder(tmp_path / "recording", prompts.inputs, "float32", None)
    leads = np.array(record_generation(recorder, reference, prompts.generation, 2)["generation"]["leads"])
    logits, tokens = run_generate(reference, prompts.generation, 2)
    for row, step in np.ndindex(tokens.shape):
        others = np.delete(logits[row, step], tokens[row, step])
        assert leads[row, step] == pytest.approx(logits[row, step, tokens[row, step]] - others.max())


def test_log_probabilities_are_torch_s():
    logits = np.random.default_rng(0).normal(size=(2, 3, 7), scale=50)
    tokens = np.array([[0, 6, 2], [3, 3, 1]])
    expected = torch.from_numpy(logits).log_softmax(-1).gather(-1, torch.from_numpy(tokens)[..., None])[..., 0]
    np.testing.assert_allclose(log_probabilities(logits, tokens), expected.numpy(), atol=1e-12)
