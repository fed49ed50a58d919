"""The fast sweep of every family equals the plain way: images of unlike sizes, shared images, questions apart."""

import jax
import numpy as np
import pytest

from jaxmllm.analysis import blind_image, erase_image, knockout
from jaxmllm.analysis.masking import run_plain
from jaxmllm.analysis.sharing.compilations import Compilations
from jaxmllm.analysis.sharing.engine import Engine
from jaxmllm.analysis.sharing.keys import SharedKeys
from jaxmllm.analysis.sharing.plan import plan_lane
from jaxmllm.analysis.sharing.rule import Tier
from jaxmllm.analysis.sharing.segments import find_rows, make_lanes, shapes_of
from jaxmllm.analysis.sharing.touch import settle
from jaxmllm.model import Model
from jaxmllm.models.registry import FAMILIES
from jaxmllm.processing import append_answers
from tests.analysis.sharing.cases import assert_same
from tests.support import families
from tests.support.weights import random_model


def prompts(name: str, model: Model, images: int = 3, text_alone: bool = False) -> dict[str, np.ndarray]:
    """Images of unlike sizes, each asked about twice behind one prefix, and perhaps a prompt without an image."""
    rng = np.random.default_rng(1)
    family, token = families.FAMILIES[name], model.config.image_token_id
    arrays, tokens = family.make_images(model.config, rng, images)
    shown = list(range(images)) * 2
    rows = [[5, 6] + [token] * tokens[image] + list(rng.integers(3, 89, 3 + at % 2)) for at, image in enumerate(shown)]
    if text_alone:
        rows.append(list(rng.integers(3, 89, 6)))
    width = max(map(len, rows))
    ids, mask = np.full((len(rows), width), 1), np.zeros((len(rows), width), np.int64)
    for row, words in enumerate(rows):
        ids[row, : len(words)], mask[row, : len(words)] = words, 1
    repeated = {key: np.concatenate([value] * 2) for key, value in arrays.items()}
    answers = [rng.integers(3, 89, 1 + row % 2).tolist() for row in range(len(rows))]
    return append_answers({"input_ids": ids, "attention_mask": mask} | repeated, answers)


def both_ways(name: str, branches, **form) -> None:
    model = random_model(next(iter(families.FAMILIES[name].VARIANTS.values())))
    batch = prompts(name, model, **form)
    inputs = model.as_inputs(batch, bucketed=model.family.tokens_vary)
    engine = Engine(model.graphdef, model.params, model.config, SharedKeys(), Compilations())
    fast = engine.run_block(inputs, batch["answer_ids"], branches, 4)
    assert fast is not None
    assert_same(fast, run_plain(model, model.params, inputs, batch["answer_ids"], branches))


# Images of unlike sizes, without and with positions of three axes; test_instructed_images.py has InstructBLIP, and
# to a sweep the others are LLaVA.
UNLIKE_LLAVA = (pytest.param("llava_next", marks=pytest.mark.slow), "qwen2_5_vl")


@pytest.mark.parametrize("name", UNLIKE_LLAVA)
def test_the_fast_way_equals_the_plain_way(name):
    both_ways(name, [erase_image(1), knockout(2)], images=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(families.FAMILIES))
def test_the_fast_way_equals_the_plain_way_under_many_edits(name):
    branches = [erase_image(0), erase_image(2), blind_image(1), knockout(2), knockout(0, "last", "image")]
    both_ways(name, branches, text_alone=True)


@pytest.mark.parametrize("name", sorted(name for name in families.FAMILIES if FAMILIES[name].positions is None))
def test_an_erased_image_is_computed_once_for_images_of_all_sizes(name):
    model = random_model(next(iter(families.FAMILIES[name].VARIANTS.values())))
    batch = prompts(name, model)
    inputs = jax.tree.map(np.asarray, model.as_inputs(batch))
    rows = find_rows(inputs, batch["answer_ids"], model.config.image_token_id)
    (lane,) = make_lanes(rows, inputs, shapes_of(rows, inputs, 4))
    assert lane.shared
    text = model.config.text
    settled = settle([erase_image(1)], inputs, model.config.image_token_id, text.num_layers, text.num_heads)
    (plan,) = plan_lane(settled, rows, lane, text.num_layers)
    assert (plan.path.tier[1:, 1] == Tier.GROUP).all() and plan.path.runs[1:, 1].all()
