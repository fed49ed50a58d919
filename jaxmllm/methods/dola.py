"""DoLa, decoding by contrasting layers: what the last layer knows beyond the layer that differs most from it.

Source: Chuang et al., "DoLa" (arXiv 2309.03883); voidism/DoLa@805230e: ``dola_greedy_decode``, ``relative_top_filter``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxmllm.decoding.rules import OneByOne, Rule
from jaxmllm.decoding.sampling import Sampling
from jaxmllm.errors import InputError
from jaxmllm.methods.base import Method, Number
from jaxmllm.models.capture import Capture
from jaxmllm.models.layers import Leaf


def divergence(mature: Float[Array, "B V"], premature: Float[Array, "C B V"]) -> Float[Array, "C B"]:
    """``1/2 (KL(M || mature) + KL(M || premature))``, M their mean, as a mean over the vocabulary.

    Both arguments are logits. The order of the arguments is the official code's, not that of the textbook's
    Jensen-Shannon divergence.
    """
    log_mature, log_premature = jax.nn.log_softmax(mature, axis=-1), jax.nn.log_softmax(premature, axis=-1)
    middle = 0.5 * (jnp.exp(log_mature) + jnp.exp(log_premature))
    entropy = jnp.where(middle > 0, middle * jnp.log(jnp.where(middle > 0, middle, 1.0)), 0.0)
    return 0.5 * ((entropy - middle * log_mature).mean(axis=-1) + (entropy - middle * log_premature).mean(axis=-1))


def contrasted(mature: Float[Array, "B V"], premature: Float[Array, "B V"], relative_top: Leaf) -> Float[Array, "B V"]:
    """``log p_mature - log p_premature``, minus infinity where the mature log-probability is below its maximum plus
    ``log(relative_top)``."""
    log_mature, log_premature = jax.nn.log_softmax(mature, axis=-1), jax.nn.log_softmax(premature, axis=-1)
    plausible = log_mature >= log_mature.max(axis=-1, keepdims=True) + jnp.log(jnp.float32(relative_top))
    return jnp.where(plausible, log_mature - log_premature, -jnp.inf)


def penalised(scores: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: Leaf) -> Float[Array, "B V"]:
    """Repetition penalty: scores of tokens that are there already, divided (or, below 0, multiplied) by it.

    Source: transformers' ``RepetitionPenaltyLogitsProcessor``.
    """
    return jnp.where(seen, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerScore:
    """Scores by the last layer against the candidate that differs most.

    Attributes:
      candidates ``[C]``: indices into the hidden states, 0 the embeddings, k what layer k - 1 made.
      relative_top, repetition_penalty: see ``Dola``.
      norm: whether the candidates pass the final norm.
      together: whether one candidate is chosen for the whole batch.
    """

    candidates: Leaf
    relative_top: Leaf
    repetition_penalty: Leaf
    norm: bool = dataclasses.field(metadata={"static": True})
    together: bool = dataclasses.field(metadata={"static": True})
    rows: int = dataclasses.field(default=1, metadata={"static": True})
    capture: Capture = dataclasses.field(default=Capture.residual("resid_pre", rows="last"), metadata={"static": True})

    def __call__(
        self, module: Any, logits: Float[Array, "1 B V"], captured: dict[str, Array], seen: Bool[Array, "B V"]
    ) -> Float[Array, "B V"]:
        """See ``Score``."""
        hidden = captured["resid_pre"][jnp.asarray(self.candidates), :, 0]
        early = module.decoder.logits(hidden) if self.norm else module.decoder.read(hidden)
        chosen = self.choose(logits[0], early)
        premature = jnp.take_along_axis(early, chosen[None, :, None], axis=0)[0]
        return penalised(contrasted(logits[0], premature, self.relative_top), seen, self.repetition_penalty)

    def choose(self, mature: Float[Array, "B V"], early: Float[Array, "C B V"]) -> Int[Array, " B"]:
        """The candidate of every example, by its place among them."""
        found = divergence(mature, early)
        if self.together:
            found = jnp.broadcast_to(found.mean(axis=1, keepdims=True), found.shape)
        return jnp.argmax(found, axis=0)


@dataclasses.dataclass(frozen=True)
class Dola(Method):
    """Greedy decoding by the difference of two layers' log-probabilities.

    Attributes:
      layers: which half of the even hidden states are candidates, ``low`` (0, 2, .. below the middle) or ``high``.
      candidates: hidden states by number instead; 0 is the embeddings, k what layer k - 1 made; below the last.
      relative_top: tokens below this share of the best token's probability are left out.
      repetition_penalty: for tokens of the prompt and the answer; 1 is none.
      norm: whether candidates pass the final norm before the head (the original does without, transformers' version
        does it).
      together: whether one candidate is chosen for the whole batch, as in the original; answers then depend on the
        batch.
    """

    name: ClassVar[str] = "dola"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "code": {"norm": False, "together": True},
        "library": {"norm": True, "together": False},
    }

    layers: str = "low"
    candidates: Sequence[int] = ()
    relative_top: Number = 0.1
    repetition_penalty: Number = 1.2
    norm: bool = False
    together: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "candidates", tuple(int(state) for state in self.candidates))
        if self.layers not in ("low", "high"):
            raise InputError(f"layers is {self.layers!r}; expected 'low' or 'high'")
        if not 0 < self.relative_top <= 1 or self.repetition_penalty <= 0:
            raise InputError(
                f"relative_top={self.relative_top}, repetition_penalty={self.repetition_penalty}; expected "
                "0 < relative_top <= 1 and a penalty above 0"
            )

    def states(self, num_layers: int) -> Sequence[int]:
        """The candidates of a model of so many layers: of 32, 0, 2, .., 14 or 16, 18, .., 30."""
        if self.candidates:
            outside = [state for state in self.candidates if not 0 <= state < num_layers]
            if outside:
                raise InputError(f"no candidate states {outside}: expected numbers from 0 to {num_layers - 1}")
            return self.candidates
        half = num_layers // 2
        half += half % 2
        return range(0, half, 2) if self.layers == "low" else range(half, num_layers, 2)

    def rule(self, num_layers: int, sampling: Sampling | None) -> Rule:
        states = np.array(self.states(num_layers), np.int32)
        penalties = np.float32(self.relative_top), np.float32(self.repetition_penalty)
        return OneByOne(sampling, LayerScore(states, *penalties, norm=self.norm, together=self.together))
