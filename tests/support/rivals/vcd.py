"""Visual contrastive decoding: the noise that blurs the image, and the contrast of two distributions.

DAMO-NLP-SG/VCD@d6568ff: vcd_utils/vcd_add_noise.py and vcd_utils/vcd_sample.py.
"""

import math

import numpy as np

STEPS = 1000


def noise_schedule() -> tuple[np.ndarray, np.ndarray]:
    """The image's and the noise's weight after each of 1000 diffusion steps."""
    kept, kept_by_step = 1.0, []
    for step in range(STEPS):
        ramp = -6 + 12 * step / (STEPS - 1)
        beta = (5e-3 - 1e-5) / (1 + math.exp(-ramp)) + 1e-5
        kept *= 1 - beta
        kept_by_step.append(kept)
    return np.sqrt(kept_by_step), np.sqrt(1 - np.array(kept_by_step))


def add_noise(pixels: np.ndarray, noise: np.ndarray, step: int) -> np.ndarray:
    """Preprocessed pixels as after diffusion step ``step``, counted from 0."""
    image_weight, noise_weight = noise_schedule()
    return image_weight[step] * pixels + noise_weight[step] * noise


def vcd_logits(clean: np.ndarray, noisy: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    """Contrasted logits ``[V]``, -inf where the clean logit is more than -ln ``beta`` below the largest."""
    clean, noisy = clean.astype(np.float64), noisy.astype(np.float64)
    contrast = (1 + alpha) * clean - alpha * noisy
    return np.where(clean < clean.max() + math.log(beta), -np.inf, contrast)
