"""VCD, visual contrastive decoding: tokens that a noised image makes as likely are held against themselves.

Source: Leng et al., "Mitigating Object Hallucinations in Large Vision-Language Models through Visual Contrastive
Decoding" (arXiv 2311.16922); DAMO-NLP-SG/VCD@d6568ff: ``vcd_add_noise.py``, ``vcd_sample.py``. The official code draws
tokens (temperature 1); without ``sampling`` the best token is taken here.
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
from jaxmllm.models.images import Images
from jaxmllm.models.inputs import Inputs
from jaxmllm.models.layers import Leaf

NOISE_STEPS = 1000


def noise_schedule() -> tuple[Float[np.ndarray, " steps"], Float[np.ndarray, " steps"]]:
    """The shares of image and noise by diffusion step: ``sqrt(abar_t)`` and ``sqrt(1 - abar_t)``."""
    ramp = 1 / (1 + np.exp(-np.linspace(-6, 6, NOISE_STEPS)))
    kept = np.cumprod(1 - (ramp * (5e-3 - 1e-5) + 1e-5))
    return np.sqrt(kept), np.sqrt(1 - kept)


def contrasted(
    clean: Float[Array, "*axes V"], noisy: Float[Array, "*axes V"], alpha: Leaf, beta: Leaf
) -> Float[Array, "*axes V"]:
    """``(1 + alpha) clean - alpha noisy``, minus infinity where clean is below its maximum plus ``log(beta)``."""
    plausible = clean >= clean.max(axis=-1, keepdims=True) + jnp.log(jnp.float32(beta))
    return jnp.where(plausible, (1 + alpha) * clean - alpha * noisy, -jnp.inf)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NoiseScore:
    """Scores by the logits of two views, the example itself and its noised image."""

    alpha: Leaf
    beta: Leaf
    rows: int = dataclasses.field(default=2, metadata={"static": True})
    capture: Capture = dataclasses.field(default=Capture(), metadata={"static": True})

    def __call__(
        self, module: Any, logits: Float[Array, "2 B V"], captured: dict[str, Array], seen: Bool[Array, "B V"]
    ) -> Float[Array, "B V"]:
        """See ``Score``."""
        return contrasted(logits[0], logits[1], self.alpha, self.beta)


@dataclasses.dataclass(frozen=True)
class Vcd(Method):
    """Two views with a cache each, the image and the same image noised; see ``contrasted``.

    Attributes:
      alpha: strength of the contrast.
      beta: tokens below this share of the best token's probability are left out.
      step: diffusion step of the noise, 0 to 999. Noise is added after normalisation, once an image.
      seed: of the noise; with the example's number and the image's it decides what is drawn.
    """

    name: ClassVar[str] = "vcd"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "library": {"alpha": 0.5, "beta": 0.1},
        "llava": {"alpha": 1.0, "beta": 0.2, "seed": 55},
        "instructblip": {"alpha": 0.5, "beta": 0.1},
    }

    alpha: Number = 0.5
    beta: Number = 0.1
    step: int = 500
    seed: int = 55

    def __post_init__(self) -> None:
        if not 0 <= self.step < NOISE_STEPS or not 0 < self.beta <= 1:
            raise InputError(
                f"step={self.step}, beta={self.beta}; expected a step from 0 to {NOISE_STEPS - 1} and 0 < beta <= 1"
            )

    @property
    def weight(self) -> int:
        return 2

    def views(self, model: Any, inputs: Inputs, row_numbers: Sequence[int]) -> Inputs:
        if inputs.images is None:
            raise InputError(f"method {self.name!r} adds noise to images; the prompts have none")
        name, images = model.family.pixels, inputs.images
        image, noise = noise_schedule()
        pixels = jnp.asarray(images.arrays[name])
        drawn = _noise(self.seed, _places(inputs, model.config.image_token_id, row_numbers), pixels.shape[1:])
        noised = (image[self.step] * pixels + noise[self.step] * drawn).astype(pixels.dtype)
        second = dict(images.arrays) | {name: noised}
        arrays = {key: jnp.concatenate([values, second[key]]) for key, values in images.arrays.items()}
        twice = jnp.concatenate([images.counts, images.counts])
        return dataclasses.replace(
            inputs,
            input_ids=jnp.concatenate([inputs.input_ids] * 2),
            attention_mask=jnp.concatenate([inputs.attention_mask] * 2),
            position_ids=None if inputs.position_ids is None else jnp.concatenate([inputs.position_ids] * 2),
            images=Images(arrays, twice, images.tokens),
        )

    def rule(self, num_layers: int, sampling: Sampling | None) -> Rule:
        return OneByOne(sampling, NoiseScore(np.float32(self.alpha), np.float32(self.beta)))


def _places(inputs: Inputs, image_token_id: int, row_numbers: Sequence[int]) -> Int[np.ndarray, "I 2"]:
    """For each image the number of its example, and its own number there."""
    assert inputs.images is not None
    held = (np.asarray(inputs.input_ids) == image_token_id).sum(axis=1)
    begins = np.cumsum(np.asarray(inputs.images.counts)) - np.asarray(inputs.images.counts)
    rows = np.searchsorted(np.cumsum(held), begins, side="right")
    own = np.arange(len(rows)) - np.searchsorted(rows, rows)
    return np.stack([np.asarray(row_numbers)[rows], own], axis=1)


def _noise(seed: int, places: Int[np.ndarray, "I 2"], shape: tuple[int, ...]) -> Float[Array, "I ..."]:
    key = jax.random.key(seed)

    def draw(place: Array) -> Array:
        return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, place[0]), place[1]), shape)

    return jax.vmap(draw)(jnp.asarray(places, jnp.uint32))
