"""What transformers' ``generate`` says, greedily and without a stop, and how sure it is of each token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from jaxmllm.validation.recording import Recorder
from jaxmllm.validation.torch_side.anatomy import tensors_of
from jaxmllm.validation.torch_side.edits import OTHER_ORDER, fresh_rotary
from jaxmllm.validation.torch_side.loading import Reference
from jaxmllm.validation.torch_side.ways import computing

NEW_TOKENS = 12


def record_generation(
    recorder: Recorder, reference: Reference, prompts: Mapping[str, np.ndarray], new_tokens: int = NEW_TOKENS
) -> dict[str, Any]:
    """Records greedy generation; the floor is sums in another order, along the same tokens.

    Arrays: ``generation.input_ids`` and ``generation.attention_mask`` ``[B, P]``, the prompts;
    ``generation.log_probability`` ``[B, N]``, natural, of each generated token.

    Args:
      recorder: of the recording; its inputs have the same images.
      reference: the model.
      prompts: padded on the left.
      new_tokens: N.

    Returns:
      For the header: ``generation``: ``tokens`` ``[B, N]``, ``log_probabilities``, and ``leads``: by how much the
      logit of each token is above the next best, so that a tie can be told from a mistake.
    """
    logits, tokens = run_generate(reference, prompts, new_tokens)
    chosen = log_probabilities(logits, tokens)
    best = np.sort(logits, axis=-1)[..., -2:]
    for name in ("input_ids", "attention_mask"):
        recorder.add(f"generation.{name}", np.asarray(prompts[name]), whole=True)
    recorder.add("generation.log_probability", chosen.astype(np.float32), whole=True)
    add_generation_floors(recorder, reference, OTHER_ORDER, prompts, tokens)
    recorder.flush()
    return {
        "generation": {
            "tokens": tokens.tolist(),
            "log_probabilities": chosen.tolist(),
            "leads": (best[..., 1] - best[..., 0]).tolist(),
        }
    }


def add_generation_floors(
    recorder: Recorder, reference: Reference, way: str, prompts: Mapping[str, np.ndarray], tokens: np.ndarray
) -> None:
    """Adds the noise floor of one way to ``generation.log_probability``.

    Args:
      recorder: of the recording.
      reference: the model, in the way's type.
      way: see ``jaxmllm.validation.torch_side.ways``.
      prompts: that were generated from.
      tokens: that were generated ``[B, N]``, and now are forced.
    """
    with computing(way):
        logits, _ = run_generate(reference, prompts, tokens.shape[1], forced=tokens)
    recorder.add_floor("generation.log_probability", "run", way, log_probabilities(logits, tokens))


def run_generate(
    reference: Reference, prompts: Mapping[str, np.ndarray], new_tokens: int, forced: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Logits ``[B, N, V]``, float64, and greedy tokens ``[B, N]`` of ``generate`` with its cache.

    Args:
      reference: the model.
      prompts: padded on the left.
      new_tokens: N.
      forced: tokens to take instead of the most probable ones.
    """
    model = reference.model
    tensors = tensors_of(prompts)
    types = {}
    if "image_grid_thw" in tensors:  # without them the image's tokens are counted as text
        types["mm_token_type_ids"] = (tensors["input_ids"] == model.config.image_token_id).int()
    start = tensors["input_ids"].shape[1]
    processors = LogitsProcessorList([] if forced is None else [_Forced(forced, start)])
    # what a checkpoint's own file says of sampling, penalties and stops is left out
    settings, model.generation_config = model.generation_config, GenerationConfig(pad_token_id=0)
    try:
        with fresh_rotary(reference.anatomy), torch.no_grad():
            out = model.generate(
                **tensors,
                **types,
                logits_processor=processors,
                max_new_tokens=new_tokens,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
    finally:
        model.generation_config = settings
    logits = torch.stack(out.logits, dim=1).to(torch.float64).numpy()
    return logits, out.sequences[:, start:].numpy()


class _Forced(LogitsProcessor):
    """Leaves one token to choose at each step."""

    def __init__(self, tokens: np.ndarray, start: int):
        self._tokens, self._start = torch.from_numpy(np.asarray(tokens)), start

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        wanted = self._tokens[:, input_ids.shape[1] - self._start, None]
        return torch.full_like(scores, -torch.inf).scatter(1, wanted, 0.0)


def log_probabilities(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Natural log-probabilities ``[B, N]`` of tokens from the logits ``[B, N, V]`` that predict them."""
    top = logits.max(axis=-1, keepdims=True)
    total = (top + np.log(np.exp(logits - top).sum(axis=-1, keepdims=True)))[..., 0]
    return np.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0] - total
