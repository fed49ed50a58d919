"""What users read of a model, by the production functions: answers, generated tokens, edits, contrastive attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxmllm.analysis import attention_evolution, contrastive_attention, pre_fusion_layer
from jaxmllm.analysis.scores import Scores, score
from jaxmllm.decoding.generate import Generated, generate
from jaxmllm.model import Model
from jaxmllm.models.capture import Capture
from jaxmllm.validation.edit_cases import EditCase, port_edits

Arrays = Mapping[str, np.ndarray]


def of_model(arrays: Arrays) -> dict[str, np.ndarray]:
    """The arrays that a forward pass reads."""
    return {name: value for name, value in arrays.items() if name != "answer_ids"}


def answer_logits(model: Model, arrays: Arrays) -> np.ndarray:
    """The logits that predict the answers' tokens ``[B, A, V]``."""
    return np.asarray(model.forward(model.params, of_model(arrays), logits_at="answer").logits)


def scored(logits: np.ndarray, answer_ids: np.ndarray) -> Scores:
    """What ``score`` makes of them: log-probability (natural), rank and correctness ``[B]``."""
    return jax.tree.map(np.asarray, score(jnp.asarray(logits), jnp.asarray(answer_ids, jnp.int32)))


def early_logits(model: Model, arrays: Arrays) -> np.ndarray:
    """Every layer's output at the last prompt token through final norm and head ``[L, B, V]``."""
    out = model.forward(model.params, of_model(arrays), capture=Capture.early_output(), logits_at="last")
    return np.asarray(out.captured["early_logits"])[:, :, 0]


def generated(model: Model, prompts: Arrays, new_tokens: int, stop: Sequence[int] = ()) -> Generated:
    """What ``generate`` answers greedily."""
    return generate(model, dict(prompts), max_new_tokens=new_tokens, stop_tokens=stop)


def edited(model: Model, arrays: Arrays, case: EditCase) -> tuple[np.ndarray, np.ndarray]:
    """The last layer's output ``[B, S, D]`` and the logits ``[B, S, V]`` under a case of edits."""
    inputs = model.as_inputs(of_model(arrays))
    edits = port_edits(case, model.num_heads, inputs.max_image_tokens)
    out = model.forward(model.params, inputs, edits=edits, capture=Capture.residual("resid_post"))
    return np.asarray(out.captured["resid_post"][-1], np.float32), np.asarray(out.logits)


def image_attention(model: Model, arrays: Arrays) -> np.ndarray:
    """Head-mean attention of the last prompt token to the image tokens ``[L, B, N]``."""
    capture = Capture.attention(rows="last", keys="image")
    out = model.forward(model.params, of_model(arrays), capture=capture, logits_at="last")
    return np.asarray(out.captured["attn_probs"])[:, :, 0]


def contrast(attention: np.ndarray, pre: np.ndarray) -> dict[str, np.ndarray]:
    """What is made of ``image_attention``: every layer's ``distance`` to the last ``[L, B]``, the pre-fusion ``layer``
    ``[B]``, and the contrastive ``map`` ``[B, N]`` for given pre-fusion layers ``[B]``."""
    values = jnp.asarray(attention)
    found = {
        "distance": attention_evolution(values),
        "layer": pre_fusion_layer(values),
        "map": contrastive_attention(values, jnp.asarray(pre)),
    }
    return {name: np.asarray(value, np.float32) for name, value in found.items()}
