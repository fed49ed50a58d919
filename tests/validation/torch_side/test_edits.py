"""torch's edits: against hooks that the suite has, against what a case must do, and against the port."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmllm.models.layout import ROLES, make_layout
from jaxmllm.validation.components import meaningful
from jaxmllm.validation.distributions import measure
from jaxmllm.validation.edit_cases import EditCase, Step, edit_cases, head_scales
from jaxmllm.validation.floors import ratio
from jaxmllm.validation.port import behaviour
from jaxmllm.validation.prompts import make_prompts
from jaxmllm.validation.recording import Recorder
from jaxmllm.validation.torch_side.edits import attached, record_edits, roles, run_edited
from jaxmllm.validation.torch_side.loading import load_reference
from tests.support import reference as suite

CLEAN = EditCase("clean", ())


@pytest.fixture(scope="module")
def case(pair):
    """A variant, PyTorch's model, and prompts."""
    return pair, load_reference(pair.folder, "float32"), make_prompts(pair.folder, pair.jax.config)


def bare(prompts):
    return {name: value for name, value in prompts.inputs.items() if not name.startswith("answer")}


def valid_of(prompts):
    return prompts.inputs["attention_mask"].astype(bool)


def test_whole_edits_are_those_of_the_suite(case):
    pair, reference, prompts = case
    positions = roles(prompts.inputs, pair.image_token)
    heads = head_scales(pair.jax.num_heads)
    expected = {
        EditCase("erase", (Step("erase", (1, 2)),)): suite.erase([1, 2], positions["image"]),
        EditCase("blind", (Step("blind", (0, 3)),)): suite.blind([0, 3], positions["image"]),
        EditCase("knockout", (Step("knockout", (1,), queries="last", keys="image"),)): suite.knockout(
            [1], positions["last"], positions["image"]
        ),
        EditCase("heads", (Step("scale_heads", (2,)),)): suite.scale_heads([2], heads),
    }
    fresh = dataclasses.replace(pair, torch=reference.model)
    for edits, hooks in expected.items():
        got = run_edited(reference, prompts.inputs, edits)
        theirs = suite.run(fresh, bare(prompts), hooks)
        valid = valid_of(prompts)
        np.testing.assert_array_equal(got["logits"][valid], theirs.logits[valid], err_msg=edits.name)
        np.testing.assert_array_equal(got["resid_post"][valid], theirs.resid_post[-1][valid], err_msg=edits.name)


def test_every_case_shows_in_the_logits(case):
    pair, reference, prompts = case
    valid = valid_of(prompts)
    clean = run_edited(reference, prompts.inputs, CLEAN)["logits"][valid]
    for edits in edit_cases(pair.jax.num_layers):
        got = run_edited(reference, prompts.inputs, edits)["logits"][valid]
        assert np.isfinite(got).all()
        assert np.abs(got - clean).max() > 1e-3, edits.name
    np.testing.assert_array_equal(run_edited(reference, prompts.inputs, CLEAN)["logits"][valid], clean)


def test_steps_without_strength_change_nothing(case):
    pair, reference, prompts = case
    valid, layers = valid_of(prompts), tuple(range(pair.jax.num_layers))
    clean = run_edited(reference, prompts.inputs, CLEAN)["logits"][valid]
    for kind in ("erase", "blind", "knockout", "review", "scale_heads"):
        got = run_edited(reference, prompts.inputs, EditCase(kind, (Step(kind, layers, 0.0),)))["logits"][valid]
        np.testing.assert_array_equal(got, clean, err_msg=kind)


def test_what_is_knocked_out_in_part_keeps_its_share(plain_pair):
    """Two fifths of the weight is left before attention is normalised."""
    reference = load_reference(plain_pair.folder, "float32")
    prompts = make_prompts(plain_pair.folder, plain_pair.jax.config)
    positions = roles(prompts.inputs, plain_pair.image_token)
    fresh = dataclasses.replace(plain_pair, torch=reference.model)
    clean = suite.run(fresh, bare(prompts)).attention[2]
    with attached(reference.anatomy, positions, EditCase("some", (Step("knockout", (2,), 0.6, queries="last"),))):
        edited = suite.run(fresh, bare(prompts)).attention[2]
    for row in range(len(clean)):
        at = int(np.flatnonzero(positions["last"][row])[0])
        left = np.where(positions["image"][row], 0.4, 1.0) * clean[row, :, at]
        np.testing.assert_allclose(edited[row, :, at], left / left.sum(-1, keepdims=True), atol=1e-7)
        np.testing.assert_array_equal(edited[row, :, at - 1], clean[row, :, at - 1])


def test_hooks_are_taken_off_after_a_failure(plain_pair):
    reference = load_reference(plain_pair.folder, "float32")
    prompts = make_prompts(plain_pair.folder, plain_pair.jax.config)
    clean = run_edited(reference, prompts.inputs, CLEAN)["logits"]
    with pytest.raises(IndexError):
        run_edited(reference, {**prompts.inputs, "input_ids": prompts.inputs["input_ids"] + 1000}, edit_cases(4)[-1])
    np.testing.assert_array_equal(run_edited(reference, prompts.inputs, CLEAN)["logits"], clean)


@pytest.mark.parametrize("answered", [True, False])
def test_roles_are_the_port_s(plain_pair, answered):
    prompts = make_prompts(plain_pair.folder, plain_pair.jax.config)
    inputs = dict(prompts.inputs) if answered else bare(prompts)
    ids, mask = (jnp.asarray(inputs[name]) for name in ("input_ids", "attention_mask"))
    answers = jnp.asarray(inputs["answer_positions"]) if answered else None
    layout = make_layout(ids, mask, plain_pair.image_token, None, answers, ids.shape[1])
    found = roles(inputs, plain_pair.image_token)
    assert set(found) == set(ROLES)
    for role, positions in found.items():
        np.testing.assert_array_equal(positions, np.asarray(layout.role(role)), err_msg=role)


def test_halves_are_edited_without_overflow(plain_pair):
    prompts = make_prompts(plain_pair.folder, plain_pair.jax.config)
    valid = valid_of(prompts)
    whole = load_reference(plain_pair.folder, "float32")
    for dtype, near in (("bfloat16", 0.1), ("float16", 0.02)):
        half = load_reference(plain_pair.folder, dtype)
        for edits in edit_cases(plain_pair.jax.num_layers):
            got = run_edited(half, prompts.inputs, edits)["logits"]
            assert got.dtype == np.float32
            expected = run_edited(whole, prompts.inputs, edits)["logits"]
            assert np.abs(got - expected)[valid].max() < near, (dtype, edits.name)


def departures(pair, reference, prompts, cases, folder):
    """The cases in which the port departs, by how much."""
    recorder = Recorder(folder / "recording", prompts.inputs, "float32", None)
    record_edits(recorder, reference, cases)
    recording = recorder.finish({})
    found = {}
    for each in cases:
        state, logits = behaviour.edited(pair.jax, prompts.inputs, each)
        for name, got in ((f"edit.{each.name}.resid_post", state), (f"edit.{each.name}.logits", logits)):
            expected, floor = recording.read(name), recording.floor(name, "run")
            assert 0 < floor.of["other order"].max < 1e-4
            mask = meaningful(name, expected.shape, None, prompts.inputs)
            found[name] = ratio(measure(got, expected, mask, "float32"), floor, "float32")
    assert len(found) == 2 * len(cases) == len(list(recording.names()))
    return {name: value for name, value in found.items() if value > 1}


def test_the_port_does_the_same_edits(plain_pair, tmp_path):
    reference = load_reference(plain_pair.folder, "float32")
    prompts = make_prompts(plain_pair.folder, plain_pair.jax.config)
    assert not departures(plain_pair, reference, prompts, edit_cases(4)[-1:], tmp_path)


@pytest.mark.slow
def test_the_port_does_the_same_edits_in_every_variant(case, tmp_path):
    pair, reference, prompts = case
    assert not departures(pair, reference, prompts, edit_cases(pair.jax.num_layers), tmp_path)
