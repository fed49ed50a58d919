"""What PyTorch generates: by ``generate``, and token by token without a cache, where hooks and masks can edit."""

import copy

import numpy as np
import torch

from tests.support import reference
from tests.support.tiny import Pair, roles


def hugging_face(pair: Pair, inputs: dict[str, np.ndarray], limit: int, stop: int | None = None) -> np.ndarray:
    """Greedy tokens ``[B, N]`` of transformers' ``generate``, which wants prompts padded on the left."""
    types = {}
    if "image_grid_thw" in inputs:  # without them, PyTorch counts the image's tokens as text
        types["mm_token_type_ids"] = torch.from_numpy((inputs["input_ids"] == pair.image_token).astype(np.int32))
    # a copy, since rotary scaling of type "dynamic" remembers the longest sequence that a model has seen
    model = copy.deepcopy(pair.torch)
    with torch.no_grad():
        tokens = model.generate(
            **reference.tensors(inputs),
            **types,
            max_new_tokens=limit,
            do_sample=False,
            eos_token_id=stop,
            pad_token_id=0,
        ).numpy()
    return tokens[:, inputs["input_ids"].shape[1] :]


def without_cache(pair: Pair, inputs: dict[str, np.ndarray], limit: int, edits_of) -> tuple[np.ndarray, np.ndarray]:
    """Greedy tokens and their log-probabilities ``[B, N]``, each from a pass over the whole sequence.

    ``edits_of(image, question, last)`` makes torch edits (``reference``) from positions ``[B, S]`` of the sequence so
    far, in which ``last`` is the last token of the prompt.
    """
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    tokens, log_probabilities = [], []
    for step in range(limit):
        so_far = inputs | {"input_ids": ids, "attention_mask": mask}
        image, question, _ = roles(pair, so_far)
        last = np.zeros_like(image)
        last[:, ids.shape[1] - 1 - step] = True
        logits = torch.from_numpy(reference.run(pair, so_far, *edits_of(image, question, last)).logits[:, -1])
        token = logits.argmax(-1, keepdim=True)
        tokens.append(token)
        log_probabilities.append(logits.log_softmax(-1).gather(-1, token))
        ids = np.concatenate([ids, token.numpy()], axis=1)
        mask = np.concatenate([mask, np.ones_like(mask[:, :1])], axis=1)
    return torch.cat(tokens, 1).numpy(), torch.cat(log_probabilities, 1).numpy()
