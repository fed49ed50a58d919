"""Answers, contrastive attention, generation and edits: mistakes in their formulas are told apart."""

import numpy as np
import pytest

from jaxmllm.validation.diagnosis.behaviours import behaviour_causes
from jaxmllm.validation.diagnosis.hints import hints_for_phase

RNG = np.random.default_rng(0)
IDS = RNG.integers(0, 20, (2, 9))
ANSWERS = np.array([[3, 5, 7], [2, 4, -1]])
AT = np.array([[4, 5, 6], [3, 4, 4]])
LOGITS = 2 * RNG.normal(size=(2, 9, 20))
INPUTS = {"input_ids": IDS, "answer_ids": ANSWERS, "answer_positions": AT, "image_mask": np.arange(9) < [[4], [3]]}


def log_probability(at=AT, factor=1.0):
    chosen = factor * LOGITS[np.arange(2)[:, None], at]
    every = chosen - np.log(np.exp(chosen).sum(axis=-1, keepdims=True))
    token = np.take_along_axis(every, np.maximum(ANSWERS, 0)[..., None], axis=-1)[..., 0]
    return np.where(ANSWERS >= 0, token, 0.0)


def total(**changes):
    return log_probability(**changes).sum(axis=-1)


@pytest.mark.parametrize(
    ("name", "right", "wrong", "said"),
    [
        ("log_probability", log_probability(), log_probability(AT + 1), "read one position late"),
        ("total", total(), total(at=AT - 1), "read one position early"),
        ("total", total(), total(factor=1 / 0.7), "temperature of 0.7"),
        ("total", total(), total() / [3, 2], "mean over the answer's tokens"),
        ("total", total(), total() * 1.001, "half precision"),
    ],
)
def test_answers(name, right, wrong, said):
    arrays = {"logits": LOGITS, f"answer.{name}": right}
    causes = behaviour_causes("answer", {f"answer.{name}": wrong}, arrays.get, INPUTS, ())
    assert said in causes[0].name


def hellinger(p, q):
    return np.sqrt(np.square(np.sqrt(p) - np.sqrt(q)).sum(axis=-1) / 2)


ATTENTION = RNG.uniform(0.1, 1, (4, 2, 4)) * (np.arange(4) < np.array([[4], [3]]))
SHARES = ATTENTION / ATTENTION.sum(axis=-1, keepdims=True)
DISTANCE = hellinger(SHARES, SHARES[-1:])


@pytest.mark.parametrize(
    ("name", "right", "wrong", "said"),
    [
        ("distance", DISTANCE, DISTANCE**2, "outer root"),
        ("distance", DISTANCE, hellinger(SHARES, SHARES[:1]), "first layer"),
        ("distance", DISTANCE, hellinger(ATTENTION, ATTENTION[-1:]), "not normalised"),
        ("map", SHARES[-1] - SHARES[0], SHARES[-1], "last layer alone"),
    ],
)
def test_contrast(name, right, wrong, said):
    arrays = {"contrast.attention": ATTENTION, f"contrast.{name}": right}
    causes = behaviour_causes("contrast", {f"contrast.{name}": wrong}, arrays.get, INPUTS, ())
    assert said in causes[0].name and causes[0].explained > 0.99


def test_what_arrays_that_agree_are_made_into():
    finding = "pre-fusion layer: the port says [0, 0], farthest from the last layer are [2, 1]"
    assert behaviour_causes("contrast", {}, {}.get, INPUTS, [finding])[0].name == finding


def test_generation_tells_the_prompt_s_pass_from_later_steps():
    expected = RNG.normal(size=(2, 6))
    read = {"generation.log_probability": expected}.get

    def causes(got, findings=()):
        return behaviour_causes("generation", {"generation.log_probability": got}, read, INPUTS, findings)

    later, first = expected.copy(), expected.copy()
    later[1, 3:] += 0.1
    first[0, 0] += 0.1
    assert "prompt's own pass agrees" in causes(later)[0].name
    assert causes(later)[0].evidence == "departs first at generated token 3 of prompt 1"
    assert causes(first)[0].name.startswith("the prompt's own pass: positions")
    assert "0 of prompt 1" in causes(later, ["example 1, token 0: the port says 4, PyTorch 5"])[0].evidence
    assert "stopping" in behaviour_causes("generation", {}, read, INPUTS, ["example 0: with stop token 4 ..."])[0].name


@pytest.mark.parametrize(
    ("departing", "said"),
    [
        (("erase_in_part", "blind_in_part", "together"), "weights of positions off by one: erase, blind"),
        (("twice", "together"), "composed"),
        (("erase", "blind", "knockout", "erase_in_part"), "count as image tokens"),
        (("scale_heads", "scale_heads_in_part"), "before the output map"),
    ],
)
def test_which_edits_depart_tells_what_is_wrong(departing, said):
    assert said in hints_for_phase("edits", [f"edit.{name}.logits" for name in departing])[0].name
