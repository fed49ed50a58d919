"""The plan of a sweep's memory, against the formulas written out and against a run."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from jaxmllm import InputError
from jaxmllm.analysis import erase_image, knockout, review_mask
from jaxmllm.analysis.masking import layer_edits
from jaxmllm.analysis.sharing.budget import BLOCK_ROWS, Lengths, plan_sweep
from jaxmllm.analysis.sweeping import plan_for
from jaxmllm.models.llava import read_config
from tests.analysis.sharing import cases

CONFIG = read_config(
    json.loads((Path(cases.GOLDENS).parent / "llava-1.5-7b-hf" / "config.json").read_text(encoding="utf-8"))
)
L, D, KV = 32, 4096, 2 * 32 * 128  # layers, width, numbers a layer keeps of a position
BF16 = 2
A_LAYER = (4 * D * D + 3 * D * 11008 + 2 * D) * BF16  # four projections, three of the gated block, two norms
WEIGHTS = 14_126_000_000
SHORT, LONG = Lengths(35, 576, 38, 3), Lengths(35, 2880, 38, 3)


def plan(kind="erase", lengths=SHORT, budget=80e9, **changes):
    branches = layer_edits(kind, "single", L) if isinstance(kind, str) else kind
    given = dict(itemsize=BF16, weights=WEIGHTS, layer_weights=L * A_LAYER, batch_size=16, questions=1000) | changes
    return plan_sweep(CONFIG, branches, lengths, budget=int(budget), **given)


@pytest.fixture(scope="module")
def plans():
    return {
        (kind, lengths, budget): plan(kind, lengths, budget)
        for kind in ("erase", "blind", "knockout")
        for lengths in (SHORT, LONG)
        for budget in (24e9, 40e9, 80e9)
    }


def test_every_plan_is_within_its_budget(plans):
    for found in plans.values():
        assert found.total == sum(found.parts.values()) <= found.budget
        assert found.parts["weights"] == WEIGHTS
        assert found.parts["layer copies"] == (L * A_LAYER if found.keep_layers else 0)
        assert 1 <= found.contexts <= found.rows <= 16 and found.rows <= found.block <= 1000
        assert found.keys == found.parts.get("shared keys", 0) <= found.shared_keys


def test_more_memory_never_leads_to_smaller_chunks_or_blocks(plans):
    for kind in ("erase", "blind", "knockout"):
        for lengths in (SHORT, LONG):
            grown = [plans[kind, lengths, budget] for budget in (24e9, 40e9, 80e9)]
            assert [found.rows for found in grown] == sorted(found.rows for found in grown)
            assert plans[kind, lengths, 24e9].rows <= plans[kind, lengths, 80e9].rows
            assert grown[-1].keep_layers


@pytest.mark.parametrize("lengths, gigabytes", [(SHORT, 5.28), (LONG, 25.17)])
def test_shared_keys_take_branches_x_layers_x_context_x_keys(plans, lengths, gigabytes):
    found = plans["erase", lengths, 80e9]
    context = lengths.head + lengths.body
    # erased at layer i the image runs through L - i layers; at the last one each chunk is on its own
    layers = sum(L - i for i in range(L - 1))
    assert found.layer_keys == context * KV * BF16
    assert found.shared_keys == layers * context * KV * BF16
    assert found.shared_keys == pytest.approx(gigabytes * 1e9, rel=1e-2)
    for kind in ("blind", "knockout"):
        assert plans[kind, lengths, 80e9].shared_keys == 0


def test_branches_that_wait_keep_the_states_of_question_and_answer(plans):
    for lengths, budget in ((SHORT, 24e9), (LONG, 80e9)):
        found = plans["erase", lengths, budget]
        # from every layer but the last, where the branch does not wait
        assert found.parts["waiting"] == found.block * (L - 1) * (lengths.question + lengths.answer) * D * BF16
    for kind in ("blind", "knockout"):
        assert plans[kind, SHORT, 80e9].parts["waiting"] == 0


def test_a_chunk_keeps_image_keys_for_knockouts_and_image_states_for_blinds():
    """Two branches less one: what the second adds to a chunk of the same shape."""
    for kind, extra in (
        ("knockout", SHORT.head * KV + 16 * SHORT.body * KV + 16 * (SHORT.question + SHORT.answer) * D),
        ("blind", SHORT.head * KV + 16 * SHORT.body * D + 16 * (SHORT.question + SHORT.answer) * D),
    ):
        branches = layer_edits(kind, "single", L)
        one, two = (plan(branches[start:20]) for start in (19, 18))
        assert one.rows == two.rows == 16
        assert two.parts["chunk"] - one.parts["chunk"] == extra * BF16


def test_costs_are_those_of_the_documented_formulas(plans):
    def share(part, lengths):
        return part / lengths.total

    for lengths in (SHORT, LONG):
        tail = lengths.question + lengths.answer
        erase, blind, cut = (plans[kind, lengths, 80e9] for kind in ("erase", "blind", "knockout"))
        half = (L + 1) / 2
        assert erase.clean_passes == pytest.approx(1 + half * share(tail, lengths), abs=0.15)
        assert cut.clean_passes == pytest.approx(1 + half * share(tail, lengths), abs=0.15)
        assert blind.clean_passes == pytest.approx(1 + half * share(tail + lengths.body, lengths), rel=0.06)
        assert erase.one_off == pytest.approx(half * share(lengths.body, lengths), rel=0.07)
        assert blind.one_off == cut.one_off == 0


def test_many_questions_an_image_share_its_computation():
    alone, ten = plan("blind"), plan("blind", a_context=10.0)
    assert ten.contexts < alone.contexts == alone.rows
    assert ten.clean_passes < alone.clean_passes / 4


def test_a_small_budget_halves_the_chunk_until_it_fits():
    sizes = [plan("blind", LONG, budget).rows for budget in np.geomspace(17.5e9, 80e9, 12)]
    assert sizes == sorted(sizes) and set(sizes) <= {1, 2, 4, 8, 16} and len(set(sizes)) >= 3


def needed(message: str) -> float:
    """The bytes an error asks for."""
    size, unit = re.search(r"needs ([\d.]+) (GB|MB)", message).groups()
    return float(size) * {"GB": 1e9, "MB": 1e6}[unit]


@pytest.mark.parametrize("kind", ["erase", "blind", "knockout"])
def test_a_budget_that_does_not_hold_one_question_is_refused_with_what_it_would_take(kind):
    with pytest.raises(InputError, match=r"budget is 1\.00 GB") as error:
        plan(kind, budget=1e9)
    least = needed(str(error.value))
    found = plan(kind, budget=least + 1e7)  # the message rounds to ten megabytes
    assert found.rows == 1
    with pytest.raises(InputError):
        plan(kind, budget=least - 1e7)


def test_blocks_have_a_limit_and_shared_keys_are_kept_only_where_blocks_are_many():
    few, many = plan(questions=64), plan(questions=10 * BLOCK_ROWS, lengths=SHORT)
    assert few.block == 64 and few.keys == 0
    assert many.block <= BLOCK_ROWS and many.keys == many.shared_keys > 0
    assert many.total <= many.budget


def test_the_plan_can_be_read():
    lines = plan("erase", SHORT, 24e9).lines()
    assert re.fullmatch(r"memory [\d.]+ GB of 24.00 GB: weights 14.13 GB, .*chunk .*waiting .*", lines[0])
    assert "5.28 GB in all" in lines[1] and "clean passes a question" in lines[2]


@pytest.mark.parametrize("rows", [None, 1, 5])
def test_weights_of_every_image_token_can_be_planned_for(rows):
    """One weight an image token, alike for all questions or for each question its own."""
    weights = np.full((cases.TOKENS,) if rows is None else (rows, cases.TOKENS), 0.5)
    lengths = Lengths(3, cases.TOKENS, 6, 3)
    found = plan_for(cases.model(), [erase_image(1, weights), review_mask(1, weights)], lengths, 5, 1.0)
    assert found.rows == 5


@pytest.mark.parametrize("rows", [None, 5])
def test_weights_of_every_position_can_be_planned_for(rows):
    weights = np.full((cases.WIDTH,) if rows is None else (rows, cases.WIDTH), 0.5)
    found = plan_for(cases.model(), [knockout(1, weights, "image")], Lengths(3, cases.TOKENS, 6, 3), 5, 1.0)
    assert found.rows == 5


def test_weights_can_be_planned_for_where_text_stands_between_images():
    weights = np.full(2 * cases.TOKENS, 0.5)
    found = plan_for(cases.model(), [erase_image(1, weights)], Lengths(3, 2 * cases.TOKENS + 1, 6, 3), 5, 1.0)
    assert found.rows == 5


def test_plans_are_made_of_what_the_model_holds():
    which = cases.model()
    found = plan_for(which, [erase_image(1)], Lengths(3, cases.TOKENS, 6, 3), 5, 1.0)
    tensors = (cases.GOLDENS / "grouped_queries" / "model.safetensors").stat().st_size
    assert tensors * 0.8 < found.parts["weights"] < tensors
    assert dataclasses.asdict(found)["parts"]["weights"] == found.parts["weights"]
