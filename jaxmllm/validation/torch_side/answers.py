"""What users read of a forward pass: probabilities of answers, attention to the image and what the paper makes of it.

Formulas are written here from the paper (arXiv 2601.08151, parts 1 and 2), in NumPy and float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from jaxmllm.validation.recording import Recorder
from jaxmllm.validation.torch_side.anatomy import forward_arguments, tensors_of
from jaxmllm.validation.torch_side.edits import OTHER_ORDER, fresh_rotary, roles, to_numpy
from jaxmllm.validation.torch_side.loading import Reference
from jaxmllm.validation.torch_side.ways import computing


def record_answers(recorder: Recorder, reference: Reference) -> dict[str, Any]:
    """Records answers' probabilities and attention to the image, from one pass; the floor is sums in another order.

    ``answer.log_probability`` ``[B, A]`` is each answer token's, 0 past an answer's end, ``answer.total`` ``[B]`` their
    sum, and ``answer.early_logits`` ``[L, B, V]`` every layer's output at the last prompt token through final norm and
    head (early output). ``contrast.attention`` ``[L, B, N]`` is the attention of the last prompt token to each image
    token, averaged over heads, 0 past an example's own tokens; ``contrast.distance`` ``[L, B]`` every layer's Hellinger
    distance to the last layer; ``contrast.map`` ``[B, N]`` the last layer's attention less the pre-fusion layer's.

    Args:
      recorder: of the recording; its inputs have answers.
      reference: the model.

    Returns:
      For the header: ``contrast``: ``pre``, each example's pre-fusion layer (farthest from the last); without images
      nothing.
    """
    arrays = run_answers(reference, recorder.inputs)
    header: dict[str, Any] = {}
    if "contrast.attention" in arrays:
        pre = hellinger_to_last(arrays["contrast.attention"])[:-1].argmax(axis=0)
        header["contrast"] = {"pre": pre.tolist()}
        arrays |= _contrast(arrays["contrast.attention"], pre)
    for name, array in arrays.items():
        recorder.add(name, array.astype(np.float32), whole=True)
    add_answer_floors(recorder, reference, OTHER_ORDER, header)
    recorder.flush()
    return header


def add_answer_floors(recorder: Recorder, reference: Reference, way: str, header: Mapping[str, Any]) -> None:
    """Adds the noise floors of one way to what ``record_answers`` recorded.

    Args:
      recorder: of the recording.
      reference: the model, in the way's type.
      way: see ``jaxmllm.validation.torch_side.ways``.
      header: what ``record_answers`` returned; the map's noise is that of the same two layers.
    """
    with computing(way):
        arrays = run_answers(reference, recorder.inputs)
    if "contrast" in header:
        arrays |= _contrast(arrays["contrast.attention"], np.asarray(header["contrast"]["pre"]))
    for name, array in arrays.items():
        recorder.add_floor(name, "run", way, array)


def run_answers(reference: Reference, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays of answers and, where there are images, ``contrast.attention`` ``[L, B, N]``; see ``record_answers``.

    Args:
      reference: the model.
      inputs: with ``answer_ids`` and ``answer_positions``.
    """
    model, anatomy = reference.model, reference.anatomy
    answer_ids, at = (torch.from_numpy(np.asarray(inputs[name])).long() for name in ("answer_ids", "answer_positions"))
    image = roles(inputs, model.config.image_token_id)["image"]
    attention: list[np.ndarray] = []
    states: list[torch.Tensor] = []

    def keep_state(module: nn.Module, args: Any, output: Any) -> None:
        hidden = output if torch.is_tensor(output) else output[0]
        states.append(hidden[torch.arange(len(at)), at[:, 0]])

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        weights = to_numpy(output[1][torch.arange(len(at)), :, at[:, 0]].to(torch.float32).mean(dim=1))
        attention.append(of_image_tokens(weights, image))

    handles = [layer.self_attn.register_forward_hook(keep) for layer in anatomy.layers] if image.any() else []
    handles += [layer.register_forward_hook(keep_state) for layer in anatomy.layers]
    try:
        with fresh_rotary(anatomy), torch.no_grad():
            logits = model(**tensors_of(inputs), **forward_arguments(model, inputs), use_cache=False).logits
            chosen = logits[torch.arange(len(at))[:, None], at].to(torch.promote_types(logits.dtype, torch.float32))
            every = chosen.log_softmax(-1)
            of_answers = every.gather(-1, answer_ids.clamp(min=0)[..., None])[..., 0]
            early = [to_numpy(anatomy.head(anatomy.decoder.norm(state))) for state in states]
    finally:
        for handle in handles:
            handle.remove()
    there = answer_ids >= 0
    found = {
        "answer.log_probability": to_numpy(torch.where(there, of_answers, 0)),
        "answer.total": to_numpy(torch.where(there, of_answers, 0).sum(-1)),
        "answer.early_logits": np.stack(early),
    }
    return found | ({"contrast.attention": np.stack(attention)} if attention else {})


def of_image_tokens(weights: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Weights of image tokens ``[B, N]`` in sequence order, 0 past an example's own, of weights ``[B, S]``."""
    found = np.zeros((len(image), int(image.sum(axis=-1).max())), weights.dtype)
    for row, (values, mask) in enumerate(zip(weights, image, strict=True)):
        found[row, : mask.sum()] = values[mask]
    return found


def distribution(attention: np.ndarray) -> np.ndarray:
    """Attention to image tokens ``[..., N]`` as a distribution over them; uniform where there is none at all."""
    attention = np.asarray(attention, np.float64)
    total = attention.sum(axis=-1, keepdims=True)
    return np.divide(attention, total, out=np.full_like(attention, 1 / attention.shape[-1]), where=total > 0)


def hellinger_to_last(attention: np.ndarray) -> np.ndarray:
    """``H(A(i), A(last)) = sqrt(sum_j (sqrt(A_j(i)) - sqrt(A_j(last)))^2) / sqrt(2)`` of each layer, ``[L, B]``."""
    roots = np.sqrt(distribution(attention))
    return np.sqrt(np.square(roots - roots[-1]).sum(axis=-1)) / np.sqrt(2)


def _contrast(attention: np.ndarray, pre: np.ndarray) -> dict[str, np.ndarray]:
    shares = distribution(attention)
    return {
        "contrast.distance": hellinger_to_last(attention),
        "contrast.map": shares[-1] - shares[pre, np.arange(len(pre))],
    }
