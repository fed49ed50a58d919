"""Which token comes next: the most probable one, or one that is drawn."""

from __future__ import annotations

import dataclasses
import math
import numbers

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxmllm.errors import InputError
from jaxmllm.models.layers import Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; the steps are taken in the order of the attributes, as transformers' ``generate`` does.

    All are data: changing them compiles nothing anew (but leaving one out does).

    Attributes:
      temperature: logits are divided by it; above 0.
      top_k: only the so many most probable tokens are left (and those that are as probable as the last of them).
      top_p: of these, only the most probable ones that together reach this probability, 0 < top_p <= 1; one at least.
    """

    temperature: Leaf = 1.0
    top_k: Leaf | None = None
    top_p: Leaf | None = None

    def check(self) -> None:
        """Raises InputError for values outside of their range."""
        if not _number(self.temperature) or not 0 < self.temperature < math.inf:
            raise InputError(f"temperature is {self.temperature!r}; expected a number above 0 (greedy: no sampling)")
        whole = isinstance(self.top_k, (int, np.integer)) and not isinstance(self.top_k, bool)
        if self.top_k is not None and not (whole and self.top_k >= 1):
            raise InputError(f"top_k is {self.top_k!r}; expected a whole number from 1")
        if self.top_p is not None and not (_number(self.top_p) and 0 < self.top_p <= 1):
            raise InputError(f"top_p is {self.top_p!r}; expected a number above 0, up to 1")


def _number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def left_to_draw(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Logits by temperature, with minus infinity where top-k or top-p leave a token out.

    Source: transformers' ``TemperatureLogitsWarper``, ``TopKLogitsWarper`` and ``TopPLogitsWarper``.
    """
    logits = logits / sampling.temperature
    if sampling.top_k is not None:
        largest = jnp.sort(logits, axis=-1, descending=True)
        place = jnp.minimum(sampling.top_k, logits.shape[-1]) - 1
        logits = jnp.where(logits < jnp.take(largest, place, axis=-1)[..., None], -jnp.inf, logits)
    if sampling.top_p is not None:
        order = jnp.argsort(logits, axis=-1)
        reached = jnp.cumsum(jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1), axis=-1)
        # at 1 nothing is left out, not even what has lost all probability to rounding
        out = ((reached <= 1 - sampling.top_p) & (sampling.top_p < 1)).at[..., -1].set(False)
        out = jnp.put_along_axis(jnp.zeros_like(out), order, out, axis=-1, inplace=False)
        logits = jnp.where(out, -jnp.inf, logits)
    return logits


def choose(
    logits: Float[Array, "B V"], keys: Leaf, step: Int[Array, ""], sampling: Sampling | None
) -> Int[Array, " B"]:
    """The next token of every example.

    Args:
      logits: of the model.
      keys ``[B]``: a random key an example; not read where nothing is drawn.
      step: number of the token, from 0; each is drawn with ``fold_in(key, step)``.
      sampling: ``None`` takes the most probable token (of equals the one with the lowest id).
    """
    if sampling is None:
        return jnp.argmax(logits, axis=-1)
    of_step = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, step)
    return jax.vmap(jax.random.categorical)(of_step, left_to_draw(logits, sampling))
