"""OPERA against a rendering of the official code that was written apart from it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxmllm.decoding import beams
from jaxmllm.decoding.cache import Cache, with_room
from jaxmllm.decoding.generate import Prompts, ending_of, room_for, run_prompts, run_tokens
from jaxmllm.decoding.rules import Decoding, Ending
from jaxmllm.errors import InputError
from jaxmllm.methods import Opera, opera
from jaxmllm.models.edits import LayerEdits
from jaxmllm.models.layout import make_layout
from tests.support.rivals import opera as rival
from tests.support.tiny import LAYOUTS, make_inputs

VOCAB, EOS, LIMIT, PROMPT, IMAGE = 40, 1, 40, 20, (4, 11)


def prompt_of(seed):
    return np.random.default_rng(seed).integers(2, VOCAB, PROMPT).tolist()


def scripted_pass(model, prompt, decoding, tree, tokens, depth, paths):
    """The scripted model at the end of each path: what ``grow`` returns; the tree's cache holds tokens alone."""
    slots = PROMPT + tree.depth
    place = jnp.arange(slots)
    levels = jnp.arange(tree.depth)
    taken = jax.vmap(lambda path: tree.cache.key[levels, path])(paths)
    taken = jnp.where(levels < depth, taken, 0).at[:, depth].set(tokens)
    ids = jnp.concatenate([jnp.broadcast_to(jnp.asarray(prompt), (len(tokens), PROMPT)), taken], axis=1)
    row = PROMPT + depth
    logits = jnp.asarray(model.after)[ids[:, row]] + jnp.asarray(model.before)[ids[:, row - 1]]
    logits = logits + jnp.asarray(model.rise)[row]
    scores = jnp.asarray(model.noise)[:, ids[:, row][:, None], ids]
    scores = scores + jnp.where(place < PROMPT, model.held[:, None, None], 0.0)
    following = jnp.roll(ids, -1, axis=1)
    pulls = (place >= model.sink_from) & (place < row)
    scores = scores + jnp.where(pulls, jnp.asarray(model.pull)[:, ids, following], 0.0)
    weights = jax.nn.softmax(jnp.where(place <= row, scores, -jnp.inf), axis=-1).max(axis=0)
    # by slots: the prompt's, then depth x beams (any row of a depth will do), then the token's own
    by_depth = jnp.where(levels < depth, weights[:, PROMPT:], 0.0)
    spread = jnp.zeros((len(tokens), tree.depth, tree.beams)).at[:, :, 0].set(by_depth)
    own = jnp.take_along_axis(weights, jnp.full((len(tokens), 1), row), axis=1)
    return logits, jnp.concatenate([weights[:, :PROMPT], spread.reshape(len(tokens), -1), own], axis=1), tokens


def scripted_tree(decoding, number):
    layout = jax.tree.map(lambda leaf: leaf[None], decoding.prompts.layout)
    room = decoding.ending.room
    nothing = LayerEdits(None, None, (), None)
    tokens = Cache(jnp.zeros((1, room, number), jnp.int32), jnp.zeros((1, 1)))
    return beams.Tree(layout, nothing, (), tokens, number, PROMPT)


def scripted_roots(tree, own, depth):
    return dataclasses.replace(tree, cache=Cache(tree.cache.key.at[depth].set(own), tree.cache.value))


def run_scripted(monkeypatch, seed, **options):
    """Ours on the scripted model."""
    prompt = prompt_of(seed)
    model = rival.scripted(seed, VOCAB, prompt_length=PROMPT, eos=EOS)
    monkeypatch.setattr(opera, "grow", functools.partial(scripted_pass, model, prompt))
    monkeypatch.setattr(opera, "plant", scripted_tree)
    monkeypatch.setattr(opera, "rooted", scripted_roots)
    ids = jnp.asarray([prompt])
    ids = ids.at[0, IMAGE[0] : IMAGE[1] + 1].set(0)  # as placeholders, which the prompt holds nowhere else
    layout = make_layout(ids, jnp.ones_like(ids), 0, None, None, IMAGE[1] - IMAGE[0] + 1)
    tree_slots = with_room(layout, LIMIT * options.get("beams", 5))
    logits = jnp.asarray(model(prompt)[0])[None]
    prompts = Prompts(logits, tree_slots, ids, {}, None)
    ending = Ending(jnp.array([EOS]), jnp.int32(0), jnp.int32(LIMIT), LIMIT)
    rule = Opera(**options).rule(2, None)

    class Scripted(Decoding):
        first_slot = PROMPT

    done = jax.jit(lambda: rule.decode(Scripted(None, prompts, Cache(ids, ids), None, None, ending)))()
    tokens = np.asarray(done.tokens)[0, : int(done.lengths[0])].tolist()
    theirs = rival.opera(
        model, prompt, IMAGE, eos=EOS, max_new_tokens=LIMIT, prompt_tokens=PROMPT - (IMAGE[1] - IMAGE[0]), **options
    )
    return tokens, theirs, done


@pytest.mark.parametrize(
    ("seed", "options", "back_to"),
    [
        (5, {}, [11, 11, 11, 11, 11, 10, 10, 18]),  # 11 is used up, so 10
        (3, {"candidates": 1, "threshold": 25}, None),
        pytest.param(3, {}, [11, 11, 11, 11, 11, 16], marks=pytest.mark.slow),
        # answers that ended before going back
        pytest.param(8, {}, [15, 15, 15, 15], marks=pytest.mark.slow),
        pytest.param(5, {"half_scores": False}, None, marks=pytest.mark.slow),
        pytest.param(
            8, {"beams": 3, "candidates": 2, "threshold": 4, "penalty_weight": 0.7}, None, marks=pytest.mark.slow
        ),
    ],
)
def test_scripted_attention(seed, options, back_to, monkeypatch):
    tokens, theirs, done = run_scripted(monkeypatch, seed, **options)
    assert tokens == theirs.tokens
    beams_, candidates = options.get("beams", 5), options.get("candidates", 5)
    steps = len(theirs.trace)
    places = [step.rollback for step in theirs.trace if step.rollback is not None]
    if back_to is not None:  # what the case is there for
        assert places == back_to
    backs = len(places)
    last = 1  # the tokens of the last step are not run any more
    assert int(done.passes) == beams_ * (steps * (candidates + 1) - last + backs)


@pytest.mark.slow
def test_beams_on_a_model(plain_pair):
    """The tree of beams in the cache against PyTorch's whole sequences: beams reordered, columns judged, edits none."""
    inputs = make_inputs(plain_pair, LAYOUTS["unlike_lengths"], "left")
    model, room, limit = plain_pair.jax, room_for(14), 14
    rule = Opera(beams=3, candidates=3).rule(model.num_layers, None)
    prompts, cache = run_prompts(
        model.graphdef, model.params, model.as_inputs(inputs, bucketed=True), None, rule.capture, room
    )
    done = run_tokens(
        model.graphdef, model.params, prompts, cache, None, rule, None, ending_of(model, ()), np.int32(limit), room
    )
    for row, mask in enumerate(inputs["attention_mask"]):
        prompt = inputs["input_ids"][row][mask.astype(bool)].tolist()
        pixels = torch.from_numpy(inputs["pixel_values"][row : row + 1])
        shown = [place for place, token in enumerate(prompt) if token == plain_pair.image_token]

        def whole(tokens, pixels=pixels):
            with torch.no_grad():
                out = plain_pair.torch(input_ids=torch.tensor([tokens]), pixel_values=pixels, output_attentions=True)
            return out.logits[0, -1].numpy(), out.attentions[-1][0].max(0).values.numpy()

        theirs = rival.opera(whole, prompt, (shown[0], shown[-1]), eos=-1, max_new_tokens=limit, beams=3, candidates=3)
        assert np.asarray(done.tokens)[row, :limit].tolist() == theirs.tokens
        assert any(parent != beam for step in theirs.trace for beam, (parent, _) in enumerate(step.chosen))


def test_column_scores():
    rows = np.tril(np.random.default_rng(0).uniform(0.01, 0.2, (6, 6))).astype(np.float32)
    expected = [1e-7 * np.prod([50 * rows[i, j] for i in range(j, 4)]) for j in range(4)]
    found = opera.column_scores(jnp.asarray(rows), 4, 50.0)
    np.testing.assert_allclose(found[:4], expected, rtol=1e-5)
    assert not np.asarray(found[4:]).any()


def test_the_most_frequent_of_equals_is_the_smallest():
    assert int(opera.most_frequent(jnp.array([7, 2, 7, 2, 9]))) == 2
    assert int(opera.most_frequent(jnp.array([7, 2, 7, 2, 7]))) == 7


def test_options_out_of_range():
    for options in ({"beams": 1}, {"threshold": 1}, {"candidates": 0}, {"window": 0}):
        with pytest.raises(InputError, match=next(iter(options))):
            Opera(**options)
