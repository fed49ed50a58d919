"""Runs in pieces, and the count of what is compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmllm.analysis.sharing import walk
from jaxmllm.analysis.sharing.compilations import count_compilations
from jaxmllm.analysis.sharing.programs import in_pieces
from jaxmllm.analysis.sharing.walk import examples_at_once
from tests.analysis.sharing import cases
from tests.analysis.sharing.test_exactness import close, erase_and_knockout, fixed


def mix(own, past, scale):
    """A function of examples, as a layer is: what one gets depends on itself and on what it shares with others."""
    many = own.shape[0] // past.shape[0]
    return own * scale + jnp.repeat(past, many, axis=0).sum(axis=1, keepdims=True), {"first": own[:, 0]}


@settings(deadline=None, max_examples=25)
@given(st.sampled_from([1, 2, 4, 6]), st.sampled_from([1, 2, 3]), st.integers(1, 4))
def test_pieces_give_what_the_whole_gives(count, contexts, at_once):
    rng = np.random.default_rng(count * 10 + at_once)
    groups = contexts if count % contexts == 0 else 1
    own, past = jnp.asarray(rng.normal(size=(count, 3))), jnp.asarray(rng.normal(size=(groups, 5)))
    args = (own, past, jnp.asarray(rng.normal(size=3)))
    calls = []

    def run(*piece):
        calls.append(piece[0].shape)
        return mix(*piece)

    got = in_pieces(run, count, at_once, args)
    jax.tree.map(lambda ours, whole: np.testing.assert_allclose(ours, whole, rtol=1e-6), got, mix(*args))
    cut = at_once < count and count % at_once == 0 and groups in (1, count)
    assert set(calls) == {(at_once if cut else count, 3)}


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="an accelerator takes all at once")
def test_a_cpu_takes_as_many_examples_at_once_as_its_cache_likes():
    assert [examples_at_once(count, 600) for count in (1, 2, 8)] == [1, 1, 1]
    assert [examples_at_once(16, positions) for positions in (40, 100, 400, 5000)] == [16, 8, 2, 1]
    assert examples_at_once(15, 100) == 5  # a divisor, so that no piece is smaller than the others


def test_a_sweep_in_pieces_gives_the_same_scores(monkeypatch):
    batch, branches = fixed(), erase_and_knockout()
    whole = cases.fast(cases.model(), batch, branches)
    monkeypatch.setattr(walk, "CPU_POSITIONS", 9)  # two answers, one question, two images, three prefixes at a time
    with count_compilations() as compilations:
        pieces = cases.fast(cases.model(), batch, branches)
    assert compilations.programs > 0  # other programs than those of the whole
    close(pieces, whole)


def test_compilations_are_counted_while_the_block_runs_and_no_longer():
    def fresh():
        jax.jit(lambda x: x * 2 + 1)(np.ones(3, np.float32))

    with count_compilations() as outer:
        fresh()
        with count_compilations() as inner:
            fresh()
    fresh()
    assert (outer.programs, inner.programs) == (2, 1)
    assert outer.seconds > inner.seconds > 0


def test_the_same_work_compiles_nothing_again():
    cases.fast(cases.model(), fixed(), erase_and_knockout())
    with count_compilations() as compilations:
        cases.fast(cases.model(), fixed("left", seed=8), erase_and_knockout())
    assert compilations.programs == 0
