"""What PyTorch computes: hidden states, attention weights and logits, clean or under edits made by hooks and masks.

Nothing here is shared with the code under test: the edits are written once more, as a torch user would.
"""

import contextlib
import dataclasses

import numpy as np
import torch

from tests.support.tiny import Pair


@dataclasses.dataclass
class Reference:
    """Arrays ``[B, S, V]``, ``[L + 1, B, S, D]`` (the last one before the final norm) and ``[L, B, H, S, S]``."""

    logits: np.ndarray
    resid_pre: np.ndarray
    resid_post: np.ndarray
    attention: np.ndarray


def tensors(inputs: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.asarray(value)) for name, value in inputs.items()}


@contextlib.contextmanager
def hooks(*handles):
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run(pair: Pair, inputs: dict[str, np.ndarray], *edits) -> Reference:
    """Runs PyTorch; each edit is a function of the model's decoder layers that returns hook handles."""
    pre, post, weights = {}, {}, {}
    layers = pair.family.layers(pair.torch)
    handles = [handle for edit in edits for handle in edit(layers)]
    for index, layer in enumerate(layers):
        # registered after the edits, so they see what the layer sees
        handles.append(layer.register_forward_pre_hook(keep_input(pre, index), with_kwargs=True))
        handles.append(layer.register_forward_hook(keep_output(post, index)))
        handles.append(layer.self_attn.register_forward_hook(keep_weights(weights, index)))
    with hooks(*handles), torch.no_grad():
        out = pair.torch(**tensors(inputs), **pair.family.forward_arguments(pair.torch, inputs))
    return Reference(
        out.logits.numpy(),
        np.stack([pre[i] for i in range(len(layers))]),
        np.stack([post[i] for i in range(len(layers))]),
        np.stack([weights[i] for i in range(len(layers))]),
    )


def keep_input(store, index):
    def hook(module, args, kwargs):
        store[index] = (args[0] if args else kwargs["hidden_states"]).numpy().copy()

    return hook


def keep_output(store, index):
    def hook(module, args, output):
        store[index] = (output if torch.is_tensor(output) else output[0]).numpy().copy()

    return hook


def keep_weights(store, index):
    """Eager attention returns its weights beside its output."""

    def hook(module, args, output):
        store[index] = output[1].numpy().copy()

    return hook


def zeroing(positions: np.ndarray):
    """A pre-hook that zeroes the hidden states a module receives at ``positions [B, S]``."""
    keep = torch.from_numpy(~positions)[..., None]

    def hook(module, args, kwargs):
        if args:
            return (args[0] * keep, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"] * keep}

    return hook


def erase(layers_edited, positions):
    """The residual stream is zeroed at the input of each layer."""

    def edit(layers):
        return [layers[i].register_forward_pre_hook(zeroing(positions), with_kwargs=True) for i in layers_edited]

    return edit


def blind(layers_edited, positions):
    """Attention and feed-forward block of each layer receive zeros."""

    def edit(layers):
        return [
            block.register_forward_pre_hook(zeroing(positions), with_kwargs=True)
            for i in layers_edited
            for block in (layers[i].self_attn, layers[i].mlp)
        ]

    return edit


def knockout(layers_edited, queries, keys):
    """Scores from queries to keys are set to the smallest float, in the 4-D mask of each layer."""
    blocked = torch.from_numpy(queries[:, :, None] & keys[:, None, :])[:, None]

    def hook(module, args, kwargs):
        mask = kwargs["attention_mask"].masked_fill(blocked, torch.finfo(torch.float32).min)
        return args, {**kwargs, "attention_mask": mask}

    def edit(layers):
        return [layers[i].self_attn.register_forward_pre_hook(hook, with_kwargs=True) for i in layers_edited]

    return edit


def scale_heads(layers_edited, scale):
    """The heads' outputs are scaled before the output projection."""

    def hook(module, args):
        return (args[0] * torch.from_numpy(np.repeat(scale, args[0].shape[-1] // len(scale))),)

    def edit(layers):
        return [layers[i].self_attn.o_proj.register_forward_pre_hook(hook) for i in layers_edited]

    return edit
