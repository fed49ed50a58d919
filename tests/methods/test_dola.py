"""DoLa against a rendering of the official code that was written apart from it, on scores and on PyTorch's model."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmllm.decoding.generate import ending_of, room_for, run_prompts, run_tokens
from jaxmllm.errors import InputError
from jaxmllm.methods import Dola, dola
from tests.support import reference
from tests.support.rivals import dola as rival
from tests.support.tiny import LAYOUTS, make_inputs

LIMIT = 6


def score(candidates, together=False, penalty=1.0):
    method = Dola(candidates=tuple(range(candidates)), together=together, repetition_penalty=penalty)
    return method.rule(candidates, None).score


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 10_000), st.integers(1, 5), st.sampled_from([0.5, 3.0, 12.0]))
def test_choice_and_scores(seed, candidates, spread):
    rng = np.random.default_rng(seed)
    final = (rng.normal(size=(3, 20)) * spread).astype(np.float32)
    early = (rng.normal(size=(candidates, 3, 20)) * spread).astype(np.float32)
    chosen = np.asarray(score(candidates).choose(jnp.asarray(final), jnp.asarray(early)))
    for row in range(3):
        place, expected = rival.dola_scores(final[row], early[:, row])
        assert chosen[row] == place
        found = dola.contrasted(jnp.asarray(final[None, row]), jnp.asarray(early[None, place, row]), 0.1)[0]
        np.testing.assert_allclose(found, expected, atol=1e-4)
    together = score(candidates, together=True).choose(jnp.asarray(final), jnp.asarray(early))
    assert set(np.asarray(together).tolist()) == {rival.dola_batch_scores(final, early.swapaxes(0, 1), 0.1)[0]}


def test_the_order_of_arguments_is_not_the_textbooks():
    final, early = jnp.array([[2.0, 0.0, -1.0]]), jnp.array([[[0.0, 1.0, 3.0]]])
    p, q = (np.exp(x) / np.exp(x).sum() for x in (np.asarray(final)[0], np.asarray(early)[0, 0]))
    middle = (p + q) / 2
    expected = 0.5 * (middle * np.log(middle / p) + middle * np.log(middle / q)).mean()
    assert float(dola.divergence(final, early)[0, 0]) == pytest.approx(expected, rel=1e-5)


def test_candidates():
    assert list(Dola().states(32)) == [0, 2, 4, 6, 8, 10, 12, 14]
    assert list(Dola(layers="high").states(32)) == [16, 18, 20, 22, 24, 26, 28, 30]
    assert list(Dola(candidates=(1, 3)).states(4)) == [1, 3]
    with pytest.raises(InputError, match="no candidate states"):
        Dola(candidates=(4,)).states(4)


def answers(pair, inputs, method):
    """Ours, below the processor: the tiny models have none."""
    model = pair.jax
    rule = method.rule(model.num_layers, None)
    room = room_for(LIMIT)
    checked = model.as_inputs(inputs, bucketed=True)
    prompts, cache = run_prompts(model.graphdef, model.params, checked, None, rule.capture, room)
    done = run_tokens(
        model.graphdef, model.params, prompts, cache, None, rule, None, ending_of(model, ()), np.int32(LIMIT), room
    )
    return np.asarray(done.tokens)[:, :LIMIT]


@pytest.mark.parametrize("norm", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_generated_tokens_are_those_of_the_rendering(plain_pair, norm):
    """States of PyTorch's model, its head with or without the final norm, and the rendering's loop without a cache."""
    inputs = make_inputs(plain_pair, LAYOUTS["one_image"], "left")
    ids = np.asarray(inputs["input_ids"])
    language = plain_pair.torch.model.language_model
    candidates = (0, 1)

    def states_of(tokens, row):
        prompt = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
        prompt["pixel_values"] = inputs["pixel_values"][row : row + 1]
        prompt |= {"input_ids": np.array([tokens]), "attention_mask": np.ones((1, len(tokens)), np.int64)}
        with torch.no_grad():
            out = plain_pair.torch(**reference.tensors(prompt), output_hidden_states=True)
            early = torch.stack([out.hidden_states[place][0, -1] for place in candidates])
            early = plain_pair.torch.lm_head(language.norm(early) if norm else early)
        return out.logits[0, -1].numpy(), early.numpy()

    found = answers(plain_pair, inputs, Dola(candidates=candidates, norm=norm))
    for row, mask in enumerate(np.asarray(inputs["attention_mask"])):
        prompt = ids[row][mask.astype(bool)].tolist()
        theirs = rival.dola(
            lambda tokens, row=row: states_of(tokens, row), prompt, list(candidates), eos=-1, max_new_tokens=LIMIT
        )
        assert found[row].tolist() == theirs.tokens


def test_repetition_is_penalised_once():
    seen = jnp.array([[True, False, True]])
    found = dola.penalised(jnp.array([[2.0, 2.0, -2.0]]), seen, 1.25)
    np.testing.assert_allclose(found, [[1.6, 2.0, -2.5]])
    assert Dola().repetition_penalty == 1.2
