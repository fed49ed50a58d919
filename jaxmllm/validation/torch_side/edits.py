"""Interventions once more, as someone who works with transformers would write them: hooks and masks.

Nothing here is shared with the port but the cases themselves (``jaxmllm.validation.edit_cases``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from jaxmllm.validation.edit_cases import EditCase, Step, edit_cases, head_scales, image_weights
from jaxmllm.validation.recording import Recorder
from jaxmllm.validation.torch_side.anatomy import Anatomy, forward_arguments, tensors_of
from jaxmllm.validation.torch_side.loading import Reference
from jaxmllm.validation.torch_side.ways import computing

OTHER_ORDER = "other order"

Progress = Callable[[int, int], None]


def roles(inputs: Mapping[str, np.ndarray], image_token_id: int) -> dict[str, np.ndarray]:
    """The positions ``[B, S]`` that play a part: ``image``, ``text``, ``prefix``, ``question``, ``last``, ``all``.

    Args:
      inputs: right-padded prompts, with ``answer_positions`` where answers follow.
      image_token_id: the placeholder.
    """
    valid = np.asarray(inputs["attention_mask"]).astype(bool)
    image = (np.asarray(inputs["input_ids"]) == image_token_id) & valid
    behind = np.cumsum(image, axis=-1) > 0
    last = np.zeros_like(valid)
    for row, mask in enumerate(valid):
        answered = "answer_positions" in inputs
        last[row, inputs["answer_positions"][row, 0] if answered else np.flatnonzero(mask)[-1]] = True
    text = valid & ~image
    return {
        "image": image,
        "text": text,
        "prefix": text & ~behind,
        "question": text & behind,
        "last": last,
        "all": valid,
    }


def record_edits(
    recorder: Recorder,
    reference: Reference,
    cases: Sequence[EditCase] | None = None,
    on_progress: Progress = lambda done, total: None,
) -> None:
    """Records what each case of edits makes of the prompts: ``edit.NAME.resid_post`` and ``edit.NAME.logits``.

    ``resid_post`` is the last layer's output. The noise floor is that of sums in another order.

    Args:
      recorder: of the recording, with the inputs.
      reference: the model.
      cases: by default all.
      on_progress: told of passes done, and of all.
    """
    cases = edit_cases(len(reference.anatomy.layers)) if cases is None else cases
    for number, case in enumerate(cases):
        for name, array in run_edited(reference, recorder.inputs, case).items():
            recorder.add(f"edit.{case.name}.{name}", array)
        on_progress(2 * number + 1, 2 * len(cases))
        add_edit_floors(recorder, reference, OTHER_ORDER, [case])
        recorder.flush()
        on_progress(2 * number + 2, 2 * len(cases))


def add_edit_floors(recorder: Recorder, reference: Reference, way: str, cases: Sequence[EditCase]) -> None:
    """Adds the noise floors of one way to edits that are recorded.

    Args:
      recorder: of the recording.
      reference: the model, in the way's type.
      way: see ``jaxmllm.validation.torch_side.ways``.
      cases: those recorded.
    """
    for case in cases:
        with computing(way):
            arrays = run_edited(reference, recorder.inputs, case)
        for name, array in arrays.items():
            recorder.add_floor(f"edit.{case.name}.{name}", "run", way, array)


def run_edited(reference: Reference, inputs: Mapping[str, np.ndarray], case: EditCase) -> dict[str, np.ndarray]:
    """The last layer's output ``[B, S, D]`` and the logits ``[B, S, V]`` under a case of edits, float32.

    Args:
      reference: the model.
      inputs: see ``roles``.
      case: what is done.
    """
    model, anatomy = reference.model, reference.anatomy
    kept = {}

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        kept["resid_post"] = to_numpy(output if torch.is_tensor(output) else output[0])

    with attached(anatomy, roles(inputs, model.config.image_token_id), case), fresh_rotary(anatomy), torch.no_grad():
        handle = anatomy.layers[-1].register_forward_hook(keep)
        try:
            logits = model(**tensors_of(inputs), **forward_arguments(model, inputs), use_cache=False).logits
        finally:
            handle.remove()
    return {**kept, "logits": to_numpy(logits)}


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's own copy as float32 (float64 stays)."""
    wide = tensor.detach() if tensor.dtype == torch.float64 else tensor.detach().to(torch.float32)
    return wide.numpy().copy()


@contextlib.contextmanager
def fresh_rotary(anatomy: Anatomy) -> Iterator[None]:
    """Rotary scaling of type ``dynamic`` remembers the longest sequence that it saw; here it forgets."""
    _forget_lengths(anatomy.rotary)
    try:
        yield
    finally:
        _forget_lengths(anatomy.rotary)


def _forget_lengths(rotary: nn.Module) -> None:
    if getattr(rotary, "rope_type", None) == "dynamic":
        rotary.max_seq_len_cached = rotary.original_max_seq_len
        rotary.inv_freq = rotary.original_inv_freq


@contextlib.contextmanager
def attached(anatomy: Anatomy, positions: Mapping[str, np.ndarray], case: EditCase) -> Iterator[None]:
    """The case's hooks, while it lasts.

    Args:
      anatomy: of the model.
      positions: see ``roles``.
      case: what is done.
    """
    handles: list[RemovableHandle] = []
    try:
        for step in case.steps:
            for layer in step.layers:
                handles += STEPS[step.kind](anatomy.layers[layer], step, positions)
        yield
    finally:
        for handle in handles:
            handle.remove()


Positions = Mapping[str, np.ndarray]


def _weights_of_images(positions: Positions, weighted: bool) -> np.ndarray:
    """One weight a position ``[B, S]``: each image token's, 0 elsewhere."""
    weights = np.zeros(positions["image"].shape, np.float32)
    for row, image in enumerate(positions["image"]):
        weights[row, image] = image_weights(int(image.sum())) if weighted else 1.0
    return weights


def _erase(layer: nn.Module, step: Step, positions: Positions) -> list[RemovableHandle]:
    """What enters the layer is multiplied."""
    return [layer.register_forward_pre_hook(_multiplying(step, positions), with_kwargs=True)]


def _blind(layer: Any, step: Step, positions: Positions) -> list[RemovableHandle]:
    """What enters attention and feed-forward block, behind their norms, is multiplied."""
    hook = _multiplying(step, positions)
    return [block.register_forward_pre_hook(hook, with_kwargs=True) for block in (layer.self_attn, layer.mlp)]


def _multiplying(step: Step, positions: Positions) -> Callable[..., Any]:
    keep = torch.from_numpy(1 - step.strength * _weights_of_images(positions, step.weighted))[..., None]

    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            return (args[0] * keep.to(args[0].dtype), *args[1:]), kwargs
        hidden = kwargs["hidden_states"]
        return args, {**kwargs, "hidden_states": hidden * keep.to(hidden.dtype)}

    return hook


def _knockout(layer: Any, step: Step, positions: Positions) -> list[RemovableHandle]:
    queries, keys = (torch.from_numpy(positions[role].astype(np.float32)) for role in (step.queries, step.keys))
    return _weaken(layer, step.strength * queries[:, :, None] * keys[:, None, :])


def _review(layer: Any, step: Step, positions: Positions) -> list[RemovableHandle]:
    taken = positions["image"] - _weights_of_images(positions, True)
    queries = torch.from_numpy(positions["question"].astype(np.float32))
    return _weaken(layer, step.strength * queries[:, :, None] * torch.from_numpy(taken)[:, None, :])


def _weaken(layer: Any, strength: torch.Tensor) -> list[RemovableHandle]:
    """Attention ``[B, S, S]`` is multiplied by ``1 - strength`` before it is normalised: a logarithm in the mask."""
    blocked = strength[:, None] >= 1
    logarithm = torch.log1p(-torch.where(blocked, 0.0, strength[:, None]))

    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        mask = kwargs["attention_mask"]
        least = torch.finfo(mask.dtype).min
        # what is blocked stays so: a half's smallest number less a little would be infinite
        weakened = torch.where(mask <= least, mask, mask + logarithm.to(mask.dtype)).masked_fill(blocked, least)
        return args, {**kwargs, "attention_mask": weakened}

    return [layer.self_attn.register_forward_pre_hook(hook, with_kwargs=True)]


def _scale_heads(layer: Any, step: Step, positions: Positions) -> list[RemovableHandle]:
    """The heads' outputs are multiplied before the output projection."""
    projection, width = layer.self_attn.o_proj, layer.self_attn.head_dim
    scales = head_scales(projection.in_features // width)
    factors = torch.from_numpy(np.repeat(1 + step.strength * (scales - 1), width).astype(np.float32))

    def hook(module: nn.Module, args: Any) -> Any:
        return (args[0] * factors.to(args[0].dtype),)

    return [projection.register_forward_pre_hook(hook)]


def _at_site(layer: Any, step: Step, positions: Positions) -> list[RemovableHandle]:
    """What a block adds to the residual stream is multiplied."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if torch.is_tensor(output):
            return output * step.strength
        return (output[0] * step.strength, *output[1:])

    block = layer.mlp if step.site == "mlp_out" else layer.self_attn
    return [block.register_forward_hook(hook)]


STEPS: dict[str, Callable[[nn.Module, Step, Positions], list[RemovableHandle]]] = {
    "erase": _erase,
    "blind": _blind,
    "knockout": _knockout,
    "review": _review,
    "scale_heads": _scale_heads,
    "at_site": _at_site,
}
