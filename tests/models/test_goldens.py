"""Parity without torch: the port against committed results of PyTorch (see scripts/make_goldens.py)."""

from pathlib import Path

import numpy as np
import pytest

import jaxmllm
from jaxmllm import Capture
from jaxmllm.analysis import blind_image, erase_image, knockout

GOLDENS = Path(__file__).parent.parent / "fixtures" / "goldens"
EDITS = {"clean": None, "erase_1": erase_image(1), "blind_1": blind_image(1), "knockout_0_1": knockout([0, 1])}
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


def test_there_are_goldens():
    assert len(list(GOLDENS.glob("*/golden.npz"))) >= 4
