"""Parity without torch: the port against committed results of PyTorch (see scripts/make_goldens.py)."""

from pathlib import Path

import numpy as np
import pytest

import jaxmllm
from jaxmllm import Capture
from jaxmllm.analysis import blind_image, compose, erase_image, knockout

GOLDENS = Path(__file__).parent.parent / "fixtures" / "goldens"


def only(kind):
    """One kind of edit at full strength beside the others at none: all cases share a program."""
    full = {name: float(name == kind) for name in ("erase", "blind", "knockout")}
    return compose(
        erase_image(1, strength=full["erase"]),
        blind_image(1, strength=full["blind"]),
        knockout([0, 1], strength=full["knockout"]),
    )


EDITS = {"clean": only(None), "erase_1": only("erase"), "blind_1": only("blind"), "knockout_0_1": only("knockout")}
KEPT = Capture.attention("all", "all", "each") | Capture.residual("resid_post")


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("name", sorted(path.name for path in GOLDENS.iterdir()))
def test_golden(name, edit):
    model = jaxmllm.load(GOLDENS / name)
    with np.load(GOLDENS / name / "golden.npz") as golden:
        inputs = {key.removeprefix("inputs/"): golden[key] for key in golden if key.startswith("inputs/")}
        logits, states, weights = (golden[f"{edit}/{site}"] for site in ("logits", "resid_post", "attn_probs"))
    out = model.forward(model.params, inputs, edits=EDITS[edit], capture=KEPT)
    valid = inputs["attention_mask"].astype(bool)
    np.testing.assert_allclose(np.asarray(out.logits)[valid], logits[valid], atol=1e-4, rtol=0)
    np.testing.assert_allclose(np.asarray(out.captured["resid_post"])[:, valid], states[:, valid], atol=1e-4, rtol=0)
    got = np.moveaxis(np.asarray(out.captured["attn_probs"]), 2, -1)
    pairs = valid[:, :, None] & valid[:, None, :]
    np.testing.assert_allclose(got[:, pairs], np.moveaxis(weights, 2, -1)[:, pairs], atol=1e-5, rtol=0)


# one of every family
GENERATED = ("grouped_queries", "next_llama", "vip_five_layers", "instructblip_cross_seldom", "qwen2_vl", "qwen2_5_vl")


@pytest.mark.parametrize("name", GENERATED)
def test_generated_tokens(name):
    model = jaxmllm.load(GOLDENS / name)
    with np.load(GOLDENS / name / "golden.npz") as golden:
        inputs = {key.removeprefix("inputs/"): golden[key] for key in golden if key.startswith("inputs/")}
        tokens = golden["generated"]
    found = jaxmllm.generate(model, inputs, max_new_tokens=tokens.shape[1], stop_tokens=())
    np.testing.assert_array_equal(found.tokens, tokens)


def test_there_are_goldens():
    assert len(list(GOLDENS.glob("*/golden.npz"))) >= 4
